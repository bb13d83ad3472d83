"""Relaxing a cache to a plan: attention to the kept entries, with a gradient for every entry's mask."""

from dataclasses import replace

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.eviction import compact
from learnkv.cache.stored_prompt import compact_stored
from learnkv.core.plan import Plan
from learnkv.ops.normal_scores import unit_scale
from learnkv.ops.soft_topk import soft_topk


def relax_to_plan(student: CompressedCache, plan: Plan, temperature: float, soft: bool = False) -> None:
    """Let a student attend to the kept entries of `plan`; its gates pass gradients on to the plan.

    Args:
        student: a fork whose layers have their prompt complete; nothing is freed.
        temperature: width of the soft top-k in units of normal scores.
        soft: multiply every entry's softmax weight by its gate instead.
    """
    layers = student.compressed_layers()
    student.budgets = plan.budgets
    if plan.levels is not None:
        student.narrow = True
    if plan.levels is not None and not soft:
        _relax_to_levels(student, plan, temperature)
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
        layers[layer_idx].relax(segment, gates[layer_idx], decode_capture)


def _relax_to_levels(student: CompressedCache, plan: Plan, temperature: float) -> None:
    """Attend to kept entries as each one's level stores them; every step to a level has a gate."""
    assert plan.levels is not None
    layers, scores = student.compressed_layers(), unit_scale(plan.scores)
    order = scores if plan.levels.order is None else unit_scale(plan.levels.order)
    steps = [soft_topk(order, wanted, temperature) for wanted in plan.levels.at_least[1:]]
    gates = torch.stack([soft_topk(scores, plan.wanted, temperature), *steps])  # [M, L, B, H, S]
    segments = compact_stored(layers, plan.scores.detach(), plan.budgets, plan.total, plan.levels.levels, plan.chosen)
    for layer_idx, segment, stored in segments:
        layers[layer_idx].relax(segment, gates[:, layer_idx], stored=stored)
