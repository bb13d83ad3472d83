"""Relaxing a cache to a plan: attention to the kept entries, with a gradient for every entry's mask."""

from dataclasses import replace

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.evicted import Evicted, evicted_entries
from learnkv.cache.eviction import compact
from learnkv.cache.states import Prompt
from learnkv.cache.stored_prompt import compact_stored
from learnkv.core.plan import Plan
from learnkv.core.residual_store import ResidualStore
from learnkv.ops.normal_scores import unit_scale
from learnkv.ops.soft_topk import soft_topk


def relax_to_plan(
    student: CompressedCache,
    plan: Plan,
    temperature: float,
    soft: bool = False,
    residual: ResidualStore | None = None,
) -> None:
    """Let a student attend to the kept entries of `plan`; its gates pass gradients on to the plan.

    Args:
        student: a fork whose layers have their prompt complete; nothing is freed.
        temperature: width of the soft top-k in units of normal scores.
        soft: multiply every entry's softmax weight by its gate instead.
        residual: summarises what is evicted; its gradient reaches the gates, too.
    """
    layers = student.compressed_layers()
    student.budgets = plan.budgets
    if plan.levels is not None:
        student.narrow = True
    if plan.levels is not None and not soft:
        _relax_to_levels(student, plan, temperature, residual)
        return
    gates = soft_topk(unit_scale(plan.scores), plan.wanted, temperature).unbind()
    decode_capture = None
    if soft:
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate(gate.to(layer.device))
        return
    if student.schedule is not None:
        student.schedule = replace(student.schedule, wanted=plan.wanted)
        decode_capture = student.schedule.capture_spec
    segments = compact(layers, plan.scores.detach(), plan.budgets, plan.total, decode_capture, None)
    for layer_idx, segment in segments:
        prompt = layers[layer_idx].prompt
        gone = None if residual is None else _evicted(residual, prompt, plan, layer_idx, gates[layer_idx])
        layers[layer_idx].relax(prompt.relax(segment, gates[layer_idx], evicted=gone), decode_capture)


def _evicted(store: ResidualStore, prompt: Prompt, plan: Plan, layer_idx: int, gates: Tensor) -> Evicted:
    """What is evicted of a layer: entries count as 1 or 0, with the gradient of 1 minus their gates [B, H, S]."""
    scores = plan.scores[layer_idx].detach()
    gone = evicted_entries(scores, plan.budgets[layer_idx])
    return prompt.evicted_with(store, gone + (gates.detach() - gates) * (scores > -torch.inf))


def _relax_to_levels(student: CompressedCache, plan: Plan, temperature: float, residual: ResidualStore | None) -> None:
    """Attend to kept entries as each one's level stores them; every step to a level has a gate."""
    assert plan.levels is not None
    layers, scores = student.compressed_layers(), unit_scale(plan.scores)
    order = scores if plan.levels.order is None else unit_scale(plan.levels.order)
    steps = [soft_topk(order, wanted, temperature) for wanted in plan.levels.at_least[1:]]
    gates = torch.stack([soft_topk(scores, plan.wanted, temperature), *steps])  # [M, L, B, H, S]
    segments = compact_stored(layers, plan.scores.detach(), plan.budgets, plan.total, plan.levels.levels, plan.chosen)
    for layer_idx, segment, stored in segments:
        prompt = layers[layer_idx].prompt
        gone = None if residual is None else _evicted(residual, prompt, plan, layer_idx, gates[0, layer_idx])
        layers[layer_idx].relax(prompt.relax(segment, gates[:, layer_idx], stored=stored, evicted=gone))
