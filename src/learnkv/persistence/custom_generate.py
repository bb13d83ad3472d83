"""The files that make an exported policy a `custom_generate` repository of transformers."""

from pathlib import Path

from learnkv.formats.files import write_text

CODE = {
    "custom_generate/generate.py": '''"""Generation from a compressed KV cache: calls the installed learnkv.

model.generate(**inputs, custom_generate="PATH or owner/name", trust_remote_code=True, keep=0.1)
"""

import sys


def generate(model, policy=None, **arguments):
    """Compress the prompt to `keep`, `budget` or `bytes`, then generate as transformers does.

    The policy is the one beside this file: transformers does not pass its name, so it is read from the calling frame.
    """
    from learnkv.integrations.custom_generate import generate as compressed

    if policy is None:
        policy = sys._getframe(1).f_locals.get("custom_generate")
        if policy is None:
            raise ValueError("policy=: expected the folder or owner/name of a policy")
        if arguments.get("revision"):
            policy = f"{policy}@{arguments['revision']}"
    return compressed(model, policy, **arguments)
''',
    "custom_generate/requirements.txt": "learnkv\n",
}
"""Content of each file. They are the only code of an export, and the same in all."""


def write(folder: Path) -> None:
    """Write the files below an exported policy."""
    for name, text in CODE.items():
        write_text(folder / name, text)


def unchanged(folder: Path) -> list[str]:
    """The names of those files that are there as they were written."""
    return [
        name
        for name, text in CODE.items()
        if (folder / name).is_file() and (folder / name).read_bytes() == text.encode()
    ]
