"""Bytes shared out over entries and levels together."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import starmap

import torch
from torch import Tensor, nn

from learnkv.core.precision import Level, LevelPlan, Precision
from learnkv.errors import UserError
from learnkv.ops.concave_envelope import envelope_slopes
from learnkv.ops.share_bytes import share_bytes
from learnkv.precision.uniform import codec_of, pair_of

MOST_LEVELS = 5


class SharedPrecision(Precision):
    """Which entries are kept, and in how many bits, decided together under one budget of bytes.

    An entry of utility u keeps the quality q[l, h, m] of it at level m, nothing where it is evicted. The sum of what is
    kept is maximised within the budget. The least concave function above a head's levels makes this one threshold for
    all steps from level to level: a step is worth u * (gain of quality) / bytes.

    Args:
        menu: levels as bits of keys and values, such as K4V3, in ascending order of their bytes; at most five.
    """

    def __init__(self, menu: Sequence[str]) -> None:
        super().__init__()
        if not 2 <= len(set(menu)) == len(menu) <= MOST_LEVELS:
            raise UserError(f"menu={','.join(menu)}: expected two to {MOST_LEVELS} different levels, such as K4V3")
        pairs = [pair_of(name) for name in menu]
        self.keys, self.values = (
            nn.ModuleList(codec_of(bits, "menu") for bits in side) for side in zip(*pairs, strict=True)
        )
        self.menu = tuple(menu)

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(starmap(Level, zip(self.keys, self.values, strict=True)))

    @abstractmethod
    def quality(self) -> Tensor:
        """[L, H, M] float64; 1 for L or H: the same for all."""

    @abstractmethod
    def utility(self, scores: Tensor) -> Tensor:
        """Logarithms [L, B, H, S] of utilities, from finite scores."""

    def shares(
        self, scores: Tensor, budget: Tensor, head_dims: Sequence[int], unprotected: Tensor | None = None
    ) -> LevelPlan:
        layers, _, heads, _ = scores.shape
        self.check(layers, heads)
        steps = self._steps(head_dims)
        slopes = self._slopes(steps).to(scores.device).expand(layers, heads, -1)
        at_least = share_bytes(self._values(scores, slopes, unprotected), _whole_pieces(slopes.detach(), steps), budget)
        exact = at_least.detach().round().long()
        counts = exact - torch.cat([exact[1:], torch.zeros_like(exact[:1])])
        return LevelPlan(self.levels, counts, at_least, self.used(head_dims), unprotected)

    def used(self, head_dims: Sequence[int]) -> list[bool]:
        slopes = self._slopes(self._steps(head_dims)).detach()
        ends = slopes > torch.cat([slopes[..., 1:], torch.zeros_like(slopes[..., :1])], -1).clamp_min(0)
        return ends.flatten(0, 1).any(0).tolist()

    def _steps(self, head_dims: Sequence[int]) -> Tensor:
        """[M, L] bytes of the step to each level. Raises UserError for levels that are not in the order of bytes."""
        entry = torch.tensor([[level.entry_bytes(dim) for dim in head_dims] for level in self.levels])
        steps = entry.diff(dim=0, prepend=torch.zeros_like(entry[:1]))
        if bool((steps <= 0).any()):
            raise UserError(f"menu={','.join(self.menu)}: expected levels in ascending order of their bytes")
        return steps

    def _slopes(self, steps: Tensor) -> Tensor:
        """What a byte gains [L, H, M] in the step to each level, of an entry of utility 1."""
        quality = self.quality()
        cost = steps.cumsum(0).T.unsqueeze(1).to(quality)  # [L, 1, M]
        return envelope_slopes(quality.expand(len(cost), -1, -1), cost)

    def _values(self, scores: Tensor, slopes: Tensor, unprotected: Tensor | None) -> Tensor:
        """Log value per byte [M, L, B, H, S] of the step of every entry to each level."""
        worth = slopes.clamp_min(torch.finfo(torch.float64).tiny).log().masked_fill(slopes <= 0, -torch.inf)
        protected, absent = scores == torch.inf, scores == -torch.inf
        if unprotected is None:
            best = scores.masked_fill(protected, -torch.inf).amax(-1, keepdim=True)
            unprotected = best.masked_fill(best == -torch.inf, 0)
        # Infinite scores would make the gradients of what multiplies them NaN.
        utility = self.utility(torch.where(protected, unprotected, scores.masked_fill(absent | protected, 0)))
        values = utility.double() + worth.movedim(-1, 0)[:, :, None, :, None]
        # Protected entries get the lowest level of the head that is in use, in any case.
        lowest = (slopes == slopes[..., :1]).movedim(-1, 0)[:, :, None, :, None]
        return values.masked_fill(protected & lowest, torch.inf).masked_fill(absent, -torch.inf)


def _whole_pieces(slopes: Tensor, steps: Tensor) -> Tensor:
    """Bytes of every step [M, L, H], those of a straight piece at its first step: its inner levels are never used.

    Args:
        slopes: [L, H, M].
        steps: [M, L] bytes of the step to each level.
    """
    same = slopes[..., 1:] == slopes[..., :-1]
    begins = torch.cat([torch.ones_like(same[..., :1]), ~same], -1)
    piece = begins.cumsum(-1) - 1
    cost = steps.T.unsqueeze(1).to(slopes.device).expand(slopes.shape)
    of_piece = torch.zeros_like(cost).scatter_add_(-1, piece, cost)
    return of_piece.gather(-1, piece).masked_fill(~begins, 0).movedim(-1, 0)
