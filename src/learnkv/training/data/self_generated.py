"""What the frozen model answers to questions about its prompts, said once from the full cache and kept on disk."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generate import generate
from learnkv.inference.models import model_digest
from learnkv.training import seeding as seeding
from learnkv.training.data.batches import Batch, following

TOP_P = 0.9


class Answers:
    """Completes batches whose answers the model has still to give.

    They are sampled, as the likeliest answer of a small model repeats itself; which ones is a function of the model,
    the seed and the batch, so that a run that goes on, and another run with the same folder, trains on the same.

    Args:
        folder: of the files, one per batch; None: nothing is kept.
        seed: of the samples.
    """

    def __init__(self, folder: Path | None, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.digest: str | None = None

    def meet(self, model: Any) -> str:
        """Take note of which model it is that answers, while all of its weights are there; gives its digest."""
        self.digest = self.digest or model_digest(model)
        return self.digest

    def complete(self, model: Any, batch: Batch, cache: CompressedCache) -> Batch:
        """The batch with its answers; `cache` holds its prompts complete, and is not touched."""
        if batch.to_say == 0:
            return batch
        about = [self.meet(model), str(self.seed), str(batch.number), str(batch.to_say)]
        asked = [held.cpu().numpy().tobytes() for held in batch[1:5]]
        file = f"{hashlib.sha256('/'.join(about).encode() + b''.join(asked)).hexdigest()[:32]}.safetensors"
        known = self.folder / file if self.folder is not None else None
        said = load_file(known)["said"] if known is not None and known.is_file() else self._say(model, batch, cache)
        if known is not None and not known.is_file():
            known.parent.mkdir(parents=True, exist_ok=True)
            part = known.with_name(f"{known.name}.{os.getpid()}.part")
            save_file({"said": said}, part)
            part.replace(known)
        return self._completed(batch, said)

    def _say(self, model: Any, batch: Batch, cache: CompressedCache) -> Tensor:
        """[B*C, T] int64, -1 behind an answer's end."""
        fork, copies = cache.fork(), len(batch.continuations) // len(batch.prompts)
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        said = generate(
            model,
            batch.continuations,
            fork,
            batch.continuation_mask,
            max_new_tokens=batch.to_say,
            do_sample=True,
            top_p=TOP_P,
            seed=seeding.generator(self.seed, "answers", batch.number).getrandbits(31),
            graph=False,
        ).cpu()
        eos = model.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, dtype=said.dtype).reshape(-1)
        ended = torch.isin(said, ends).long()
        return said.masked_fill(ended.cumsum(-1) - ended > 0, -1)

    @staticmethod
    def _completed(batch: Batch, said: Tensor) -> Batch:
        questions = [row[there.bool()].tolist() for row, there in zip(*batch[3:5], strict=True)]
        pairs = [(asked, row[row >= 0].tolist()) for asked, row in zip(questions, said, strict=True)]
        ids, mask, counted = (held.to(batch.prompts.device) for held in following(pairs))
        return Batch(batch.number, batch.prompts, batch.prompt_mask, ids, mask, counted)
