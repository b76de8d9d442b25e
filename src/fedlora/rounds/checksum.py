"""SHA-256 embedded in the content that it covers, so that both are replaced in one file operation."""

import hashlib
import re

EMPTY = {"sha256": "0" * 64}
"""First entry of a JSON object in the content; placeholder of the checksum during its computation."""

_ENTRY = re.compile(rb'\\?"sha256\\?": \\?"([0-9a-f]{64})')  # in JSON, or in JSON in a JSON string


def sealed(content: bytes) -> bytes:
    """The content with its checksum in place of the first `EMPTY`."""
    start, end = _place(content)
    return content[:start] + _sum(content, start, end) + content[end:]


def intact(content: bytes) -> bool:
    """Whether the content equals a result of `sealed`, byte for byte."""
    if _ENTRY.search(content) is None:
        return False
    start, end = _place(content)
    return content[start:end] == _sum(content, start, end)


def _place(content: bytes) -> tuple[int, int]:
    found = _ENTRY.search(content)
    assert found is not None
    return found.span(1)


def _sum(content: bytes, start: int, end: int) -> bytes:
    digest = hashlib.sha256(content[:start])
    digest.update(EMPTY["sha256"].encode())
    digest.update(memoryview(content)[end:])
    return digest.hexdigest().encode()
