"""Precision: how many bits kept entries are stored in."""

from learnkv.core.precision import Level, LevelPlan, Precision
from learnkv.precision.fixed_tiers import FixedTiers
from learnkv.precision.learned import LearnedPrecision
from learnkv.precision.rate_distortion import RateDistortion
from learnkv.precision.shared import SharedPrecision
from learnkv.precision.uniform import UniformPrecision

__all__ = [
    "FixedTiers",
    "LearnedPrecision",
    "Level",
    "LevelPlan",
    "Precision",
    "RateDistortion",
    "SharedPrecision",
    "UniformPrecision",
]
