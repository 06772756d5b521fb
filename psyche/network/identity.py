"""A node's identity: an Ed25519 key, whose PeerID contains the public key.

A signature can therefore be checked from the author's PeerID alone, without key server or certificate. The key file has
libp2p's format, because the libp2p daemon uses the same file: the peer that authenticates a connection and the author
that signs messages are the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from psyche.durable import sync_directory
from psyche.errors import PsycheError
from psyche.network.address import PEER_ID
from psyche.numerics.digest import digest
from psyche.protocol.wire import Envelope, signing_bytes

# libp2p's protobufs, which for Ed25519 have one fixed form: field 1 is the key type (1), field 2 the key.
_PRIVATE_HEADER = bytes((0x08, 0x01, 0x12, 64))  # PrivateKey{Ed25519, private ‖ public}
_PEER_HEADER = bytes((0x00, 36, 0x08, 0x01, 0x12, 32))  # identity multihash of PublicKey{Ed25519, public}

IDENTITY = "identity.key"
"""Name of the key file in the directory of a node or coordinator."""


_KEYS = 8192
"""Public keys cached, a few hundred bytes each: twice as many as a round has members."""


class BadSignature(Exception):
    """An envelope was not signed by the author it names."""


class WrongContext(Exception):
    """An envelope is for another domain, run or round; the text says which."""


class Identity:
    """A node's key pair. ``peer_id`` is its public name (base58, 12D3Koo…), ``path`` the file it lives in."""

    def __init__(self, seed: bytes, path: Path) -> None:
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.path = path
        self.peer_id = base58.b58encode(_PEER_HEADER + self._key.public_key().public_bytes_raw()).decode()

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read the key file, or make one (mode 0600, atomically). Raises :class:`PsycheError` that says how to fix
        it."""
        path = path.expanduser()
        try:
            if not path.exists():
                _create(path)
            return cls(_read(path), path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise PsycheError(f"cannot use the identity file {path}: {reason}; choose another place for it") from None

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature of ``data``, 64 bytes."""
        return self._key.sign(data)

    def seal(self, domain: str, run_id: bytes, round_number: int, body: bytes) -> Envelope:
        """Return a signed envelope around ``body``."""
        draft = Envelope(domain, run_id, round_number, self.peer_id, body, bytes(64))
        return Envelope(domain, run_id, round_number, self.peer_id, body, self.sign(signing_bytes(draft)))

    def secret_digest(self, *parts: bytes) -> bytes:
        """32 bytes that the same key and parts always give and nobody else can guess, for salts of commitments."""
        return digest("identity secret", self._seed, *parts)


def in_use(path: Path) -> bool:
    """Return whether a node runs with this key file: its daemon holds a lock on it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not there, or on a file system without locks
        return False
    return False


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Return whether the owner of ``peer_id`` signed ``data``. False too for names that are not Ed25519 PeerIDs."""
    key = public_key(peer_id)
    if key is None:
        return False
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def open_envelope(envelope: Envelope, *, domain: str, run_id: bytes, round_number: int | None = None) -> None:
    """Check that an envelope is for this purpose, run and round, then that its author signed it.

    Raises :class:`WrongContext` or :class:`BadSignature`. ``round_number=None`` accepts any round.
    """
    check_context(envelope, domain=domain, run_id=run_id, round_number=round_number)
    if not verify(envelope.author, signing_bytes(envelope), envelope.signature):
        raise BadSignature(f"not signed by {envelope.author}")


def check_context(envelope: Envelope, *, domain: str, run_id: bytes, round_number: int | None) -> None:
    """Check that an envelope is for this purpose, run and round, but not its signature. Raises
    :class:`WrongContext`."""
    if envelope.domain != domain:
        raise WrongContext(f"domain {envelope.domain!r}, expected {domain!r}")
    if envelope.run_id != run_id:
        raise WrongContext(f"run {envelope.run_id.hex()[:12]}, expected {run_id.hex()[:12]}")
    if round_number is not None and envelope.round != round_number:
        raise WrongContext(f"round {envelope.round}, expected {round_number}")


@lru_cache(_KEYS)
def public_key(peer_id: str) -> Ed25519PublicKey | None:
    """Return the public key contained in a PeerID, or None if it is not the PeerID of an Ed25519 key."""
    if not PEER_ID.fullmatch(peer_id):
        return None
    raw = base58.b58decode(peer_id)
    # Decoding ignores what encoding would not produce, and two names for one key would be two votes.
    if len(raw) != 38 or not raw.startswith(_PEER_HEADER) or base58.b58encode(raw).decode() != peer_id:
        return None
    return Ed25519PublicKey.from_public_bytes(raw[len(_PEER_HEADER) :])


def _read(path: Path) -> bytes:
    """Return the seed in a key file. Raises :class:`PsycheError` where the file is not exactly one Ed25519 key."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise PsycheError(f"others on this machine can read the identity file {path}; run: chmod 600 {path}")
        data = file.read(256)
    seed, public = data[4:36], data[36:]
    if (
        len(data) != 68
        or not data.startswith(_PRIVATE_HEADER)
        or Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() != public
    ):
        raise PsycheError(f"the identity file {path} is damaged; restore it, or remove it to become a new peer")
    return seed


def _create(path: Path) -> None:
    """Write a new key beside ``path`` and link it in place: never half a file, never one over another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_PRIVATE_HEADER + key.private_bytes_raw() + key.public_key().public_bytes_raw())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its key is the one
            os.link(draft, path)
        sync_directory(path.parent)  # before anything is signed with it: a node that loses its key is another peer
    finally:
        draft.unlink(missing_ok=True)
