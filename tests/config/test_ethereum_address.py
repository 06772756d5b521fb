"""Addresses as Ethereum writes them, and its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.config import override_node
from psyche.config.ethereum_address import address_bytes, checksummed, keccak256
from psyche.config.files import load_node
from psyche.config.node_config import Node
from psyche.errors import ConfigError

# The examples of EIP-55.
EXAMPLES = [
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
    "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
]


def test_the_hash_is_not_sha3() -> None:
    assert keccak256(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
    assert keccak256(b"") != hashlib.sha3_256(b"").digest()


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(text: str) -> None:
    address = address_bytes(text)
    assert checksummed(address) == text
    assert address_bytes(text.lower()) == address_bytes("0x" + text[2:].upper()) == address


@given(st.binary(min_size=20, max_size=20).filter(any))
def test_what_is_written_is_read(address: bytes) -> None:
    assert address_bytes(checksummed(address)) == address


@given(st.sampled_from(EXAMPLES), st.integers(2, 41), st.sampled_from("0123456789abcdefABCDEF"))
def test_a_wrong_digit_is_found(text: str, at: int, digit: str) -> None:
    """With a chance of 1 in 4,000 it is not; none of these is of them."""
    changed = text[:at] + digit + text[at + 1 :]
    if changed != text:
        with pytest.raises(ValueError, match="wrong checksum: copy the whole address"):
            address_bytes(changed)


@pytest.mark.parametrize("text", ["", "0x", EXAMPLES[0][2:], EXAMPLES[0] + "0", "0x" + "g" * 40, EXAMPLES[0] + "\n"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="give 0x and 40 hexadecimal digits"):
        address_bytes(text)


def test_nobody_owns_zero() -> None:
    with pytest.raises(ValueError, match="belongs to nobody"):
        address_bytes("0x" + "0" * 40)


def test_it_can_be_said_on_the_command_line() -> None:
    assert override_node(Node(), payout=EXAMPLES[0]).payout == EXAMPLES[0]
    assert override_node(Node(payout=EXAMPLES[0])).payout == EXAMPLES[0]
    with pytest.raises(ConfigError, match=r"command line.*payout.*copy the whole address"):
        override_node(Node(), payout=EXAMPLES[0].replace("5aA", "5Aa"))


def test_yaml_makes_a_number_of_it(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(f"node: {{payout: {EXAMPLES[0]}}}")
    with pytest.raises(ConfigError, match=r"node.*payout.*put the address in quotes"):
        load_node(file)
    file.write_text(f"node: {{payout: '{EXAMPLES[0]}'}}")
    assert load_node(file).payout == EXAMPLES[0]
