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
# # Compress a prompt and ask
#
# A prompt is read once. Several methods then keep a tenth of its cache, and each answers the same question.

# %%
from learnkv import generate, load_model, load_policy, prefill

model, tokenizer = load_model("reference")


def ids(text):
    return tokenizer(text, return_tensors="pt").input_ids


# %% [markdown]
# The prompt: three facts in a text that has nothing to do with them.

# %%
rain = "Rain fell on the hills all day and nobody went out of the house. " * 7
facts = [
    "The secret number of Ada is 4817293. ",
    "The secret number of Ben is 7720815. ",
    "The secret number of Eva is 1346702. ",
]
prompt = rain + rain.join(facts) + rain
print(ids(prompt).shape[1], "tokens")

# %% [markdown]
# All policies are handed to `prefill`, so that what they read beside keys and values is recorded. KVzip has the model
# read the prompt a second time.

# %%
policies = {name: load_policy(name) for name in ("reference", "kvzip", "snapkv", "streaming_llm")}
cache = prefill(model, ids(prompt), policies=policies.values())
print("full cache:", cache.full_nbytes, "bytes")

# %% [markdown]
# `fork` shares memory with the complete cache; `compress` evicts in the fork and leaves the original as it is.

# %%
question = "\nWhat is the secret number of Ada? The secret number of Ada is"
answers = {}
for name, policy in policies.items():
    small = policy.compress(cache.fork(), keep=0.1)
    size = small.nbytes  # it grows with the tokens of question and answer
    tokens = generate(model, ids(question), small, max_new_tokens=10)
    answers[name] = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    print(f"{name:>14}: {size} bytes, answers {answers[name]}")

# %% [markdown]
# The trained policy keeps what will be asked for. Where does it keep it? `kept_positions` has the prompt positions that
# one head retains; heads keep unequal numbers.

# %%
small = policies["reference"].compress(cache.fork(), keep=0.1)
for layer, compressed in enumerate(small.compressed_layers()):
    counts = [len(compressed.kept_positions(0, head)) for head in range(compressed.heads)]
    print(f"layer {layer}: entries per head {counts}")

# %% [markdown]
# Several turns: the same cache takes the next question.

# %%
for name in ("Ada", "Ben"):
    question = f"\nWhat is the secret number of {name}? The secret number of {name} is"
    tokens = generate(model, ids(question), small, max_new_tokens=10)
    print(name, tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
