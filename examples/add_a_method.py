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
# # Add a method
#
# A scorer gives every entry a score; the policy keeps the highest scores of every head. Suppose that entries
# whose keys are unlike the keys before them are worth keeping.

# %%
import torch
from torch import Tensor

from learnkv import Policy, load_model, load_policy, prefill
from learnkv.allocators import AdaKV
from learnkv.core.observation import Observation
from learnkv.scorers import Scorer


class Novelty(Scorer):
    """One minus the cosine between a key and the mean of the keys in front of it.

    Args:
        power: exponent of the distance.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, obs: Observation) -> Tensor:
        keys = obs.keys.float() * obs.valid.unsqueeze(-1)  # [B, H, S, D]; padding must not count
        before = keys.cumsum(2) - keys  # its direction is all that matters
        distance = 1 - torch.cosine_similarity(keys, before, dim=-1)
        return distance.clamp_min(0) ** self.power  # [B, H, S], higher is kept


# %% [markdown]
# The budget, protected tokens and everything else are the policy's. It works with any allocator.

# %%
model, tokenizer = load_model("reference")
rain = "Rain fell on the hills all day and nobody went out of the house. " * 10
prompt = rain + "The secret number of Ada is 4817293. " + rain
encoded = tokenizer(prompt, return_tensors="pt", return_offsets_mapping=True)
policies = {
    "novelty": Policy(Novelty()),
    "novelty + AdaKV": Policy(Novelty(power=2.0), AdaKV()),
    "keydiff": load_policy("keydiff"),
    "snapkv": load_policy("snapkv"),
    "random": load_policy("random"),
}
cache = prefill(model, encoded.input_ids, policies=policies.values())

# %% [markdown]
# How much of the number's tokens does each keep, over all layers and heads, when a fifth of the cache stays?

# %%
first = prompt.index("4817293")
number = [i for i, (begin, end) in enumerate(encoded.offset_mapping[0].tolist()) if begin < first + 7 and end > first]
shares = {}
for name, policy in policies.items():
    kept = policy.plan(cache.fork(), keep=0.2).kept  # [L, B, H, S]
    assert abs(kept.float().mean().item() - 0.2) < 0.01  # every policy spends the same budget
    shares[name] = kept[..., number].float().mean().item()
    print(f"{name:>16}: {shares[name]:.2f} of the number's entries")

# %% [markdown]
# A row of a batch must get the scores that it would get alone. The contract tests of the package check this for every
# scorer; here by hand, with a padded row:

# %%
pad = torch.full((1, 9), tokenizer.pad_token_id)
padded = torch.cat([pad, encoded.input_ids], 1)
mask = torch.cat([torch.zeros_like(pad), torch.ones_like(encoded.input_ids)], 1)
batch = prefill(model, padded, mask, policies=[policies["novelty"]])
alone = policies["novelty"].plan(cache.fork(), keep=0.2).kept
assert torch.equal(policies["novelty"].plan(batch, keep=0.2).kept[..., 9:], alone)

# %% [markdown]
# To use it on the command line, put the class into `novelty.py` and name it in a YAML:
#
# ```yaml
# scorer:
#   class_path: novelty.Novelty
#   init_args: {power: 2.0}
# allocator:
#   class_path: learnkv.allocators.AdaKV
# ```
#
# `python eval.py --ckpt novelty.yaml --ckpt snapkv allow=novelty` compares both on RULER's tasks.
