"""Methods that kvpress and learnkv both have, with the settings that make their definitions equal."""

from dataclasses import dataclass
from typing import Any

from learnkv.allocators import AdaKV, Allocator, Pyramid
from learnkv.policy.policy import Policy
from learnkv.scorers import TOVA, ExpectedAttention, KeyDiff, Knorm, Scorer, SnapKV, StreamingLLM

WINDOW, KERNEL = 32, 5
SNAPKV = {"press": "SnapKVPress", "arguments": {"window_size": WINDOW, "kernel_size": KERNEL}}


@dataclass(frozen=True)
class Method:
    """One method in both libraries, with definitions made equal."""

    press: dict[str, Any]
    scorer: Scorer
    shipped: str
    """Our YAML."""
    note: str
    """What has to be set for the definitions to be equal."""
    allocator: Allocator | None = None
    protected: tuple[int, int] = (0, 0)
    """First and last entries that kvpress keeps in any case."""

    @property
    def policy(self) -> Policy:
        return Policy(self.scorer, self.allocator, *self.protected)


def plain(name: str, **arguments: Any) -> dict[str, Any]:
    """What builds a press of kvpress in its own environment."""
    return {"press": f"{name}Press", "arguments": arguments}


METHODS = {
    "SnapKV": Method(
        SNAPKV,
        SnapKV(WINDOW, KERNEL),
        "snapkv",
        f"window {WINDOW} and kernel {KERNEL}; kvpress keeps the whole window, our YAML 4 sinks and 8 recent entries "
        "and pools over 7",
        protected=(0, WINDOW),
    ),
    "PyramidKV": Method(
        {**SNAPKV, "press": "PyramidKVPress"},
        SnapKV(WINDOW, KERNEL),
        "pyramidkv",
        "`rounding: kvpress`, whose table is flat, SnapKV's, wherever the last layer would get less than the window; "
        "ours is a pyramid at every budget and spends it exactly",
        allocator=Pyramid(protected=WINDOW, rounding="kvpress"),
        protected=(0, WINDOW),
    ),
    "AdaKV": Method(
        {"press": "AdaKVPress", "arguments": {"press": SNAPKV, "alpha_safeguard": 0.2}},
        SnapKV(WINDOW, KERNEL),
        "adakv",
        "`rounding: kvpress`: a fifth of each head's share is set aside and the rest is competed for; the authors' "
        "rule, ours by default, mixes equal shares with the outcome of a competition for everything",
        allocator=AdaKV(rounding="kvpress"),
        protected=(0, WINDOW),
    ),
    "ExpectedAttention": Method(
        plain("ExpectedAttention"),
        ExpectedAttention(),
        "expected_attention",
        "the same defaults; our YAML keeps 8 recent entries besides the sinks",
    ),
    "KeyDiff": Method(plain("KeyDiff"), KeyDiff(), "keydiff", "the same; our YAML keeps 4 sinks and 8 recent entries"),
    "Knorm": Method(plain("Knorm"), Knorm(), "knorm", "the same; our YAML keeps 4 sinks and 8 recent entries"),
    "StreamingLLM": Method(plain("StreamingLLM"), StreamingLLM(), "streaming_llm", "the same, our YAML too"),
    "TOVA": Method(
        plain("TOVA"), TOVA(), "tova", "kvpress keeps the newest entry; our YAML 4 sinks and 8", protected=(0, 1)
    ),
}
