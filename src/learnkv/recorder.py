"""What is recorded of one layer beside keys and values, for scorers."""

import torch
from torch import Tensor

from learnkv.observation import Observation, Probe, Recording, Statistic
from learnkv.ops.rotary import Rotary


class Recorder:
    """The last queries of the prompt, hidden states and statistics, as far as `recording` asks for them."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.queries: Tensor | None = None
        self.hidden: Tensor | None = None
        self.statistics: dict[Statistic | Probe, Tensor] = {}
        self.rotations: tuple[tuple[Tensor, Tensor], ...] = ()
        self.output_weight: Tensor | None = None
        self.scaling = 1.0

    def record(self, hidden: Tensor) -> None:
        """Keep the attention block's input [B, T, E]."""
        new = hidden.detach()
        self.hidden = new if self.hidden is None else torch.cat([self.hidden, new], 1)

    def observe(self, queries: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take note of the newest queries [B, H*G, T, D], whose entries are the last of those given."""
        new = queries.detach()
        if window := self.recording.window:
            both = new[:, :, -window:]
            both = both if self.queries is None else torch.cat([self.queries, both], 2)
            self.queries = both[:, :, -window:].clone()
        if self.recording.statistics:
            chunk = self._seen(new, layer_idx, keys, values, positions)
            self.statistics = {one: one.update(chunk, self.statistics.get(one)) for one in self.recording.statistics}

    def observation(self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> Observation:
        """What a scorer may see of the entries [B, H, S, D] at `positions` [B, S], negative where there is none."""
        queries = keys[:, :, :0] if self.queries is None else self.queries
        return self._seen(queries, layer_idx, keys, values, positions)

    def _seen(self, queries: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> Observation:
        batch, heads, slots, _ = keys.shape
        rope = Rotary(*(torch.cat(part, 1) for part in zip(*self.rotations, strict=True))) if self.rotations else None
        return Observation(
            layer_idx=layer_idx,
            queries=queries,
            query_positions=positions[:, slots - queries.shape[2] :],
            keys=keys,
            values=values,
            scaling=self.scaling,
            valid=(positions >= 0).unsqueeze(1).expand(batch, heads, slots),
            positions=positions.unsqueeze(1).expand(batch, heads, slots),
            output_weight=self.output_weight,
            hidden=self.hidden,
            rope=rope,
            statistics=self.statistics,
        )

    def rows(self, batch: Tensor) -> "Recorder":
        """What was recorded of batch rows `batch` [B']."""
        chosen = Recorder(self.recording)
        chosen.queries, chosen.hidden = (
            None if one is None else _rows(one, batch) for one in (self.queries, self.hidden)
        )
        chosen.statistics = {which: _rows(held, batch) for which, held in self.statistics.items()}
        chosen.rotations = tuple((_shared(cos, batch), _shared(sin, batch)) for cos, sin in self.rotations)
        chosen.output_weight, chosen.scaling = self.output_weight, self.scaling
        return chosen

    def forget(self) -> None:
        """Hold nothing of the prompt any more."""
        self.queries, self.hidden, self.rotations, self.statistics = None, None, (), {}

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        return [held for held in (self.queries, self.hidden, *self.statistics.values()) if held is not None]


def _rows(held: Tensor, rows: Tensor) -> Tensor:
    return held[rows.to(held.device)]


def _shared(held: Tensor, rows: Tensor) -> Tensor:
    return held if held.shape[0] == 1 else _rows(held, rows)
