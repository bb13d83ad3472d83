# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a policy on your text
#
# A policy learns which entries the model needs on text like yours: it is trained so that the model with the compressed
# cache predicts what it predicts with the full one. This run is short, so that it ends within a minute on a laptop.

# %%
import pydoc_data.topics
import tempfile
from pathlib import Path

import torch

from learnkv import continuation, load_model, load_policy, prefill
from learnkv.cli.main import main

work = Path(tempfile.mkdtemp())

# %% [markdown]
# The text: replace these files by yours. Text, JSON lines and Parquet files are read; a .txt file is one document.

# %%
topics = list(pydoc_data.topics.topics.values())
(work / "train.txt").write_text("\n".join(topics[:-12]), encoding="utf-8")
held_out = "\n".join(topics[-12:])

# %% [markdown]
# The same keys as on the command line: `learnkv train config=text model=reference text=train.txt …`. `config=text` has
# learned scores and budgets on top of SnapKV.

# %%
words = [
    "config=text",
    "model=reference",
    f"text={work / 'train.txt'}",
    f"output={work / 'run'}",
    "lengths=192,256",
    "continuation_tokens=48",
    "batch_size=2",
    "trainer.max_steps=12",
    "validation_batches=1",
    "wandb=null",
]
assert main(["train", *words]) == 0

# %% [markdown]
# The run's folder is a policy: `load_policy` takes it, `eval.py --ckpt` too. Its loss on text that was not trained on,
# beside SnapKV's: the KL divergence to the full cache, in nats per token.

# %%
model, tokenizer = load_model("reference")
tokens = tokenizer(held_out, return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // 320 * 320].view(-1, 320)[:12]
context, follows = windows[:, :256], windows[:, 256:]
policies = {"trained": load_policy(work / "run"), "snapkv": load_policy("snapkv")}
cache = prefill(model, context, policies=policies.values())


def log_probabilities(retained):
    with torch.no_grad():
        return continuation(model, follows, retained).float().log_softmax(-1)


full = log_probabilities(cache.fork())
losses = {}
for name, policy in policies.items():
    lost = log_probabilities(policy.compress(cache.fork(), keep=0.1))
    losses[name] = (full.exp() * (full - lost)).sum(-1).mean().item()
    print(f"{name:>8}: {losses[name]:.3f} nats per token at a tenth of the cache")

# %% [markdown]
# Longer training, longer contexts and your own model are other values of the same keys; `learnkv memory` with the same
# keys predicts the memory that a run needs.
