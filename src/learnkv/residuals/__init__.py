"""Residual stores: what is remembered of evicted entries."""

from learnkv.core.residual_store import ResidualStore
from learnkv.residuals.moments import Moments

__all__ = ["Moments", "ResidualStore"]
