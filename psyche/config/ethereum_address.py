"""Ethereum addresses with EIP-55 checksums, and Keccak-256."""

from __future__ import annotations

import re

from typing_extensions import Buffer

ADDRESS_BYTES = 20
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


def keccak256(data: Buffer) -> bytes:
    """Return the 32 bytes of Keccak-256, which differs from SHA3-256 in its padding."""
    from Crypto.Hash import keccak  # loads a C library that few commands need

    return keccak.new(digest_bits=256, data=bytes(data)).digest()


def address_bytes(text: str) -> bytes:
    """Parse ``0x`` and 40 hexadecimal digits to 20 bytes. Raises ``ValueError``.

    An address in mixed case carries a checksum (EIP-55), which is verified; one in a single case has none.
    """
    if not _ADDRESS.fullmatch(text):
        raise ValueError(f"{text!r} is not an address: give 0x and 40 hexadecimal digits, as a wallet shows it")
    address, digits = bytes.fromhex(text[2:]), text[2:]
    if digits not in (digits.lower(), digits.upper()) and checksummed(address) != text:
        raise ValueError(f"{text} has a wrong checksum: copy the whole address from the wallet again")
    if not any(address):
        raise ValueError("the zero address belongs to nobody: give your own address")
    return address


def checksummed(address: bytes) -> str:
    """Format an address with its EIP-55 checksum: a letter is upper-case if the hash has a digit above 7 there."""
    digits = address.hex()
    marks = keccak256(digits.encode()).hex()
    return "0x" + "".join(d.upper() if mark > "7" else d for d, mark in zip(digits, marks, strict=False))
