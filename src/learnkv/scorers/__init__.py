"""Scorers: how important is each cache entry."""

from learnkv.scorers.base import Scorer
from learnkv.scorers.knorm import Knorm
from learnkv.scorers.learned import LearnedScorer
from learnkv.scorers.random import Random
from learnkv.scorers.snapkv import SnapKV
from learnkv.scorers.streaming_llm import StreamingLLM

__all__ = ["Knorm", "LearnedScorer", "Random", "Scorer", "SnapKV", "StreamingLLM"]
