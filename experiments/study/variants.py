"""The trainings of a study."""

import sys
from pathlib import Path
from typing import Any

import yaml

from experiments.study.config import StudyConfig, name_of, ships
from learnkv.cli.parser import parse
from learnkv.errors import UserError
from learnkv.training.config import TrainConfig
from learnkv.training.run import train


def trainings(config: StudyConfig) -> dict[str, tuple[TrainConfig, str]]:
    """Keys and resolved YAML of every training, by name; each has a folder of its own."""
    found = {}
    text = [f"text={','.join(config.training_text)}"] if config.training_text else []
    for variant in config.variants:
        if ships(variant):
            continue
        name = name_of(variant)
        words = [f"config={variant}", f"model={config.model}", f"output={config.folder / 'train' / name}"]
        found[name] = parse(TrainConfig, [*words, *text, *config.training], "train")
    return found


def train_missing(config: StudyConfig) -> None:
    """Train every variant, or go on with it; what is finished stays as it is."""
    for name, (keys, resolved) in trainings(config).items():
        print(f"training {name}", file=sys.stderr)
        train(keys, resolved)


def trained(config: StudyConfig) -> dict[str, str]:
    """Folder of each variant's policy, or the name of one that ships; UserError where one is missing."""
    found = {}
    for variant in config.variants:
        name, folder = name_of(variant), config.folder / "train" / name_of(variant)
        if not ships(variant) and not (folder / "policy" / "manifest.json").is_file():
            raise UserError(f"output={config.output}: {name} is not trained yet, expected stages=train first")
        found[name] = variant if ships(variant) else str(folder)
    return found


def facts(folder: Path) -> dict[str, Any]:
    """What a finished training was: the keys of its `config.yaml`."""
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return found
