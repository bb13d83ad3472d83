"""The console command's subcommands, as functions that give the exit code."""

from collections.abc import Sequence

from learnkv.cli.main import main


def train(words: Sequence[str]) -> int:
    """`learnkv train`."""
    return main(["train", *words])


def eval(words: Sequence[str]) -> int:
    """`learnkv eval`."""
    return main(["eval", *words])


def export(words: Sequence[str]) -> int:
    """`learnkv export`."""
    return main(["export", *words])


def calibrate(words: Sequence[str]) -> int:
    """`learnkv calibrate`."""
    return main(["calibrate", *words])


def memory(words: Sequence[str]) -> int:
    """`learnkv memory`."""
    return main(["memory", *words])
