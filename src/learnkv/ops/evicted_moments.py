"""Mean keys, mean values and their covariance over weighted entries, and attention estimated from these."""

import torch
from torch import Tensor

from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms, times


def weighted_moments(keys: Tensor, values: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Moments in float32 (float64 of float64) over entries [B, H, S, D] with weights [B, H, S].

    Returns:
        `count` [B, H], `mean_key` and `mean_value` [B, H, D], `covariance` [B, H, D, D] of values with keys; all 0
        where all weights are.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    keys, values, weights = keys.to(exact), values.to(exact), weights.to(exact).unsqueeze(-1)
    if not weights.requires_grad:  # entries that do not count may hold anything; with gradients they all count
        keys, values = (part.masked_fill(weights == 0, 0) for part in (keys, values))
    count = weights.sum(2)  # [B, H, 1]
    share = weights / count.clamp(min=1e-6).unsqueeze(2)
    mean_key, mean_value = (share * keys).sum(2), (share * values).sum(2)
    apart = keys - mean_key.unsqueeze(2)
    covariance = ((values - mean_value.unsqueeze(2)) * share).mT @ apart
    return {"count": count.squeeze(-1), "mean_key": mean_key, "mean_value": mean_value, "covariance": covariance}


def merged_moments(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments of the entries of both, by the parallel form of Welford's update."""
    count = first["count"] + second["count"]
    part = (second["count"] / count.clamp(min=1)).unsqueeze(-1)  # [B, H, 1]
    shift_key, shift_value = (second[name] - first[name] for name in ("mean_key", "mean_value"))
    between = part * (1 - part)
    covariance = first["covariance"] + part.unsqueeze(-1) * (second["covariance"] - first["covariance"])
    covariance = covariance + between.unsqueeze(-1) * shift_value.unsqueeze(-1) * shift_key.unsqueeze(-2)
    means = {"mean_key": first["mean_key"] + part * shift_key, "mean_value": first["mean_value"] + part * shift_value}
    return {"count": count, **means, "covariance": covariance}


def estimated_attention(
    query: Tensor,
    count: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    covariance: Tensor | None,
    scaling: float,
    terms: SoftmaxTerms = NO_TERMS,
) -> tuple[Tensor, Tensor]:
    """Attention [B, H*G, T, D] of queries to entries of which only moments are known, and its log-sum-exp [B, H*G, T].

    The output is mean_value + scaling * covariance q, exact for jointly normal keys and values; the log-sum-exp is
    log(count) + scaling * q mean_key, a lower bound of the true one.

    A soft cap c bends both around the mean: with z = scaling * q mean_key, the log-sum-exp has c tanh(z / c), and the
    covariance is multiplied by its slope there, to first order in the spread of keys. Sinks are no entries.
    """
    batch, heads, _ = mean_key.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(exact).reshape(batch, heads, -1, query.shape[-1])  # [B, H, G*T, D]
    logits = terms.capped((grouped @ mean_key.to(exact).unsqueeze(-1)).squeeze(-1) * scaling)
    count = count.to(exact).unsqueeze(-1)
    lse = torch.where(count > 0, logits + count.clamp(min=0.5).log(), -torch.inf)
    output = mean_value.to(exact).unsqueeze(2).expand_as(grouped)
    if covariance is not None:
        slope = terms.slope(logits.unsqueeze(-1))
        output = output + times(grouped @ covariance.to(exact).mT * scaling, slope)
    return output.reshape(query.shape), lse.reshape(query.shape[:3])


def merged_attention(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H*G, T, D] to two sets of entries from that to each, with log-sum-exps [B, H*G, T]."""
    both = torch.logaddexp(lse, other_lse)
    floor = both.masked_fill(both == float("-inf"), 0)
    mixed = output * (lse - floor).exp().unsqueeze(-1) + other * (other_lse - floor).exp().unsqueeze(-1)
    return mixed.to(output.dtype), both
