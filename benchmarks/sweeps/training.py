"""Attention of training: soft gates in the forward, the gradient of every entry's mask in the backward.

Peers are `flex_attention`, compiled, with the logarithms of the gates as a captured bias, and SDPA with that bias as a
mask of queries x entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import limits
from benchmarks.results import Clock, Part
from benchmarks.shapes import LLAMA_8B, Shape
from benchmarks.timing import Call, race
from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.gather_kv import gather_kv
from learnkv.ops.mask_gradient import mask_gradient
from learnkv.ops.select import select

KEEP = 0.1
FLEX, BIAS = "flex_attention", "SDPA with a bias"


def run(part: Part, device: torch.device, clock: Clock, dry_run: bool) -> None:
    """Ours at all sizes first; a peer that has to be compiled at one size, last."""
    wanted = [(LLAMA_8B, 512, 32768), (LLAMA_8B, 4096, 32768), (LLAMA_8B, 8192, 8192)]
    if dry_run:
        wanted = [(LLAMA_8B.tiny(), 6, 48)]
    for peers in (False, True):
        for shape, new, prompt in wanted[:2] if peers else wanted:
            if not clock.over():
                measure(part, Inputs.random(shape, new, prompt, device), peers)


def measure(part: Part, made: "Inputs", peers: bool) -> None:
    """Forward and backward of one size, ours alone or peers alone: all are long enough for turns not to matter."""
    shape = made.shape
    calls: dict[str, dict[str, Callable[[], Call]]] = {
        "gated forward": {FLEX: made.flex, BIAS: made.bias} if peers else {"learnkv": made.forward},
        "gated backward": {FLEX: made.flex_backward} if peers else {"learnkv": made.backward},
    }
    about = {"model": shape.name, "B": 1, "T": made.prompt, "new": made.new, "dtype": "bfloat16"}
    for kernel, contenders in calls.items():
        work = limits.gated_attention(made.new, made.prompt + made.new, shape.heads, shape.dim, products=2)
        for impl, prepare in contenders.items():
            try:
                call = prepare()
            except Exception as error:
                part.add(f"{type(error).__name__}: {str(error)[:200]}", work, kernel=kernel, impl=impl, **about)
                continue
            # Autograd runs a backward pass where it likes; a capture would have to follow it there.
            timing = race({impl: [call]}, captured=impl == "learnkv")[impl]
            part.add(timing, work, kernel=kernel, impl=impl, **about)


@dataclass
class Inputs:
    """`new` queries after a prompt of gated entries; what was kept of it lies in a pool."""

    shape: Shape
    new: int
    prompt: int
    query: Tensor
    keys: Tensor
    values: Tensor
    tails: list[Tensor]
    gates: Tensor
    grad: Tensor

    @classmethod
    def random(cls, shape: Shape, new: int, prompt: int, device: torch.device) -> "Inputs":
        def numbers(*size: int) -> Tensor:
            return torch.randn(1, *size, shape.dim, device=device, dtype=torch.bfloat16)

        gates = torch.rand(1, shape.kv_heads, prompt, device=device).clamp(min=0.01)
        keys, values = numbers(shape.kv_heads, prompt), numbers(shape.kv_heads, prompt)
        tails = [numbers(shape.kv_heads, new) for _ in range(2)]
        asks = (numbers(shape.heads, new), numbers(shape.heads, new))
        return cls(shape, new, prompt, asks[0], keys, values, tails, gates, asks[1])

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(self.shape.dim)

    def forward(self) -> Call:
        """Every entry in the forward."""
        given = (self.query, self.keys, self.values, self.gates, Tail(*self.tails), self.scaling)
        return torch.no_grad()(lambda: gated_attention(*given, impl="triton"))

    def backward(self) -> Call:
        """The deployed set in the forward; its backward, which gives every entry of the prompt a gradient."""
        rows, dim, device = self.shape.kv_heads, self.shape.dim, self.query.device
        kept = math.ceil(KEEP * self.prompt)
        length = torch.full((rows,), kept, device=device)
        offset = length.cumsum(0) - length
        index = select(self.gates.view(rows, -1), length, rows * kept)
        pools = [self.keys.new_empty(rows * kept, dim) for _ in range(2)]
        segment, tail = Ragged(pools[0], pools[1], offset, length, kept), Tail(*self.tails)
        gather_kv(self.keys[0], self.values[0], index, 0, segment)
        output, lse = decode_attention(self.query, segment, tail, self.scaling, impl="triton")
        given = (self.grad, self.query, output, lse, self.keys, self.values, segment, tail, self.scaling)
        return torch.no_grad()(lambda: mask_gradient(*given, impl="triton"))

    def _whole(self, grouped: bool) -> list[Tensor]:
        """Keys, values [1, H, S + T, D] and the bias [1, H, S + T]; repeated for every query head unless `grouped`."""
        keys, values = (torch.cat(pair, 2) for pair in zip((self.keys, self.values), self.tails, strict=True))
        bias = torch.cat([self.gates.log(), self.gates.new_zeros(1, self.shape.kv_heads, self.new)], -1)
        return [one if grouped else one.repeat_interleave(self.shape.group, 1) for one in (keys, values, bias)]

    def _flex(self, trained: bool) -> tuple[Call, list[Tensor]]:
        keys, values, bias = self._whole(grouped=True)
        leaves = [one.detach().requires_grad_(trained) for one in (self.query, keys, values, bias[0].contiguous())]
        asks, held, seen, gate = leaves
        group, before = self.shape.group, self.prompt

        def score(product: Tensor, batch: Tensor, head: Tensor, at: Tensor, entry: Tensor) -> Tensor:
            return product + gate[head // group, entry]

        def visible(batch: Tensor, head: Tensor, at: Tensor, entry: Tensor) -> Tensor:
            return entry <= at + before

        blocks = create_block_mask(visible, None, None, self.new, before + self.new, device=str(asks.device))
        function = torch.compile(flex_attention, dynamic=False) if asks.is_cuda else flex_attention
        call = lambda: function(asks, held, seen, score_mod=score, block_mask=blocks, enable_gqa=True)  # noqa: E731
        return call, leaves

    def flex(self) -> Call:
        """Forward of flex_attention where no backward is to come."""
        return self._flex(trained=False)[0]

    def flex_backward(self) -> Call:
        """Backward of flex_attention to queries, keys, values and bias."""
        call, leaves = self._flex(trained=True)
        output = call()
        assert isinstance(output, Tensor)
        return lambda: torch.autograd.grad(output, leaves, self.grad, retain_graph=True)

    def bias(self) -> Call:
        """SDPA with the bias of every pair written out."""
        keys, values, bias = self._whole(grouped=False)
        causal = torch.ones(self.new, self.new, dtype=torch.bool, device=keys.device).tril()
        mask = bias.to(torch.bfloat16).unsqueeze(2).repeat(1, 1, self.new, 1)
        mask[..., self.prompt :].masked_fill_(~causal, -torch.inf)
        return torch.no_grad()(lambda: scaled_dot_product_attention(self.query, keys, values, mask))
