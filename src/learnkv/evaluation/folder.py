"""The folder of an evaluation: one program at a time, and never the folder of another program's run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from learnkv.errors import UserError
from learnkv.formats.files import make_folder, read_yaml
from learnkv.formats.folder_lock import folder_lock

CONFIG = "config.yaml"


def check_folder(output: str) -> None:
    """Raise UserError where the folder has the run of another program, whose config an evaluation would replace."""
    config = Path(output).expanduser() / CONFIG
    if not config.is_file():
        return
    try:
        keys = read_yaml(config)
    except UserError:
        keys = None
    if not isinstance(keys, dict) or not {"ckpt", "tasks", "samples"} <= keys.keys():
        raise UserError(
            f"output={output}: has the {CONFIG} of a training or another program; expected another folder, "
            f"such as output={Path(output) / 'eval'}"
        )


@contextmanager
def evaluation_folder(output: str) -> Iterator[Path]:
    """Create or open the folder `output=`, which no other evaluation writes into meanwhile.

    Raises:
        UserError: it cannot be written, or another program is writing into it.
    """
    check_folder(output)
    folder = make_folder(Path(output).expanduser(), "output")
    with folder_lock(folder, "output"):
        yield folder
