"""The models that are measured: sizes from their published configs, weights random and made on the device."""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

ELEMENT = 2
"""Bytes of a bfloat16 number."""

CONTEXT = 2**20  # positions a built model accepts: a prompt of 128k and its continuation must fit


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `heads` query heads, `kv_heads` key-value heads of `dim` numbers each."""

    name: str
    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    head_norms: bool = False

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def parameters(self) -> int:
        """Numbers in the weights."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        attention = self.hidden * (2 * queries + 2 * keys)
        attention += (queries + 2 * keys) * self.attention_bias + 2 * self.dim * self.head_norms
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def streamed(self) -> int:
        """Bytes of weights that a decode step reads: all but an embedding that is only looked up."""
        return ELEMENT * (self.parameters - (0 if self.tied else self.vocabulary * self.hidden))

    @property
    def linear(self) -> int:
        """Weights that every token of a prompt is multiplied with: without embeddings and the head."""
        return self.parameters - self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token, all layers."""
        return 2 * self.layers * self.kv_heads * self.dim * ELEMENT

    def step_bytes(self, batch: int, entries: float) -> float:
        """Bytes that a decode step must move: weights once, `entries` tokens of cache per row of the batch."""
        return self.streamed + batch * entries * self.token_bytes

    def tiny(self) -> "Shape":
        """The same family, group and bits of the architecture, small enough for a CPU."""
        return dataclasses.replace(
            self, layers=2, hidden=32, ffn=64, heads=2 * self.group, kv_heads=2, dim=16, vocabulary=97
        )

    def config(self, context: int = CONTEXT) -> PretrainedConfig:
        """Transformers' config of a model that accepts `context` positions."""
        settings = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.dim,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": context,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return AutoConfig.for_model(self.family, **settings)

    def build(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """A model with random weights, in evaluation mode and without gradients."""
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype, attn_implementation="sdpa")
        return model.eval().requires_grad_(False)


LLAMA_8B = Shape("Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, tied=False)
QWEN_7B = Shape("Qwen2.5-7B", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, tied=False, attention_bias=True)
LLAMA_1B = Shape("Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, tied=True)
QWEN3_8B = Shape("Qwen3-8B", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, tied=False, head_norms=True)
QWEN_06B = Shape("Qwen3-0.6B", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, tied=True, head_norms=True)
QWEN_05B = Shape("Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, tied=True, attention_bias=True)

SHAPES = {shape.name: shape for shape in (LLAMA_8B, QWEN_7B, QWEN_06B, QWEN_05B)}
