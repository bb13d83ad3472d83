"""Caches on disk: a prompt that was read once, to be asked later by the same model."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.pack import pack
from learnkv.cache.plain_layers import layout
from learnkv.cache.reader import Reader
from learnkv.cache.unpack import unpack
from learnkv.core.adapter import Adapter
from learnkv.errors import RunError, UserError
from learnkv.formats.files import FULL_DISK, atomic_write, file_digest, make_folder, read_tensors
from learnkv.inference import lora, moving_rope
from learnkv.inference.attention import attach
from learnkv.inference.attention_modules import layer_devices
from learnkv.inference.digest import known_weights_digest, tokenizer_digest
from learnkv.inference.models import describe_model
from learnkv.persistence.stored_components import built_components, described_components
from learnkv.persistence.stored_manifest import (
    MANIFEST,
    check_can_hold,
    check_manifest,
    read_manifest,
    seal_manifest,
)

_ADAPTER = "adapter."
_BROKEN = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError)
"""What unpacking raises for a description that no version of learnkv wrote."""


def save_cache(
    cache: CompressedCache,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a cache into a folder, from which `load_cache` continues: kept entries, tiers, tail and ids of all tokens.

    Tensors are one safetensors file of the cache's bytes, everything else is `manifest.json`. The manifest replaces an
    older one last and in one step: whatever ends the program before, the folder holds what it held. Of a complete
    prompt the last queries are stored, too, so that policies which read nothing else can compress it later.

    Args:
        cache: as `prefill`, `compress` or `generate` left it; it does not change.
        folder: created where it is missing; a cache that it holds is replaced.
        tokenizer: `load_cache` refuses another one; None: not compared.
        about: plain containers that the manifest keeps, such as how the prompt was formatted.

    Raises:
        UserError: a cache with online eviction (`evict_interval`), one in training or of a model that is gone.
        RunError: the disk is full.
    """
    cache.seal()
    cache.refuse_invalid()
    model = cache.read_by()
    if not isinstance(model, nn.Module):
        raise UserError("the model that read this cache is not alive: save a cache while its model is")
    description, tensors, components = pack(cache)
    adapter = _packed_adapter(cache.adapter, tensors)
    manifest = {
        "model": {**describe_model(model), "dtype": _dtype(model), "weights": known_weights_digest(model)},
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "compression": cache.compression,
        "tokens": {"prompt": cache.prompt_lengths, "positions": cache.next_positions().tolist(), "ids": _ids(cache)},
        "nbytes": cache.nbytes,
        "about": dict(about or {}),
        "versions": {name: version(name) for name in ("learnkv", "torch", "transformers")},
        "adapter": adapter,
        "rotation": getattr(cache.rotation, "length", None),
        "components": described_components(components),
        "cache": description,
    }
    from learnkv.formats.folder_lock import folder_lock  # filelock is needed to write only

    path = make_folder(Path(folder).expanduser(), "folder")
    check_can_hold(path)
    with folder_lock(path, "folder"):
        try:
            _write(path, manifest, tensors)
        except (OSError, SafetensorError) as error:
            raise _cannot_write(path, error) from None
    return path


def load_cache(
    folder: str | Path,
    model: Any,
    *,
    tokenizer: Any = None,
    allow: Sequence[str] = (),
) -> CompressedCache:
    """The cache that `save_cache` wrote; every call gives another one, which can be forked, continued and saved again.

    On a CPU its tensors are a private mapping of the file: processes that load it share its memory, and what they add
    stays theirs. The file's digest is computed before, once in a process. `attach` is called on the model if it was
    not.

    Args:
        model: the model that read the prompt: of the same weights, RoPE and number format.
        tokenizer: compared with the stored digest where both are given.
        allow: module prefixes besides `learnkv` whose codecs the manifest may name.

    Raises:
        UserError: in one line, for another model or tokenizer, a file that is missing or has changed, and a newer
            format.
    """
    path = Path(folder).expanduser()
    manifest, tensors = _read(path)
    check_manifest(path, manifest, model, _dtype(model), tokenizer)
    attach(model)
    components = built_components(manifest["components"], allow, path)
    try:
        adapter = _adapter(manifest["adapter"], tensors)
        devices = layer_devices(model, layout(model.config))
        cache = unpack(model.config, manifest["cache"], tensors, components, devices)
    except _BROKEN as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: {MANIFEST} and its tensors do not belong together ({reason})") from None
    cache.adapter, cache.compression, cache.read_by = adapter, manifest["compression"], Reader(model)
    if manifest["rotation"] is not None:
        cache.rotation = moving_rope.Rotation(moving_rope.moving_embeddings(model), int(manifest["rotation"]))
    return cache


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _ids(cache: CompressedCache) -> str | None:
    """SHA-256 of the ids of all tokens, [B, S] and [B, M]; None where they are not known."""
    if cache.token_ids is None:
        return None
    digest = hashlib.sha256()
    for part in (*cache.token_ids, cache.prompt_mask):
        digest.update(f"{tuple(part.shape)}".encode() + part.long().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _packed_adapter(adapter: Adapter | None, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Description of a LoRA adapter, whose weights are added to the tensors."""
    if adapter is None:
        return None
    if not adapter.state:
        raise UserError("a cache whose adapter is in training is not stored: load the trained policy")
    tensors |= {_ADAPTER + name: weight.detach().cpu().contiguous() for name, weight in adapter.state.items()}
    return lora.description(adapter)


def _adapter(described: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Adapter | None:
    if described is None:
        return None
    state = {name.removeprefix(_ADAPTER): weight for name, weight in tensors.items() if name.startswith(_ADAPTER)}
    adapter = Adapter(int(described["rank"]), float(described["alpha"]), tuple(described["targets"]), state)
    return lora.of_its_rank(adapter)


def _write(path: Path, manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors under a name of their own, then the manifest, which names them; then drop older files."""
    part = path / f".entries.{os.getpid()}.part"
    try:
        save_file(dict(tensors), part)
        _flush(part)
        digest = file_digest(part)
        name = f"entries-{digest[:16]}.safetensors"
        part.replace(path / name)
    finally:
        part.unlink(missing_ok=True)
    manifest |= {"entries": name, "sha256": digest}
    with atomic_write(path / MANIFEST) as part:
        part.write_text(json.dumps(seal_manifest(manifest)) + "\n", encoding="utf-8")
        _flush(part)
    _flush(path)
    for old in {*path.glob(f"entries-{16 * '[0-9a-f]'}.safetensors"), *path.glob(".entries.*.part")} - {path / name}:
        old.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError | SafetensorError) -> Exception:
    full = isinstance(error, OSError) and error.errno in FULL_DISK
    if full or any(f"os error {number}" in str(error) for number in FULL_DISK):
        return RunError(f"{path}: no space left on disk; what the folder held before is unchanged")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return UserError(f"folder={path}: cannot be written: {reason}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors; once more where another program has replaced both meanwhile."""
    manifest = read_manifest(path)
    try:
        return manifest, _entries(path, manifest)
    except UserError:
        again = read_manifest(path)
        if again == manifest:
            raise
        return again, _entries(path, again)


def _entries(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    file = path / Path(str(manifest["entries"])).name
    try:
        digest = file_digest(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    if digest != manifest["sha256"]:
        raise UserError(f"{file}: has changed since it was written, {MANIFEST} has another digest")
    return read_tensors(file)
