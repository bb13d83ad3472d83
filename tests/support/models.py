"""Tiny random models of every family, built from configs, and an oracle that masks what a policy evicts."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from learnkv import CompressedCache, Policy, attach, load_policy, prefill
from learnkv.allocators import AdaKV, LayerByLayer, LearnedAllocator, LearnedSequentialAllocator, Pyramid, Uniform
from learnkv.persistence.named_configs import CONFIGS as CONFIGURATIONS
from learnkv.scorers import LearnedScorer, Scorer, SnapKV
from support.configs import COMMON, CONFIGS, VOCABULARY
from support.observations import randomised
from support.tables import policy_of

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""What `load_model` returns."""


def build(family: str, attn: str | None = None, **changes: object) -> PreTrainedModel:
    """A new model of the family with the same weights every time, in evaluation mode; with sdpa where that is exact."""
    attn = attn or ("eager" if family in ("gemma2", "gpt-oss") else "sdpa")
    settings = {**COMMON, **CONFIGS[family], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
        for name, held in model.named_parameters():
            if "norm" in name:  # norms that are not the identity
                nn.init.normal_(held, float(held.detach().mean()), 0.1)
            if "sinks" in name:  # that hold much of the attention
                nn.init.normal_(held, 2.0, 1.0)
    return model.eval().requires_grad_(False)


@functools.cache
def plain(family: str) -> PreTrainedModel:
    """One untouched model per family; tests never attach to it."""
    return build(family)


@functools.cache
def attached(family: str) -> PreTrainedModel:
    """The same model with learnkv attached."""
    return attach(build(family))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [B, T] without the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1000 * seed + length))


def padded(rows: Sequence[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows [T] of different lengths as ids [B, T] and mask [B, T]; what stands in the padding is random."""
    longest = max(len(row) for row in rows)
    ids, mask = tokens(len(rows), longest, seed=99), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, one in enumerate(rows):
        at = slice(longest - len(one), None) if side == "left" else slice(0, len(one))
        ids[row, at], mask[row, at] = one, 1
    return ids, mask


class Oracle:
    """Attention in float64 with an additive mask per layer and kv head over the entries of one prompt."""

    NAME = "oracle"

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(self.NAME, self._attention)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)
        self.model = model
        self.before = self.model.config._attn_implementation
        self.compressible = compressible(self.model)
        self.kept: Tensor | None = None

    def __call__(self, prompt: Tensor, kept: Tensor | None, new_tokens: Tensor) -> Tensor:
        """Logits [T, V] of the tokens `new_tokens` [T] after `prompt` [S], of which heads see `kept` [L, H, S] only."""
        cache = DynamicCache(config=self.model.config)
        self.model.set_attn_implementation(self.before)
        self.model(input_ids=prompt.unsqueeze(0), past_key_values=cache, logits_to_keep=1)
        self.kept = kept
        self.model.set_attn_implementation(self.NAME)
        AttentionInterface.register(self.NAME, self._attention)
        return self.model(input_ids=new_tokens.unsqueeze(0), past_key_values=cache).logits[0]

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group, new, seen = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        query, key, value = (x.double() for x in (query, key, value))
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        order = torch.arange(seen)
        hidden = order > order[seen - new :].unsqueeze(-1)
        if attention_mask is not None:
            hidden = hidden | ~attention_mask
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.kept is not None and module.layer_idx in self.compressible:
            evicted = ~self.kept[module.layer_idx].repeat_interleave(group, 0)
            scores[..., : evicted.shape[-1]].masked_fill_(evicted.view(1, -1, 1, evicted.shape[-1]), float("-inf"))
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., :seen]
        return (weights @ value).transpose(1, 2).to(torch.float32).contiguous(), None


@functools.cache
def oracle(family: str) -> Oracle:
    return Oracle(build(family))


def heads_of(model: PreTrainedModel) -> int:
    return model.config.num_key_value_heads


def compressible(model: PreTrainedModel) -> list[int]:
    return CompressedCache(model.config).compressible


SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGURATIONS / "policies").glob("*.yaml")}
ALTERING = {"precision", "residual"}  # attention is not that to the kept entries as they were
EVICTING = sorted(name for name, spec in SHIPPED.items() if spec["scorer"] is not None and not ALTERING & spec.keys())
DECODING = [name for name in EVICTING if SHIPPED[name].get("evict_interval")]
HEURISTICS = [name for name in EVICTING if name not in DECODING]
LEARNED = ["budgets", "conditioned", "tokens", "causal", "ranked", "sampled"]


heuristic = functools.cache(load_policy)


def read(model: PreTrainedModel, *prompt: Tensor, **more: object) -> CompressedCache:
    """A prompt, read for whatever `policy_for` gives."""
    refused = ("kvgrad",) if model.config.model_type == "qwen3_next" else ()  # its pass reads the output projection
    names = [name for name in EVICTING + LEARNED if name not in refused]
    return prefill(model, *prompt, policies=[policy_for(name, model) for name in names], **more)


@functools.cache
def policy_for(name: str, model: PreTrainedModel) -> Policy:
    """A heuristic by the name of its YAML, or a learned policy whose parameters are random. Each is made once."""
    layers, heads = len(compressible(model)), heads_of(model)
    if name not in LEARNED:
        config = model.config
        group, hidden = config.num_attention_heads // heads, config.hidden_size
        return policy_of(name, layers, heads, group, config.head_dim, hidden)
    scorer: Scorer = SnapKV(window=16)
    if name == "causal":
        return Policy(scorer, randomised(LearnedSequentialAllocator(LayerByLayer(Pyramid()), layers, heads)))
    base = {
        "budgets": AdaKV(),
        "conditioned": Uniform(),
        "tokens": Pyramid(),
        "ranked": Uniform(),
        "sampled": Uniform(),
    }[name]
    by, conditioned = "scores" if name in ("ranked", "sampled") else "shares", name in ("conditioned", "ranked")
    allocator = LearnedAllocator(base, layers, heads, conditioned, by=by)
    if name in ("tokens", "ranked", "sampled"):
        sizes = {"rank": 4 if name == "ranked" else 0, "hidden_size": model.config.hidden_size}
        sampling = 0.3 if name == "sampled" else 0.0
        scorer = LearnedScorer(scorer, layers, heads, model.config.head_dim, sampling=sampling, **sizes)
    randomised(scorer)
    if name == "sampled":
        scorer.sampling_growth.data.div_(30)  # scales of all sizes, none out of bounds
    return Policy(scorer, randomised(allocator))


def kept_mask(cache: CompressedCache, row: int) -> Tensor:
    """[L, H, n] True where a head of a model layer retains the prompt position; sliding layers count as all True."""
    heads = cache.layers[cache.compressible[0]].heads
    kept = torch.ones(len(cache.layers), heads, cache.prompt_lengths[row], dtype=torch.bool)
    for layer in cache.compressible:
        for head in range(heads):
            kept[layer, head] = False
            kept[layer, head, cache.kept_positions(layer, row, head)] = True
    return kept


def kept(cache: CompressedCache, row: int) -> list[list[int]]:
    """The kept positions of every compressible layer and head."""
    return [one.nonzero().flatten().tolist() for one in kept_mask(cache, row)[cache.compressible].flatten(0, 1)]


def assert_kept_alike(one: CompressedCache, row: int, other: CompressedCache, other_row: int, scores: Tensor) -> None:
    """The same entries are kept, up to ties: `scores` [L, H, n] of what only one of them keeps lie at the threshold."""
    ours, theirs = (
        cache_kept[cache.compressible]
        for cache, cache_kept in ((one, kept_mask(one, row)), (other, kept_mask(other, other_row)))
    )
    assert ours.sum() == theirs.sum()
    if torch.equal(ours, theirs):
        return
    threshold = scores.masked_fill(~ours, torch.inf).amin(-1, keepdim=True).expand_as(scores)
    differ = ours ^ theirs
    assert differ.sum() <= 4
    torch.testing.assert_close(scores[differ], threshold[differ], rtol=1e-4, atol=0)


def assert_logits_close(ours: Tensor, theirs: Tensor) -> None:
    """Logits here have a standard deviation between 1 and 2; single precision leaves some 1e-5 of them undecided."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
