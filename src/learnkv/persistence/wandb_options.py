"""Options of Weights & Biases."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Wandb:
    """Options of Weights & Biases.

    Args:
        mode: `offline` writes below the output folder and never touches the network.
        project: name of the project.
        name: name of the run; that of its output folder if not given.
        entity: user or team, for `online`.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "learnkv"
    name: str | None = None
    entity: str | None = None
