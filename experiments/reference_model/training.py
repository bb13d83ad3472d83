"""Training of the reference model: next-token loss where rows ask for it, Muon and AdamW, exact resumption."""

import math
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.reference_model.config import ReferenceConfig, Shape
from experiments.reference_model.corpus import prepare
from experiments.reference_model.rows import IGNORE, READ, RowMaker
from learnkv.formats.files import atomic_write


def build_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A fresh Llama of `shape` with tied embeddings and rotary base 10,000."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **vars(shape),
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


class ReferenceTraining:
    """The state of a run: model, optimizers and the next step.

    What a step trains on is a function of (seed, step) alone, so a resumed run equals the uninterrupted one.
    """

    def __init__(self, config: ReferenceConfig, tokenizer: PreTrainedTokenizerFast, pools: list[np.ndarray]):
        self.config, self.tokenizer, self.pools = config, tokenizer, pools
        if config.device == "auto":
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        else:
            self.device = torch.device(config.device)
        self.model = build_model(config.shape, config.seed).to(self.device).train()
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
        decay = config.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=1.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step = 0

    def batch(self, step: int) -> tuple[Tensor, Tensor, list[str]]:
        """Rows of a step: ids and labels [B, T], and each row's kind."""
        rng = random.Random(f"{self.config.seed}:{step}")
        stage = self.config.stage_at(step)
        length = rng.choices(list(stage.lengths), list(stage.lengths.values()))[0]
        make = RowMaker(self.tokenizer, self.pools, stage.level, rng)
        kinds = rng.choices(
            list(stage.kinds), list(stage.kinds.values()), k=max(1, self.config.tokens_per_step // length)
        )
        ids, labels = zip(*(make.row(kind, length) for kind in kinds), strict=True)
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(labels)), kinds

    def train_step(self) -> dict[str, list[tuple[float, float]]]:
        """One step; (loss, share of tokens right) of every row, by kind. Raises FloatingPointError on NaN."""
        ids, labels, kinds = self.batch(self.step)
        ids, labels = ids.to(self.device), labels.to(self.device)[:, 1:]
        wanted = labels != IGNORE
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with autocast:
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = self.model.lm_head(hidden[wanted]).float()
        targets = labels[wanted]
        row = wanted.nonzero()[:, 0]
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * self._weights(wanted, kinds)[row]).sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {self.step}: the loss is {loss.item()}")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.rate_at(self.step)
            optimizer.step()
        self.step += 1
        each = torch.zeros(2, len(ids), device=self.device)
        each.index_add_(1, row, torch.stack((losses.detach(), (logits.argmax(-1) == targets).float())))
        each /= wanted.sum(1)
        seen = defaultdict(list)
        for kind, pair in zip(kinds, each.T.tolist(), strict=True):
            seen[kind].append(tuple(pair))
        return seen

    def _weights(self, wanted: Tensor, kinds: list[str]) -> Tensor:
        """Weight of a label of each row [B]: kinds count by their rows and, within a kind, every label the same.

        All kinds with questions are one, so that long answers weigh more than short ones.
        """
        groups = [kind if kind in READ else "asked" for kind in kinds]
        rows = {group: [i for i, other in enumerate(groups) if other == group] for group in groups}
        weights = torch.zeros(len(kinds), device=wanted.device)
        for members in rows.values():
            weights[members] = len(members) / len(kinds) / wanted[members].sum()
        return weights

    def save(self, path: Path) -> None:
        """Checkpoint of plain tensors."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_write(path) as part:
            torch.save(state, part)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Hugging Face folder with fp16 weights and the tokenizer."""
        half = build_model(self.config.shape, 0).half()
        half.load_state_dict(self.model.state_dict())
        half.save_pretrained(folder)
        for key in ("is_local", "local_files_only"):  # how this machine found it
            self.tokenizer.init_kwargs.pop(key, None)
        self.tokenizer.save_pretrained(folder)


def train(config: ReferenceConfig, say: Callable[[str], None] = print) -> Path:
    """Train, or go on training, the reference model; returns the exported model's folder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    run = ReferenceTraining(config, *prepare(config.text, config.shape.vocab_size, folder))
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
        say(f"resumed at step {run.step}")
    say(f"{run.model.num_parameters():,} parameters, {sum(map(len, run.pools)):,} tokens of text, {config.steps} steps")
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    started = logged = saved = time.monotonic()
    logged_step = run.step
    stopping = False

    def stop(signal_number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    previous = signal.signal(signal.SIGTERM, stop)
    while run.step < config.steps and not stopping:
        for kind, pairs in run.train_step().items():
            seen[kind] += pairs
        now = time.monotonic()
        if run.step % config.log_every == 0:
            rate = (run.step - logged_step) * config.tokens_per_step / (now - logged)
            parts = " ".join(f"{k} {np.mean(v, 0)[0]:.3f}/{np.mean(v, 0)[1]:.3f}" for k, v in sorted(seen.items()))
            say(f"step {run.step}/{config.steps} {parts} {rate:.0f} tok/s {(now - started) / 60:.1f} min")
            seen, logged, logged_step = defaultdict(list), now, run.step
        if now - saved > 60 * config.checkpoint_minutes or run.step == config.steps or stopping:
            run.save(checkpoint)
            run.export(folder / "model")
            saved = now
    signal.signal(signal.SIGTERM, previous)
    return folder / "model"
