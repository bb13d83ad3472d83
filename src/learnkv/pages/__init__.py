"""Page selectors: which entries does a decode step read, when nothing is evicted."""

from learnkv.core.page_selector import PageSelector
from learnkv.pages.quest import Quest

__all__ = ["PageSelector", "Quest"]
