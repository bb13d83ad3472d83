"""`python -m experiments.method_comparison results=runs/method_comparison out=docs/results`: tables of all methods."""

import sys

from experiments.method_comparison.tables import write
from learnkv.cli.parser import run_main

PROG = "python -m experiments.method_comparison"

if __name__ == "__main__":
    raise SystemExit(run_main(write, sys.argv[1:] or ["results=runs/method_comparison"], "eval", PROG))
