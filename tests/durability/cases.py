"""Everything that is written durably, as cases: the n-th value is written, and how many values are there is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import opacus.accountants  # noqa: F401  # now, and not in each child that is about to die
import pytest

from psyche.config import MANIFEST, BpeTokenizer, Data, TextSource
from psyche.coordinator.cosigner import SIGNED_STATE
from psyche.data.cache import PART, ShardCache
from psyche.data.index import Shard
from psyche.data.prepare import prepare
from psyche.data.staging import PreparationJournal as Preparation
from psyche.data.staging import load_journal
from psyche.diloco.checkpoint import load_latest, save
from psyche.durable import write_durably
from psyche.exchange.payload_journal import PayloadJournal
from psyche.federated.privacy_budget import NAME as PRIVACY
from psyche.federated.privacy_budget import Budget
from psyche.ledger.signing_record import Ballot, load_signed, save_signed
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.network.identity import IDENTITY, Identity
from psyche.network.peer_book import PEERS, PeerBook
from psyche.network.spool import Spool
from psyche.numerics.digest import blob_root, index_chunks
from psyche.processes.coordinator_process import GENESIS, INVITE
from psyche.protocol.acceptor import Acceptor
from psyche.protocol.certificates import SignedInRound, SignedState
from psyche.telemetry.event_log import LOG_NAME, EventLog, read_events
from psyche.telemetry.events import Notice
from psyche.worker.voter import BALLOT
from tests.chains import RULES, chain
from tests.diloco.test_checkpoint import RUN, checkpoint, same

CHAIN, OTHER = chain(2), chain(2, flavour=b"other")


@dataclass(frozen=True)
class DurabilityCase:
    """Something on disk with a value that is replaced or added to."""

    name: str
    write: Callable[[Path, int], None]
    """Value 1 where there is none, then value 2; into a folder that exists."""
    read: Callable[[Path], int]
    """Which is there, 0 for none; an ``AssertionError`` for what was never written."""
    durable: bool = True
    """What was written is on the disk when the writer returns."""
    last: int = 2
    """Values there are."""


def which(found: object, *values: object) -> int:
    """The place of ``found`` among ``values``."""
    assert found in values, f"{found!r} was never written"
    return values.index(found)


# ------------------------------------------------------------------------------------- whole files


def whole_file(name: str) -> DurabilityCase:
    values = {1: b"one" * 50, 2: b"and another" * 7000}

    def read(folder: Path) -> int:
        path = folder / name
        return which(path.read_bytes() if path.exists() else b"", b"", *values.values())

    return DurabilityCase(name, lambda folder, number: write_durably(folder / name, values[number]), read)


def pledge(name: str, first: Ballot | SignedState, second: Ballot | SignedState) -> DurabilityCase:
    def read(folder: Path) -> int:
        return which(load_signed(folder / name, RUN, type(first)()), type(first)(), first, second)

    return DurabilityCase(
        name, lambda folder, number: save_signed(folder / name, RUN, (first, second)[number - 1]), read
    )


BALLOT_OF_ONE = Ballot(Acceptor(1, 2, bytes(32)), b"claim", 3, b"proposal" * 100, (b"a" * 500,), (b"b" * 900,))
OATH_OF_ONE = SignedState(4, {bytes(32): (3, SignedInRound(1, ("me", "you"), b""))})


def know(folder: Path, number: int) -> None:
    book = PeerBook(folder / PEERS)
    book.own = OWN[number]
    book.save()


OWN = {n: (f"/ip4/127.0.0.1/tcp/{n}/p2p/{Identity(bytes([n]) * 32, Path()).peer_id}",) for n in (1, 2)}


def known(folder: Path) -> int:
    return which(PeerBook(folder / PEERS).own, (), *OWN.values())


def identify(folder: Path, number: int) -> None:
    Identity.load_or_create(folder / IDENTITY)


def identified(folder: Path) -> int:
    path = folder / IDENTITY
    if not path.exists():
        return 0
    assert Identity.load_or_create(path).peer_id == Identity.load_or_create(path).peer_id
    return 1


# ------------------------------------------------------------------------------------ what is longer


def hold(folder: Path, number: int) -> None:
    save(checkpoint(number), folder, keep=2)


def held(folder: Path) -> int:
    found = load_latest(folder, RUN, pytest.fail)
    assert found is None or same(found, checkpoint(found.chain.rounds))
    return 0 if found is None else found.chain.rounds


def certify(folder: Path, number: int) -> None:
    with Ledger.open(folder / LEDGER, RULES.run_id) as ledger:
        ledger.append(CHAIN[number - 1].certificate, CHAIN[number - 1].record, CHAIN[number - 1].root)


def certified(folder: Path) -> int:
    with Ledger.open(folder / LEDGER, RULES.run_id) as ledger:
        ledger.check_pages()
        return which(list(ledger.entries()), *([one.entry for one in CHAIN[:count]] for count in range(3)))


def go_back(folder: Path, number: int) -> None:
    """A first record, then another in its place."""
    one = (CHAIN, OTHER)[number - 1][0]
    with Ledger.open(folder / LEDGER, RULES.run_id) as ledger:
        ledger.supersede(one.certificate, one.record, one.root)


def gone_back(folder: Path) -> int:
    with Ledger.open(folder / LEDGER, RULES.run_id) as ledger:
        ledger.check_pages()
        now, before = list(ledger.entries()), ledger.superseded()
        first, second = CHAIN[0].entry, OTHER[0].entry
        return which((now, before), ([], []), ([first], []), ([second], [first]))


def parts(number: int) -> list[bytes]:
    return [bytes([number]) * 70_000, b"the end"]


def take(folder: Path, number: int) -> None:
    PayloadJournal(folder, pytest.fail).put(number, Spool(folder).put(parts(number)))


def copy(folder: Path, number: int) -> None:
    """On a file system that cannot name nameless files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", _refuse)
        take(folder, number)


def _refuse(*arguments: object, **options: object) -> None:
    raise OSError


def taken(folder: Path) -> int:
    journal = PayloadJournal(folder, pytest.fail)
    roots = [index_chunks(parts(number)).root for number in (1, 2)]
    there = [root in journal for root in roots]
    assert all(journal.blob(root) is not None for root in roots if root in journal)
    return which(there, [False, False], [True, False], [True, True])


def tell(folder: Path, number: int) -> None:
    log = EventLog(folder / LOG_NAME, "me")
    log.emit(Notice(level="info", text=f"{number}" * 300))
    log.close()


def told(folder: Path) -> int:
    log = folder / LOG_NAME
    texts = [event.text for event in read_events(log) if isinstance(event, Notice)] if log.exists() else []
    return which(texts, *(["1" * 300, "2" * 300][:count] for count in range(3)))


def pay(folder: Path, number: int) -> None:
    Budget(folder, 1e9, 1e-6, 1.0).charge()


def paid(folder: Path) -> int:
    releases = msgspec.json.decode((folder / PRIVACY).read_bytes()) if (folder / PRIVACY).exists() else []
    return sum(charge["releases"] for charge in releases)


# -------------------------------------------------------------------------------------- prepared text


def note(folder: Path, number: int) -> None:
    Preparation((), None, (), documents=number).save(folder)


def noted(folder: Path) -> int:
    found = load_journal(folder, folder)
    return 0 if found is None else found.documents


def corpus(folder: Path) -> Data:
    where = folder.parent / "corpus"  # the same for all that die
    if not where.exists():
        where.mkdir()
        for number in range(6):
            (where / f"{number}.txt").write_text(f"the {number}. of some texts, {number * number}\n" * 30)
    tokenizer = BpeTokenizer(vocab_size=260)
    source = TextSource(kind="text", paths=(str(where),))
    return Data(source=source, tokenizer=tokenizer, sequence_length=16, heldout_fraction=0.4)


def encode(folder: Path, number: int) -> None:
    prepare(corpus(folder), folder, vocab_limit=260, shard_bytes=4096)


def encoded(folder: Path) -> int:
    """Whatever is there, preparing goes on from it to the same store."""
    store = prepare(corpus(folder), folder, vocab_limit=260, shard_bytes=4096)
    store.verify()
    whole = folder.parent / "whole"
    assert store.root == prepare(corpus(folder), whole, vocab_limit=260, shard_bytes=4096).root
    return 1


def shelve(folder: Path, number: int) -> None:
    incoming = ShardCache(folder, 1 << 20).claim(SHARDS[number])
    assert incoming is not None
    with incoming:
        os.pwrite(incoming.descriptor, TEXTS[number], 0)
        incoming.keep()


TEXTS = {1: b"one" * 50, 2: b"and another" * 7000}
SHARDS = {number: Shard("x", 1, len(text), blob_root(text).hex()) for number, text in TEXTS.items()}


def shelved(folder: Path) -> int:
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != PART}
    here = [number for number, shard in SHARDS.items() if found.pop(shard.root, b"") == TEXTS[number]]
    assert not found, "what has a name is whole"
    return len(here)


CASES = [
    *(whole_file(name) for name in (MANIFEST, GENESIS, INVITE)),
    pledge(BALLOT, BALLOT_OF_ONE, replace(BALLOT_OF_ONE, round=4)),
    pledge(SIGNED_STATE, OATH_OF_ONE, replace(OATH_OF_ONE, term=9)),
    DurabilityCase(PEERS, know, known),
    DurabilityCase(IDENTITY, identify, identified, last=1),
    DurabilityCase("checkpoint", hold, held),
    DurabilityCase("privacy budget", pay, paid),
    DurabilityCase("ledger", certify, certified),
    DurabilityCase("ledger that goes back", go_back, gone_back),
    DurabilityCase("journal", take, taken),
    DurabilityCase("journal of copies", copy, taken),
    DurabilityCase("shard cache", shelve, shelved),
    DurabilityCase("events", tell, told, durable=False),
    DurabilityCase("preparation", note, noted),
    DurabilityCase("token store", encode, encoded, durable=False, last=1),  # its folder may go, and is made again
]
