"""Distillation of a policy from the full cache of its own model."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.observation import SAMPLED_TOKENS, HiddenSample
from learnkv.core.plan import Plan
from learnkv.errors import RunError, UserError
from learnkv.inference import lora as adapters
from learnkv.inference.extra_passes import scores_of
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import GRID
from learnkv.policy.policy import TEMPERATURE, Policy
from learnkv.scorers.streaming_llm import StreamingLLM
from learnkv.training import seeding as seeding
from learnkv.training.activation_checkpointing import recomputed
from learnkv.training.continuation import read_on
from learnkv.training.data.batches import Batch
from learnkv.training.data.self_generated import Answers
from learnkv.training.fsdp import in_step
from learnkv.training.gumbel_noise import with_gumbel_noise
from learnkv.training.losses import Weighting, context_weights, forward_kl
from learnkv.training.objectives import Comparison, ForwardKL, Objective, Outputs
from learnkv.training.seeding import Draw
from learnkv.training.validation import VALIDATION_KEEPS, measure


class Distillation(L.LightningModule):
    """Trains `policy` so that the frozen model says after compression what it says with the full cache.

    A batch is read once, without gradients. Every student is a fork of that prompt in which attention computes the
    deployed result, after `soft_steps`; gradients pass through the tokens of the continuation to the masks of kept and
    evicted entries.

    Args:
        model: frozen causal language model.
        policy: what is trained.
        steps: length of the schedule: 3 % warm-up, then a cosine down to a tenth.
        keep: kept fractions to draw from; empty: log-uniform in `keep_range`.
        keep_range: lowest and highest kept fraction.
        students: kept fractions per batch.
        weights: `uniform`, or `context` for tokens that need the context to count more.
        objective: what is minimised; forward KL if not given.
        draw: of kept fractions: `spread`, one in each equal part of the range, or `sandwich`, always the lowest and the
            highest and at random between them. From a list, all at random, or its two ends and the others at random.
        temperature: of the soft top-k at the first and at the last step.
        soft_steps: steps at the beginning in which students attend to every entry as much as its soft gate says.
        exploration: scale of Gumbel noise on the scores of one student, in temperatures; 0: none.
        lr: peak learning rate of networks.
        budget_lr: peak learning rate of budget logits.
        lora_lr: peak learning rate of the adapter that `policy` names and the model has.
        chunk_size: tokens of a prompt that are read at once; None: all.
        checkpointing: compute activations of a student again for its gradient instead of holding them.
        gradient_tokens: tokens of a prompt, drawn for each batch, whose hidden states predictors learn from.
        seed: of everything drawn here.
        answers: folder where the model's own answers are kept; None: they are given anew each time.
        description: plain values that belong into a checkpoint beside the weights.

    `budgets` is the mean kept fraction [L][H] over the last validation's prompts at each fraction of the export's grid,
    `marginal` the mean value [L][H] of one more entry per head at each fraction that is validated.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        steps: int,
        keep: Sequence[float] = (),
        keep_range: tuple[float, float] = (0.02, 0.6),
        students: int = 2,
        weights: Weighting = "uniform",
        objective: Objective | None = None,
        draw: Draw = "spread",
        temperature: tuple[float, float] = (TEMPERATURE, TEMPERATURE),
        soft_steps: int = 0,
        exploration: float = 0.0,
        lr: float = 5e-3,
        budget_lr: float = 0.1,
        lora_lr: float = 1e-3,
        chunk_size: int | None = None,
        checkpointing: bool = False,
        gradient_tokens: int = SAMPLED_TOKENS,
        seed: int = 0,
        answers: Path | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the policy, the model comes from its own files
        self.model = model.eval().requires_grad_(False)
        self.policy = policy
        self.steps, self.students, self.weights = steps, students, weights
        self.objective = objective or ForwardKL()
        self.keep, self.keep_range, self.draw = tuple(keep), keep_range, draw
        self.temperature, self.soft_steps, self.exploration = temperature, soft_steps, exploration
        self.lr, self.budget_lr, self.lora_lr, self.seed = lr, budget_lr, lora_lr, seed
        self.chunk_size, self.checkpointing = chunk_size, checkpointing
        self.gradient_tokens = gradient_tokens
        self.answers = Answers(answers, seed)
        self.description = dict(description or {})
        self.measured: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.budgets: dict[float, list[list[float]]] | None = None
        self.marginal: dict[float, list[list[float]]] | None = None
        self.local = Policy(StreamingLLM(), sinks=policy.sinks, recent=policy.recent)
        self.adapted = [] if policy.adapter is None else list(adapters.weights(model, policy.adapter).values())
        for weight in self.adapted:
            weight.requires_grad_(True)
        self.trained = [*(one for one in policy.parameters() if one.requires_grad), *self.adapted]
        if not self.trained:
            raise UserError("policy: has nothing to train; name a learned scorer or allocator")

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.model.eval()
        return self

    def setup(self, stage: str) -> None:
        self.answers.meet(self.model)  # before its weights are shared out

    def keeps(self, index: int) -> list[float]:
        """Kept fractions of the students of batch `index`."""
        rng = seeding.generator(self.seed, "keep", index)
        if self.draw == "sandwich":
            low, high = (min(self.keep), max(self.keep)) if self.keep else self.keep_range
            between = [
                rng.choice(self.keep) if self.keep else seeding.log_uniform(rng, low, high)
                for _ in range(self.students - 2)
            ]
            return [low, *between, high]
        if self.keep:
            return [rng.choice(self.keep) for _ in range(self.students)]
        return seeding.spread(rng, *self.keep_range, self.students)

    @property
    def width(self) -> float:
        """Temperature of the soft top-k at this step: from the first to the last one, evenly in its logarithm."""
        first, last = self.temperature
        return first * (last / first) ** min(1.0, self.global_step / max(1, self.steps - 1))

    @property
    def asked(self) -> Objective:
        """What is minimised at this step."""
        return self.objective.at(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        objective = self.asked
        imitated = [Policy(target) for target in objective.targets]
        with in_step(self.model):
            cache = self._read(batch, [self.policy, *imitated], self.hidden_sample(batch.number))
            batch = self.answers.complete(self.model, batch, cache)
        seen = Comparison(len(batch.prompts), targets={one: scores_of(cache, one) for one in objective.targets})
        if objective.reads:
            with torch.no_grad():
                teacher = self._said(cache.fork(), batch)
            sample, weights = self._tokens(cache, batch, teacher.logits)
            seen = replace(seen, sample=sample, weights=weights)
        losses, spent, soft = [], [], self.global_step < self.soft_steps
        keeps = self.keeps(batch.number)
        for at, keep in enumerate(keeps if objective.budgets else keeps[:1]):
            with self._recomputing():
                plan = self._plan(cache, keep, batch.number, exploring=at == self.students // 2)
                if objective.reads:
                    student = self.policy.relax(cache, keep=keep, plan=plan, temperature=self.width, soft=soft)
                    spent.append(sum(student.spent) / len(student.spent) / keep)
                    seen = replace(seen, both=(teacher, self._said(student, batch)))
            losses.append(objective(replace(seen, plan=plan)).mean())
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss of step {self.global_step} is {loss.item()}: the model's or policy's output is not finite"
            )
        self.log(f"train/{objective.name}", loss.detach(), on_step=True, on_epoch=False)
        if spent:
            self.log("train/spent_over_asked", sum(spent) / len(spent), on_step=True, on_epoch=False)
        # What this batch did not reach has a gradient of 0, too: other processes wait for it. A student that keeps
        # everything reaches nothing.
        return loss + sum(0.0 * one.sum() for one in self.trained)

    def hidden_sample(self, number: int) -> HiddenSample:
        """Tokens of batch `number` whose hidden states predictors learn from."""
        return HiddenSample(self.gradient_tokens, seeding.generator(self.seed, "gradient", number).getrandbits(32))

    def _read(self, batch: Batch, policies: Sequence[Policy], sample: HiddenSample | None = None) -> CompressedCache:
        """The prompts, with what these policies read beside keys and values."""
        chunks, prompts = self.chunk_size, (batch.prompts, batch.prompt_mask)
        return prefill(self.model, *prompts, chunk_size=chunks, policies=policies, sample=sample)

    def _recomputing(self) -> AbstractContextManager[None]:
        """Within it, a student's activations are held or computed again, as `checkpointing` says."""
        return recomputed(self.model, self.policy.scorer) if self.checkpointing else nullcontext()

    def _plan(self, cache: CompressedCache, keep: float, number: int, exploring: bool) -> Plan | None:
        """What a student keeps; None where that is everything and nobody asks."""
        if keep == 1 and not self.asked.plans:
            return None
        plan = self.policy.plan(cache, keep=keep)
        if not exploring or self.exploration == 0:
            return plan
        noise = seeding.generator(self.seed, "exploration", number).getrandbits(63)
        return with_gumbel_noise(plan, self.exploration * self.width, noise)

    def _tokens(self, cache: CompressedCache, batch: Batch, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample of each counted token and its weight."""
        copies = len(batch.continuations) // len(batch.prompts)
        sample = batch.counted.nonzero()[:, 0] // copies
        if self.weights == "uniform":
            return sample, None
        with torch.no_grad():
            local = self.local.compress(cache.fork(), keep=self.keep_range[0])
            lost = forward_kl(teacher, self._logits(local, batch))
        return sample, context_weights(lost, sample, len(batch.prompts))

    def _said(self, cache: CompressedCache, batch: Batch) -> Outputs:
        """What an objective looks at of the counted tokens; `cache` is used up."""
        copies = len(batch.continuations) // len(batch.prompts)
        if cache.schedule is None:  # nobody judges it again: what scorers read is not copied row by row
            for layer in cache.compressed_layers():
                layer.capture.forget()
        if copies > 1:  # a row for every continuation
            cache.batch_repeat_interleave(copies)
        logits, hidden = read_on(self.model, batch.continuations, cache, batch.continuation_mask, self.asked.hidden)
        return Outputs(logits[batch.counted], tuple(state[batch.counted] for state in hidden))

    def _logits(self, cache: CompressedCache, batch: Batch) -> Tensor:
        """Logits [N, V] of the counted tokens; `cache` is used up."""
        return self._said(cache, batch).logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The deployed policy, its heuristic and its soft gates, at fixed kept fractions."""
        with in_step(self.model):
            cache = self._read(batch, [self.policy], HiddenSample(self.gradient_tokens))
            batch = self.answers.complete(self.model, batch, cache)
        teacher = self._logits(cache.fork(), batch)

        def divergence(student: CompressedCache) -> Tensor:
            return forward_kl(teacher, self._logits(student, batch)).mean()

        slopes = []
        for keep in VALIDATION_KEEPS:
            with self._recomputing():
                found = measure(self.policy, cache, keep, self.width, divergence)
            named = {"learned_kl": found.learned, "heuristic_kl": found.heuristic, "soft_kl": found.soft}
            for name, value in {**named, "gap": found.gap, "changed": found.changed}.items():
                self.log(f"val/{name}@{keep:g}", value, on_epoch=True, sync_dist=True, batch_size=len(batch.prompts))
            slopes.append(found.marginal)
        self.slopes.append(torch.stack(slopes))
        lengths = torch.tensor(cache.prompt_lengths, device=teacher.device).view(1, -1, 1)
        shares = [(self.policy.plan(cache, keep=keep).budgets / lengths).mean(1) for keep in GRID]  # [L, H] each
        self.measured.append(torch.stack(shares))

    def on_validation_epoch_start(self) -> None:
        self.measured.clear()
        self.slopes.clear()

    def on_validation_epoch_end(self) -> None:
        mean, marginal = (
            self.trainer.strategy.reduce(torch.stack(found).mean(0), reduce_op="mean")
            for found in (self.measured, self.slopes)
        )
        self.budgets = dict(zip(GRID, mean.tolist(), strict=True))
        self.marginal = dict(zip(VALIDATION_KEEPS, marginal.tolist(), strict=True))
        for keep, table in zip(VALIDATION_KEEPS, marginal, strict=True):
            self.log(f"val/marginal_spread@{keep:g}", table.std(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name.endswith("logits")], "lr": self.budget_lr},
            {"params": [p for name, p in named if not name.endswith("logits")], "lr": self.lr},
            {"params": self.adapted, "lr": self.lora_lr},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        warm = max(1, round(0.03 * self.steps))
        return min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value for name, value in state.items() if name.startswith("policy.") or adapters.in_training(name)
        }
        beside = None if self.policy.adapter is None else adapters.description(self.policy.adapter)
        found = {"budgets": self.budgets, "marginal": self.marginal}
        checkpoint["learnkv"] = {**self.description, **found, "adapter": beside}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.budgets, self.marginal = (checkpoint["learnkv"][key] for key in ("budgets", "marginal"))
