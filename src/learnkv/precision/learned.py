"""Bytes shared out over entries and levels together, by learned exchange rates."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from learnkv.core.precision import Level
from learnkv.errors import UserError
from learnkv.precision.shared import SharedPrecision

_GROWTH = 10  # distortions and scales may change by orders of magnitude at a rate that suits the weights of a network
_FAR_BELOW = -1e9  # any other level
_LEAST = 1e-6
_WORTH = 0.1  # distortion of the level of a uniform start


class LearnedPrecision(SharedPrecision):
    """Bytes shared out by learned exchange rates (`SharedPrecision`).

    An entry of score s in head h of layer l has the utility exp(scale[l, h] * s), and level m keeps the fraction
    1 - distortion[l, h, m] of it; below 0 it is worse than eviction. Scores, the scale of each head and the distortions
    are trained; the offset of a head is its allocator's head importance.

    RDKV (arXiv 2605.08317) and Spherical KV share out bits by training-free rules; deciding eviction and precision
    together by distillation is this project's own.

    Args:
        menu: levels as bits of keys and values, such as K4V3; at most five.
        init: one of them: the policy at initialisation keeps the entries that the same policy keeps with this uniform
            precision, at this level. Or a distortion for each, the same in all heads. Or `measured`: `train.py`
            measures distortions on its first prompts.
        num_layers: layers of the model; 0 until `train.py` fills in this and the next one.
        num_heads: kv heads per layer.
    """

    def __init__(
        self,
        menu: Sequence[str] = ("K3V2", "K4V2", "K4V3", "K8V4"),
        init: str | Sequence[float] = "K4V3",
        num_layers: int = 0,
        num_heads: int = 0,
    ) -> None:
        super().__init__(menu)
        self.label, self.shape = "learned", (num_layers, num_heads)
        self._reference = self.menu.index(init) if init in self.menu else len(menu) // 2
        start = self._initial(init)
        self.scale_growth = nn.Parameter(torch.zeros(num_layers, num_heads, dtype=torch.float32))
        self.log_distortion = nn.Parameter(torch.zeros(num_layers, num_heads, len(menu), dtype=torch.float32))
        self.set_distortions(start)
        self.available: Tensor | None = None
        """[L, H, M] levels that a training step tries alone; None: all."""

    def _initial(self, init: str | Sequence[float]) -> Tensor:
        """[M] distortions before training; NaN until they are measured."""
        if init == "measured":
            return torch.full((len(self.menu),), torch.nan)
        if init in self.menu:
            return torch.where(torch.arange(len(self.menu)) < self._reference, 1.0, _WORTH)
        if isinstance(init, str) or len(init) != len(self.menu) or not all(number > 0 for number in init):
            expected = f"measured, one of {', '.join(self.menu)}, or {len(self.menu)} distortions above 0"
            raise UserError(f"init={init}: expected {expected}")
        return torch.tensor(init)

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
    def reference(self) -> Level:
        return self.levels[self._reference]

    def distortions(self) -> Tensor:
        """[L, H, M] what each level loses of an entry's utility."""
        return (_GROWTH * self.log_distortion).exp()

    def scales(self) -> Tensor:
        """[L, H] factor of scores in the exponent of utilities."""
        return (_GROWTH * self.scale_growth).exp()

    def quality(self) -> Tensor:
        if not self.measured:
            raise UserError(
                "init=measured: train.py measures distortions before the first step; expected a trained policy"
            )
        quality = 1 - self.distortions().double()
        if self.available is None:
            return quality
        return quality.masked_fill(~self.available.to(quality.device), _FAR_BELOW)

    def utility(self, scores: Tensor) -> Tensor:
        return scores * self.scales()[:, None, :, None].to(scores)

    def check(self, layers: int, heads: int) -> None:
        if self.shape != (layers, heads):
            raise UserError(f"num_layers={self.shape[0]} num_heads={self.shape[1]}: the model has {layers} and {heads}")
