"""OScaR: keys divided by the norm of their token before they are rounded."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from learnkv.codecs.kivi import LatestExact, check_blocks
from learnkv.codecs.per_channel import PerChannel
from learnkv.codecs.per_token import PerToken
from learnkv.core.codec import Codec, Encoded, ScaleDtype, Source, check_choice, torch_dtype
from learnkv.errors import UserError
from learnkv.ops.hadamard import check_hadamard, hadamard

Norm = Literal["l2", "max", "mean_abs", "none"]


class TokenNorm(Codec):
    """Entries divided by the norm of their token, which is stored beside what `codec` stores of them.

    Args:
        codec: of the divided entries.
        norm: of a token.
        heads: rows that follow each other and share one norm per token; they must hold equally many entries.
        scale_dtype: of norms.
    """

    def __init__(self, codec: Codec, norm: Norm = "l2", heads: int = 1, scale_dtype: ScaleDtype = "float16") -> None:
        super().__init__()
        check_choice("norm", norm, Norm)
        if heads < 1:
            raise UserError(f"heads={heads}: expected at least 1 that shares a norm")
        self.codec, self.norm, self.heads, self.scale_dtype = codec, norm, heads, scale_dtype

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        return self.codec.basis(layer_idx, head_dim, device)

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        norms = 0 if self.norm == "none" else sum(self._tokens(entries)) * torch_dtype(self.scale_dtype).itemsize
        return norms + self.codec.nbytes(entries, head_dim, itemsize)

    def _tokens(self, entries: Sequence[int]) -> list[int]:
        """Tokens of every `heads` rows."""
        groups = [list(entries[row : row + self.heads]) for row in range(0, len(entries), self.heads)]
        for group in groups:
            if len(group) != self.heads or len(set(group)) != 1:
                raise UserError(f"heads={self.heads}: rows of {group} entries, expected equal numbers that share norms")
        return [group[0] for group in groups]

    def _encode(self, source: Source) -> dict[str, Tensor]:
        if self.norm == "none":
            return self.codec._encode(source)
        tokens, entries = self._tokens(source.lengths), source.entries.float()
        norms = torch.cat([entries.new_zeros(0), *(self._norms(part) for part in self._by_token(entries, tokens))])
        stored = self._rounded(norms)
        divided = entries / self._expanded(stored, tokens).unsqueeze(-1)
        return {"norm": stored, **self.codec._encode(source._replace(entries=divided))}

    def _decode(self, encoded: Encoded) -> Tensor:
        decoded = self.codec._decode(encoded)
        if self.norm == "none":
            return decoded
        return decoded * self._expanded(encoded.tensors["norm"], self._tokens(encoded.entries)).unsqueeze(-1)

    def _by_token(self, entries: Tensor, tokens: Sequence[int]) -> list[Tensor]:
        """[n, heads * D] of every `heads` rows."""
        parts = entries.split([self.heads * count for count in tokens])
        return [
            part.unflatten(0, (self.heads, count)).transpose(0, 1).flatten(1)
            for part, count in zip(parts, tokens, strict=True)
        ]

    def _norms(self, vectors: Tensor) -> Tensor:
        if self.norm == "l2":
            norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
            return norms
        return vectors.abs().amax(-1) if self.norm == "max" else vectors.abs().mean(-1)

    def _rounded(self, norms: Tensor) -> Tensor:
        dtype = torch_dtype(self.scale_dtype)
        return norms.clamp(min=max(1e-8, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)).to(dtype)

    def _expanded(self, norms: Tensor, tokens: Sequence[int]) -> Tensor:
        """Norms [N], float32, of all entries."""
        return torch.cat([norms.float()[:0], *(part.repeat(self.heads) for part in norms.float().split(list(tokens)))])


class RotatedBlocks(Codec):
    """Blocks of entries rotated along the entries before `codec` stores them, and turned back when they are decoded.

    Args:
        codec: of the rotated entries.
        block: entries that are rotated together, a power of two; rows hold whole blocks.
    """

    def __init__(self, codec: Codec, block: int) -> None:
        super().__init__()
        check_hadamard(block)
        self.codec, self.block, self.scale_dtype = codec, block, codec.scale_dtype

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        return self.codec.basis(layer_idx, head_dim, device)

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        if any(count % self.block for count in entries):
            raise UserError(f"{self.name}: rows of {list(entries)} entries, expected whole blocks of {self.block}")
        return self.codec.nbytes(entries, head_dim, itemsize)

    def _encode(self, source: Source) -> dict[str, Tensor]:
        return self.codec._encode(source._replace(entries=self._along_entries(source.entries)))

    def _decode(self, encoded: Encoded) -> Tensor:
        return self._along_entries(self.codec._decode(encoded))

    def _along_entries(self, entries: Tensor) -> Tensor:
        blocks = entries.unflatten(0, (len(entries) // self.block, self.block))
        rotated: Tensor = hadamard(self.block, entries.device) @ blocks.float()
        return rotated.flatten(0, 1)


class OScaRKeys(LatestExact):
    """Rotated keys, divided by the norm of their token, in codes per channel (OScaR, arXiv 2605.19660).

    Args:
        bits: of a code.
        group: entries that share scales.
        residual: entries behind the last whole block of so many stay at full precision.
        norm: by which keys are divided.
        heads: kv heads that share one norm per token, all in the published code; 1 where heads keep different entries.
        rotate_entries: whether every block is rotated along its entries, too.
        scale_dtype: of scales, zeros and norms.
    """

    status = "numbers"

    def __init__(
        self,
        bits: int = 2,
        group: int = 32,
        residual: int = 256,
        norm: Norm = "l2",
        heads: int = 1,
        rotate_entries: bool = False,
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        check_blocks(residual, group)
        channels = PerChannel(bits, group, "hadamard", "zero_point", scale_dtype)
        codec: Codec = TokenNorm(channels, norm, heads, scale_dtype)
        super().__init__(RotatedBlocks(codec, residual) if rotate_entries else codec, residual, blocks=True)


class OScaRValues(LatestExact):
    """Rotated values in codes per token and group of channels (OScaR, arXiv 2605.19660).

    Args:
        bits: of a code.
        group: channels that share a scale.
        residual: a block.
        blocks: whether entries behind the last whole block stay at full precision, or the last `residual`.
        scale_dtype: of scales and zeros.
    """

    status = "numbers"

    def __init__(
        self,
        bits: int = 2,
        group: int = 32,
        residual: int = 256,
        blocks: bool = True,
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        super().__init__(PerToken(bits, "hadamard", group, "zero_point", scale_dtype), residual, blocks)
