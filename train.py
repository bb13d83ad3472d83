"""Train a compression policy: ``python train.py config=quickstart [key=value …]``."""

import sys

from learnkv.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
