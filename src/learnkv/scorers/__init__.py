"""Scorers: the importance of each cache entry."""

from learnkv.core.scorer import Scorer
from learnkv.scorers.ams import AMS
from learnkv.scorers.cake import CAKE
from learnkv.scorers.chunked import Chunked
from learnkv.scorers.compresskv import CompressKV
from learnkv.scorers.constant import Constant
from learnkv.scorers.criticalkv import CriticalKV
from learnkv.scorers.defensivekv import DefensiveKV
from learnkv.scorers.dkv import DKV
from learnkv.scorers.dropkv import DropKV
from learnkv.scorers.expected_attention import ExpectedAttention
from learnkv.scorers.fast_kvzip import FastKVzip
from learnkv.scorers.gate import GateScorer
from learnkv.scorers.h2o import H2O
from learnkv.scorers.hidden import HiddenScorer
from learnkv.scorers.indexmem import IndexMem
from learnkv.scorers.keydiff import KeyDiff
from learnkv.scorers.knorm import Knorm
from learnkv.scorers.kvec import KVEC
from learnkv.scorers.kvgrad import KVgrad
from learnkv.scorers.kvzip import KVzip
from learnkv.scorers.laprox import LaProx
from learnkv.scorers.lava import LAVa
from learnkv.scorers.learned import LearnedScorer
from learnkv.scorers.observed_attention import ObservedAttention
from learnkv.scorers.prompt_order import PromptOrder
from learnkv.scorers.random import Random
from learnkv.scorers.restkv import ReSTKV
from learnkv.scorers.rkv import RKV
from learnkv.scorers.shotkv import ShotKV
from learnkv.scorers.snapkv import SnapKV
from learnkv.scorers.snapstream import SnapStream
from learnkv.scorers.streaming_llm import StreamingLLM
from learnkv.scorers.tgv_kv import TGVKV
from learnkv.scorers.thought_hierarchy import ThoughtHierarchy
from learnkv.scorers.tova import TOVA
from learnkv.scorers.triattention import TriAttention
from learnkv.scorers.trimkv import TrimKV
from learnkv.scorers.vase import VaSE

__all__ = [
    "AMS",
    "CAKE",
    "DKV",
    "H2O",
    "KVEC",
    "RKV",
    "TGVKV",
    "TOVA",
    "Chunked",
    "CompressKV",
    "Constant",
    "CriticalKV",
    "DefensiveKV",
    "DropKV",
    "ExpectedAttention",
    "FastKVzip",
    "GateScorer",
    "HiddenScorer",
    "IndexMem",
    "KVgrad",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LAVa",
    "LaProx",
    "LearnedScorer",
    "ObservedAttention",
    "PromptOrder",
    "Random",
    "ReSTKV",
    "Scorer",
    "ShotKV",
    "SnapKV",
    "SnapStream",
    "StreamingLLM",
    "ThoughtHierarchy",
    "TriAttention",
    "TrimKV",
    "VaSE",
]
