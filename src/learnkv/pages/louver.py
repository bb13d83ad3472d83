"""Louver: the keys whose product with the query passes a threshold."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.entry_selector import EntrySelector, Lookup, State
from learnkv.errors import UserError
from learnkv.ops.hash_bits import WORD, hash_bits


class Louver(EntrySelector):
    """The entries whose query-key product reaches a threshold, for every query head (Louver, arXiv 2605.06763).

    The threshold tau comes from the products with a sample of the keys. `budget`: the max(1, floor(f M))-th largest of
    M. `sample_max`: the largest. `sample_mean_max`: halfway between that and the mean. `sample_gap`: among the
    floor(search * M) largest, sorted, the value below the earliest of the `gaps` widest gaps. Only `budget` reads about
    as much as it is asked to; the others read whatever passes.

    The authors find these keys with an index of clusters, one variant of which may miss some; here products with all
    keys are computed, and the attention is that of an index that misses none. Keys of new tokens are read in any case
    until `buffer` of them have come, when they move into the index. The authors keep a running random sample; here the
    sample is a function of a seed and of an entry's number in its head.

    Args:
        mode: rule of the threshold.
        fraction: f of `budget`; None: the policy's budget.
        sample: M, keys of the sample, or all where there are fewer.
        search: part of the sorted sample in which gaps are looked for.
        gaps: how many of the widest gaps are considered.
        buffer: new tokens that are read in any case.
        seed: of the sample.
    """

    status = "numbers"

    def __init__(
        self,
        mode: Literal["budget", "sample_max", "sample_mean_max", "sample_gap"] = "budget",
        fraction: float | None = None,
        sample: int = 512,
        search: float = 0.5,
        gaps: int = 3,
        buffer: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if fraction is not None and not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction}: expected more than 0, up to 1")
        if min(sample, gaps, buffer) < 1 or not 0 < search <= 1:
            raise UserError(
                f"sample={sample} gaps={gaps} buffer={buffer} search={search}: expected at least 1, and a part up to 1"
            )
        self.mode, self.fraction, self.sample, self.search = mode, fraction, sample, search
        self.gaps, self.buffer, self.seed = gaps, buffer, seed

    def threshold(self, products: Tensor, sampled: Tensor, fraction: Tensor) -> Tensor:
        """The threshold [..., 1] from `products` [..., M] with a sample.

        Args:
            products: -inf where there is no key.
            sampled: [..., 1] number of keys.
            fraction: f [..., 1], float64.
        """
        ordered = products.sort(-1, descending=True).values
        if self.mode == "budget":
            place = torch.floor(fraction * sampled).long().clamp(min=1) - 1
            return ordered.gather(-1, place.expand(*ordered.shape[:-1], 1))
        if self.mode == "sample_max":
            return ordered[..., :1]
        if self.mode == "sample_mean_max":
            mean = products.masked_fill(products.isinf(), 0).sum(-1, keepdim=True) / sampled
            return (ordered[..., :1] + mean) / 2
        return self._below_a_gap(ordered, (sampled.double() * self.search).long())

    def _below_a_gap(self, ordered: Tensor, searched: Tensor) -> Tensor:
        """The value below the earliest of the widest gaps among the `searched` [..., 1] largest values."""
        gaps = ordered[..., :-1] - ordered[..., 1:]
        number = torch.arange(gaps.shape[-1], device=gaps.device)
        gaps = gaps.masked_fill(number >= searched - 1, -torch.inf)
        if not gaps.shape[-1]:
            return ordered[..., :1]
        widest = gaps.topk(min(self.gaps, gaps.shape[-1]), -1)
        earliest = widest.indices.masked_fill(widest.values == -torch.inf, gaps.shape[-1]).amin(-1, keepdim=True)
        below = torch.where(earliest < gaps.shape[-1], earliest + 1, 0)  # a single value has no gap
        return ordered.gather(-1, below)

    def forward(self, lookup: Lookup, state: State) -> tuple[Tensor | None, State]:
        number = torch.arange(lookup.keys.shape[2], device=lookup.keys.device)
        new = lookup.entries - lookup.prompt_entries
        buffered = (new - 1) % self.buffer + 1
        indexed = number < (lookup.entries - buffered).unsqueeze(-1)  # [B, H, E]
        present = number < lookup.entries.unsqueeze(-1)
        sample = self._sample(indexed)
        products = lookup.logits.masked_fill(~sample.unsqueeze(2), -torch.inf)
        count = sample.sum(-1, keepdim=True)
        if self.fraction is None:
            share = lookup.tokens.double().view(-1, 1, 1) / indexed.sum(-1, keepdim=True).clamp(min=1)
            share = share.clamp(max=1)
        else:
            share = torch.full_like(count, self.fraction, dtype=torch.float64)
        tau = self.threshold(products, count.unsqueeze(2), share.unsqueeze(2))
        passing = (lookup.logits >= tau) & indexed.unsqueeze(2)
        return passing | (present & ~indexed).unsqueeze(2), state

    def _sample(self, indexed: Tensor) -> Tensor:
        """True for the sampled entries of [B, H, E]: those with the lowest lots among the indexed ones."""
        number = torch.arange(indexed.shape[-1])
        lots = hash_bits(hash_bits(torch.tensor(self.seed & WORD)) ^ number).to(indexed.device)
        order = lots.argsort()
        drawn = indexed[..., order]
        taken = drawn & (drawn.cumsum(-1) <= self.sample)
        return torch.zeros_like(indexed).scatter(-1, order.expand_as(indexed), taken)
