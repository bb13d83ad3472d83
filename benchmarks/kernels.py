"""Every kernel against its limit and against its peers: `python -m benchmarks.kernels --out parts/kernels.json`."""

from benchmarks.results import Clock, Part, arguments, device
from benchmarks.sweeps import decode, eviction, pages

SWEEPS = {"decode": decode.run, "eviction": eviction.run, "pages": pages.run}


def main(argv: list[str] | None = None) -> Part:
    asked = arguments(__doc__, argv, only={"choices": sorted(SWEEPS), "help": "one sweep"})
    where = device(asked.dry_run)
    names = [asked.only] if asked.only else list(SWEEPS)
    part = Part(asked.out, "kernels" + (f" {asked.only}" if asked.only else ""), asked.dry_run)
    clock = Clock(asked.seconds)
    for name in names:
        SWEEPS[name](part, where, clock, asked.dry_run)
    part.finish()
    return part


if __name__ == "__main__":
    main()
