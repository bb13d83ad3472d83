"""Page selectors: which entries does a decode step read, when nothing is evicted."""

from learnkv.pages.base import PageSelector
from learnkv.pages.quest import Quest

__all__ = ["PageSelector", "Quest"]
