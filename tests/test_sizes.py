"""Sizes of memory and disk, as people write them."""

from __future__ import annotations

import pytest

from psyche.sizes import byte_count


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6gb", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("800 MB", 8 * 10**8),
        ("1.5gib", 3 * 2**29),
        ("512b", 512),
        ("1.5 TB", 15 * 10**11),
    ],
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "6", "6g", "0gb", "-1gb", "much", "1e3gb", "6gbit"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        byte_count(text)
