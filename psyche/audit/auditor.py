"""The auditor in every worker: what it lets others check of its own work, and what it checks of theirs (DESIGN §8).

While the members of a round train, who is asked to audit does somebody's work again instead (``protocol/audits.py``
says who). Nobody waits for it: the outer step of the round is taken as if the node did nothing, and a node that is a
member after all puts the audit off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Protocol, TypeVar

from psyche.audit.audit_case import AuditCase, first_needed, open_case
from psyche.audit.evidence_store import EVIDENCE, Evidence
from psyche.audit.recheck import audit, can_audit, claim_of
from psyche.audit.replay import Stopped, needed
from psyche.config.manifest import chain_rules
from psyche.data.shard_prefetch import Supply
from psyche.data.store import BadShard
from psyche.diloco.audit_bundle import MAX_KIT, AuditBundle, AuditBundles, Unserved
from psyche.diloco.replica import Replica
from psyche.errors import PsycheError
from psyche.ledger.chain_sync import Past
from psyche.ledger.writer import LedgerWriter
from psyche.network.transport import BadBlob, FetchError, Network, Refused, Unreachable, Violation
from psyche.protocol.audits import asked
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.judgement import grade
from psyche.protocol.ledger import claimed
from psyche.protocol.messages import Record
from psyche.protocol.verdicts import JURY, Audit, AuditStatement, DeclinedAudit, Finding, SealedVerdict, Verdict
from psyche.protocol.wire import Body, decode
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog

AUDITS = "audits"
"""What others need to check this node's last rounds, in its directory."""
CALL_SECONDS = 15.0
ATTEMPTS = 3
"""To get something of an accused, before that is said."""
RETRY_SECONDS = 2.0
MAX_LOOKED_AT = 64 << 20
"""Bytes of certificates."""
NO_BASE = "it does not hold what that round was trained from"
"""Why a node declines: it was not there, started again since, or has several ranks."""
UNSERVED = Finding("unserved", 0, 0, 0)

Key = tuple[str, int]
T = TypeVar("T")


class Client(Protocol):
    """Takes messages to the coordinator. Raises ``Refused``."""

    async def submit(self, body: Body, round_number: int) -> None: ...


class Do(Protocol):
    """Runs a function where the node trains."""

    def __call__(self, function: Callable[..., T], *arguments: object) -> Awaitable[T]: ...


class Later(Exception):
    """Something of an accused is not to be had now."""


class Convicted(PsycheError):
    """This node was convicted in its run."""


@dataclass
class AuditAttempt:
    """What this node has done for an audit it is asked for."""

    begun: int = 0
    """Times: who is put off goes on with another one, lest an accused holds up all."""
    failed: int = 0
    """Times that something of the accused was not to be had, whether this node was put off meanwhile or not."""
    again: float = 0.0
    """When to ask it once more, by this machine's clock: it may be between two connections."""
    verdict: Verdict | None = None
    declined: bool = False
    """This node cannot do it: the next candidate is to be asked."""


class Auditor:
    """One node's."""

    def __init__(
        self,
        replica: Replica,
        directory: Path,
        network: Network,
        client: Client,
        ledger: LedgerWriter,
        supply: Supply,
        *,
        do: Do,
        log: EventLog,
        warn: Callable[[str], None],
    ) -> None:
        """In the node's ``directory`` is kept what others need to check ``replica``, and what did not pass. ``do`` runs
        a function on the thread that trains."""
        self._replica, self._network, self._client = replica, network, client
        self._ledger, self._supply, self._do, self._log, self._warn = ledger, supply, do, log, warn
        self._kits, self._evidence = AuditBundles(directory / AUDITS, warn), Evidence(directory / EVIDENCE)
        replica.trace_recorder.bundles = self._kits
        self._past = Past(replica.manifest, network.rpc)
        self._me, self._rules = replica.node, chain_rules(replica.manifest).audits
        self._tried: defaultdict[Key, AuditAttempt] = defaultdict(AuditAttempt)
        self._served: dict[int, list[tuple[bytes, Callable[[int], bytes]]]] = {}
        self._working: asyncio.Task[None] | None = None
        self._now: Audit | None = None
        """What it is busy with, or was last, and"""
        self._during = 0
        """the round under way."""
        self._saying: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        """Of the work that is under way: the thread that trains asks for it between two steps."""

    async def serve(self) -> None:
        """Let others ask for the trace points of this node's rounds. Blobs are served of what is audited."""

        async def bundle(peer: str, request: bytes) -> bytes:
            found = await asyncio.to_thread(self._kits.bundle, int.from_bytes(request, "little"))
            if found is None:
                raise Refused("this node has nothing of that round (any more)")
            return found.encode()

        await self._network.rpc.serve("kit", bundle, max_request=8)
        self._offer()

    @property
    def busy(self) -> bool:
        """Whether the engine holds somebody else's work."""
        return self._working is not None and not self._working.done()

    async def follow(self, record: Record) -> None:
        """``record`` is certified, and its outer step taken: say what is to be said, and forget what nobody asks for.

        What this node cannot audit it declines before the next round is planned, so that it can train in that round.

        Raises :class:`Convicted`.
        """
        for one in record.audit_state.closed:
            if one.accused == self._me:
                self._tell(f"the audit of this node's work in round {one.round} ended: {one.outcome}")
        for key in self._tried.keys() - {(one.accused, one.round) for one in record.audit_state.audits}:
            del self._tried[key]
        self.check()
        self._offer()
        if self._saying is not None:
            self._saying.cancel()
        for duty in self._duties():
            held = can_audit(self._replica, duty.round) and await self._records(range(duty.round, duty.round + 1))
            if not held:
                self._cannot(duty, NO_BASE)
        for case in record.audit_state.audits:
            if self._tried[case.accused, case.round].declined and self._me not in case.declined:
                await self._submit(DeclinedAudit(case.accused, case.round))
        self._saying = asyncio.create_task(self._say(record.audit_state.audits))

    async def _say(self, audits: Sequence[Audit]) -> None:
        """What is not on record yet of this node's verdicts: nobody waits for it, however long the coordinator is
        away."""
        for case in audits:
            mine = next((one for one in case.opinions if one.auditor == self._me), None)
            verdict = self._tried[case.accused, case.round].verdict
            if verdict is not None and (mine is None or mine.finding is None):
                sealed = SealedVerdict(case.accused, case.round, verdict.digest)
                await self._submit(sealed if mine is None else verdict)

    def check(self) -> None:
        """Raise :class:`Convicted` where the chain says so."""
        if self._me in self._replica.chain.audit_state.banned:
            raise Convicted(
                "this node was convicted of cheating and takes no part in this run any more; what of is in "
                "`psyche ledger why`. If it is honest its hardware computes wrongly: `psyche doctor`, no overclocking"
            )

    def begin(self, round_number: int) -> bool:
        """This node is no member of the round under way: do the audits that it is asked for. Whether there are any."""
        self._during = round_number
        if self.busy:
            self._tell_what_is_audited()
        elif self._duties():
            self._now = None
            self._stop = threading.Event()
            self._working = asyncio.create_task(self._work(self._stop))
        return self.busy

    async def put_off(self) -> None:
        """Stop working; what was begun is begun anew another time."""
        self._stop.set()
        if self._working is not None:
            self._working.cancel()
            (ended,) = await asyncio.gather(self._working, return_exceptions=True)
            self._working = None
            if isinstance(ended, Exception):
                raise ended

    async def close(self) -> None:
        """Do and say nothing any more."""
        await self.put_off()
        if self._saying is not None:
            self._saying.cancel()
            await asyncio.gather(self._saying, return_exceptions=True)

    # ------------------------------------------------------------------------------ being audited

    def _offer(self) -> None:
        """Serve what is being audited, and of the rest keep the last round: who stood out in it is not known yet."""
        chain = self._replica.chain
        wanted = {audit.round for audit in chain.audit_state.audits if audit.accused == self._me}
        for round_number in [round_number for round_number in self._served if round_number not in wanted]:
            for root, read in self._served.pop(round_number):
                self._network.blobs.remove(root, read)
        for round_number in wanted - set(self._served):
            self._served[round_number] = []
            for root, load, read in self._kits.blobs(round_number):
                self._network.blobs.add_unread(root, load, read)
                self._served[round_number].append((root, read))
        self._kits.forget(chain.rounds, keep=wanted)

    # -------------------------------------------------------------------------------------- auditing

    def _duties(self) -> list[Audit]:
        chain = self._replica.chain
        found = [
            case
            for case in chain.audit_state.audits
            if self._me in asked(case, chain.rounds + 1, self._rules)
            and all(one.auditor != self._me for one in case.opinions)
            and self._tried[case.accused, case.round].verdict is None
            and not self._tried[case.accused, case.round].declined
        ]
        return sorted(found, key=lambda case: self._tried[case.accused, case.round].begun)

    async def _work(self, stop: threading.Event) -> None:
        """One contribution after the other; what can be said of each goes on record as soon as it is known."""
        await self._do(self._replica.discard_local_steps)
        duties = self._duties()
        while duties:
            duties = [duty for duty in duties if not await self._done(duty, stop)]
            if duties:
                await asyncio.sleep(RETRY_SECONDS / 4)
        self._log.emit(events.PhaseChanged(round=self._during, phase="following"))

    async def _done(self, duty: Audit, stop: threading.Event) -> bool:
        """Whether there is nothing more to be done for ``duty`` now; False: its accused is to be asked once more."""
        tried = self._tried[duty.accused, duty.round]
        if monotonic() < tried.again:
            return False
        tried.begun += 1
        case = await self._case(duty)
        if isinstance(case, str):
            await self._decline(duty, case)
            return True
        self._now = duty
        self._tell_what_is_audited()
        try:
            finding = await self._look_into(case, stop)
        except BadShard:
            await self._decline(duty, "the text that it was trained on cannot be fetched")
            return True
        except Stopped:
            return True
        except Later:
            return False
        tried.verdict = Verdict(duty.accused, duty.round, finding, os.urandom(32))
        self._log.emit(
            events.Audited(
                peer=duty.accused,
                round=duty.round,
                outcome=finding.outcome,
                error=finding.error / 1e6,
                grade=grade(finding, self._rules),
            )
        )
        await self._submit(SealedVerdict(duty.accused, duty.round, tried.verdict.digest))
        return True

    async def _case(self, duty: Audit) -> AuditCase | str:
        """What the records say of the contribution, or why this node cannot audit it.

        All auditors look as far back, or one would pass what another fails: where this node's ledger has a gap (it
        joined late, or was away) others are asked for those rounds.
        """
        first = first_needed(duty.round)
        records = await self._records(range(first, duty.round + 1))
        if not can_audit(self._replica, duty.round) or duty.round not in records:
            return NO_BASE
        known = duty.round
        while known > first and known - 1 in records:
            known -= 1
        if known > first:
            record = records[duty.round]
            others = [node for node in record.electorate if node not in (self._me, duty.accused)]
            older = await self._past.before(records[known], first, others)
            if not older:
                return f"nobody gives it the records of rounds {first} to {known - 1}"
            records |= older
        manifest = self._replica.manifest
        fragments, jury = manifest.run.overlap.fragments, duty.looks == JURY
        case = open_case(duty.accused, duty.round, records, manifest.run_id, fragments, jury=jury)
        return NO_BASE if case is None else case

    async def _records(self, rounds: range) -> dict[int, Record]:
        """Those of ``rounds`` that are in this node's ledger, which checked them before it wrote them."""
        encoded = await self._ledger.held(rounds, MAX_LOOKED_AT)
        return await asyncio.to_thread(lambda: {one.plan.round: one for one in _readable(encoded)})

    async def _decline(self, duty: Audit, why: str) -> None:
        self._cannot(duty, why)
        await self._submit(DeclinedAudit(duty.accused, duty.round))

    def _cannot(self, duty: Audit, why: str) -> None:
        self._tried[duty.accused, duty.round].declined = True
        text = f"this node declines to audit {duty.accused[-6:]}'s work in round {duty.round}: {why}"
        self._tell(f"{text}; another member is asked")

    async def _look_into(self, case: AuditCase, stop: threading.Event) -> Finding:
        """Fetch what the work rests on, and do it again. Raises ``BadShard``, :class:`Stopped` and :class:`Later`."""
        await self._supply.ready(case.plan, case.node, stop.is_set)
        try:
            bundle = await self._kit_of(case)
            blobs = await self._blobs_of(case, bundle)
        except Unserved as error:
            self._tell(f"{case.node[-6:]} does not hand over what it committed to in round {case.plan.round}: {error}")
            return UNSERVED
        found = await self._do(partial(audit, stop=stop.is_set), self._replica, case, bundle, partial(_within, blobs))
        if grade(found, self._rules) == "fail":
            await asyncio.to_thread(self._keep, case, bundle, blobs)
        return found

    def _keep(self, case: AuditCase, bundle: AuditBundle, blobs: Mapping[bytes, bytearray]) -> None:
        """Evidence of what failed: nobody has to believe this node."""
        base = self._replica.trace_recorder.bases.get(case.plan.round - 1)
        if base is None:
            return
        try:
            self._evidence.keep(case.node, case.plan.round, bundle, blobs, base)
        except OSError as error:
            self._warn(f"the evidence against {case.node[-6:]} cannot be kept ({error.strerror}): free some disk")

    async def _kit_of(self, case: AuditCase) -> AuditBundle:
        async def ask() -> AuditBundle:
            reply = await self._network.rpc.call(
                case.node, "kit", case.plan.round.to_bytes(8, "little"), timeout=CALL_SECONDS, max_reply=MAX_KIT
            )
            return decode(AuditBundle, reply)

        return await self._had(case, ask)

    async def _blobs_of(self, case: AuditCase, bundle: AuditBundle) -> Mapping[bytes, bytearray]:
        def roots() -> Mapping[bytes, int]:  # hashes vectors of the model's size
            claim = claim_of(case, bundle, self._replica.trace_recorder.bases[case.plan.round - 1])
            return needed(self._replica.engine, claim)

        found: dict[bytes, bytearray] = {}
        for root, limit in (await asyncio.to_thread(roots)).items():

            async def get(root: bytes = root, limit: int = limit) -> bytearray:
                return await self._network.blobs.fetch_bytes(root, sources=[case.node], max_size=limit)

            found[root] = await self._had(case, get)
        return found

    async def _had(self, case: AuditCase, get: Callable[[], Awaitable[T]]) -> T:
        """Raises :class:`Unserved` where it was not to be had however often this node asked, and :class:`Later`."""
        try:
            return await get()
        except (MalformedMessage, BadBlob) as error:
            raise Unserved(str(error)) from None
        except (FetchError, Unreachable, Refused, Violation) as error:
            tried = self._tried[case.node, case.plan.round]
            tried.failed += 1
            tried.again = monotonic() + RETRY_SECONDS
            raise (Unserved(str(error)) if tried.failed >= ATTEMPTS else Later) from None

    async def _submit(self, body: AuditStatement) -> None:
        with contextlib.suppress(Refused):  # it is on record, or the audit has ended
            await self._client.submit(body, body.round)

    def _tell_what_is_audited(self) -> None:
        if (now := self._now) is not None:
            self._log.emit(events.AuditStarted(peer=now.accused, round=now.round, during=self._during))

    def _tell(self, text: str) -> None:
        self._log.emit(events.Notice(level="info", text=text))


def _readable(encoded: Sequence[bytes]) -> Iterator[Record]:
    for one in encoded:
        with contextlib.suppress(MalformedMessage):  # a damaged row: the round is missing
            yield claimed(one).record


def _within(blobs: Mapping[bytes, bytearray], root: bytes, limit: int) -> bytearray:
    if root not in blobs or len(blobs[root]) > limit:
        raise Unserved(f"{root.hex()[:8]}")
    return blobs[root]
