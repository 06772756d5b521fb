"""Hashes and addresses as Ethereum has them."""

from __future__ import annotations

import re

from typing_extensions import Buffer

ADDRESS_BYTES = 20
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


def keccak256(data: Buffer) -> bytes:
    """Keccak-256, which became SHA-3 with another padding: 32 bytes."""
    from Crypto.Hash import keccak  # it loads a C library, which few commands need

    return keccak.new(digest_bits=256, data=bytes(data)).digest()


def address_bytes(text: str) -> bytes:
    """The 20 bytes of ``0x`` and 40 hexadecimal digits. Raises ``ValueError`` with the mend.

    Letters in both cases have a checksum in them (EIP-55), which is held against the digits; in one case they have not.
    """
    if not _ADDRESS.fullmatch(text):
        raise ValueError(f"{text!r} is no address: give 0x and 40 hexadecimal digits, as a wallet shows it")
    address, digits = bytes.fromhex(text[2:]), text[2:]
    if digits not in (digits.lower(), digits.upper()) and checksummed(address) != text:
        raise ValueError(f"{text} has a wrong checksum: a digit is wrong; copy the whole address from the wallet again")
    if not any(address):
        raise ValueError("nobody owns the address of zeros: give your own")
    return address


def checksummed(address: bytes) -> str:
    """An address as EIP-55 writes it: a letter is a capital where the digit of the hash in its place is above 7."""
    digits = address.hex()
    marks = keccak256(digits.encode()).hex()
    return "0x" + "".join(d.upper() if mark > "7" else d for d, mark in zip(digits, marks, strict=False))
