"""Attention that entries receive while the model repeats the prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation, PassTokens, PromptPass
from learnkv.errors import UserError
from learnkv.ops.attention_columns import attention_columns
from learnkv.ops.output_projection import projected_l2


@dataclass(frozen=True)
class Repetition(PromptPass):
    """Largest attention that an entry receives while its chunk of the prompt is repeated, [B, H, S, 1].

    The maximum is over the queries of the pass and the query heads of a kv head; 0 for entries that are not repeated.

    Args:
        prefix: first tokens of the prompt that are not repeated (system prompt, chat template).
        sinks: first tokens that take part in every softmax, beside the chunk and the pass itself.
        chunk: tokens repeated in one pass.
        overlap: last tokens of the chunk before that introduce the next.
        before: ids in front of those and of every chunk: the instruction.
        after: ids between the instruction and the chunk: the end of the user's turn.
        normalized: multiply by the norm of what the value adds to the layer's output, divide by the norm of the layer's
            input at the query (KVzip+, KVzap).
        softmax: over the sinks, the chunk and the pass, or over `all` entries before the query.
        queries: all of the pass, or those of the tokens `repeated`.
        gradients: multiply by the norm of what the value adds to the layer's output, and by how much the model's last
            hidden states depend on the layer's output at the query (KVgrad).
    """

    prefix: int = 0
    sinks: int = 4
    chunk: int = 2000
    overlap: int = 8
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    normalized: bool = False
    softmax: Literal["chunk", "all"] = "chunk"
    queries: Literal["all", "repeated"] = "all"
    gradients: bool = False

    def __post_init__(self) -> None:
        if min(self.prefix, self.sinks, self.overlap) < 0 or self.chunk < 1:
            raise UserError(
                f"prefix={self.prefix} sinks={self.sinks} overlap={self.overlap} chunk={self.chunk}: expected numbers "
                "of tokens >= 0, a chunk of at least 1"
            )

    @property
    def hidden(self) -> bool:  # type: ignore[override]
        return self.normalized

    def passes(self, ids: Tensor, mask: Tensor) -> Iterator[PassTokens]:
        rows = [row[valid].tolist() for row, valid in zip(ids, mask.bool(), strict=True)]
        for begin in range(self.prefix, max(map(len, rows)), self.chunk):
            end = begin + self.chunk
            lead = [self._lead(row, begin) if begin < len(row) else [] for row in rows]
            read = [[*first, *row[begin:end]] for first, row in zip(lead, rows, strict=True)]
            longest = max(map(len, read))
            slot, device = torch.arange(longest, device=ids.device), ids.device
            length, leading = (torch.tensor([len(row) for row in part], device=device) for part in (read, lead))
            valid = slot < length.unsqueeze(-1)
            entries = torch.tensor([len(row) for row in rows], device=device)
            yield PassTokens(
                ids=torch.tensor([row + [0] * (longest - len(row)) for row in read], device=device),
                mask=valid,
                repeated=valid & (slot >= leading.unsqueeze(-1)),
                begin=entries.clamp(max=begin),
                end=entries.clamp(max=end),
            )

    def _lead(self, row: list[int], begin: int) -> list[int]:
        overlap = row[max(begin - self.overlap, self.prefix) : begin]
        return [*self.before, *overlap, *self.after]

    def update(self, obs: Observation, tokens: PassTokens, gathered: Tensor | None) -> Tensor:
        heads, prompt = obs.keys.shape[1], obs.keys.shape[2] - tokens.ids.shape[1]
        slots, among = self._taking_part(obs.positions[:, 0], tokens, prompt)
        index = slots.unsqueeze(1).expand(-1, heads, -1)  # [B, H, J]
        each = index.unsqueeze(-1).expand(*index.shape, obs.keys.shape[3])
        positions = obs.positions.gather(2, index)
        counted = tokens.repeated if self.queries == "repeated" else tokens.mask
        columns = attention_columns(
            obs.queries,
            obs.keys.gather(2, each),
            query_positions=obs.query_positions.masked_fill(~counted, -1),
            positions=positions,
            valid=among.unsqueeze(1).expand_as(positions),
            scaling=obs.scaling,
            terms=obs.terms,
            reduce="max",
            query_weight=self._query_weight(obs, tokens),
        )  # [B, H, G, J]
        if self.normalized or self.gradients:
            columns = columns * projected_l2(obs.values.gather(2, each), obs.projection)
        repeated = (positions >= tokens.begin[:, None, None]) & (positions < tokens.end[:, None, None])
        received = obs.keys.new_zeros(obs.positions.shape, dtype=torch.float32)
        received = received.scatter(2, index, columns.amax(2).masked_fill(~repeated, 0.0))[..., :prompt].unsqueeze(-1)
        return received if gathered is None else torch.maximum(received, gathered)

    def _taking_part(self, positions: Tensor, tokens: PassTokens, prompt: int) -> tuple[Tensor, Tensor]:
        """Slots [B, J] of the entries in the softmax and their mask [B, J]: rows have different numbers of them."""
        most = positions.shape[1]
        taking = positions >= 0
        if self.softmax == "chunk":
            chunk = (positions >= tokens.begin.unsqueeze(-1)) & (positions < tokens.end.unsqueeze(-1))
            own = torch.arange(most, device=positions.device) >= prompt
            taking = taking & (chunk | own | (positions < self.sinks))
            most = min(most, self.sinks + self.chunk + most - prompt)
        slots = taking.to(torch.int8).argsort(dim=-1, stable=True)[:, -most:]
        return slots, taking.gather(1, slots)

    def _query_weight(self, obs: Observation, tokens: PassTokens) -> Tensor | None:
        if self.gradients:
            assert tokens.gradient_norms is not None
            return tokens.gradient_norms[obs.layer_idx].to(obs.keys.device)
        if not self.normalized:
            return None
        assert obs.hidden is not None
        norm: Tensor = obs.hidden.float().norm(dim=-1)
        return 1 / norm.clamp(min=1e-12)  # padding may be read as zeros
