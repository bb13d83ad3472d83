"""Train a compression policy: ``python train.py config=quickstart [key=value …]``."""

from learnkv.train import main

if __name__ == "__main__":
    raise SystemExit(main())
