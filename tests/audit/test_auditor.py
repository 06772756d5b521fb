"""The auditor completes its audits even when audited nodes are silent, hang or cheat."""

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
from tests.audit.audited import AuditedRun, audited_run, train_lazily


@dataclass
class Scene:
    """An auditor and two audited nodes.

    The first trains lazily; the second is honest, and its audit is a jury's. Both serve their bundles unless they are
    ``silent`` or ``hang``.
    """

    run: AuditedRun
    directory: Path
    monkeypatch: pytest.MonkeyPatch
    silent: set[str] = field(default_factory=set)
    hang: set[str] = field(default_factory=set)
    certificates: list[bytes] = field(default_factory=lambda: [b"certificate of round 1"])
    """Certificates in the auditor's ledger."""
    sealed: list[str] = field(default_factory=list)
    """Nodes on whose work the auditor has submitted a sealed verdict."""
    declined: list[str] = field(default_factory=list)
    """Nodes whose audit it has declined."""
    warnings: list[str] = field(default_factory=list)
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        run = self.run
        plan = run.plan()
        works = {run.audited.node: train_lazily(run.audited, plan, 15), run.peer.node: run.peer.train(plan)}
        audits = (
            Audit(run.audited.node, 1, 1, 1, 1, (run.auditor.node,), (1,), ()),
            Audit(run.peer.node, 1, 1, JURY, 1, (run.auditor.node,), (1,), ()),
        )
        self.record = run.advance(plan, works, audits)

    def auditor(self) -> Auditor:
        """Return an auditor on a stubbed network; certificates are not verified."""
        by_node = {one.node: one for one in (self.run.audited, self.run.peer)}

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
            (self.sealed if isinstance(body, SealedVerdict) else self.declined).append(body.accused)

        async def do(function: Callable[..., object], *arguments: object) -> object:
            return function(*arguments)

        self.monkeypatch.setattr(auditing, "claimed", lambda certificate: SimpleNamespace(record=self.record))
        network = SimpleNamespace(rpc=SimpleNamespace(call=call), blobs=SimpleNamespace(fetch_bytes=fetch_bytes))
        ledger, client = SimpleNamespace(held=held), SimpleNamespace(submit=submit)
        log = EventLog(self.directory / "events.jsonl", "auditor")
        parts = (self.run.auditor, self.directory, network, client, ledger, ShardPrefetcher())
        return Auditor(*parts, do=do, log=log, warn=self.warnings.append)  # type: ignore[arg-type]

    def finding(self, auditor: Auditor, node: str) -> Finding:
        """Return the auditor's finding on ``node``."""
        verdict = auditor._attempts[node, 1].verdict
        assert verdict is not None
        return verdict.finding


@pytest.fixture
def scene(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Scene:
    run = audited_run(tmp_path, tmp_path_factory.mktemp("cache"))
    run.peer.trace_recorder.bundles = auditing.AuditBundleStore(tmp_path / "peer")
    return Scene(run, tmp_path / "auditor", monkeypatch)


async def work_until(auditor: Auditor, until: Callable[[], bool] = lambda: False) -> None:
    """Run the auditor until it is done or ``until()`` holds, then interrupt it."""
    auditor.begin(2)
    working = auditor._working
    assert working is not None
    while not working.done() and not until():  # noqa: ASYNC110  # the condition sets no event
        await asyncio.sleep(0.001)
    await auditor.interrupt()


def test_evidence_of_a_failed_audit_is_saved_and_a_jury_member_replays_twice(scene: Scene) -> None:
    auditor = scene.auditor()
    asyncio.run(work_until(auditor))
    lazy, honest = (scene.finding(auditor, one.node) for one in (scene.run.audited, scene.run.peer))
    assert (lazy.outcome, honest.outcome, honest.error) == ("measured", "measured", 0)
    assert lazy.error > 40_000
    assert honest.noise < MOST, "a jury measures it"
    assert len(lazy.sketch) == len(honest.sketch) == SKETCH
    assert EvidenceStore(scene.directory / EVIDENCE_DIRECTORY).cases() == [(scene.run.audited.node, 1)]
    assert set(scene.sealed) == {scene.run.audited.node, scene.run.peer.node}


def test_a_verdict_is_reached_and_a_warning_shown_when_evidence_cannot_be_written(scene: Scene) -> None:
    scene.directory.mkdir()
    (scene.directory / EVIDENCE_DIRECTORY).write_text("a file, where a directory should be")
    asyncio.run(work_until(auditor := scene.auditor()))
    assert scene.finding(auditor, scene.run.audited.node).error > 40_000
    (warning,) = scene.warnings
    assert "cannot save the evidence" in warning


def test_a_node_that_refuses_its_bundle_delays_no_other_audit_and_is_asked_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The auditor is interrupted as soon as it waits: a round may be shorter than the retry interval."""
    now = [0.0]
    monkeypatch.setattr(auditing, "monotonic", lambda: now[0])
    scene.silent = {scene.run.audited.node}
    auditor = scene.auditor()
    attempt = auditor._attempts[scene.run.audited.node, 1]

    async def rounds() -> list[int]:
        found = []
        for count in range(1, auditing.MAX_FETCHES + 1):
            await work_until(auditor, lambda count=count: bool(attempt.failed_fetches == count and scene.sealed))  # type: ignore[misc]
            found.append(len(scene.sealed))
            now[0] += auditing.RETRY_SECONDS
        return found

    assert asyncio.run(rounds()) == [1, 1, 2]
    assert scene.finding(auditor, scene.run.peer.node).outcome == "measured"
    assert scene.finding(auditor, scene.run.audited.node).outcome == "unserved"


def test_an_audit_that_hung_is_not_the_first_one_tried_next_time(scene: Scene) -> None:
    scene.hang = {scene.run.audited.node}
    auditor = scene.auditor()

    attempt = auditor._attempts[scene.run.audited.node, 1]

    async def rounds() -> list[int]:
        await work_until(auditor, lambda: attempt.starts == 1)
        found = [len(scene.sealed)]
        await work_until(auditor, lambda: bool(scene.sealed))
        return [*found, len(scene.sealed)]

    assert asyncio.run(rounds()) == [0, 1]
    assert scene.finding(auditor, scene.run.peer.node).outcome == "measured"


@pytest.mark.parametrize("lacks", ["the record", "the base state"])
def test_an_audit_that_cannot_be_done_is_declined_before_the_next_round_is_planned(lacks: str, scene: Scene) -> None:
    if lacks == "the record":
        scene.certificates = []
    else:  # the auditor restarted
        scene.run.auditor.trace_recorder.theta_proofs.clear()
    auditor = scene.auditor()

    async def declined() -> bool:
        await auditor.follow(scene.record)
        assert len(scene.declined) == 2, "declined before anything else"
        return auditor.begin(2)

    assert not asyncio.run(declined()), "the node is free to train"
    assert sorted(scene.declined) == sorted([scene.run.audited.node, scene.run.peer.node])


def test_an_audit_is_declined_when_its_training_data_cannot_be_fetched(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(*_: object) -> None:
        raise BadShard("nobody has it", ())

    monkeypatch.setattr(ShardPrefetcher, "wait_ready", unavailable)
    auditor = scene.auditor()
    asyncio.run(work_until(auditor))
    assert sorted(scene.declined) == sorted([scene.run.audited.node, scene.run.peer.node])
    assert not auditor.begin(2)


@pytest.mark.parametrize("given", [True, False])
def test_rounds_missing_from_the_ledger_are_fetched_or_the_audit_is_declined(
    given: bool, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All auditors look equally far back: one that looks less far would pass what another fails."""
    asked: list[tuple[int, int]] = []

    async def before(record: Record, first: int, sources: list[str]) -> dict[int, Record]:
        assert scene.run.auditor.node not in sources
        asked.append((record.plan.round, first))
        return {0: scene.record} if given else {}

    monkeypatch.setattr(auditing, "first_round_needed", lambda round_number: 0)
    auditor = scene.auditor()
    auditor._chain_fetcher.fetch_before = before  # type: ignore[method-assign, assignment]
    asyncio.run(work_until(auditor))
    assert set(asked) == {(1, 0)}
    both = {scene.run.audited.node, scene.run.peer.node}
    assert (set(scene.sealed), set(scene.declined)) == ((both, set()) if given else (set(), both))


def test_a_declined_audit_is_declined_again_to_the_next_leader(scene: Scene) -> None:
    scene.certificates = []
    auditor = scene.auditor()

    async def twice() -> None:
        for _ in range(2):
            await auditor.follow(scene.record)

    asyncio.run(twice())
    assert sorted(scene.declined) == sorted(2 * [scene.run.audited.node, scene.run.peer.node])
