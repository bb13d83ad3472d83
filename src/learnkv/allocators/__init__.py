"""Allocators: how is the budget split over layers and heads."""

from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.base import Allocator
from learnkv.allocators.flat import Flat
from learnkv.allocators.learned import LearnedAllocator
from learnkv.allocators.pyramid import Pyramid
from learnkv.allocators.uniform import Uniform

__all__ = [
    "AdaKV",
    "Allocator",
    "Flat",
    "LearnedAllocator",
    "Pyramid",
    "Uniform",
]
