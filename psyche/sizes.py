"""How much memory or disk, as people write it."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE)


def byte_count(text: str) -> int:
    """``6gb``, ``6GiB`` or ``800 MB`` as bytes; with an i powers of 1024, else of 1000. Raises ``ValueError``."""
    match = _SIZE.fullmatch(text.strip())
    bytes_ = match and float(match[1]) * (1024 if match[3] else 1000) ** "_kmgt".index(match[2].lower() or "_")
    if not bytes_ or bytes_ < 1:
        raise ValueError(f"{text!r} is not a size such as 6gb or 800MiB")
    return int(bytes_)
