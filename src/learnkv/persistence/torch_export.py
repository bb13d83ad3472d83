"""A policy's budgets as a `torch.export` program, for engines without learnkv and transformers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats.files import output_file
from learnkv.ops.round_to_budget import round_in_order, round_to_budget
from learnkv.policy.budget import protected_entries
from learnkv.policy.policy import Policy

DESCRIPTION = "learnkv.json"
"""File within the program that describes its inputs and its output."""
INPUTS = {
    "keep": "[B] float64, fraction of each row's entries to keep",
    "valid": "[B, S] bool, True where a slot of the left-padded prompt is a token",
    "features": "[L, B, H, F] float32, of each head: normalised entropy of the last queries' attention, mass of its "
    "top 5 %, mass of the first 4 tokens; behind them the budget of the heuristic",
    "scores": "[L, B, H, S] float32, importance of entries by the policy's scorer; for a LearnedAllocator by the "
    "heuristic below a learned one",
}
OUTPUT = "[L, B, H] int64, entries that each kv head keeps; a row sums to round(keep * tokens * L * H), half to even"


class BudgetProgram(nn.Module):
    """Budgets from tensors, with the arithmetic of `Policy.plan`.

    Args:
        policy: policy whose allocator and protected tokens are exported.
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
        """Budgets [L, B, H] int64; `INPUTS` describes the arguments."""
        everywhere = self.layers * self.heads
        entries = valid.sum(-1)
        total = torch.round(keep.double() * entries * everywhere).long()
        protected = torch.minimum((total // (2 * everywhere)).clamp(max=self.sinks + self.recent), entries)
        positions = torch.where(valid, valid.cumsum(-1) - 1, -1)
        rows = (entries.unsqueeze(-1), protected.unsqueeze(-1))
        always = protected_entries(positions, valid, *rows, self.recent, self.sinks)
        if scores is None:  # an allocator without `needs_scores` uses only the number of entries
            scores = valid.new_zeros((), dtype=torch.float32).expand(
                self.layers, valid.shape[0], self.heads, valid.shape[1]
            )
        scores = scores.masked_fill(~valid[:, None], -torch.inf).masked_fill(always[:, None], torch.inf)
        wanted = self.allocator(scores, features, total.double() / everywhere)
        exact = round_in_order if self.allocator.sequential else round_to_budget
        return exact(wanted, entries, total, protected)


@torch.no_grad()
def export_budgets(path: str | Path, policy: Policy, shapes: Mapping[str, int]) -> Path:
    """Export the budgets of a policy as a `.pt2` file for `torch.export.load`; batch size and length are dynamic.

    Args:
        shapes: the model's `layers`, `heads` and `head_dim`.

    Raises:
        UserError: the path cannot be written, the policy has a precision, or its allocator has no learned budgets or
            cannot be traced.
    """
    _check_allocator(policy)
    if policy.precision is not None:
        raise UserError(f"precision={policy.precision.label}: a program has budgets in entries, expected none")
    if policy.residual is not None:
        raise UserError(f"residual={policy.residual.name}: a program says what is kept, expected none")
    with output_file(path) as part:
        inputs, exported = _traced(policy, shapes)
        description = {
            "inputs": {name: INPUTS[name] for name in inputs},
            "output": OUTPUT,
            "layers": shapes["layers"],
            "heads": shapes["heads"],
            "sinks": policy.sinks,
            "recent": policy.recent,
        }
        torch.export.save(exported, part, extra_files={DESCRIPTION: json.dumps(description, indent=2)})
    return Path(path).expanduser()


def _check_allocator(policy: Policy) -> None:
    if policy.allocator.by_scores:
        raise UserError(
            f"{type(policy.allocator).__name__}: its budgets follow learned scores (by: scores), which a program does "
            "not have; expected by: shares"
        )
    if not any(True for _ in policy.allocator.parameters()):
        raise UserError(
            f"{type(policy.allocator).__name__}: has nothing learned, expected a policy with learned budgets"
        )


def _traced(policy: Policy, shapes: Mapping[str, int]) -> tuple[dict[str, Tensor], torch.export.ExportedProgram]:
    """Example inputs, and the program."""
    layers, heads = shapes["layers"], shapes["heads"]
    program = BudgetProgram(policy, layers, heads).cpu().eval()
    rows, slots = torch.export.Dim("batch"), torch.export.Dim("length")
    inputs = {"keep": torch.tensor([0.2, 0.4], dtype=torch.float64), "valid": torch.ones(2, 64, dtype=torch.bool)}
    dynamic: dict[str, dict[int, object]] = {"keep": {0: rows}, "valid": {0: rows, 1: slots}}
    if (features := policy.allocator.features(_small_observation(shapes))) is not None:
        inputs["features"], dynamic["features"] = features.expand(layers, 2, -1, -1).contiguous(), {1: rows}
    if policy.allocator.needs_scores:
        inputs["scores"], dynamic["scores"] = torch.rand(layers, 2, heads, 64, dtype=torch.float32), {1: rows, 3: slots}
    try:
        exported = torch.export.export(program, (), inputs, dynamic_shapes=dynamic)
    except (RuntimeError, TypeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        raise UserError(
            f"{type(policy.allocator).__name__}: cannot be exported ({str(error).splitlines()[0]})"
        ) from None
    return inputs, exported


def _small_observation(shapes: Mapping[str, int]) -> Observation:
    """Observation of a prompt of two tokens, for the number of the allocator's features."""
    keys = torch.zeros(1, shapes["heads"], 2, shapes["head_dim"], dtype=torch.float32)
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
