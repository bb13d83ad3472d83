"""Evaluate compression policies: ``python eval.py --ckpt PATH [config=…] [key=value …]``."""

import sys

from learnkv.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["eval", *sys.argv[1:]]))
