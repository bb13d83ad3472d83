"""`learnkv calibrate model=MODEL out=FOLDER`: measures the tables of a model that methods read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from learnkv.calibration.covariance_rotations import covariance_rotations
from learnkv.calibration.curve import budget_curve
from learnkv.calibration.frequencies import query_frequencies
from learnkv.calibration.gates import head_gates
from learnkv.calibration.heads import Kind, head_scores
from learnkv.calibration.kvzip_gate import kvzip_gate
from learnkv.calibration.layers import layer_errors
from learnkv.calibration.moments import query_moments
from learnkv.calibration.trials import Trial, sample_trials
from learnkv.errors import UserError
from learnkv.formats import duo, headkv, layers, lukv, tensors
from learnkv.inference.models import load_model
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

DECIMALS = 5
Measurement = Literal[
    "head_scores",
    "copying_heads",
    "semantic_heads",
    "layer_errors",
    "budget_curve",
    "head_gates",
    "query_moments",
    "query_frequencies",
    "kvzip_gate",
    "covariance_rotation",
]
UNUSED = ("copying_heads", "covariance_rotation")
"""What no policy here reads; the second needs a head size that is a power of two."""
EVERYTHING: tuple[Measurement, ...] = tuple(name for name in get_args(Measurement) if name not in UNUSED)
KINDS: dict[Measurement, Kind] = {
    "head_scores": "reasoning",
    "copying_heads": "copying",
    "semantic_heads": "semantic",
}


@dataclass(frozen=True)
class CalibrationConfig:
    """Measure the tables of a model that methods read.

    Args:
        model: `reference`, a model's folder or a hub id.
        out: folder to write: `head_scores.json` (HeadKV), `copying_heads.json` (retrieval heads, in the same format),
            `semantic_heads.json` and `layer_errors.json` (CompressKV), `lukv.npy` (LU-KV's budget curve), `duo/`
            (DuoAttention's gates), `query_moments.safetensors` (ExpectedAttention), `query_frequencies.safetensors`
            (TriAttention), `kvzip_gate.safetensors` (Fast KVzip), `covariance_rotation.safetensors` (the codec OSCAR).
        only: measurements to make; by default all but `copying_heads` and `covariance_rotation`, which no policy here
            needs.
        policy: policy that layer errors and the budget curve are measured for.
        keep: kept fraction of the layer errors.
        lengths: tokens of the contexts.
        samples: questions at each length; head scores use those that the model answers correctly.
        sink: first tokens that a streaming head keeps.
        recent: latest tokens that a streaming head keeps.
        gate_steps: steps of the gates' training, one question each.
        gate_penalty: weight in nats of the mean gate in the gates' loss.
        kvzip_steps: training steps of Fast KVzip's gate, per layer.
        seed: seed of the questions.
        revision: branch, tag or commit of a hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:N or mps.
        attn: transformers' attention implementation.
    """

    model: str = "reference"
    out: str = ""
    only: tuple[Measurement, ...] = ()
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


def calibrate(config: CalibrationConfig, resolved: str) -> None:
    """Measure and write one file after the other; prints the name of each."""
    policy = load_policy(config.policy)
    if policy.scorer is None:
        raise UserError(f"policy={config.policy}: expected a policy that evicts")
    model, tokenizer = load_model(config.model, config.revision, config.dtype, config.device, config.attn)
    trials: list[Trial] = []
    for length in config.lengths:
        trials += sample_trials(tokenizer, length, config.samples, config.seed)
    for file in _written(config, policy, model, tokenizer, trials):
        print(file, flush=True)


def _written(
    config: CalibrationConfig, policy: Policy, model: torch.nn.Module, tokenizer: object, trials: list[Trial]
) -> Iterator[Path]:
    """Write the requested files; yields their paths."""
    out, wanted = Path(config.out).expanduser(), config.only or EVERYTHING
    kinds = {KINDS[name]: name for name in wanted if name in KINDS}
    if kinds:
        for kind, scores in head_scores(model, tokenizer, trials, list(kinds)).items():
            rounded = [[[round(score, DECIMALS) for score in head] for head in layer] for layer in scores]
            yield headkv.write(out / f"{kinds[kind]}.json", rounded)
    contexts = [trial.context for trial in trials]
    measured: dict[str, Callable[[], Path]] = {
        "layer_errors": lambda: layers.write(
            out / "layer_errors.json",
            [round(error, DECIMALS) for error in layer_errors(model, trials, policy, config.keep).tolist()],
        ),
        "budget_curve": lambda: lukv.write(out / "lukv.npy", budget_curve(model, trials, policy)),
        "head_gates": lambda: duo.write(
            out / "duo",
            head_gates(model, trials, config.sink, config.recent, config.gate_steps, config.gate_penalty),
            config.sink,
            config.recent,
            {"model_name": config.model, "num_steps": config.gate_steps, "reg_weight": config.gate_penalty},
        ),
        "query_moments": lambda: tensors.write(
            out / "query_moments.safetensors", query_moments(model, contexts), torch.float16
        ),
        "query_frequencies": lambda: tensors.write(
            out / "query_frequencies.safetensors", query_frequencies(model, contexts)
        ),
        "kvzip_gate": lambda: tensors.write(
            out / "kvzip_gate.safetensors",
            kvzip_gate(model, contexts, config.kvzip_steps, seed=config.seed),
            torch.float16,
        ),
        "covariance_rotation": lambda: tensors.write(
            out / "covariance_rotation.safetensors", covariance_rotations(model, contexts)
        ),
    }
    for name, write in measured.items():
        if name in wanted:
            yield write()
