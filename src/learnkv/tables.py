"""`python -m learnkv.tables model=MODEL out=FOLDER`: every table that a policy here reads, measured of a model."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learnkv.calibration.curve import budget_curve
from learnkv.calibration.gates import head_gates
from learnkv.calibration.heads import Kind, head_scores
from learnkv.calibration.kvzip_gate import kvzip_gate
from learnkv.calibration.layers import layer_errors
from learnkv.calibration.moments import query_moments
from learnkv.calibration.trials import draw
from learnkv.config import run_main
from learnkv.errors import UserError
from learnkv.formats import duo, headkv, layers, lukv, tensors
from learnkv.io import load_policy
from learnkv.models import load_model

DECIMALS = 5
HEADS: dict[Kind, str] = {"reasoning": "head_scores.json", "semantic": "semantic_heads.json"}


@dataclass(frozen=True)
class TablesConfig:
    """Measure the tables of a model: head scores, layer errors, a budget curve and head gates.

    Args:
        model: `reference`, a model's folder or a hub id.
        out: folder to write: `head_scores.json` (HeadKV), `semantic_heads.json` and `layer_errors.json` (CompressKV),
            `lukv.npy` (LU-KV), `duo/` (DuoAttention), `query_moments.safetensors` (ExpectedAttention),
            `kvzip_gate.safetensors` (Fast KVzip).
        policy: whose entries the layer errors and the curve are about.
        keep: fraction at which layer errors are measured.
        lengths: tokens of the contexts.
        samples: questions at each length.
        sink: first tokens that a streaming head keeps.
        recent: latest tokens that a streaming head keeps.
        gate_steps: steps of the gates' training, one question each.
        gate_penalty: nats that a gate costs, on average over heads.
        kvzip_steps: steps of the training of Fast KVzip's gate, in every layer.
        seed: of the questions.
        revision, dtype, device, attn: as anywhere a model is loaded.
    """

    model: str = "reference"
    out: str = ""
    policy: str = "snapkv"
    keep: float = 0.1
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024])
    samples: int = 12
    sink: int = 4
    recent: int = 28
    gate_steps: int = 120
    gate_penalty: float = 0.3
    kvzip_steps: int = 400
    seed: int = 0
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("out=: expected a folder to write, got nothing")
        if self.samples < 1 or not self.lengths or self.gate_steps < 1 or self.kvzip_steps < 1:
            raise UserError(
                f"samples={self.samples} lengths={self.lengths} gate_steps={self.gate_steps} "
                f"kvzip_steps={self.kvzip_steps}: expected one at least"
            )


def main(config: TablesConfig, resolved: str) -> None:
    """Measure and write."""
    policy = load_policy(config.policy)
    if policy.scorer is None:
        raise UserError(f"policy={config.policy}: expected a policy that evicts")
    model, tokenizer = load_model(config.model, config.revision, config.dtype, config.device, config.attn)
    trials = [trial for length in config.lengths for trial in draw(tokenizer, length, config.samples, config.seed)]
    out = Path(config.out).expanduser()
    for kind, scores in head_scores(model, tokenizer, trials, list(HEADS)).items():
        rounded = [[[round(one, DECIMALS) for one in head] for head in layer] for layer in scores]
        print(headkv.write(out / HEADS[kind], rounded), flush=True)
    errors = layer_errors(model, trials, policy, config.keep)
    print(layers.write(out / "layer_errors.json", [round(one, DECIMALS) for one in errors.tolist()]), flush=True)
    print(lukv.write(out / "lukv.npy", budget_curve(model, trials, policy)), flush=True)
    gates = head_gates(model, trials, config.sink, config.recent, config.gate_steps, config.gate_penalty)
    told = {"model_name": config.model, "num_steps": config.gate_steps, "reg_weight": config.gate_penalty}
    print(duo.write(out / "duo", gates, config.sink, config.recent, told), flush=True)
    contexts = [trial.context for trial in trials]
    print(tensors.write(out / "query_moments.safetensors", query_moments(model, contexts), torch.float16), flush=True)
    gate = kvzip_gate(model, contexts, config.kvzip_steps, seed=config.seed)
    print(tensors.write(out / "kvzip_gate.safetensors", gate, torch.float16))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:] or ["out="], "tables"))
