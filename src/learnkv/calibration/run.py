"""`learnkv calibrate model=MODEL out=FOLDER`: measures the tables of a model that methods read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from learnkv.calibration.contributions import logit_heads
from learnkv.calibration.covariance_rotations import covariance_rotations
from learnkv.calibration.curve import budget_curve
from learnkv.calibration.frequencies import query_frequencies
from learnkv.calibration.gates import head_gates
from learnkv.calibration.head_kinds import head_kinds
from learnkv.calibration.heads import Kind, head_scores
from learnkv.calibration.indexer import indexer
from learnkv.calibration.kvzip_gate import kvzip_gate
from learnkv.calibration.layer_gains import layer_gains
from learnkv.calibration.layer_router import layer_router
from learnkv.calibration.layers import layer_errors
from learnkv.calibration.moments import query_moments
from learnkv.calibration.retention import retention_gates
from learnkv.calibration.text_units import text_units
from learnkv.calibration.trials import Trial, sample_trials
from learnkv.errors import UserError
from learnkv.formats import duo, headkv, heterocache, layers, lukv, tensors, unit_ends
from learnkv.inference.models import load_model
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

DECIMALS = 5
Measurement = Literal[
    "head_scores",
    "copying_heads",
    "semantic_heads",
    "logit_heads",
    "layer_errors",
    "budget_curve",
    "head_gates",
    "query_moments",
    "query_frequencies",
    "kvzip_gate",
    "retention_gates",
    "indexer",
    "unit_ends",
    "head_kinds",
    "layer_gains",
    "layer_router",
    "covariance_rotation",
]
UNUSED = ("copying_heads", "covariance_rotation")
"""What is measured where it is named only; the second needs a head size that is a power of two."""
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
            `semantic_heads.json` and `layer_errors.json` (CompressKV), `logit_heads.json` (LOCOS, in HeadKV's format),
            `lukv.npy` (LU-KV's budget curve), `duo/` (DuoAttention's gates), `query_moments.safetensors`
            (ExpectedAttention), `query_frequencies.safetensors` (TriAttention), `kvzip_gate.safetensors` (Fast KVzip),
            `retention_gates.safetensors` (TrimKV), `indexer.safetensors` (IndexMem),
            `unit_ends.json` (ShotKV), `head_kinds.json` (HeteroCache),
            `layer_router.safetensors` (Flux Attention), `layer_gains.json` (NLL-guided layers),
            `covariance_rotation.safetensors` (the codec OSCAR).
        only: measurements to make; by default all but `copying_heads`, which no policy here needs, and
            `covariance_rotation`.
        policy: policy that layer errors and the budget curve are measured for.
        keep: kept fraction of the layer errors, and that TrimKV's gates may retain of a context.
        lengths: tokens of the contexts.
        samples: questions at each length; head scores use those that the model answers correctly.
        sink: first tokens that a streaming head keeps.
        recent: latest tokens that a streaming head keeps.
        gate_steps: steps of the gates' training, one question each.
        gate_penalty: weight in nats of the mean gate in the gates' loss.
        kvzip_steps: training steps of Fast KVzip's gate, per layer.
        indexer_steps: training steps of IndexMem's indexers, one window of queries each, per layer.
        retention_steps: training steps of TrimKV's gates, one context each, per layer.
        stable: overlap of a head's best entries below which HeteroCache counts it as volatile.
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
    retention_steps: int = 100
    indexer_steps: int = 300
    stable: float = 0.5
    seed: int = 0
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("out=: expected a folder to write, got nothing")
        steps = (self.gate_steps, self.kvzip_steps, self.retention_steps, self.indexer_steps)
        if self.samples < 1 or not self.lengths or min(steps) < 1:
            raise UserError(
                f"samples={self.samples} lengths={self.lengths} gate_steps={self.gate_steps} "
                f"kvzip_steps={self.kvzip_steps} retention_steps={self.retention_steps} "
                f"indexer_steps={self.indexer_steps}: expected one at least"
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
            yield headkv.write(out / f"{kinds[kind]}.json", _rounded(scores))
    measured = _measurements(config, policy, model, tokenizer, trials)
    for name, write in measured.items():
        if name in wanted:
            yield write()


def _measurements(
    config: CalibrationConfig, policy: Policy, model: torch.nn.Module, tokenizer: object, trials: list[Trial]
) -> dict[str, Callable[[], Path]]:
    """What measures and writes each table but the heads' scores, which are read of the same answers."""
    out = Path(config.out).expanduser()
    contexts = [trial.context for trial in trials]
    return {
        "logit_heads": lambda: headkv.write(out / "logit_heads.json", _rounded(logit_heads(model, trials))),
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
        "retention_gates": lambda: tensors.write(
            out / "retention_gates.safetensors",
            retention_gates(model, contexts, config.keep, config.retention_steps, seed=config.seed),
            torch.float16,
        ),
        "indexer": lambda: tensors.write(
            out / "indexer.safetensors",
            indexer(model, contexts, config.indexer_steps, seed=config.seed),
            torch.float16,
        ),
        "unit_ends": lambda: unit_ends.write(out / "unit_ends.json", text_units(tokenizer)),
        "head_kinds": lambda: heterocache.write(out / "head_kinds.json", head_kinds(model, trials, config.stable)),
        "layer_gains": lambda: layers.write(
            out / "layer_gains.json",
            [round(gain, DECIMALS) for gain in layer_gains(model, trials, config.sink, config.recent).tolist()],
        ),
        "layer_router": lambda: tensors.write(
            out / "layer_router.safetensors",
            layer_router(model, trials, config.sink, config.recent, config.gate_steps, seed=config.seed),
            torch.float16,
        ),
        "covariance_rotation": lambda: tensors.write(
            out / "covariance_rotation.safetensors", covariance_rotations(model, contexts)
        ),
    }


def _rounded(trials: headkv.Trials) -> headkv.Trials:
    return [[[round(score, DECIMALS) for score in head] for head in layer] for layer in trials]
