"""Page selectors: which entries a decode step reads when nothing is evicted."""

from learnkv.core.entry_selector import EntrySelector
from learnkv.core.page_selector import PageSelector
from learnkv.pages.delta import DELTA
from learnkv.pages.heterocache import HeteroCache
from learnkv.pages.louver import Louver
from learnkv.pages.quest import Quest
from learnkv.pages.sink_router import SinkRouter

__all__ = ["DELTA", "EntrySelector", "HeteroCache", "Louver", "PageSelector", "Quest", "SinkRouter"]
