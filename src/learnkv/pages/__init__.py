"""Page selectors: which entries a decode step reads when nothing is evicted."""

from learnkv.core.page_selector import PageSelector
from learnkv.pages.quest import Quest

__all__ = ["PageSelector", "Quest"]
