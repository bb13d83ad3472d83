"""Every kernel against its limit and against its peers: `python -m benchmarks.kernels --out parts/kernels.json`."""

import importlib

from benchmarks.results import Clock, Part, arguments, device

SWEEPS = ("decode", "bits", "eviction", "pages", "training")


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv, only={"choices": SWEEPS, "help": "one sweep"})
    where = device(options.dry_run)
    names = [options.only] if options.only else SWEEPS
    part = Part(options.out, "kernels" + (f" {options.only}" if options.only else ""), options.dry_run)
    clock = Clock(options.seconds)
    for name in names:  # imported one by one: what is wrong with one costs the others nothing
        importlib.import_module(f"benchmarks.sweeps.{name}").run(part, where, clock, options.dry_run)
    part.finish()
    return part


if __name__ == "__main__":
    main()
