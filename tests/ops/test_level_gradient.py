"""Gradients of the steps between levels of precision: the formula, and the exact change of one entry."""

import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.relaxed_attention import relaxed_attention

BATCH, HEADS, GROUP, ENTRIES, NEW, DIM, LEVELS = 1, 2, 2, 7, 3, 8, 3
SCALING = DIM**-0.5


class Case:
    """Entries at a level each (0: evicted), and attention to them."""

    def __init__(self, spread: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        exact = normal(2, BATCH, HEADS, ENTRIES, DIM)
        self.keys, self.values = ([part + spread * normal(*part.shape) for _ in range(LEVELS)] for part in exact)
        self.query = normal(BATCH, HEADS * GROUP, NEW, DIM)
        self.tail = normal(BATCH, HEADS, NEW, DIM), normal(BATCH, HEADS, NEW, DIM)
        self.grad = normal(BATCH, HEADS * GROUP, NEW, DIM)
        self.level = torch.randint(LEVELS + 1, (BATCH, HEADS, ENTRIES), generator=generator)
        self.level[:, :, 0], self.level[:, :, 1] = 0, LEVELS  # both ends occur

    def gate_gradient(self) -> Tensor:
        """[M, B, H, S] of sum(grad * output)."""
        gates = torch.zeros(LEVELS, *self.level.shape, dtype=torch.float64, requires_grad=True)
        output = relaxed_attention(
            self.query, self.keys, self.values, gates, self.kept(), Tail(*self.tail), SCALING, impl="reference"
        )
        (output * self.grad).sum().backward()
        assert gates.grad is not None
        return gates.grad

    def kept(self) -> Ragged:
        rows = self.level.flatten(0, 1)
        length = (rows > 0).sum(-1)
        pools = []
        for levels in (self.keys, self.values):
            stored = torch.stack([torch.zeros_like(levels[0]), *levels]).flatten(1, 2)
            chosen = stored.gather(0, rows[None, ..., None].expand(1, -1, -1, DIM))[0]
            pools.append(chosen[rows > 0])
        return Ragged(*pools, length.cumsum(0) - length, length, int(length.max()))

    def loss(self, mask: Tensor) -> Tensor:
        """Of masks [M, B, H, S] on the softmax weights of every entry at every level."""
        query = self.query.view(BATCH, HEADS, GROUP, NEW, DIM)
        keys, values = (
            torch.cat([*levels, tail], 2) for levels, tail in ((self.keys, self.tail[0]), (self.values, self.tail[1]))
        )
        weights = (query @ keys.unsqueeze(2).mT * SCALING).exp()
        causal = torch.ones(NEW, NEW, dtype=torch.float64).tril().expand(BATCH, HEADS, 1, NEW, NEW)
        of_entries = torch.cat(list(mask), -1)[:, :, None, None].expand(-1, -1, 1, NEW, -1)
        weights = weights * torch.cat([of_entries, causal], -1)
        output = weights / weights.sum(-1, keepdim=True) @ values.unsqueeze(2)
        return (output.view(self.grad.shape) * self.grad).sum()

    def mask(self) -> Tensor:
        return torch.stack([(self.level == number).double() for number in range(1, LEVELS + 1)])


def test_it_is_the_derivative_by_the_masks_of_both_levels() -> None:
    case = Case(spread=0.3)
    mask = case.mask().requires_grad_(True)
    (of_masks,) = torch.autograd.grad(case.loss(mask), mask)
    want = of_masks.diff(dim=0, prepend=torch.zeros_like(of_masks[:1]))
    torch.testing.assert_close(case.gate_gradient(), want)


def test_it_predicts_the_exact_change_of_one_entry() -> None:
    """The sum of the steps between two levels, where levels differ little; evicting an entry is checked elsewhere."""
    case = Case(spread=0.02)
    steps, before = case.gate_gradient().cumsum(0), case.loss(case.mask())
    wrong, changes = [], []
    for head, entry in (case.level[0] > 0).nonzero().tolist():
        old = int(case.level[0, head, entry])
        for new in range(1, LEVELS + 1):
            mask = case.mask()
            mask[:, 0, head, entry] = 0
            mask[new - 1, 0, head, entry] = 1
            predicted = steps[new - 1, 0, head, entry] - steps[old - 1, 0, head, entry]
            changes.append((case.loss(mask) - before).abs())
            wrong.append((case.loss(mask) - before - predicted).abs())
    assert torch.stack(changes).max() > 1e-3
    assert torch.stack(wrong).max() < 0.05 * torch.stack(changes).max()
