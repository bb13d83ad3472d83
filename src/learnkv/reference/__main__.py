"""`python -m learnkv.reference config=configs/train/reference.yaml [key=value ...]` trains the reference model."""

import sys

from jsonargparse import ArgumentParser

from learnkv.reference.config import ReferenceConfig
from learnkv.reference.training import train


def parse(arguments: list[str]) -> ReferenceConfig:
    """A `ReferenceConfig` from `config=FILE` and `key=value` arguments; exits with code 2 on a wrong one."""
    parser = ArgumentParser(prog="python -m learnkv.reference", description=ReferenceConfig.__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ReferenceConfig, None, as_group=False)
    values = vars(parser.instantiate(parser.parse_args([f"--{a}" for a in arguments])))
    values.pop("config", None)
    return ReferenceConfig(**values)


def main() -> None:
    folder = train(parse(sys.argv[1:]), lambda line: print(line, flush=True))
    print(f"model: {folder}")


if __name__ == "__main__":
    main()
