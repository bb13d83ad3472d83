"""`python -m learnkv` is the console command `learnkv`."""

from learnkv.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
