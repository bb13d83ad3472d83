"""Which tokens of a prompt stand for parts of images, and what they do to positions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of images and videos in prompts; all others are text.

    Where images have positions in space (multimodal RoPE), those of the tokens after an image go on from its height or
    width instead of its number of tokens.
    """

    is_image: Tensor
    """[B, S] True where the slot is part of an image or a video."""
    shifts: tuple[int, ...]
    """Of every row, the position of the next token less the number of tokens; 0 where images have no positions."""
    in_space: bool = False
    """Whether images have positions in space, so that those of the prompt are not consecutive."""

    def positions_after(self, lengths: Sequence[int]) -> list[int]:
        """Of every row, the position of the token after a prompt of so many tokens."""
        return [length + shift for length, shift in zip(lengths, self.shifts, strict=True)]

    def rows(self, rows: Tensor) -> "ImageTokens":
        """Those of rows `rows` [B'] of the batch."""
        chosen = self.is_image[rows.to(self.is_image.device)]
        return ImageTokens(chosen, tuple(self.shifts[int(row)] for row in rows), self.in_space)
