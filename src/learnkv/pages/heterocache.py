"""HeteroCache while decoding: satellites read what their pivot's latest queries attend to."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from learnkv.core.entry_selector import EntrySelector, Lookup, State
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import heterocache
from learnkv.formats.files import locate
from learnkv.ops.head_taxonomy import base_entries
from learnkv.ops.softmax_terms import softmax

POOLED = 5
"""Entries over which attention is averaged."""


class HeteroCache(EntrySelector):
    """Satellites are loaded again where their pivot's attention has moved (HeteroCache, arXiv 2601.13684).

    Kinds of heads and entries per head are those of `allocators.HeteroCache`; which entries a head reads of the prompt
    is decided by its last query: softmax, average over 5 entries, largest of the group. The prompt stays in memory, and
    tokens after it are read by all heads. Every `interval` tokens each pivot compares the best entries of these tokens'
    queries, as many as the base budget, with its reference, the best of the query that was last decisive. Where the
    median overlap is below `stable`, the latest query becomes the reference, and its ranking gives the entries of all
    satellites. Where the budget does not hold the heads that would read everything, these share what it holds.

    The authors' code gives a satellite not the best entries of its pivot but those of lowest position among as many as
    the largest satellite has, and looks references up in another order than they were stored in where pivots were not
    chosen in ascending order. `original` does both.

    Args:
        kinds: file of the heads' kinds, or `reference`.
        interval: tokens between comparisons.
        stable: overlap from which nothing is loaded.
        loading: `best` entries of each head's own pivot, or as the `original`.
        ratio: rho, fraction of all entries; None: the policy's budget.
    """

    status = "numbers"
    aligned = True
    remembers = True
    window = 1
    table_argument = "kinds"

    def __init__(
        self,
        kinds: str = "reference",
        interval: int = 4,
        stable: float = 0.5,
        loading: Literal["best", "original"] = "best",
        ratio: float | None = None,
    ) -> None:
        super().__init__()
        if interval < 1:
            raise UserError(f"interval={interval}: expected at least one token")
        self.source, self.interval, self.stable, self.loading, self.ratio = kinds, interval, stable, loading, ratio
        self.table = heterocache.read(locate(kinds, "head_kinds.json"))
        self._weights = self.table.weights.masked_fill(self.table.full, -1.0)

    def base(self, entries: Tensor, tokens: Tensor) -> Tensor:
        """[B] entries of a head of weight 1, at least one."""
        keep = (tokens.double() / entries).clamp(max=1)
        if self.ratio is not None:
            keep = torch.full_like(keep, self.ratio)
        weights = self._weights.to(keep.device)
        return base_entries(weights, entries.double(), keep, whole_numbers=True).long().clamp(min=1)

    def capacity(self, layer_idx: int, entries: Tensor, base: Tensor, tokens: Tensor) -> Tensor:
        """[B, H] entries of the prompt that every head reads."""
        weights = self._weights.to(base.device)
        own = (base.view(-1, 1, 1).double() * weights).long().minimum(entries.view(-1, 1, 1))
        whole = entries.clone()
        if self.ratio is None and (full := int((weights < 0).sum())):
            others = own.masked_fill(weights < 0, 0).sum((1, 2))
            whole = ((entries.minimum(tokens) * weights.numel() - others) // full).minimum(entries).clamp(min=1)
        return torch.where(weights[layer_idx] < 0, whole.unsqueeze(-1), own[:, layer_idx])

    def begin(self, obs: Observation, tokens: Tensor) -> State:
        layers, heads = self.table.kinds.shape
        if obs.layer_idx >= layers or obs.keys.shape[1] != heads:
            raise UserError(f"kinds={self.source}: made for {layers} layers of {heads} kv heads, not for this model")
        weights, _ = obs.window_attention(1)
        padding = (~obs.valid[:, 0]).sum(-1)  # entries are counted from the first one that exists
        scores = _shifted(weights[:, :, :, -1], padding)
        ranking = pooled(scores, obs.valid.sum(-1))
        base = self.base(obs.length, tokens)
        read = best(ranking, self.capacity(obs.layer_idx, obs.length, base, tokens))
        shape = (len(base), self.interval, *obs.queries.shape[1::2])
        return {
            "read": read,
            "reference": best(ranking, base.unsqueeze(-1).expand(-1, heads)),
            "queries": obs.queries.new_zeros(shape),
            "filled": torch.zeros_like(base),
            "base": base,
        }

    def planned(self, entries: Tensor, tokens: Tensor) -> Tensor:
        """The mean over the heads of all layers."""
        length = entries[:, 0]
        base = self.base(length, tokens)
        every = torch.stack([self.capacity(layer, length, base, tokens) for layer in range(len(self.table.kinds))])
        return every.double().mean((0, 2)).unsqueeze(-1).expand(entries.shape)

    def forward(self, lookup: Lookup, state: State) -> tuple[Tensor | None, State]:
        queries = state["queries"].clone()
        rows = torch.arange(len(queries), device=queries.device)
        queries[rows, state["filled"]] = lookup.query
        filled = state["filled"] + 1
        new = {**state, "queries": queries, "filled": filled % self.interval}
        slots = lookup.keys.shape[2] - state["read"].shape[2]
        number = torch.arange(lookup.keys.shape[2], device=queries.device)
        later = (number >= lookup.prompt_entries.unsqueeze(-1)) & (number < lookup.entries.unsqueeze(-1))
        due = filled == self.interval
        if bool(due.any()):
            compared = self._compared(lookup, queries, state)
            for name, value in zip(("read", "reference"), compared, strict=True):
                new[name] = torch.where(due.view(-1, 1, 1), value, state[name])
        return F.pad(state["read"], (0, slots)) | later, new

    def _compared(self, lookup: Lookup, queries: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Entries read [B, H, S] and references [B, H, S] after the comparison of every pivot with its reference."""
        read, reference = state["read"].clone(), state["reference"].clone()
        heads, slots = read.shape[1:]
        order = self.table.order[lookup.layer_idx]
        if not order:
            return read, reference
        exists = torch.arange(slots, device=read.device) < lookup.prompt_entries[:, :1]
        length = lookup.prompt_entries[:, 0]
        capacity = self.capacity(lookup.layer_idx, length, state["base"], lookup.tokens)
        stored = sorted(order) if self.loading == "original" else order
        sinks = lookup.terms.of_heads(heads)
        for pivot, place in zip(order, stored, strict=True):
            grouped = queries.unflatten(2, (heads, -1))[:, :, pivot].float()  # [B, I, G, D]
            logits = torch.einsum("bigd,bsd->bigs", grouped, lookup.keys[:, pivot, :slots].float()) * lookup.scaling
            logits = lookup.terms.capped(logits).masked_fill(~exists[:, None, None], -torch.inf)
            weights = softmax(logits, None if sinks is None else sinks[pivot])
            ranking = pooled(weights, exists.sum(-1, keepdim=True))  # [B, I, S]
            current = best(ranking, state["base"].unsqueeze(-1).expand(-1, self.interval))
            shared = (current & state["reference"][:, place].unsqueeze(1)).sum(-1).double()
            overlap = (shared / state["base"].unsqueeze(-1)).quantile(0.5, dim=-1)
            moved = (overlap < self.stable).unsqueeze(-1)
            reference[:, place] = torch.where(moved, current[:, -1], reference[:, place])
            satellites = (self.table.pivots[lookup.layer_idx] == pivot).nonzero().flatten().tolist()
            loaded = self._loaded(ranking[:, -1], capacity[:, satellites])
            read[:, satellites] = torch.where(moved.unsqueeze(1), loaded, read[:, satellites])
        return read, reference

    def _loaded(self, ranking: Tensor, capacity: Tensor) -> Tensor:
        """Entries [B, N, S] of N satellites with `capacity` [B, N], by their pivot's ranking [B, S]."""
        if self.loading == "best":
            return best(ranking.unsqueeze(1).expand(-1, capacity.shape[1], -1), capacity)
        candidates = best(ranking.unsqueeze(1), capacity.amax(1, keepdim=True))
        return candidates & (candidates.cumsum(-1) <= capacity.unsqueeze(-1))


def pooled(weights: Tensor, entries: Tensor) -> Tensor:
    """Largest of the group [..., S] of weights [..., G, S], averaged over 5 entries; -inf beyond `entries`."""
    flat = weights.float().flatten(0, -2)
    smooth = F.avg_pool1d(flat, POOLED, 1, POOLED // 2).view(weights.shape).amax(-2)
    number = torch.arange(smooth.shape[-1], device=smooth.device)
    return smooth.masked_fill(number >= entries.unsqueeze(-1), -torch.inf)


def best(ranking: Tensor, count: Tensor) -> Tensor:
    """Mask [..., S] of the `count` [...] highest of a ranking [..., S], ties to the first."""
    order = ranking.argsort(dim=-1, descending=True, stable=True)
    number = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, number)
    return (rank < count.unsqueeze(-1)) & (ranking > -torch.inf)


def _shifted(weights: Tensor, padding: Tensor) -> Tensor:
    """Weights [B, H, G, S] with left padding [B] moved to the end."""
    slots = weights.shape[-1]
    source = (torch.arange(slots, device=weights.device) + padding.unsqueeze(-1)) % slots
    return weights.gather(-1, source[:, None, None].expand_as(weights))
