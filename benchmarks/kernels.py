"""Every kernel against its limit and against its peers: `python -m benchmarks.kernels --out parts/kernels.json`."""

import importlib

from benchmarks.results import Clock, Part, arguments, device

SWEEPS = ("decode", "eviction", "pages", "training")


def main(argv: list[str] | None = None) -> Part:
    asked = arguments(__doc__, argv, only={"choices": SWEEPS, "help": "one sweep"})
    where = device(asked.dry_run)
    names = [asked.only] if asked.only else SWEEPS
    part = Part(asked.out, "kernels" + (f" {asked.only}" if asked.only else ""), asked.dry_run)
    clock = Clock(asked.seconds)
    for name in names:  # imported one by one: what is wrong with one costs the others nothing
        importlib.import_module(f"benchmarks.sweeps.{name}").run(part, where, clock, asked.dry_run)
    part.finish()
    return part


if __name__ == "__main__":
    main()
