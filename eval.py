"""Evaluate compression policies: ``python eval.py --ckpt PATH [config=…] [key=value …]``."""

from learnkv.eval import main

if __name__ == "__main__":
    raise SystemExit(main())
