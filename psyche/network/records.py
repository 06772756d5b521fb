"""Records in the run's DHT: announcements signed by their authors, few, small and for a limited time.

hivemind's DHT is open: anyone may ask any node to store anything under any key. Three things close it.
``RecordValidator`` believes only records that name, under signature, their author, run, kind and end of life, so
nobody can speak for another, revive an old record, or move one to another key. ``RecordTable`` replaces hivemind's
storage, which has no bounds. ``NoCache`` replaces its cache, where one far-dated record would hide all others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.protocol.wire import Envelope, MalformedMessage, decode_envelope, encode_envelope

DOMAIN = "announce"
MAX_BODY = 1024
"""Bytes of an announcement's body: addresses, a version, a few numbers."""
MAX_RECORD = MAX_BODY + 512
MAX_AUTHORS = 1024
"""Announcements of one kind that a node stores. All are in one reply, which hivemind's daemon bounds at 4 MiB."""
MAX_TTL = 3600.0
CLOCK_SKEW = 10.0
"""Seconds that two honest clocks may differ by."""


class Announcement(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The body of an announcement's envelope. ``expires_ms`` is Unix time in milliseconds."""

    kind: str
    expires_ms: int
    body: bytes


def record_key(run_id: bytes, kind: str) -> str:
    """Return the DHT key of all announcements of one kind in one run."""
    return f"psyche/{run_id.hex()}/{kind}"


def sign_record(identity: Identity, run_id: bytes, announcement: Announcement) -> bytes:
    """Return the value to store under ``record_key``, subkey PeerID."""
    return encode_envelope(identity.seal(DOMAIN, run_id, 0, msgspec.msgpack.encode(announcement)))


def open_record(run_id: bytes, data: bytes) -> tuple[str, Announcement]:
    """(author, announcement) of a stored value.

    Raises MalformedMessage, WrongContext or BadSignature: a record is whole, of this run, and its author's.
    """
    envelope = decode_envelope(data, MAX_RECORD)
    open_envelope(envelope, domain=DOMAIN, run_id=run_id, round_number=0)
    return envelope.author, _announcement(envelope)


def _announcement(envelope: Envelope) -> Announcement:
    try:
        announcement = msgspec.msgpack.decode(envelope.body, type=Announcement)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise MalformedMessage("not an announcement") from None
    if len(announcement.body) > MAX_BODY or msgspec.msgpack.encode(announcement) != envelope.body:
        raise MalformedMessage("an announcement that is too long or not canonical")
    return announcement


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped
    """Decides which records exist, for storing as for reading. Depends on no clock: hivemind throws away a peer's
    whole reply for one record it finds invalid, so two honest nodes must never disagree on one."""

    def __init__(self, run_id: bytes, kinds: Sequence[str]) -> None:
        self._kinds = {DHTID.generate(record_key(run_id, kind)).to_bytes(): kind for kind in kinds}
        # Every lookup brings the same records again, from several nodes.
        self._open = functools.lru_cache(maxsize=4 * MAX_AUTHORS)(functools.partial(_open_or_none, run_id))

    def validate(self, record: DHTRecord) -> bool:
        kind = self._kinds.get(record.key)
        if kind is None or len(record.value) > MAX_RECORD + 8 or len(record.subkey) > 64:
            return False
        try:
            subkey = msgspec.msgpack.decode(record.subkey, type=str)
            value = msgspec.msgpack.decode(record.value, type=bytes)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        opened = self._open(value)
        if opened is None:
            return False
        author, said = opened
        return author == subkey and said.kind == kind and said.expires_ms / 1000 == record.expiration_time


def _open_or_none(run_id: bytes, value: bytes) -> tuple[str, Announcement] | None:
    try:
        return open_record(run_id, value)
    except (MalformedMessage, WrongContext, BadSignature):
        return None


class RecordTable:
    """Validated records by key and author: the part of hivemind's ``DHTLocalStorage`` that its protocol uses.

    Holds MAX_AUTHORS records a key (the validator admits only our few keys), each for MAX_TTL at most; the newest
    of an author replaces the one before.
    """

    def __init__(self) -> None:
        self._records: dict[Any, dict[str, ValueWithExpiration]] = {}

    def store(self, key: Any, value: bytes, expiration_time: float, subkey: str | None = None) -> bool:
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: Any, subkey: str, value: bytes, expiration_time: float) -> bool:
        now = time.time()
        records = self._live(key)
        known = records.get(subkey)
        if not now < expiration_time <= now + MAX_TTL + CLOCK_SKEW:
            return False
        if known.expiration_time >= expiration_time if known else len(records) >= MAX_AUTHORS:
            return False
        records[subkey] = ValueWithExpiration(value, expiration_time)
        self._records[key] = records
        return True

    def get(self, key: Any) -> ValueWithExpiration | None:
        """Return all records of a key as a new dictionary value (a search merges what others have into it)."""
        records = self._live(key)
        if not records:
            return None
        merged = DictionaryDHTValue()
        for author, record in records.items():
            merged.store(author, record.value, record.expiration_time)
        return ValueWithExpiration(merged, merged.latest_expiration_time)

    def items(self) -> Iterator[tuple[Any, ValueWithExpiration]]:
        for key in list(self._records):
            value = self.get(key)
            if value is not None:
                yield key, value

    def _live(self, key: Any) -> dict[str, ValueWithExpiration]:
        now = time.time()
        return {author: r for author, r in self._records.get(key, {}).items() if r.expiration_time > now}


class NoCache(DHTLocalStorage):  # type: ignore[misc]  # hivemind is untyped
    """Keeps nothing. Peers may ask to have records *cached*, and what is cached would be returned instead of
    what is stored, if only its end of life is later."""

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        return False

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        return False
