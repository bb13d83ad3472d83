"""Distillation of a policy from the full cache of its own model."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.finite import refuse_invalid
from learnkv.core.observation import HiddenSample
from learnkv.core.plan import Plan
from learnkv.errors import RunError, UserError
from learnkv.inference import lora as adapters
from learnkv.inference.extra_passes import scores_of
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import GRID
from learnkv.policy.policy import Policy
from learnkv.scorers.streaming_llm import StreamingLLM
from learnkv.training import levels, samples, seeding
from learnkv.training.activation_checkpointing import recomputed
from learnkv.training.continuation import continuation_outputs
from learnkv.training.data.batches import Batch
from learnkv.training.data.self_generated import AnswerCache
from learnkv.training.fsdp import in_step
from learnkv.training.gumbel_noise import with_gumbel_noise
from learnkv.training.keep_sampling import sample_keeps
from learnkv.training.losses import context_weights, forward_kl
from learnkv.training.objectives import Comparison, ForwardKL, Objective, Outputs
from learnkv.training.settings import DistillationSettings
from learnkv.training.validation import VALIDATION_KEEPS, measure

WARMUP, FINAL_RATE = 0.03, 0.1


class Distillation(L.LightningModule):
    """Trains a policy so that the model's next-token distributions after compression match those of the full cache.

    A batch's prompts are read once, without gradients. Every student is a fork of that cache in which attention
    computes the deployed result (after `soft_steps`); gradients pass through the continuation's tokens to the masks of
    kept and evicted entries.

    Args:
        model: frozen causal language model.
        policy: policy to train, with its adapter if there is one.
        settings: objective, kept fractions, learning rates and memory options.
        steps: length of the learning-rate schedule: 3 % warm-up, then a cosine down to a tenth.
        seed: seed of all random numbers.
        description: plain values to store in checkpoints beside the weights.

    `budgets` is the mean kept fraction [L][H] over the last validation's prompts at each fraction of the export's grid,
    `marginal` the mean value [L][H] of one more entry per head at each validated fraction.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        settings: DistillationSettings,
        *,
        steps: int,
        seed: int = 0,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints contain the policy, the model comes from its own files
        self.model = model.eval().requires_grad_(False)
        self.policy, self.settings = policy, settings
        self.steps, self.seed = steps, seed
        self.description = dict(description or {})
        self.logged_loss = ""  # name of the last step's loss in logs
        self.objective = settings.objective or ForwardKL()
        self.answers = AnswerCache(Path(settings.answers).expanduser() if settings.answers else None, seed)
        self.budgets: dict[float, list[list[float]]] | None = None
        self.marginal: dict[float, list[list[float]]] | None = None
        self._shares: list[Tensor] = []  # of each validation batch, stacked over the grid
        self._marginals: list[Tensor] = []
        self.protected_only = Policy(StreamingLLM(), sinks=policy.sinks, recent=policy.recent)
        self.adapted = [] if policy.adapter is None else list(adapters.weights(model, policy.adapter).values())
        for weight in self.adapted:
            weight.requires_grad_(True)
        self.trained = [*(weight for weight in policy.parameters() if weight.requires_grad), *self.adapted]
        if not self.trained:
            raise UserError("policy: has nothing to train; name a learned scorer or allocator")

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.model.eval()
        return self

    def setup(self, stage: str) -> None:
        self.answers.digest_of(self.model)  # before its weights are sharded

    def keeps(self, index: int) -> list[float]:
        """Kept fractions of the students of batch `index`."""
        return sample_keeps(self.settings, seeding.generator(self.seed, "keep", index))

    @property
    def temperature(self) -> float:
        """Temperature of the soft top-k at this step, log-linear from the first to the last step."""
        first, last = self.settings.temperature
        temperature: float = first * (last / first) ** min(1.0, self.global_step / max(1, self.steps - 1))
        return temperature

    @property
    def step_objective(self) -> Objective:
        """The objective that this step minimises."""
        return self.objective.at_step(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        cache, batch = self._prefill(batch)
        levels.measure_first(self, cache)
        inputs = self._inputs(cache, batch)
        losses, spent = self._student_losses(cache, batch, inputs)
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss of step {self.global_step} is {loss.item()}: the model's or policy's output is not finite"
            )
        self.logged_loss = f"train/{self.step_objective.name}"  # the next step may have another objective
        self.log(self.logged_loss, loss.detach(), on_step=True, on_epoch=False)
        if spent:
            self.log("train/spent_over_asked", sum(spent) / len(spent), on_step=True, on_epoch=False)
        # Parameters without a gradient in this batch get a gradient of 0: other processes wait for it. A student that
        # keeps everything reaches no parameter.
        return loss + sum(0.0 * weight.sum() for weight in self.trained)

    def _prefill(self, batch: Batch) -> tuple[CompressedCache, Batch]:
        """The prompts' cache with the objective's targets, and the batch with its answers."""
        targets = [Policy(target) for target in self.step_objective.targets]
        with in_step(self.model):
            cache = self._read(batch, [self.policy, *targets], self.hidden_sample(batch.number))
            return cache, self.answers.complete(self.model, batch, cache)

    def _inputs(self, cache: CompressedCache, batch: Batch) -> Comparison:
        """What all students of a batch are compared with."""
        objective = self.step_objective
        targets = {target: scores_of(cache, target) for target in objective.targets}
        inputs = Comparison(len(batch.prompts), targets=targets)
        if not objective.reads:
            return inputs
        with torch.no_grad():
            teacher = self._outputs(cache.fork(), batch)
        sample, weights = self._tokens(cache, batch, teacher.logits)
        return replace(inputs, sample=sample, weights=weights, teacher=teacher)

    def _student_losses(
        self, cache: CompressedCache, batch: Batch, inputs: Comparison
    ) -> tuple[list[Tensor], list[float]]:
        """Mean loss of each student, and what each one spends over what was requested."""
        objective, soft = self.step_objective, self.global_step < self.settings.soft_steps
        losses, spent = list[Tensor](), list[float]()
        for index, keep in enumerate(self.keeps(batch.number)[: None if objective.budgets else 1]):
            if objective.samples:
                rng = seeding.generator(self.seed, "samples", batch.number, index)
                read = partial(self._outputs, batch=batch)
                losses.append(samples.loss(self.policy, objective, cache, keep, inputs, read, rng).mean())
                continue
            with self._recomputing():
                plan = self._plan(cache, keep, batch.number, index)
                student_inputs = replace(inputs, plan=plan)
                if objective.reads:
                    how = {"plan": plan, "temperature": self.temperature, "soft": soft}
                    student = self.policy.relax(cache, **levels.budget_arguments(self.policy, keep), **how)
                    spent.append(levels.spent_over_asked(self.policy, student, plan, keep))
                    student_inputs = replace(student_inputs, student=self._outputs(student, batch))
                elif plan is not None:
                    refuse_invalid(plan.invalid)
            losses.append(objective(student_inputs).mean())
        return losses, spent

    def hidden_sample(self, number: int) -> HiddenSample:
        """Tokens of batch `number` whose hidden states predictors get gradients from."""
        seed = seeding.generator(self.seed, "gradient", number).getrandbits(32)
        return HiddenSample(self.settings.gradient_tokens, seed)

    def _read(self, batch: Batch, policies: Sequence[Policy], sample: HiddenSample | None = None) -> CompressedCache:
        """The prompts' cache, with the observations that these policies need."""
        chunk_size, prompts = self.settings.chunk_size, (batch.prompts, batch.prompt_mask)
        spans = batch.protection
        return prefill(self.model, *prompts, chunk_size=chunk_size, policies=policies, sample=sample, protect=spans)

    def _recomputing(self) -> AbstractContextManager[None]:
        """Activation checkpointing of a student, where `checkpointing` is set."""
        return recomputed(self.model, self.policy.scorer) if self.settings.checkpointing else nullcontext()

    def _plan(self, cache: CompressedCache, keep: float, number: int, student: int) -> Plan | None:
        """A student's plan; None where everything is kept and the objective needs no plan."""
        if keep == 1 and self.policy.precision is None and not self.step_objective.plans:
            return None
        seed = seeding.generator(self.seed, "levels", number, student).getrandbits(63)
        with levels.trying_levels(self.policy, self.settings.level_exploration, seed):
            plan = self.policy.plan(cache, **levels.budget_arguments(self.policy, keep))
        if student != self.settings.students // 2 or self.settings.gumbel_noise == 0:
            return plan
        seed = seeding.generator(self.seed, "exploration", number).getrandbits(63)
        return with_gumbel_noise(plan, self.settings.gumbel_noise * self.temperature, seed)

    def _tokens(self, cache: CompressedCache, batch: Batch, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample [N] of each counted token and its weight [N]."""
        copies = len(batch.continuations) // len(batch.prompts)
        sample = batch.counted.nonzero()[:, 0] // copies
        if self.settings.weights == "uniform":
            return sample, None
        with torch.no_grad():
            without_context = self.protected_only.compress(cache.fork(), keep=self.settings.keep_range[0])
            lost = forward_kl(teacher, self._logits(without_context, batch))
        return sample, context_weights(lost, sample, len(batch.prompts))

    def _outputs(self, cache: CompressedCache, batch: Batch) -> Outputs:
        """Outputs at the counted tokens; `cache` is consumed."""
        copies = len(batch.continuations) // len(batch.prompts)
        if cache.schedule is None:  # never evicts again: observations are not copied for every row
            for layer in cache.compressed_layers():
                layer.capture.forget()
        if copies > 1:  # a row for every continuation
            cache.batch_repeat_interleave(copies)
        logits, hidden = continuation_outputs(
            self.model, batch.continuations, cache, batch.continuation_mask, self.step_objective.hidden
        )
        return Outputs(logits[batch.counted], tuple(state[batch.counted] for state in hidden))

    def _logits(self, cache: CompressedCache, batch: Batch) -> Tensor:
        """Logits [N, V] of the counted tokens; `cache` is consumed."""
        return self._outputs(cache, batch).logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """KL of the deployed policy, of its base policy and of its soft gates, at fixed kept fractions."""
        with in_step(self.model):
            cache = self._read(batch, [self.policy], HiddenSample(self.settings.gradient_tokens))
            batch = self.answers.complete(self.model, batch, cache)
        teacher = self._logits(cache.fork(), batch)

        def divergence(student: CompressedCache) -> Tensor:
            return forward_kl(teacher, self._logits(student, batch)).mean()

        marginals = []
        for keep in VALIDATION_KEEPS:
            with self._recomputing():
                result = measure(self.policy, cache, keep, self.temperature, divergence)
            for name, value in result.metrics().items():
                self.log(f"val/{name}@{keep:g}", value, on_epoch=True, sync_dist=True, batch_size=len(batch.prompts))
            marginals.append(result.marginal)
        self._marginals.append(torch.stack(marginals))
        lengths = torch.tensor(cache.prompt_lengths, device=teacher.device).view(1, -1, 1)
        shares = [
            (self.policy.plan(cache, **levels.budget_arguments(self.policy, keep)).budgets.float() / lengths).mean(1)
            for keep in GRID
        ]  # [L, H] each
        self._shares.append(torch.stack(shares))

    def on_validation_epoch_start(self) -> None:
        self._shares.clear()
        self._marginals.clear()

    def on_validation_epoch_end(self) -> None:
        mean, marginal = (
            self.trainer.strategy.reduce(torch.stack(tables).mean(0), reduce_op="mean")
            for tables in (self._shares, self._marginals)
        )
        self.budgets = dict(zip(GRID, mean.tolist(), strict=True))
        self.marginal = dict(zip(VALIDATION_KEEPS, marginal.tolist(), strict=True))
        for keep, table in zip(VALIDATION_KEEPS, marginal, strict=True):
            self.log(f"val/marginal_spread@{keep:g}", table.std(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        settings, lora = self.settings, self.settings.lora
        groups = {
            "budget_lr": {"params": [p for name, p in named if name.endswith("logits")], "lr": settings.budget_lr},
            "lr": {"params": [p for name, p in named if not name.endswith("logits")], "lr": settings.lr},
            "lora_lr": {"params": self.adapted, "lr": 0.0 if lora is None else lora.lr},
        }
        self.rate_names = [name for name, group in groups.items() if group["params"]]
        optimizer = torch.optim.AdamW([groups[name] for name in self.rate_names], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        warmup, progress = max(1, round(WARMUP * self.steps)), min(1.0, step / self.steps)
        cosine = (1 - FINAL_RATE) / 2 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / warmup) * (FINAL_RATE + cosine)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value for name, value in state.items() if name.startswith("policy.") or adapters.in_training(name)
        }
        adapter = None if self.policy.adapter is None else adapters.description(self.policy.adapter)
        tables = {"budgets": self.budgets, "marginal": self.marginal}
        checkpoint["learnkv"] = {**self.description, **tables, "adapter": adapter}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.budgets, self.marginal = (checkpoint["learnkv"][key] for key in ("budgets", "marginal"))
