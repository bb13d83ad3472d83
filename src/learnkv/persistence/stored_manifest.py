"""The manifest of a stored cache: format version, its own digest, and which model may continue."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learnkv.errors import UserError
from learnkv.formats.files import read_json
from learnkv.inference.digest import known_weights_digest, tokenizer_digest
from learnkv.inference.models import describe_model

MANIFEST = "manifest.json"
FORMAT = "learnkv stored cache"
FORMAT_VERSION = 1
_KEYS = {
    "model": dict,
    "tokens": dict,
    "about": dict,
    "versions": dict,
    "components": list,
    "cache": dict,
    "entries": str,
    "sha256": str,
    "tokenizer": str | None,
    "compression": dict | None,
    "adapter": dict | None,
    "rotation": int | None,
}


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its format and a digest of itself."""
    content = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}))
    return {**content, "digest": _digest(content)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stored cache.

    Raises:
        UserError: no such folder, another kind of folder, a newer format, a manifest that has changed.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: expected a folder of learnkv.save_cache or `learnkv compress`, no {MANIFEST} in it")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: expected a stored cache, {MANIFEST} is of something else")
    number = manifest.get("format_version")
    if number != FORMAT_VERSION:
        newer = isinstance(number, int) and number > FORMAT_VERSION
        advice = f"; learnkv {version('learnkv')} is older than the file, update it" if newer else ""
        raise UserError(f"{folder}: format version {number}, expected {FORMAT_VERSION}{advice}")
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if _digest(content) != manifest.get("digest"):
        raise UserError(f"{folder / MANIFEST}: has changed since it was written, its digest is another")
    wrong = [key for key, kind in _KEYS.items() if key not in content or not isinstance(content[key], kind)]
    if wrong:
        raise UserError(f"{folder / MANIFEST}: {wrong[0]} is missing or of another type")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    model: PreTrainedModel,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise UserError unless the model, in this number format, and the tokenizer are those of the stored cache."""
    stored, given = manifest["model"], describe_model(model)
    if (stored.get("config_hash"), stored.get("shapes")) != (given["config_hash"], given["shapes"]):
        raise UserError(
            f"{folder}: was read by the model {stored.get('id')} ({_listed(stored.get('shapes'))}), not by "
            f"{given['id']} ({_listed(given['shapes'])})"
        )
    if stored.get("dtype") != dtype:
        raise UserError(
            f"{folder}: was read in {stored.get('dtype')}, the model computes in {dtype}: load it with "
            f"dtype={stored.get('dtype')}"
        )
    weights = known_weights_digest(model)
    if stored.get("weights") != weights:
        before, now = manifest["versions"].get("transformers"), version("transformers")
        releases = "" if before == now else f", or transformers {now} builds it otherwise than {before} did"
        raise UserError(
            f"{folder}: was read by {stored.get('id')} with the weights {str(stored.get('weights'))[:12]}, those of "
            f"{given['id']} are {weights[:12]}: another model of this shape, or another RoPE{releases}"
        )
    if tokenizer is not None and manifest["tokenizer"] not in (None, tokenizer_digest(tokenizer)):
        raise UserError(f"{folder}: its prompt was tokenised by another tokenizer than {tokenizer.name_or_path}")


def _listed(shapes: object) -> str:
    return ", ".join(f"{name} {size}" for name, size in shapes.items()) if isinstance(shapes, Mapping) else "no sizes"
