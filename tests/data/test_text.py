import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch

from learnkv.data.text import text_windows
from learnkv.errors import UserError


class Bytes:
    """A tokenizer of one token per byte that begins prompts with token 256 and counts how often it is asked."""

    bos_token_id, eos_token_id = 256, 257

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.asked += 1
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(258)}


TEXTS = ["the first document.", "and the second one", "x" * 30]
STREAM = [token for text in TEXTS for token in [*text.encode(), 257]]
EXPECTED = [[256, *STREAM[at : at + 7]] for at in range(0, len(STREAM) - 6, 7)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines() -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "*.txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_windows_of_local_files(tmp_path: Path, name: str, streaming: bool) -> None:
    if name == "a.parquet":
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / name)
    elif name == "*.txt":
        for i, text in enumerate(TEXTS):
            (tmp_path / f"{i}.txt").write_text(text)
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines().encode()) if name.endswith("gz") else lines().encode())
    windows = text_windows(str(tmp_path / name), Bytes(), 8, streaming=streaming)
    found = [row["input_ids"] for row in windows]
    assert all(isinstance(window, torch.Tensor) and window.shape == (8,) for window in found)
    assert torch.stack(found).tolist() == EXPECTED


def test_text_is_tokenised_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines())
    first, second, other = Bytes(), Bytes(), Bytes()
    text_windows(str(tmp_path / "a.jsonl"), first, 8)
    again = text_windows(str(tmp_path / "a.jsonl"), second, 8)
    assert first.asked > 1 >= second.asked
    assert [w.tolist() for w in again["input_ids"]] == EXPECTED
    assert len(text_windows(str(tmp_path / "a.jsonl"), other, 9)[0]["input_ids"]) == 9


def test_one_line_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines())
    (tmp_path / "a.csv").write_text("text\nhere\n")
    with pytest.raises(UserError, match=r"text .*/none\.txt: no such file"):
        text_windows(str(tmp_path / "none.txt"), Bytes(), 8)
    with pytest.raises(UserError, match=r"expected one of \.txt, \.jsonl"):
        text_windows(str(tmp_path / "a.csv"), Bytes(), 8)
    with pytest.raises(UserError, match=r"column='body': .* has text"):
        text_windows(str(tmp_path / "a.jsonl"), Bytes(), 8, column="body")
    with pytest.raises(UserError, match="no window of 500 tokens"):
        text_windows(str(tmp_path / "a.jsonl"), Bytes(), 500)
