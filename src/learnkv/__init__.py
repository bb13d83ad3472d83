"""Trainable KV-cache compression: heuristics and learned predictors on one eviction path."""

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.attention import attach, detach
from learnkv.inference.generate import continuation, generate
from learnkv.inference.lossless import generate_lossless
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy, save_policy
from learnkv.persistence.stored_cache import load_cache, save_cache
from learnkv.policy.policy import Policy

__all__ = [
    "CompressedCache",
    "Policy",
    "attach",
    "continuation",
    "detach",
    "generate",
    "generate_lossless",
    "load_cache",
    "load_model",
    "load_policy",
    "prefill",
    "save_cache",
    "save_policy",
]
