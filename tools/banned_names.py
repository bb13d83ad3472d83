"""Names and words that are not to come back: the left column of the table of names, and where each is banned.

A word is banned as a module, class, public function or method, parameter, class attribute or field, and key of a
YAML. Some mean something else in one of these places, or in one room; the entry says where and why.
"""

from dataclasses import dataclass

KINDS = ("module", "class", "function", "parameter", "attribute", "key")


@dataclass(frozen=True)
class Ban:
    """A name that has been replaced.

    Args:
        name: without case.
        use: what replaced it.
        kinds: where it is banned.
        rooms: rooms of the package in which it is banned; empty: all, experiments and configs included.
        why: why it is not banned everywhere.
    """

    name: str
    use: str
    kinds: tuple[str, ...] = KINDS
    rooms: tuple[str, ...] = ()
    why: str = ""


def _all(names: str, use: str) -> list[Ban]:
    return [Ban(name, use) for name in names.split()]


_MODULE = ("module",)
_NOT_ARGUMENTS = ("module", "class", "function")

BANNED = [
    *_all("renewal renewed recompression every agree settle", "online eviction: evict_interval, schedule_eviction"),
    *_all("reopening folded", "merge_tail, merged_tokens"),
    *_all("spending paging", "budget; part of the policy"),
    Ban("reading", "page_index", ("module", "class", "parameter", "key"), why="a page index chooses what is read"),
    *_all("probing probe", "extra_passes, PromptPass"),
    *_all("recorder recording later live", "capture, CaptureSpec, decode_capture"),
    *_all("compaction segments", "eviction, storage"),
    Ban("tail", "DecodeBuffer", ("class",), ("cache",), "`Tail` is an argument of ops; a buffer may be called tail"),
    *_all("program", "torch_export"),
    Ban("card", "model_card", _MODULE, why="a model card is the hub's word; a function may write one"),
    Ban("tables", "calibrate", _MODULE, ("calibration", "cli"), "reference/tables is data, a Markdown table a table"),
    Ban("size", "(part of the model card)", _MODULE, why="the size of a chunk or file is its size"),
    Ban("heuristic", "base_policy", _NOT_ARGUMENTS, why="a training-free policy is a heuristic"),
    Ban("steps", "decode_loop", _NOT_ARGUMENTS, ("inference", "ops", "cache"), "an optimiser has steps"),
    *_all("decoding", "sampling"),
    Ban("graph", "cuda_graph", _NOT_ARGUMENTS, why="an argument may be a CUDA graph"),
    *_all("said spoken", "generated, is_token, Outputs"),
    *_all("seen", "obs, mask or inputs"),
    *_all("judge judgement judged", "score, Scores, raw_scores"),
    Ban(
        "start",
        "baseline",
        ("parameter", "attribute", "function"),
        ("core", "scorers", "allocators", "policy"),
        "rows of a pool have a start and a length (cache, ops)",
    ),
    *_all("prior follows ranks", "baseline, by_scores, needs_scores"),
    Ban(
        "causal",
        "sequential",
        KINDS,
        ("core", "allocators", "policy"),
        "attention and language models are causal",
    ),
    *_all("fit hats heights mix", "round_to_budget, interpolation_weights, margins, hash_bits"),
    *_all("pretence continuing draws exploration", "meta_device, continuation, seeding, gumbel_noise"),
    *_all("bars evidence elsewhere zoo", "criteria, results, out_of_domain, method_comparison"),
]

VAGUE = frozenset({"at", "one", "held", "found", "mine"})
"""Names of nothing in src, local variables included: `layer_idx`, `tensor`, `rows` or whatever it is says more."""
PRIVATE_WORDS = r"(?<![a-z])(said|spoken|judg(?:e|es|ed|ing|ement|ements)|told|folded|renewals?|reopen\w*)(?![a-z])"
"""Verbs of speech for tensors and private names: nowhere in src, prose and identifiers included."""
MODEL_READS = ("data/ruler_text.py", "data/retrieval_text.py")
"""Files whose strings are text that a model reads, in ordinary English."""
