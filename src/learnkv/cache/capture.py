"""What is recorded of one layer beside keys and values, for scorers."""

import torch
from torch import Tensor

from learnkv.core.observation import CaptureSpec, Observation, PromptPass, Statistic
from learnkv.ops.rotary import Rotary


class Capture:
    """The last queries of the prompt, hidden states and statistics, as far as `recording` asks for them.

    Of tokens that come after the prompt queries and hidden states are held back until entries are judged again.
    """

    def __init__(self, capture_spec: CaptureSpec) -> None:
        self.capture_spec = capture_spec
        self.queries: Tensor | None = None
        self.query_positions: Tensor | None = None
        self.unread: Tensor | None = None
        self.unread_hidden: Tensor | None = None
        self.hidden: Tensor | None = None
        self.statistics: dict[Statistic | PromptPass, Tensor] = {}
        self.rotations: tuple[tuple[Tensor, Tensor], ...] = ()
        self.output_weight: Tensor | None = None
        self.scaling = 1.0

    def record(self, hidden: Tensor, later: bool = False) -> None:
        """Keep the attention block's input [B, T, E]: of tokens that are not judged yet until they are, of the prompt's
        until statistics have read it, unless all of it is asked for."""
        name = "unread_hidden" if later else "hidden"
        known, new = getattr(self, name), hidden.detach()
        setattr(self, name, new if known is None else torch.cat([known, new], 1))

    def observe(self, queries: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take note of the newest queries [B, H*G, T, D], whose entries are the last of those at `positions` [B, H, S],
        negative where there is none."""
        new, at = queries.detach(), positions[:, 0, positions.shape[2] - queries.shape[2] :]
        self._gather(new, at, layer_idx, keys, values, positions)
        if window := self.capture_spec.window:
            self._hold(*self._with_last(new[:, :, -window:], at[:, -window:]))

    def hold_back(self, queries: Tensor) -> None:
        """Keep the queries [B, H*G, T, D] of tokens that are not judged yet."""
        if self.capture_spec.window or self.capture_spec.statistics:
            new = queries.detach()
            self.unread = new if self.unread is None else torch.cat([self.unread, new], 2)

    def resume(self, said: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take note of the queries that were held back, at `said` [B, M]; as for `observe`, but entries have holes."""
        if self.unread is None:
            return
        self.hidden, self.unread_hidden = self.unread_hidden, None
        self._gather(self.unread, said, layer_idx, keys, values, positions)
        self.hidden = None
        if self.capture_spec.window:
            new, at = self._with_last(self.unread, said)
            order = (at >= 0).to(torch.int8).argsort(dim=-1, stable=True)  # padding first
            new = new.gather(2, order[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
            self._hold(new, at.gather(1, order))
        self.unread = None

    def _gather(self, new: Tensor, at: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        if self.capture_spec.statistics:
            chunk = self._seen(new, at, layer_idx, keys, values, positions)
            self.statistics = {one: one.update(chunk, self.statistics.get(one)) for one in self.capture_spec.statistics}
        if not self.capture_spec.hidden:
            self.hidden = None

    def _with_last(self, new: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """New queries [B, H*G, T, D] at positions [B, T] behind those that are held."""
        if self.queries is None or self.query_positions is None:
            return new, at
        return torch.cat([self.queries, new], 2), torch.cat([self.query_positions, at], 1)

    def _hold(self, queries: Tensor, at: Tensor) -> None:
        window = self.capture_spec.window
        self.queries, self.query_positions = queries[:, :, -window:].clone(), at[:, -window:].clone()

    def observation(self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> Observation:
        """What a scorer may see of the entries [B, H, S, D] at `positions` [B, H, S], negative where there is none."""
        if self.queries is None or self.query_positions is None:
            nothing = positions[:, 0, :0]
            return self._seen(keys[:, :, :0], nothing, layer_idx, keys, values, positions)
        return self._seen(self.queries, self.query_positions, layer_idx, keys, values, positions)

    def _seen(
        self, queries: Tensor, at: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> Observation:
        rope = Rotary(self.rotations) if self.rotations else None
        return Observation(
            layer_idx=layer_idx,
            queries=queries,
            query_positions=at,
            keys=keys,
            values=values,
            scaling=self.scaling,
            valid=positions >= 0,
            positions=positions,
            output_weight=self.output_weight,
            hidden=self.hidden,
            rope=rope,
            statistics=self.statistics,
        )

    def rows(self, batch: Tensor) -> "Capture":
        """What was recorded of batch rows `batch` [B']."""
        chosen = Capture(self.capture_spec)
        chosen.queries, chosen.hidden = (
            None if one is None else _rows(one, batch) for one in (self.queries, self.hidden)
        )
        chosen.query_positions = None if self.query_positions is None else _rows(self.query_positions, batch)
        chosen.unread, chosen.unread_hidden = (
            None if one is None else _rows(one, batch) for one in (self.unread, self.unread_hidden)
        )
        chosen.statistics = {which: _rows(held, batch) for which, held in self.statistics.items()}
        chosen.rotations = tuple((_shared(cos, batch), _shared(sin, batch)) for cos, sin in self.rotations)
        chosen.output_weight, chosen.scaling = self.output_weight, self.scaling
        return chosen

    def crop(self, slots: int) -> None:
        """Forget what is held back of tokens after the first `slots` that were not judged yet."""
        self.unread = None if self.unread is None else self.unread[:, :, :slots]
        self.unread_hidden = None if self.unread_hidden is None else self.unread_hidden[:, :slots]

    def forget(self, live: CaptureSpec | None = None) -> None:
        """Hold nothing of the prompt any more but the queries that `live`, what is recorded from now on, asks for."""
        kept = live.window if live is not None else 0
        if kept and self.queries is not None and self.query_positions is not None:
            self.queries = self.queries[:, :, -kept:].clone()
            self.query_positions = self.query_positions[:, -kept:].clone()
        else:
            self.queries = self.query_positions = None
        self.hidden, self.rotations, self.statistics = None, (), {}
        if live is not None:
            self.capture_spec = live

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        one_each = (self.queries, self.query_positions, self.unread, self.unread_hidden, self.hidden)
        held = (*one_each, *self.statistics.values())
        return [one for one in held if one is not None]


def _rows(held: Tensor, rows: Tensor) -> Tensor:
    return held[rows.to(held.device)]


def _shared(held: Tensor, rows: Tensor) -> Tensor:
    return held if held.shape[0] == 1 else _rows(held, rows)
