"""Everything the reference model's recipe may be told."""

from dataclasses import dataclass, field

from experiments.reference_model.rows import Stage


@dataclass(frozen=True)
class Shape:
    """Size of the Llama: every (layer, kv head) pair has a cache of its own to compress."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 4096


@dataclass(frozen=True)
class ReferenceConfig:
    """Recipe of the reference model.

    Args:
        text: files of public-domain text (.txt or .jsonl with "text", also .gz); the standard library's
            docstrings are always added.
        output: folder of tokenizer, token pool, checkpoint, log and exported model.
        stages: the curriculum, in order.
        shape: size of the model.
        learning_rate: peak rate, of Muon for matrices (matched to AdamW's update size) and of AdamW for the rest.
        weight_decay: for both optimizers.
        warmup: steps of linear warm-up.
        cooldown: last steps, in which the rate falls linearly to zero.
        tokens_per_step: rows x length of a step.
        seed: of the rows and of the initial weights.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, 0 for PyTorch's own choice.
        checkpoint_minutes: minutes between checkpoints.
        log_every: steps between progress lines.
    """

    text: list[str] = field(default_factory=list)
    output: str = "runs/reference"
    stages: list[Stage] = field(default_factory=list)
    shape: Shape = field(default_factory=Shape)
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 100
    cooldown: int = 600
    tokens_per_step: int = 6144
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    checkpoint_minutes: float = 10.0
    log_every: int = 50

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: trapezoid over all steps, times the stage's own factor."""
        height = min(1.0, (step + 1) / self.warmup, (self.steps - step) / max(1, self.cooldown))
        return self.learning_rate * self.stage_at(step).rate * height
