"""Capture of one layer's queries, hidden states and statistics, for scorers."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from learnkv.core.images import ImageTokens
from learnkv.core.observation import (
    CaptureSpec,
    Embeddings,
    LayerFunctions,
    Observation,
    PromptPass,
    Statistic,
)
from learnkv.errors import UserError
from learnkv.ops.rotary import Rotary
from learnkv.ops.softmax_terms import NO_TERMS
from learnkv.ops.tail_slots import padding_first


class Capture:
    """The last queries of the prompt, hidden states and statistics, as far as `capture_spec` requires them.

    Queries and hidden states of tokens after the prompt are kept back until entries are scored again (`resume`): of
    queries only the last `window` tokens of every row, unless statistics read all of them. The tail may be cropped and
    grown again: what is cropped was read before the eviction is due, and so lies before its window. A row whose
    window is padding after a crop would need what was dropped before it: `resume` refuses that.
    """

    def __init__(self, capture_spec: CaptureSpec) -> None:
        self.capture_spec = capture_spec
        self.queries: Tensor | None = None
        self.query_positions: Tensor | None = None
        self.unread: Tensor | None = None
        """[B, H*G, M, D] queries of the tail, or of the last tokens of every row."""
        self.unread_slots: Tensor | None = None
        """[B, M] slots of the tail that `unread` belongs to, negative for none; None: it belongs to all of them."""
        self.cropped = False
        """Whether the tail was cropped since queries were dropped."""
        self.unread_hidden: Tensor | None = None
        """[B, M, E] hidden states of the tail."""
        self.hidden: Tensor | None = None
        self.token_ids: Tensor | None = None
        """[B, S] of the whole prompt."""
        self.images: ImageTokens | None = None
        self.statistics: dict[Statistic | PromptPass, Tensor] = {}
        self.embeddings: tuple[Embeddings, ...] = ()
        """Rotary embeddings of every chunk of the prompt."""
        self.functions: LayerFunctions | None = None
        self.scaling, self.terms = 1.0, NO_TERMS
        self.aligned = True

    def record(self, hidden: Tensor, after_prompt: bool = False) -> None:
        """Append the attention block's input [B, T, E] to the prompt's, or to the tail's with `after_prompt`.

        The prompt's is dropped when statistics have read it, unless all of it is required.
        """
        name = "unread_hidden" if after_prompt else "hidden"
        before, new = getattr(self, name), hidden.detach()
        setattr(self, name, new if before is None else torch.cat([before, new], 1))

    def observe(self, queries: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Capture the newest queries [B, H*G, T, D], whose entries are the last of those at `positions` [B, H, S].

        Positions are negative where there is no entry.
        """
        new, query_positions = queries.detach(), positions[:, 0, positions.shape[2] - queries.shape[2] :]
        self._gather(new, query_positions, layer_idx, keys, values, positions)
        if window := self.capture_spec.window:
            self._set_queries(*self._with_last(new[:, :, -window:], query_positions[:, -window:]))

    def hold_back(self, queries: Tensor, slots: int, is_token: Tensor | None) -> None:
        """Append the queries [B, H*G, T, D] of tokens after the prompt, the last of `slots` slots of the tail.

        Args:
            queries: of the newest tokens.
            slots: M, slots of the tail with the newest.
            is_token: [B, M] False for padding; None: there is none.
        """
        if not (self.capture_spec.window or self.capture_spec.statistics):
            return
        new, before = queries.detach(), self.unread
        self.unread = new if before is None else torch.cat([before, new], 2)
        if self.capture_spec.statistics:
            return
        length = new.shape[2]
        places = torch.arange(slots - length, slots, device=new.device).repeat(new.shape[0], 1)
        if is_token is not None:
            places = torch.where(is_token[:, slots - length : slots], places, -1)
        if before is not None:
            assert self.unread_slots is not None
            places = torch.cat([self.unread_slots, places], 1)
        self.unread_slots = places
        if places.shape[1] > self.capture_spec.window:
            order = padding_first(places >= 0)[:, -self.capture_spec.window :]
            self.unread, self.unread_slots = _ordered(self.unread, order), places.gather(1, order)

    def resume(self, tail_positions: Tensor, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Capture the queries that were kept back, at `tail_positions` [B, M]; as `observe`, but entries have holes.

        Raises:
            UserError: where the last tokens of a row were cropped, and their place was taken by padding.
        """
        self.aligned = False
        if self.unread is None:
            return
        if self.unread_slots is not None:
            tail_positions = self._positions_of_unread(tail_positions)
        self.hidden, self.unread_hidden = self.unread_hidden, None
        self._gather(self.unread, tail_positions, layer_idx, keys, values, positions)
        self.hidden = None
        if self.capture_spec.window:
            queries, query_positions = self._with_last(self.unread, tail_positions)
            order = padding_first(query_positions >= 0)
            self._set_queries(_ordered(queries, order), query_positions.gather(1, order))
        self.unread, self.unread_slots, self.cropped = None, None, False

    def _positions_of_unread(self, tail_positions: Tensor) -> Tensor:
        """Positions [B, M] of the queries that were kept back, of those of all slots of the tail."""
        assert self.unread_slots is not None
        positions = tail_positions.gather(1, self.unread_slots.clamp(min=0))
        positions = positions.masked_fill(self.unread_slots < 0, -1)
        if self.cropped:
            needed = (tail_positions >= 0).sum(-1).clamp(max=self.capture_spec.window)
            if bool(((positions >= 0).sum(-1) < needed).any()):
                raise UserError(
                    f"online eviction reads the last {self.capture_spec.window} queries of every row, and some were "
                    "dropped before tokens were cropped: fork the cache before tokens that may be taken back"
                )
        return positions

    def _gather(
        self,
        queries: Tensor,
        query_positions: Tensor,
        layer_idx: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
    ) -> None:
        if gathered := self.capture_spec.gathered:
            chunk = self._observation(queries, query_positions, layer_idx, keys, values, positions)
            self.statistics = {part: part.update(chunk, self.statistics.get(part)) for part in gathered}
        if not self.capture_spec.hidden:
            self.hidden = None

    def _with_last(self, queries: Tensor, query_positions: Tensor) -> tuple[Tensor, Tensor]:
        """New queries [B, H*G, T, D] at positions [B, T], appended to the captured ones."""
        if self.queries is None or self.query_positions is None:
            return queries, query_positions
        return torch.cat([self.queries, queries], 2), torch.cat([self.query_positions, query_positions], 1)

    def _set_queries(self, queries: Tensor, query_positions: Tensor) -> None:
        window = self.capture_spec.window
        self.queries, self.query_positions = queries[:, :, -window:].clone(), query_positions[:, -window:].clone()

    def observation(self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor) -> Observation:
        """The observation of entries [B, H, S, D] at `positions` [B, H, S], negative where there is none."""
        if self.queries is None or self.query_positions is None:
            none = positions[:, 0, :0]
            return self._observation(keys[:, :, :0], none, layer_idx, keys, values, positions)
        return self._observation(self.queries, self.query_positions, layer_idx, keys, values, positions)

    def _observation(
        self,
        queries: Tensor,
        query_positions: Tensor,
        layer_idx: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
    ) -> Observation:
        return Observation(
            layer_idx=layer_idx,
            queries=queries,
            query_positions=query_positions,
            keys=keys,
            values=values,
            scaling=self.scaling,
            terms=self.terms,
            valid=positions >= 0,
            positions=positions,
            project=None if self.functions is None else self.functions.projection,
            hidden=self.hidden,
            token_ids=None if self.token_ids is None or not self.aligned else self.token_ids[:, : keys.shape[2]],
            is_image=None if self.images is None or not self.aligned else self.images.is_image[:, : keys.shape[2]],
            rotation=self._rotation(keys),
            statistics=self.statistics,
            sample=self.capture_spec.sample,
            aligned=self.aligned,
        )

    def _rotation(self, keys: Tensor) -> Callable[[], Rotary] | None:
        if self.functions is None:
            return None
        if self.images is not None and self.images.in_space:
            return _refuse_rotation
        return functools.partial(self.functions.rotary, self.embeddings, keys)

    def empty(self, capture_spec: CaptureSpec) -> "Capture":
        """An empty capture of the same layer."""
        capture = Capture(capture_spec)
        capture.functions, capture.images = self.functions, self.images
        return capture

    def rows(self, batch: Tensor) -> "Capture":
        """The capture of batch rows `batch` [B']."""
        chosen = Capture(self.capture_spec)
        chosen.queries, chosen.query_positions = _rows(self.queries, batch), _rows(self.query_positions, batch)
        chosen.unread, chosen.unread_hidden = _rows(self.unread, batch), _rows(self.unread_hidden, batch)
        chosen.unread_slots, chosen.cropped = _rows(self.unread_slots, batch), self.cropped
        chosen.hidden, chosen.token_ids = _rows(self.hidden, batch), _rows(self.token_ids, batch)
        chosen.images = None if self.images is None else self.images.rows(batch)
        chosen.statistics = {key: tensor[batch.to(tensor.device)] for key, tensor in self.statistics.items()}
        chosen.embeddings = tuple(tuple(_shared(part, batch) for part in parts) for parts in self.embeddings)
        chosen.functions, chosen.aligned = self.functions, self.aligned
        chosen.scaling, chosen.terms = self.scaling, self.terms
        return chosen

    def crop(self, slots: int) -> None:
        """Drop what was kept back of tokens after the first `slots` of the tail."""
        if self.unread_slots is not None:
            self.unread_slots, self.cropped = self.unread_slots.masked_fill(self.unread_slots >= slots, -1), True
        elif self.unread is not None:
            self.unread = self.unread[:, :, :slots]
        self.unread_hidden = None if self.unread_hidden is None else self.unread_hidden[:, :slots]

    def forget(self, decode_capture: CaptureSpec | None = None) -> None:
        """Drop everything about the prompt except the queries that `decode_capture`, the new spec, requires."""
        kept = decode_capture.window if decode_capture is not None else 0
        if kept and self.queries is not None and self.query_positions is not None:
            self.queries = self.queries[:, :, -kept:].clone()
            self.query_positions = self.query_positions[:, -kept:].clone()
        else:
            self.queries = self.query_positions = None
        self.hidden, self.token_ids, self.embeddings, self.statistics = None, None, (), {}
        if decode_capture is None:
            self.functions = None
        else:
            self.capture_spec = decode_capture

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        of_tail = (self.unread, self.unread_slots, self.unread_hidden)
        tensors = (self.queries, self.query_positions, *of_tail, self.hidden)
        return [tensor for tensor in (*tensors, *self.statistics.values()) if tensor is not None]


def _refuse_rotation() -> Rotary:
    raise UserError("the policy reads the rotation of keys, and the images of this prompt have positions in space")


def _ordered(queries: Tensor, order: Tensor) -> Tensor:
    """Queries [B, H*G, M, D] in another order [B, N]."""
    return queries.gather(2, order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))


def _rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows.to(tensor.device)]


def _shared(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[rows.to(tensor.device)]
