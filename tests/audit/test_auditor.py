"""An auditor does what it is asked for, whatever those that it looks at do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import psyche.audit.auditor as auditing
from psyche.audit.auditor import Auditor
from psyche.audit.evidence_store import EVIDENCE_DIRECTORY, EvidenceStore
from psyche.data.shard_prefetch import ShardPrefetcher
from psyche.data.token_store import BadShard
from psyche.network.transport import Refused
from psyche.protocol.audit_messages import JURY, MOST, SKETCH, Audit, DeclinedAudit, Finding, SealedVerdict
from psyche.protocol.messages import Record
from psyche.protocol.wire import Body
from psyche.telemetry.event_log import EventLog
from tests.audit.audited import Court, court, train_lazily


@dataclass
class Scene:
    """An auditor and two that it looks at, first a lazy one, then one that a jury is asked about and that is honest.

    They hand it their kits, unless they are ``silent`` or ``hang``.
    """

    court: Court
    directory: Path
    monkeypatch: pytest.MonkeyPatch
    silent: set[str] = field(default_factory=set)
    hang: set[str] = field(default_factory=set)
    certificates: list[bytes] = field(default_factory=lambda: [b"that of round 1"])
    """In the auditor's ledger."""
    said: list[str] = field(default_factory=list)
    """Nodes on whose work it has sealed a verdict."""
    declined: list[str] = field(default_factory=list)
    """Nodes whose work it has declined to audit."""
    warned: list[str] = field(default_factory=list)
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        case = self.court
        plan = case.plan()
        works = {case.accused.node: train_lazily(case.accused, plan, 15), case.peer.node: case.peer.train(plan)}
        audits = (
            Audit(case.accused.node, 1, 1, 1, 1, (case.auditor.node,), (1,), ()),
            Audit(case.peer.node, 1, 1, JURY, 1, (case.auditor.node,), (1,), ()),
        )
        self.record = case.advance(plan, works, audits)

    def auditor(self) -> Auditor:
        """With the network in the hands of this scene; only who certified a record is taken on trust."""
        by_node = {one.node: one for one in (self.court.accused, self.court.peer)}

        async def call(node: str, *request: object, **options: object) -> bytes:
            if node in self.silent:
                raise Refused("no")
            if node in self.hang:
                await asyncio.Event().wait()
            bundles = by_node[node].trace_recorder.bundles
            assert bundles is not None
            bundle = bundles.bundle(1)
            assert bundle is not None
            return bundle.encode()

        async def fetch_bytes(root: bytes, *, sources: list[str], max_size: int) -> bytearray:
            bundles = by_node[sources[0]].trace_recorder.bundles
            assert bundles is not None
            return bytearray(bundles.read(1, root, max_size))

        async def held(rounds: range, most: int) -> list[bytes]:
            return self.certificates

        async def submit(body: Body, round_number: int) -> None:
            assert isinstance(body, SealedVerdict | DeclinedAudit)
            (self.said if isinstance(body, SealedVerdict) else self.declined).append(body.accused)

        async def do(function: Callable[..., object], *arguments: object) -> object:
            return function(*arguments)

        self.monkeypatch.setattr(auditing, "claimed", lambda certificate: SimpleNamespace(record=self.record))
        network = SimpleNamespace(rpc=SimpleNamespace(call=call), blobs=SimpleNamespace(fetch_bytes=fetch_bytes))
        ledger, client = SimpleNamespace(held=held), SimpleNamespace(submit=submit)
        log = EventLog(self.directory / "events.jsonl", "auditor")
        parts = (self.court.auditor, self.directory, network, client, ledger, ShardPrefetcher())
        return Auditor(*parts, do=do, log=log, warn=self.warned.append)  # type: ignore[arg-type]

    def finding(self, auditor: Auditor, node: str) -> Finding:
        """What it will show of ``node``."""
        verdict = auditor._attempts[node, 1].verdict
        assert verdict is not None
        return verdict.finding


@pytest.fixture
def scene(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Scene:
    case = court(tmp_path, tmp_path_factory.mktemp("cache"))
    case.peer.trace_recorder.bundles = auditing.AuditBundleStore(tmp_path / "peer")
    return Scene(case, tmp_path / "auditor", monkeypatch)


async def worked(auditor: Auditor, until: Callable[[], bool] = lambda: False) -> None:
    """All that it is asked for, or what it does until ``until()``; then it is put off."""
    auditor.begin(2)
    working = auditor._working
    assert working is not None
    while not working.done() and not until():  # noqa: ASYNC110  # what is waited for sets no event
        await asyncio.sleep(0.001)
    await auditor.interrupt()


def test_what_fails_is_kept_and_a_jury_looks_twice(scene: Scene) -> None:
    auditor = scene.auditor()
    asyncio.run(worked(auditor))
    lazy, honest = (scene.finding(auditor, one.node) for one in (scene.court.accused, scene.court.peer))
    assert (lazy.outcome, honest.outcome, honest.error) == ("measured", "measured", 0)
    assert lazy.error > 40_000
    assert honest.noise < MOST, "a jury measures it"
    assert len(lazy.sketch) == len(honest.sketch) == SKETCH
    assert EvidenceStore(scene.directory / EVIDENCE_DIRECTORY).cases() == [(scene.court.accused.node, 1)]
    assert set(scene.said) == {scene.court.accused.node, scene.court.peer.node}


def test_evidence_that_cannot_be_written_costs_no_verdict_and_is_told(scene: Scene) -> None:
    scene.directory.mkdir()
    (scene.directory / EVIDENCE_DIRECTORY).write_text("a file, where a directory should be")
    asyncio.run(worked(auditor := scene.auditor()))
    assert scene.finding(auditor, scene.court.accused.node).error > 40_000
    (warning,) = scene.warned
    assert "cannot save the evidence" in warning


def test_who_hands_nothing_over_holds_up_nobody_and_is_asked_in_later_rounds(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The auditor is put off as soon as it waits: rounds may be shorter than what it waits for."""
    now = [0.0]
    monkeypatch.setattr(auditing, "monotonic", lambda: now[0])
    scene.silent = {scene.court.accused.node}
    auditor = scene.auditor()
    attempt = auditor._attempts[scene.court.accused.node, 1]

    async def rounds() -> list[int]:
        found = []
        for count in range(1, auditing.MAX_FETCHES + 1):
            await worked(auditor, lambda count=count: bool(attempt.failed_fetches == count and scene.said))  # type: ignore[misc]
            found.append(len(scene.said))
            now[0] += auditing.RETRY_SECONDS
        return found

    assert asyncio.run(rounds()) == [1, 1, 2]
    assert scene.finding(auditor, scene.court.peer.node).outcome == "measured"
    assert scene.finding(auditor, scene.court.accused.node).outcome == "unserved"


def test_who_hangs_is_not_begun_with_again(scene: Scene) -> None:
    scene.hang = {scene.court.accused.node}
    auditor = scene.auditor()

    attempt = auditor._attempts[scene.court.accused.node, 1]

    async def rounds() -> list[int]:
        await worked(auditor, lambda: attempt.starts == 1)
        found = [len(scene.said)]
        await worked(auditor, lambda: bool(scene.said))
        return [*found, len(scene.said)]

    assert asyncio.run(rounds()) == [0, 1]
    assert scene.finding(auditor, scene.court.peer.node).outcome == "measured"


@pytest.mark.parametrize("lacks", ["the record", "the base state"])
def test_what_a_node_cannot_audit_it_declines_before_the_next_round_is_planned(lacks: str, scene: Scene) -> None:
    if lacks == "the record":
        scene.certificates = []
    else:  # it started again meanwhile
        scene.court.auditor.trace_recorder.theta_proofs.clear()
    auditor = scene.auditor()

    async def declined() -> bool:
        await auditor.follow(scene.record)
        assert len(scene.declined) == 2, "before anything else is done"
        return auditor.begin(2)

    assert not asyncio.run(declined()), "it is free to train"
    assert sorted(scene.declined) == sorted([scene.court.accused.node, scene.court.peer.node])


def test_work_on_text_that_cannot_be_fetched_is_declined(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_: object) -> None:
        raise BadShard("nobody has it", ())

    monkeypatch.setattr(ShardPrefetcher, "wait_ready", gone)
    auditor = scene.auditor()
    asyncio.run(worked(auditor))
    assert sorted(scene.declined) == sorted([scene.court.accused.node, scene.court.peer.node])
    assert not auditor.begin(2)


@pytest.mark.parametrize("given", [True, False])
def test_rounds_that_its_ledger_lacks_are_fetched_or_the_audit_is_declined(
    given: bool, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All auditors look as far back: one that looks less far would pass what another fails."""
    asked: list[tuple[int, int]] = []

    async def before(record: Record, first: int, sources: list[str]) -> dict[int, Record]:
        assert scene.court.auditor.node not in sources
        asked.append((record.plan.round, first))
        return {0: scene.record} if given else {}

    monkeypatch.setattr(auditing, "first_round_needed", lambda round_number: 0)
    auditor = scene.auditor()
    auditor._chain_fetcher.fetch_before = before  # type: ignore[method-assign, assignment]
    asyncio.run(worked(auditor))
    assert set(asked) == {(1, 0)}
    both = {scene.court.accused.node, scene.court.peer.node}
    assert (set(scene.said), set(scene.declined)) == ((both, set()) if given else (set(), both))


def test_what_was_declined_under_a_leader_that_is_gone_is_said_to_the_next(scene: Scene) -> None:
    scene.certificates = []
    auditor = scene.auditor()

    async def twice() -> None:
        for _ in range(2):
            await auditor.follow(scene.record)

    asyncio.run(twice())
    assert sorted(scene.declined) == sorted(2 * [scene.court.accused.node, scene.court.peer.node])
