"""Tokenising a text needs memory that does not grow with its documents."""

import pytest

from benchmarks import text_memory


@pytest.mark.slow
def test_memory_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = text_memory.main(["--megabytes", "3"])
    assert set(peaks) == {f"{kind}{how}" for kind in text_memory.KINDS for how in ("", " streamed")}
    assert max(peaks.values()) < 250  # about 140; 3 MB that are tokenised at once need more than 375
    assert capsys.readouterr().out.count("windows: peak") == len(peaks)
