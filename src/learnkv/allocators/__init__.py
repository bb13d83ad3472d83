"""Allocators: how the budget is split over layers and heads."""

from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.cake import CAKE
from learnkv.allocators.compresskv import CompressKV
from learnkv.allocators.duo_attention import DuoAttention
from learnkv.allocators.fixed_layers import FixedLayers
from learnkv.allocators.flat import Flat
from learnkv.allocators.flux_attention import FluxAttention
from learnkv.allocators.headkv import HeadKV
from learnkv.allocators.heterocache import HeteroCache
from learnkv.allocators.lava import LAVa
from learnkv.allocators.layer_by_layer import LayerByLayer
from learnkv.allocators.learned import LearnedAllocator
from learnkv.allocators.learned_sequential import LearnedSequentialAllocator
from learnkv.allocators.lukv import LUKV
from learnkv.allocators.nll_layers import NLLLayers
from learnkv.allocators.pyramid import Pyramid
from learnkv.allocators.tgv_kv import TGVKV
from learnkv.allocators.threshold import Threshold
from learnkv.allocators.uniform import Uniform
from learnkv.core.allocator import Allocator

__all__ = [
    "CAKE",
    "LUKV",
    "TGVKV",
    "AdaKV",
    "Allocator",
    "CompressKV",
    "DuoAttention",
    "FixedLayers",
    "Flat",
    "FluxAttention",
    "HeadKV",
    "HeteroCache",
    "LAVa",
    "LayerByLayer",
    "LearnedAllocator",
    "LearnedSequentialAllocator",
    "NLLLayers",
    "Pyramid",
    "Threshold",
    "Uniform",
]
