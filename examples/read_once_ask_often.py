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
# # Read once, ask often
#
# A text is read once and a tenth of its cache stored in a folder. Any later program loads the folder and asks: what is
# loaded is what was saved, and the text is not read again.

# %%
import tempfile
from pathlib import Path

import torch

from learnkv import generate, load_cache, load_model, load_policy, prefill, save_cache

model, tokenizer = load_model("reference")


def ids(text):
    return tokenizer(text, return_tensors="pt").input_ids


rain = "Rain fell on the hills all day and nobody went out of the house. " * 12
text = f"{rain}The secret number of Ada is 4817293. {rain}The secret number of Ben is 7720815. {rain}"

# %% [markdown]
# Read and compress. With `policy=` the full cache never exists for all layers at once.

# %%
cache = prefill(model, ids(text), policy=load_policy("reference"), keep=0.1)
print(f"{ids(text).shape[1]} tokens, {cache.nbytes} of {cache.full_nbytes} bytes kept")

# %% [markdown]
# Save. The folder has one safetensors file, of the cache's bytes, and `manifest.json`: which model and which policy, a
# digest of the prompt's token ids, and digests of both files. With the tokenizer, another one is refused later.

# %%
folder = Path(tempfile.mkdtemp()) / "story"
save_cache(cache, folder, tokenizer=tokenizer, about={"title": "a rainy day"})
sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
print("on disk:", sum(sizes.values()), "bytes")

# %% [markdown]
# Load, as often as there are questions. On a CPU the file is mapped into memory, so that many programs share it.

# %%
for name in ("Ada", "Ben"):
    loaded = load_cache(folder, model, tokenizer=tokenizer)
    question = f"\nWhat is the secret number of {name}? The secret number of {name} is"
    tokens = generate(model, ids(question), loaded, max_new_tokens=10)
    print(f"{name}: {tokenizer.decode(tokens[0], skip_special_tokens=True).strip()}")

# %% [markdown]
# A loaded cache is a cache: it can be forked, continued over several turns, and saved again with all that was added.

# %%
loaded = load_cache(folder, model)
first, second = (generate(model, ids("\nThe secret number of Ben is"), fork, max_new_tokens=8) for fork in
                 (cache.fork(), loaded.fork()))  # fmt: skip
print("same tokens before and after:", torch.equal(first, second))

# %% [markdown]
# The same from the command line:
#
# ```sh
# learnkv compress text=story.txt ckpt=reference keep=0.1 out=story
# learnkv ask story "What is the secret number of Ada?"
# ```
