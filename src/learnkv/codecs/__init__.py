"""Codecs: how keys and values are stored."""

from learnkv.codecs.covariance_rotation import CovarianceRotation
from learnkv.codecs.float16 import Float16
from learnkv.codecs.fp8 import FP8
from learnkv.codecs.kivi import KIVIKeys, KIVIValues, LatestExact
from learnkv.codecs.logquant import LogQuant
from learnkv.codecs.oscar_norm import OScaRKeys, OScaRValues, RotatedBlocks, TokenNorm
from learnkv.codecs.per_channel import PerChannel
from learnkv.codecs.per_token import PerToken
from learnkv.codecs.spherical import Spherical
from learnkv.codecs.spherical_tiers import SphericalTiers
from learnkv.codecs.think import ThinK
from learnkv.codecs.turboquant import TurboQuant
from learnkv.core.codec import Codec

__all__ = [
    "FP8",
    "Codec",
    "CovarianceRotation",
    "Float16",
    "KIVIKeys",
    "KIVIValues",
    "LatestExact",
    "LogQuant",
    "OScaRKeys",
    "OScaRValues",
    "PerChannel",
    "PerToken",
    "RotatedBlocks",
    "Spherical",
    "SphericalTiers",
    "ThinK",
    "TokenNorm",
    "TurboQuant",
]
