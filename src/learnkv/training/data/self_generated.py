"""The model's own answers to questions about its prompts, generated from the full cache and stored on disk."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.formats.files import output_file, read_tensors
from learnkv.inference.digest import model_digest
from learnkv.inference.generate import generate
from learnkv.training import seeding
from learnkv.training.data.batches import Batch, pad_continuations

TOP_P = 0.9


class AnswerCache:
    """Completes batches whose answers the model has yet to generate.

    Answers are sampled, as greedy answers of small models are repetitive. They are a function of the model, the seed
    and the batch, so that a resumed run, or another run with the same folder, trains on the same answers.

    Args:
        folder: folder of the files, one per batch; None: nothing is stored.
        seed: seed of the samples.
    """

    def __init__(self, folder: Path | None, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._digest: str | None = None

    def digest_of(self, model: Any) -> str:
        """Digest of the model, computed on the first call: before its weights are sharded."""
        self._digest = self._digest or model_digest(model)
        return self._digest

    def complete(self, model: Any, batch: Batch, cache: CompressedCache) -> Batch:
        """The batch with its answers; `cache` has its complete prompts and is unchanged."""
        if batch.tokens_to_generate == 0:
            return batch
        if self.folder is None:
            return _with_answers(batch, self._generate(model, batch, cache))
        file = self.folder / self._file_name(model, batch)
        with suppress(UserError, KeyError):  # a broken file is written anew
            return _with_answers(batch, read_tensors(file)["tokens"])
        answers = self._generate(model, batch, cache)
        with output_file(file) as part:
            save_file({"tokens": answers}, part)
        return _with_answers(batch, answers)

    def _file_name(self, model: Any, batch: Batch) -> str:
        key = [self.digest_of(model), str(self.seed), str(batch.number), str(batch.tokens_to_generate)]
        content = [tensor.cpu().numpy().tobytes() for tensor in batch[1:5]]
        return f"{hashlib.sha256('/'.join(key).encode() + b''.join(content)).hexdigest()[:32]}.safetensors"

    def _generate(self, model: Any, batch: Batch, cache: CompressedCache) -> Tensor:
        """Answers [B*C, T] int64, -1 after the end of an answer."""
        fork, copies = cache.fork(), len(batch.continuations) // len(batch.prompts)
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        answers = generate(
            model,
            batch.continuations,
            fork,
            batch.continuation_mask,
            max_new_tokens=batch.tokens_to_generate,
            do_sample=True,
            top_k=0,
            top_p=TOP_P,
            seed=seeding.generator(self.seed, "answers", batch.number).getrandbits(31),
            graph=False,
        ).cpu()
        eos = model.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, dtype=answers.dtype).reshape(-1)
        ended = torch.isin(answers, ends).long()
        return answers.masked_fill(ended.cumsum(-1) - ended > 0, -1)


def _with_answers(batch: Batch, answers: Tensor) -> Batch:
    """The batch with answers [B*C, T] behind its questions."""
    rows = zip(batch.continuations, batch.continuation_mask, answers, strict=True)
    pairs = [(question[mask.bool()].tolist(), answer[answer >= 0].tolist()) for question, mask, answer in rows]
    ids, mask, counted = (tensor.to(batch.prompts.device) for tensor in pad_continuations(pairs))
    return Batch(batch.number, batch.prompts, batch.prompt_mask, ids, mask, counted, protection=batch.protection)
