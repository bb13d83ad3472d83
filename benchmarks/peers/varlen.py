"""torch's own flash attention for sequences of unequal length, on the layout that ragged heads make of it.

Every row (b, kv head) is a sequence with one kv head and one query token of G heads, as AdaKV calls it.
"""

import torch
from torch import Tensor

NAME = "flash varlen"

_OP = "aten::_flash_attention_forward"
_NEEDS = {"query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale"}


def missing() -> str | None:
    """Why this torch cannot run it, None where it can."""
    schemas = [one for one in torch._C._jit_get_schemas_for_operator(_OP) if not one.overload_name]
    if not schemas:
        return f"{_OP} does not exist in torch {torch.__version__}"
    known = {argument.name for argument in schemas[0].arguments}
    if not known >= _NEEDS:
        return f"{_OP} has no argument {', '.join(sorted(_NEEDS - known))}"
    return None


def sequence_starts(lengths: list[int], device: torch.device) -> Tensor:
    """[R + 1] int32 where every row begins, and where the last one ends."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, cum_q: Tensor, cum_k: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention [R, G, D] of query [R, G, D] to the rows of keys and values [N, D] that `cum_k` bounds."""
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        keys.unsqueeze(1),
        values.unsqueeze(1),
        cum_q,
        cum_k,
        1,
        longest,
        0.0,
        False,
        False,
        scale=scale,
    )[0]
    return output
