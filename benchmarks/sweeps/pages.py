"""Reading without freeing: bounds of pages, their scores, and a step that reads the best pages only."""

import torch
from torch import Tensor

from benchmarks import limits
from benchmarks.limits import Work
from benchmarks.results import Clock, Part
from benchmarks.shapes import LLAMA_8B, Shape
from benchmarks.timing import Call, input_sets, race
from learnkv.ops.arguments import Pages, Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.page_bounds import empty_bounds, page_bounds, page_scores
from learnkv.ops.select import select_slots

PAGE = 16


def run(part: Part, device: torch.device, clock: Clock, dry_run: bool) -> None:
    """Measure everything until time is up."""
    wanted = [(LLAMA_8B, 8, 131072, 2048), (LLAMA_8B, 1, 131072, 2048), (LLAMA_8B, 8, 32768, 2048)]
    for shape, batch, prompt, read in [(LLAMA_8B.tiny(), 2, 96, 32)] if dry_run else wanted:
        if not clock.over():
            measure(part, device, dry_run, shape, batch, prompt, read)


def measure(part: Part, device: torch.device, dry_run: bool, shape: Shape, batch: int, prompt: int, read: int) -> None:
    """One prompt: `read` entries of every row are read in a step."""
    rows, dim, count = batch * shape.kv_heads, shape.dim, prompt // PAGE
    about = {"model": shape.name, "B": batch, "T": prompt, "dtype": "bfloat16"}
    scored = Work(rows * count * (2 * dim * limits.HALF + limits.SINGLE), launches=1)
    sets = [Inputs(shape, batch, prompt, read, device) for _ in range(input_sets(scored.bytes, dry_run))]
    listed = limits.decode_attention(rows * read, rows, shape.group, dim)
    step = Work(scored.bytes + listed.bytes, listed.flops, scored.launches + 1 + listed.launches)
    whole = limits.decode_attention(rows * prompt, rows, shape.group, dim)
    races: dict[str, tuple[Work, dict[str, list[Call]]]] = {
        "page_bounds": (
            limits.page_bounds(rows, prompt, dim, PAGE),
            {"learnkv": [one.enclose for one in sets], "torch": [one.enclose_in_torch for one in sets]},
        ),
        "page_scores": (
            scored,
            {
                "learnkv": [lambda one=one: one.score("triton") for one in sets],  # type: ignore[misc]
                "torch": [lambda one=one: one.score("reference") for one in sets],  # type: ignore[misc]
            },
        ),
        "paged step": (step, {"learnkv": [one.step for one in sets]}),
        "unpaged step": (whole, {"learnkv": [one.read_all for one in sets]}),
    }
    for kernel, (work, contenders) in races.items():
        for impl, timing in race(contenders).items():
            part.add(timing, work, kernel=kernel, impl=impl, budget=read if "step" in kernel else None, **about)


class Inputs:
    """Keys and values [R * S, D] of whole prompts, their pages' bounds, and a query of one token."""

    def __init__(self, shape: Shape, batch: int, prompt: int, read: int, device: torch.device) -> None:
        rows, dim = batch * shape.kv_heads, shape.dim

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=torch.bfloat16)

        self.scaling, self.most = dim**-0.5, read // PAGE
        self.keys, self.values = numbers(rows * prompt, dim), numbers(rows * prompt, dim)
        self.query = numbers(batch, shape.heads, 1, dim)
        self.tails = [numbers(batch, shape.kv_heads, 1, dim) for _ in range(2)]
        offset = torch.arange(rows, device=device) * prompt
        length = torch.full((rows,), prompt, device=device)
        self.kept = Ragged(self.keys, self.values, offset, length, prompt)
        self.none = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bounds = empty_bounds(self.keys, rows, 2, prompt // PAGE, dim)
        self.pages = torch.full((rows,), prompt // PAGE, device=device)
        self.budget = torch.full((rows,), self.most, dtype=torch.int32, device=device)
        self.enclose()

    def enclose(self) -> None:
        """Bounds of all pages; those of the prompt do not change by being taken again."""
        page_bounds(self.kept, self.none, self.bounds, PAGE, impl="triton")

    def enclose_in_torch(self) -> list[Tensor]:
        """The same by two reductions."""
        pages = self.keys.view(-1, PAGE, self.keys.shape[-1])
        return [pages.amin(1), pages.amax(1)]

    def score(self, impl: str) -> Tensor:
        """[R, P], the largest over the query heads of a kv head."""
        return page_scores(self.query[:, :, 0], self.bounds, self.pages, "max", impl=impl)  # type: ignore[arg-type]

    def attend(self, pages: Tensor | None) -> Tensor:
        """Output of a step that reads these pages; None: everything."""
        listed = None if pages is None else Pages(pages, PAGE)
        return decode_attention(self.query, self.kept, Tail(*self.tails), self.scaling, listed, impl="triton")[0]

    def step(self) -> Tensor:
        """Score, list the best pages, read them."""
        return self.attend(select_slots(self.score("triton"), self.budget, self.most, impl="triton"))

    def read_all(self) -> Tensor:
        """What the step saves: everything is read."""
        return self.attend(None)
