"""`python -m experiments.reference_model config=reference [text=FILES key=value ...]` trains the reference model."""

import sys

from experiments.reference_model.config import ReferenceConfig
from experiments.reference_model.training import train
from learnkv.cli.parser import run_main


def main(config: ReferenceConfig, resolved: str) -> None:
    """Train, or go on training, and say where the model is."""
    print(f"model: {train(config, lambda line: print(line, flush=True))}")


if __name__ == "__main__":
    sys.exit(run_main(main, None, "train", "python -m experiments.reference_model"))
