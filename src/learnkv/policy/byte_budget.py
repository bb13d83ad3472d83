"""Stand-in until main has it."""

import re

from learnkv.errors import UserError


def parse_bytes(text: str) -> float | int:
    """SHIM until main."""
    m = re.fullmatch(r"([\d.]+)\s*(KB|MB|GB|B)?", text.strip())
    if not m:
        raise UserError(f"bytes={text}: expected a fraction above 0 and at most 1, or bytes such as 64MB")
    return int(float(m[1]) * {"KB": 2**10, "MB": 2**20, "GB": 2**30, "B": 1}[m[2]]) if m[2] else float(m[1])
