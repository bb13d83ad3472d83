"""Words that protect tokens in training: batches carry the spans, students keep them."""

import pickle
from dataclasses import replace

import torch
from lightning.fabric.utilities import move_data_to_device
from support.training import distillation

from learnkv import Policy, load_model
from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.scorers import SnapKV
from learnkv.training.data.datamodule import DataModule
from learnkv.training.settings import DataSettings, Mixture


def test_students_keep_what_follows_words() -> None:
    model, tokenizer = load_model("reference")
    mixture = Mixture(retrieval=1, reconstruction=0, text=0)
    settings = DataSettings(mixture=mixture, protect_after=(" is ", " was "), query_aware=0.0)
    sampler = DataModule(settings, tokenizer, (120, 140), seed=1).samplers["train"]
    batch = sampler.batch(0)
    plain = replace(sampler, protect=None).batch(0)
    assert torch.equal(plain.prompts, batch.prompts)
    assert plain.protection is None
    assert batch.protection is not None
    assert all(batch.protection.after_anchors)
    assert move_data_to_device(batch, torch.device("cpu")).protection == batch.protection
    assert pickle.loads(pickle.dumps(sampler)).batch(0).protection == batch.protection  # as workers get it

    heads = model.config.num_key_value_heads
    policy = Policy(SnapKV(window=8), LearnedAllocator(Uniform(), model.config.num_hidden_layers, heads))
    module = distillation(model, policy)
    cache, _ = module._prefill(batch)
    kept = policy.plan(cache, keep=0.4).kept
    for row, spans in enumerate(batch.protection.after_anchors):
        begin, end = spans[0]
        padding = int((batch.prompt_mask[row] == 0).sum())
        assert kept[:, row, :, padding + begin : padding + end].all()
    module.training_step(batch, 0).backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in policy.parameters() if weight.grad is not None)
    assert any(bool((weight.grad != 0).any()) for weight in policy.parameters() if weight.grad is not None)
