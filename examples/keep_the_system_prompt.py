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
# # Keep the system prompt
#
# What a system message asks for matters at the end of a long chat, though no attention went there for a while: policies
# evict it (arXiv 2510.00231). `protect` keeps it, whatever the policy, and counts it towards the budget.

# %%
from learnkv import generate, load_model, load_policy, prefill

model, tokenizer = load_model("reference")
tokenizer.chat_template = (  # the bundled model has none; that of a chat model is used as it is
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]\n{{ message.content }}[end]\n{% endfor %}"
)

rain = "Rain fell on the hills all day and nobody went out of the house. " * 25
messages = [
    {"role": "system", "content": "The secret number of Ada is 4817293. "},
    {"role": "user", "content": rain + "The password: 7720815\n" + rain},
]
text = tokenizer.apply_chat_template(messages, tokenize=False)
prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
question = tokenizer("What is the secret number of Ada? The secret number of Ada is", return_tensors="pt").input_ids


def answer(cache):
    return tokenizer.decode(generate(model, question, cache, max_new_tokens=9)[0], skip_special_tokens=True).strip()


# %% [markdown]
# The same policy and budget, without and with the system message protected. With `policy=` each layer is evicted as
# soon as it has been read; protection works there, too.

# %%
policy = load_policy("snapkv")
for protect in (None, "system"):
    cache = prefill(model, prompt, policy=policy, keep=0.1, protect=protect, tokenizer=tokenizer)
    print(f"protect={protect}: {cache.nbytes} bytes, {cache.spent[0]:.1%} of the entries, answers {answer(cache)}")

# %% [markdown]
# Which tokens are they? The spans are on the cache; they can be named directly, for each row of a batch.

# %%
((begin, end),) = cache.protection.spans[0]
print("protected:", repr(tokenizer.decode(prompt[0, begin:end])))
same = prefill(model, prompt, policy=policy, keep=0.1, protect=[(begin, end)])
print("named by hand:", same.protection == cache.protection)

# %% [markdown]
# Words that announce something worth keeping: what follows is protected up to the end of the line, as far as half of
# the budget goes. A text full of such words takes no more than that.

# %%
cache = prefill(model, prompt, policy=policy, keep=0.1, protect_after=["password:"], tokenizer=tokenizer)
kept = cache.kept_positions(0, 0, 0).tolist()
((begin, end),) = cache.protection.after_anchors[0]
print("kept after password:", tokenizer.decode(prompt[0, begin:end]).strip(), set(range(begin, end)) <= set(kept))
