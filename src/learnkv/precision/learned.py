"""Bytes shared out over entries and levels together, by learned exchange rates."""

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
_GROWTH = 5  # distortions and scales may change by orders of magnitude at a rate that suits the weights of a network
_FAR_BELOW = -1e9  # any other level
_LEAST = 1e-6
_WORTH = 0.1  # distortion of the level of a uniform start


class LearnedPrecision(Precision):
    """Which entries are kept, and in how many bits, decided together under one budget of bytes.

    An entry of score s in head h of layer l has the utility exp(scale[l, h] * s), and level m keeps the fraction
    1 - distortion[l, h, m] of it; below 0 it is worse than eviction. The sum of what is kept is maximised within the
    budget. The least concave function above a head's levels makes this one threshold for all steps from level to level:
    a step is worth utility * (gain of the fraction) / bytes. Scores, the scale of each head and the distortions are
    trained; the offset of a head is its allocator's head importance.

    RDKV (arXiv 2605.08317) and Spherical KV share out bits by training-free rules; deciding eviction and precision
    together by distillation is this project's own.

    Args:
        menu: levels as bits of keys and values, such as K4V3; at most five.
        init: one of them: the policy at initialisation keeps the entries that the same policy keeps with this uniform
            precision, at this level. Or `measured`: `train.py` measures distortions on its first prompts.
        num_layers: layers of the model; 0 until `train.py` fills in this and the next one.
        num_heads: kv heads per layer.
    """

    def __init__(
        self,
        menu: Sequence[str] = ("K3V2", "K4V2", "K4V3", "K8V4"),
        init: str = "K4V3",
        num_layers: int = 0,
        num_heads: int = 0,
    ) -> None:
        super().__init__()
        if not 2 <= len(set(menu)) == len(menu) <= MOST_LEVELS:
            raise UserError(f"menu={','.join(menu)}: expected two to {MOST_LEVELS} different levels, such as K4V3")
        pairs = [pair_of(name) for name in menu]
        self.keys, self.values = (
            nn.ModuleList(codec_of(bits, "menu") for bits in side) for side in zip(*pairs, strict=True)
        )
        self.label, self.menu, self.shape = "learned", tuple(menu), (num_layers, num_heads)
        if init != "measured" and init not in menu:
            raise UserError(f"init={init}: expected measured or one of {', '.join(menu)}")
        self._reference = len(menu) // 2 if init == "measured" else self.menu.index(init)
        self.scale_growth = nn.Parameter(torch.zeros(num_layers, num_heads, dtype=torch.float32))
        self.log_distortion = nn.Parameter(
            torch.zeros(num_layers, num_heads, len(menu), dtype=torch.float32), requires_grad=True
        )
        self.set_distortions(self._initial(init))
        self.available: Tensor | None = None
        """[L, H, M] levels that a training step tries alone; None: all."""

    def _initial(self, init: str) -> Tensor:
        """[M] distortions before training; NaN until they are measured."""
        order = torch.arange(len(self.menu))
        return torch.where(order < self._reference, 1.0, _WORTH if init != "measured" else torch.nan)

    def set_distortions(self, distortion: Tensor) -> None:
        """Begin with these distortions, [L, H, M] or [M]."""
        logs = distortion.float().clamp_min(_LEAST).log() / _GROWTH
        with torch.no_grad():
            self.log_distortion.copy_(logs.expand_as(self.log_distortion))

    @property
    def measured(self) -> bool:
        """Whether distortions have values."""
        return not bool(self.log_distortion.isnan().any())

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(starmap(Level, zip(self.keys, self.values, strict=True)))

    @property
    def reference(self) -> Level:
        return self.levels[self._reference]

    def distortions(self) -> Tensor:
        """[L, H, M] what each level loses of an entry's utility."""
        return (_GROWTH * self.log_distortion).exp()

    def scales(self) -> Tensor:
        """[L, H] factor of scores in the exponent of utilities."""
        return (_GROWTH * self.scale_growth).exp()

    def check_order(self, head_dims: Sequence[int]) -> Tensor:
        """[M, L] bytes of the step to each level. Raises UserError for levels that are not in the order of bytes."""
        entry = torch.tensor([[level.entry_bytes(dim) for dim in head_dims] for level in self.levels])
        steps = entry.diff(dim=0, prepend=torch.zeros_like(entry[:1]))
        if bool((steps <= 0).any()):
            raise UserError(f"menu={','.join(self.menu)}: expected levels in ascending order of their bytes")
        return steps

    def shares(self, scores: Tensor, budget: Tensor, head_dims: Sequence[int]) -> LevelPlan:
        layers, _, heads, _ = scores.shape
        if self.shape != (layers, heads):
            raise UserError(f"num_layers={self.shape[0]} num_heads={self.shape[1]}: the model has {layers} and {heads}")
        if not self.measured:
            raise UserError(
                "init=measured: train.py measures distortions before the first step; expected a trained policy"
            )
        steps = self.check_order(head_dims)
        slopes = self._slopes(steps).to(scores.device)
        at_least = share_bytes(self._values(scores, slopes), _whole_pieces(slopes.detach(), steps), budget)
        exact = at_least.detach().round().long()
        counts = exact - torch.cat([exact[1:], torch.zeros_like(exact[:1])])
        return LevelPlan(self.levels, counts, at_least, self.used(head_dims))

    def used(self, head_dims: Sequence[int]) -> list[bool]:
        slopes = self._slopes(self.check_order(head_dims)).detach()
        ends = slopes > torch.cat([slopes[..., 1:], torch.zeros_like(slopes[..., :1])], -1).clamp_min(0)
        return ends.flatten(0, 1).any(0).tolist()

    def _slopes(self, steps: Tensor) -> Tensor:
        """What a byte gains [L, H, M] in the step to each level, of an entry of utility 1."""
        cost = steps.cumsum(0).T.unsqueeze(1).double().to(self.log_distortion.device)  # [L, 1, M]
        quality = 1 - self.distortions().double()
        if self.available is not None:
            quality = quality.masked_fill(~self.available.to(quality.device), _FAR_BELOW)
        return envelope_slopes(quality, cost)

    def _values(self, scores: Tensor, slopes: Tensor) -> Tensor:
        """Log value per byte [M, L, B, H, S] of the step of every entry to each level."""
        worth = slopes.clamp_min(torch.finfo(torch.float64).tiny).log().masked_fill(slopes <= 0, -torch.inf)
        protected, absent = scores == torch.inf, scores == -torch.inf
        best = scores.masked_fill(protected, -torch.inf).amax(-1, keepdim=True)
        best = best.masked_fill(best == -torch.inf, 0)
        # Infinite scores would make the gradient of the scales NaN.
        utility = torch.where(protected, best, scores.masked_fill(absent | protected, 0))
        utility = utility * self.scales()[:, None, :, None].to(scores)
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
