"""A policy's budgets as a `torch.export` program: for engines that have neither learnkv nor transformers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_in_order, round_to_budget
from learnkv.policy.budget import protected_entries
from learnkv.policy.policy import Policy

ABOUT = "learnkv.json"
"""The file within the program that says what goes in and comes out."""
INPUTS = {
    "keep": "[B] float64, fraction of each row's entries to keep",
    "valid": "[B, S] bool, True where a slot of the left-padded prompt is a token",
    "features": "[L, B, H, F] float32, of each head: normalised entropy of the last queries' attention, mass of its "
    "top 5 %, mass of the first 4 tokens; behind them what the heuristic asks for",
    "scores": "[L, B, H, S] float32, importance of entries by the policy's scorer; for a LearnedAllocator by the "
    "heuristic below a learned one",
}
OUTPUT = "[L, B, H] int64, entries that each kv head keeps; a row sums to round(keep * tokens * L * H), half to even"


class BudgetProgram(nn.Module):
    """Budgets from tensors alone, with the arithmetic of `Policy.plan`.

    Args:
        policy: its allocator and protected tokens count.
        layers, heads: L and H of the model.
    """

    def __init__(self, policy: Policy, layers: int, heads: int) -> None:
        super().__init__()
        self.allocator = policy.allocator
        self.sinks, self.recent = policy.sinks, policy.recent
        self.layers, self.heads = layers, heads

    def forward(
        self, keep: Tensor, valid: Tensor, features: Tensor | None = None, scores: Tensor | None = None
    ) -> Tensor:
        """Budgets [L, B, H] int64; `INPUTS` has what goes in."""
        everywhere = self.layers * self.heads
        entries = valid.sum(-1)
        total = torch.round(keep.double() * entries * everywhere).long()
        protected = torch.minimum((total // (2 * everywhere)).clamp(max=self.sinks + self.recent), entries)
        positions = torch.where(valid, valid.cumsum(-1) - 1, -1)
        rows = (entries.unsqueeze(-1), protected.unsqueeze(-1))
        always = protected_entries(positions, valid, *rows, self.recent, self.sinks)
        if scores is None:  # an allocator that is not shown scores counts entries
            scores = valid.new_zeros((), dtype=torch.float32).expand(
                self.layers, valid.shape[0], self.heads, valid.shape[1]
            )
        scores = scores.masked_fill(~valid[:, None], -torch.inf).masked_fill(always[:, None], torch.inf)
        wanted = self.allocator(scores, features, total.double() / everywhere)
        exact = round_in_order if self.allocator.sequential else round_to_budget
        return exact(wanted, entries, total, protected)


@torch.no_grad()
def write(path: str | Path, policy: Policy, shapes: Mapping[str, int]) -> Path:
    """Export the budgets of a policy as a `.pt2` file that `torch.export.load` reads; batch and length are free.

    Args:
        shapes: the model's `layers`, `heads` and `head_dim`.

    Raises:
        UserError: for a path that cannot be written, and for an allocator that cannot be traced.
    """
    if policy.allocator.by_scores:
        raise UserError(
            f"{type(policy.allocator).__name__}: its budgets follow learned scores (by: scores), which a program has "
            "not; expected by: shares"
        )
    if not any(True for _ in policy.allocator.parameters()):
        raise UserError(
            f"{type(policy.allocator).__name__}: has nothing learned, expected a policy with learned budgets"
        )
    where = Path(path).expanduser()
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    layers, heads = shapes["layers"], shapes["heads"]
    program = BudgetProgram(policy, layers, heads).cpu().eval()
    rows, slots = torch.export.Dim("batch"), torch.export.Dim("length")
    given = {"keep": torch.tensor([0.2, 0.4], dtype=torch.float64), "valid": torch.ones(2, 64, dtype=torch.bool)}
    free: dict[str, dict[int, object]] = {"keep": {0: rows}, "valid": {0: rows, 1: slots}}
    if (one := policy.allocator.features(_nothing(shapes))) is not None:
        given["features"], free["features"] = one.expand(layers, 2, -1, -1).contiguous(), {1: rows}
    if policy.allocator.needs_scores:
        given["scores"], free["scores"] = torch.rand(layers, 2, heads, 64), {1: rows, 3: slots}
    try:
        exported = torch.export.export(program, (), given, dynamic_shapes=free)
    except (RuntimeError, TypeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        raise UserError(
            f"{type(policy.allocator).__name__}: cannot be exported ({str(error).splitlines()[0]})"
        ) from None
    about = {
        "inputs": {name: INPUTS[name] for name in given},
        "output": OUTPUT,
        "layers": layers,
        "heads": heads,
        "sinks": policy.sinks,
        "recent": policy.recent,
    }
    try:
        torch.export.save(exported, where, extra_files={ABOUT: json.dumps(about, indent=2)})
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None
    return where


def _nothing(shapes: Mapping[str, int]) -> Observation:
    """A prompt of two tokens, to see how many features an allocator has."""
    keys = torch.zeros(1, shapes["heads"], 2, shapes["head_dim"])
    positions = torch.arange(2).expand(keys.shape[:3])
    return Observation(
        layer_idx=0,
        queries=keys,
        query_positions=positions[:, 0],
        keys=keys,
        values=keys,
        scaling=1.0,
        valid=torch.ones_like(positions, dtype=torch.bool),
        positions=positions,
    )
