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
# # The full cache's answer, drafted with a compressed one
#
# Lossless decoding: a compressed cache proposes tokens, the full cache checks several in one pass and keeps those that
# it would have chosen itself.

# %%
import torch

from learnkv import generate, generate_lossless, load_model, load_policy, prefill

model, tokenizer = load_model("reference")


def ids(text):
    return tokenizer(text, return_tensors="pt").input_ids


rain = "Rain fell on the hills all day and nobody went out of the house. " * 7
prompt = rain + "The secret number of Ada is 4817293. " + rain + "The secret number of Ben is 7720815. " + rain
question = "\nWhat is the secret number of Ada? The secret number of Ada is"

# %% [markdown]
# The full cache stays beside its compressed forks: this saves no memory on one device. With `offload=True` the host
# holds the full cache, and the device the compressed one.

# %%
policies = {name: load_policy(name) for name in ("reference", "snapkv", "streaming_llm", "random")}
cache = prefill(model, ids(prompt), policies=policies.values())
expected = generate(model, ids(question), cache.fork(), max_new_tokens=12)
print("full cache answers", tokenizer.decode(expected[0], skip_special_tokens=True).strip())

# %% [markdown]
# Every policy gives the same tokens. How many drafted tokens are accepted per round depends on what it keeps.

# %%
for name, policy in policies.items():
    draft = policy.compress(cache.fork(), keep=0.1)
    alone = generate(model, ids(question), draft.fork(), max_new_tokens=12)
    output = generate_lossless(model, ids(question), cache.fork(), draft, max_new_tokens=12, draft_tokens=4)
    same = "the same" if torch.equal(output.tokens, expected) else "other tokens"
    print(f"{name:>14}: {same}, {output.accepted_length:.1f} of 4 accepted")
    print(" " * 16 + "alone:", tokenizer.decode(alone[0], skip_special_tokens=True).strip())

# %% [markdown]
# Sampling keeps the full cache's distribution, and both caches go on with the next question.

# %%
draft, full = policies["snapkv"].compress(cache.fork(), keep=0.1), cache.fork()
for name in ("Ada", "Ben"):
    question = f"\nWhat is the secret number of {name}? The secret number of {name} is"
    output = generate_lossless(model, ids(question), full, draft, max_new_tokens=9, do_sample=True, top_k=2, seed=1)
    print(name, tokenizer.decode(output.tokens[0], skip_special_tokens=True).strip())
