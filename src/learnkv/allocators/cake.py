"""Layer budgets by how attention is spread over entries and how it shifts over time."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, entries_of, protected_of
from learnkv.core.observation import Observation
from learnkv.errors import UserError


class CAKE(Allocator):
    """Layer budgets in proportion to the preference H^(1/tau1) * V^(1/tau2) (CAKE, arXiv 2503.12491).

    H is the entropy of the attention that the last `window` prompt queries give to the entries before them, V its
    variance over these queries; both are sums over heads and entries, H over the queries too. The weights are those of
    the whole softmax, the window's part of it left out, so that H is an entropy only nearly.

    The authors tune both exponents for each model and budget: 1.6 and 0.4 for Llama-3.1-8B at 1024 entries, 0.8 and 0.5
    for Mistral-7B-v0.3, 1.5 and 0.6 for Qwen2.5-7B; 1 and 1 otherwise.

    Args:
        window: number of last prompt queries, at least 2.
        tau1: temperature of the entropy.
        tau2: temperature of the variance.
        rounding: `exact` spends the budget; `original` cuts off fractions and repairs the total as the authors' code
            does, which may leave it off or exceed the prompt by a little.
        cascading: for `original` rounding: budgets are split anew whenever a layer has been read, and no layer gets
            back what it has lost. With exact shares of a constant total, shares only fall, and it makes no difference.
    """

    status = "numbers"

    def __init__(
        self,
        window: int = 32,
        tau1: float = 1.0,
        tau2: float = 1.0,
        rounding: Literal["exact", "original"] = "exact",
        cascading: bool = True,
    ) -> None:
        super().__init__()
        if window < 2:
            raise UserError(f"window={window}: a variance needs at least 2 queries")
        if tau1 <= 0 or tau2 <= 0:
            raise UserError(f"tau1={tau1} tau2={tau2}: expected temperatures above 0")
        self.window, self.tau1, self.tau2 = window, tau1, tau2
        self.rounding, self.cascading = rounding, cascading

    def features(self, obs: Observation) -> Tensor:
        """[B, H, 2]: entropy and variance of the attention that goes to a kv head."""
        weights, _ = obs.window_attention(self.window)  # [B, H, G, W, S]
        # A prompt shorter than the window has no past, so padded queries never count here.
        past = (obs.valid & ~obs.in_window(self.window))[:, :, None]  # [B, H, 1, S]
        entropy = -(weights * (weights + 1e-10).log()).sum(3)
        variance = weights.var(3) if weights.shape[3] > 1 else torch.zeros_like(entropy)
        return torch.stack([torch.where(past, part, 0.0).sum((2, 3)) for part in (entropy, variance)], -1)

    def preferences(self, features: Tensor) -> Tensor:
        """[L, B] from features [L, B, H, 2]."""
        entropy, variance = features.sum(2).unbind(-1)
        return entropy.clamp_min(0) ** (1 / self.tau1) * variance ** (1 / self.tau2)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        assert features is not None
        layers, batch, heads, _ = scores.shape
        preference, protected = self.preferences(features), protected_of(scores)
        total = (budget.double() - protected).clamp_min(0) * layers
        if self.rounding == "original":
            past = (entries_of(scores) - protected).tolist()
            rows = [self._whole(preference[:, row], round(float(total[row])), past[row]) for row in range(batch)]
            wanted = torch.tensor(rows, device=scores.device).T.double()
        else:
            share = preference.double() / preference.double().sum(0).clamp_min(1e-300)
            wanted = share * total
        return (wanted + protected).unsqueeze(-1).expand(layers, batch, heads)

    def _whole(self, preference: Tensor, total: int, entries: int) -> list[int]:
        stages = range(1, len(preference) + 1) if self.cascading else [len(preference)]
        kept: list[int] = []
        for stage in stages:
            part = preference[:stage]
            new = repaired((part / part.sum() * total).tolist(), total, entries)
            kept = [min(pair) for pair in zip(kept, new, strict=False)] + new[len(kept) :]
        return kept


def repaired(shares: list[float], total: int, entries: int) -> list[int]:
    """Whole budgets from shares as CAKE's code makes them.

    Fractions are cut off; what is above `entries` is spread evenly over the layers below; then one pass adds or takes
    single entries evenly, from layers that hold less than all or more than one.
    """
    wanted = [min(int(share), entries) for share in shares]
    _spread(wanted, sum(max(0, int(share) - entries) for share in shares), lambda kept: kept < entries)
    missing = total - sum(wanted)
    _spread(wanted, missing, lambda kept: kept < entries if missing > 0 else kept > 1)
    return wanted


def _spread(wanted: list[int], missing: int, open_to: Callable[[int], bool]) -> None:
    """Add `missing` to `wanted` in equal parts where a layer is open to it, the rest to the first ones."""
    places = [layer for layer, kept in enumerate(wanted) if open_to(kept)]
    if not places:
        return
    each, rest = divmod(abs(missing), len(places))
    for rank, layer in enumerate(places):
        wanted[layer] += (each + (rank < rest)) * (1 if missing > 0 else -1)
