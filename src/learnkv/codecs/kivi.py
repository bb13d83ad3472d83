"""KIVI: keys per channel, values per token, the latest entries at full precision."""

import torch
from torch import Tensor

from learnkv.codecs.partly_exact import PartlyExact
from learnkv.codecs.per_channel import PerChannel
from learnkv.codecs.per_token import PerToken
from learnkv.core.codec import Codec, ScaleDtype
from learnkv.errors import UserError


class LatestExact(PartlyExact):
    """The latest entries of a row stay at full precision.

    Args:
        codec: of the others.
        residual: R. Whole blocks: the codec stores floor(n / R) R of n entries; otherwise all but the last R.
        blocks: whether whole blocks are stored.
    """

    def __init__(self, codec: Codec, residual: int, blocks: bool) -> None:
        super().__init__(codec)
        if residual < (1 if blocks else 0):
            raise UserError(f"residual={residual}: expected a number of entries")
        self.residual, self.blocks = residual, blocks

    def exact(self, entries: int) -> Tensor:
        stored = entries // self.residual * self.residual if self.blocks else max(entries - self.residual, 0)
        return torch.arange(entries) >= stored


class KIVIKeys(LatestExact):
    """Keys in codes per channel of groups of entries (KIVI, arXiv 2402.02750).

    Groups are formed of the entries that are kept, inside the row of one head. Entries behind the last whole block of
    `residual` stay at full precision.

    Args:
        bits: of a code.
        group: entries that share scales.
        residual: a block, whole groups; `group` itself leaves the fewest entries at full precision.
        scale_dtype: of scales and zeros.
    """

    status = "numbers"

    def __init__(
        self, bits: int = 2, group: int = 32, residual: int = 128, scale_dtype: ScaleDtype = "float16"
    ) -> None:
        check_blocks(residual, group)
        super().__init__(PerChannel(bits, group, scale_dtype=scale_dtype), residual, blocks=True)


class KIVIValues(LatestExact):
    """Values in codes per token and group of channels, all but the last `residual` (KIVI, arXiv 2402.02750).

    Args:
        bits: of a code.
        group: channels that share a scale.
        residual: latest entries at full precision.
        scale_dtype: of scales and zeros.
    """

    status = "numbers"

    def __init__(
        self, bits: int = 2, group: int = 32, residual: int = 128, scale_dtype: ScaleDtype = "float16"
    ) -> None:
        super().__init__(PerToken(bits, "none", group, scale_dtype=scale_dtype), residual, blocks=False)


def check_blocks(residual: int, group: int) -> None:
    """Raise UserError for blocks that do not hold whole groups."""
    if group < 1 or residual < 1 or residual % group:
        raise UserError(f"residual={residual} group={group}: expected a block of whole groups")
