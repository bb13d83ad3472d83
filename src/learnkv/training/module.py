"""Distillation of a policy from the full cache of its own model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from learnkv.cache import CompressedCache
from learnkv.errors import RunError, UserError
from learnkv.generation import continuation, prefill
from learnkv.io import GRID
from learnkv.policy import Policy, heuristic_of
from learnkv.scorers.streaming_llm import StreamingLLM
from learnkv.training import draws
from learnkv.training.data import Batch
from learnkv.training.losses import Weighting, context_weights, forward_kl, sample_means

VALIDATION_KEEPS = (0.5, 0.25, 0.1, 0.05)


class Distillation(L.LightningModule):
    """Trains `policy` so that the frozen model says after compression what it says with the full cache.

    A batch is read once, without gradients. Every student is a fork of that prompt in which attention computes the
    deployed result; gradients pass through the tokens of the continuation to the gates of kept and evicted entries.

    Args:
        model: frozen causal language model.
        policy: what is trained.
        steps: length of the schedule: 3 % warm-up, then a cosine down to a tenth.
        keep: kept fractions to draw from; empty: log-uniform in `keep_range`.
        keep_range: lowest and highest kept fraction.
        students: kept fractions per batch, one in each equal part of the range.
        weights: `uniform`, or `context` for tokens that need the context to count more.
        lr: peak learning rate of networks.
        budget_lr: peak learning rate of budget logits.
        seed: of the draws of kept fractions.
        description: plain values that belong into a checkpoint beside the weights.

    `budgets` is the mean kept fraction [L][H] over the last validation's prompts at each fraction of the export's grid.
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
        lr: float = 5e-3,
        budget_lr: float = 0.1,
        seed: int = 0,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the policy, the model comes from its own files
        self.model = model.eval().requires_grad_(False)
        self.policy = policy
        self.steps, self.students, self.weights = steps, students, weights
        self.keep, self.keep_range = tuple(keep), keep_range
        self.lr, self.budget_lr, self.seed = lr, budget_lr, seed
        self.description = dict(description or {})
        self.measured: list[Tensor] = []
        self.budgets: dict[float, list[list[float]]] | None = None
        self.local = Policy(StreamingLLM(), sinks=policy.sinks, recent=policy.recent)
        if not any(p.requires_grad for p in policy.parameters()):
            raise UserError("policy: has nothing to train; name a learned scorer or allocator")

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.model.eval()
        return self

    def keeps(self, index: int) -> list[float]:
        """Kept fractions of the students of batch `index`."""
        rng = draws.generator(self.seed, "keep", index)
        if self.keep:
            return [rng.choice(self.keep) for _ in range(self.students)]
        return draws.spread(rng, *self.keep_range, self.students)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        cache = prefill(self.model, batch.prompts, batch.prompt_mask, policies=[self.policy])
        with torch.no_grad():
            teacher = self._logits(cache.fork(), batch)
        sample, weights = self._tokens(cache, batch, teacher)
        losses, spent = [], []
        for keep in self.keeps(batch.number):
            student = self.policy.relax(cache, keep=keep)
            spent.append(sum(student.spent) / len(student.spent) / keep)
            kl = forward_kl(teacher, self._logits(student, batch))
            losses.append(sample_means(kl, sample, len(batch.prompts), weights).mean())
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss of step {self.global_step} is {loss.item()}: the model's or policy's output is not finite"
            )
        self.log("train/kl", loss.detach(), on_step=True, on_epoch=False)
        self.log("train/spent_over_asked", sum(spent) / len(spent), on_step=True, on_epoch=False)
        return loss

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

    def _logits(self, cache: CompressedCache, batch: Batch) -> Tensor:
        """Logits [N, V] of the counted tokens; `cache` is used up."""
        copies = len(batch.continuations) // len(batch.prompts)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return continuation(self.model, batch.continuations, cache, batch.continuation_mask)[batch.counted]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """KL of the deployed policy, and of the heuristic it starts from, at fixed kept fractions."""
        cache = prefill(self.model, batch.prompts, batch.prompt_mask, policies=[self.policy])
        teacher = self._logits(cache.fork(), batch)
        for name, policy in {"learned": self.policy, "heuristic": heuristic_of(self.policy)}.items():
            for keep in VALIDATION_KEEPS:
                kl = forward_kl(teacher, self._logits(policy.compress(cache.fork(), keep=keep), batch)).mean()
                self.log(f"val/{name}_kl@{keep:g}", kl, on_epoch=True, sync_dist=True, batch_size=len(batch.prompts))
        lengths = torch.tensor(cache.prompt_lengths, device=teacher.device).view(1, -1, 1)
        shares = [(self.policy.plan(cache, keep=keep).budgets / lengths).mean(1) for keep in GRID]  # [L, H] each
        self.measured.append(torch.stack(shares))

    def on_validation_epoch_start(self) -> None:
        self.measured.clear()

    def on_validation_epoch_end(self) -> None:
        mean = self.trainer.strategy.reduce(torch.stack(self.measured).mean(0), reduce_op="mean")
        self.budgets = dict(zip(GRID, mean.tolist(), strict=True))

    def configure_optimizers(self) -> dict[str, Any]:
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name.endswith("logits")], "lr": self.budget_lr},
            {"params": [p for name, p in named if not name.endswith("logits")], "lr": self.lr},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        warm = max(1, round(0.03 * self.steps))
        return min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name.startswith("policy.")}
        checkpoint["learnkv"] = {**self.description, "budgets": self.budgets}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.budgets = checkpoint["learnkv"]["budgets"]
