"""`learnkv compress text=FILE ckpt=… keep=… out=FOLDER` and `learnkv ask FOLDER "question"`: read once, ask often."""

import sys
from dataclasses import dataclass
from pathlib import Path

from learnkv.errors import UserError
from learnkv.formats.files import read_text
from learnkv.inference.generate import generate
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill
from learnkv.inference.prompt_format import format_prompt
from learnkv.persistence.policies import load_policy
from learnkv.persistence.stored_cache import load_cache, save_cache
from learnkv.persistence.stored_manifest import read_manifest


@dataclass(frozen=True)
class CompressConfig:
    """Read a text once, keep a part of its cache and store it in a folder, for `learnkv ask`.

    Args:
        text: file with the text (UTF-8).
        out: folder of the stored cache; a cache that it holds is replaced.
        ckpt: policy: a trained one, an exported folder, or a method's name.
        keep: fraction of the text's entries to keep; or
        budget: entries per head on average; or
        bytes: a fraction of the 16-bit cache, or bytes such as 64MB.
        model: reference, smollm2, a folder or a hub id.
        dtype: float32, bfloat16, float16 or auto.
        device: cpu, cuda, cuda:N, mps or auto.
        chat: whether the text is a user's message in the model's chat template, where it has one.
        system: system message before the text.
        protect: system: every policy keeps the system message.
        protect_after: words such as "password:" after which tokens are kept.
        chunk_size: tokens read at once; 0: all.
        allow: module prefixes besides learnkv whose classes the policy may name.
    """

    text: str = ""
    out: str = ""
    ckpt: str = ""
    keep: float | None = None
    budget: float | None = None
    bytes: str | None = None
    model: str = "reference"
    dtype: str = "auto"
    device: str = "auto"
    chat: bool = True
    system: str = ""
    protect: str = ""
    protect_after: tuple[str, ...] = ()
    chunk_size: int = 0
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("text", "out", "ckpt"):
            if not getattr(self, key):
                raise UserError(f"{key}=: expected a path, got nothing")
        if self.chunk_size < 0:
            raise UserError(f"chunk_size={self.chunk_size}: expected a number of tokens, 0 for all at once")


def compress(config: CompressConfig, resolved: str) -> None:
    """Read, compress and store; print the bytes before and after."""
    text = read_text(config.text)
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
    policy = load_policy(config.ckpt, config.allow, model)
    head, _, _ = format_prompt(tokenizer, text, "", system=config.system, chat=config.chat)
    ids = tokenizer(head, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    cache = prefill(
        model,
        ids,
        chunk_size=config.chunk_size or None,
        policy=policy,
        keep=config.keep,
        budget=config.budget,
        bytes=config.bytes,
        protect=config.protect or None,
        protect_after=config.protect_after or None,
        tokenizer=tokenizer,
    )
    about = {"text": Path(config.text).name, "chat": config.chat, "system": config.system}
    folder = save_cache(cache, config.out, tokenizer=tokenizer, about=about)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{folder}: {ids.shape[1]:,} tokens, {cache.nbytes:,} of {cache.full_nbytes:,} bytes kept, {size:,} on disk",
        file=sys.stderr,
    )


@dataclass(frozen=True)
class AskConfig:
    """Answer a question about a text that `learnkv compress` stored; the folder does not change.

    Args:
        folder: of the stored cache.
        question: follows the text.
        prefix: how the answer begins.
        max_new_tokens: length of the answer, at most.
        model: default: the one that read the text.
        device: cpu, cuda, cuda:N, mps or auto.
        allow: module prefixes besides learnkv whose codecs the folder may name.
    """

    folder: str = ""
    question: str = ""
    prefix: str = ""
    max_new_tokens: int = 64
    model: str = ""
    device: str = "auto"
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.folder or not self.question:
            raise UserError('expected a folder and a question: learnkv ask FOLDER "question"')
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")


def ask(config: AskConfig, resolved: str) -> None:
    """Load the cache, read the question and print the answer."""
    manifest = read_manifest(Path(config.folder).expanduser())
    stored, about = manifest["model"], manifest["about"]
    name, dtype = config.model or str(stored.get("id")), str(stored.get("dtype"))
    model, tokenizer = load_model(name, dtype=dtype, device=config.device)
    cache = load_cache(config.folder, model, tokenizer=tokenizer, allow=config.allow)
    chat, system = bool(about.get("chat", True)), str(about.get("system", ""))
    _, tail, _ = format_prompt(tokenizer, "", f"\n\n{config.question}", system=system, chat=chat)
    words = f"{tail}{config.prefix}" if chat and tokenizer.chat_template else f"{tail} {config.prefix}".rstrip()
    ids = tokenizer(words, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    answer = generate(model, ids, cache, max_new_tokens=config.max_new_tokens)
    print(tokenizer.decode(answer[0], skip_special_tokens=True).strip())
