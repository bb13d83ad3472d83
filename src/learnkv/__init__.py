"""Trainable KV-cache compression: heuristics and learned predictors on one eviction path."""

from learnkv.attention import attach, detach
from learnkv.cache import CompressedCache
from learnkv.generation import continuation, generate, prefill
from learnkv.io import load_policy, save_policy
from learnkv.models import load_model
from learnkv.policy import Policy

__all__ = [
    "CompressedCache",
    "Policy",
    "attach",
    "continuation",
    "detach",
    "generate",
    "load_model",
    "load_policy",
    "prefill",
    "save_policy",
]
