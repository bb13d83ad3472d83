"""Precision: how many bits kept entries are stored in."""

from learnkv.core.precision import Level, LevelPlan, Precision
from learnkv.precision.learned import LearnedPrecision
from learnkv.precision.uniform import UniformPrecision

__all__ = ["LearnedPrecision", "Level", "LevelPlan", "Precision", "UniformPrecision"]
