"""Audits between the replicas of one process: the rules and the replay of a distributed run, without its network.

``diloco/reference.py`` runs the rounds; this produces what its nodes put on record about each other's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from psyche.audit.audit_case import audit, open_case
from psyche.diloco.replica import Replica
from psyche.numerics.digest import digest
from psyche.protocol.audit_messages import JURY, Audit, Finding, SealedVerdict, Verdict
from psyche.protocol.audits import asked
from psyche.protocol.messages import Record
from psyche.protocol.round_state import AuditRules, StatementReceived
from psyche.protocol.wire import Envelope, encode_envelope

VerdictPolicy = Callable[[str, Audit, Callable[[], Finding]], Finding | None]
"""Returns what an auditor reports, given the audit and a function that does it honestly; None: nothing."""
UNSERVED = Finding("unserved", 0, 0, 0)


def honest(node: str, case: Audit, replay: Callable[[], Finding]) -> Finding | None:
    """Report what the replay finds."""
    return replay()


class SimulatedAudits:
    """The auditors of all replicas of a run, each replica with audit bundles of its own."""

    def __init__(
        self, replicas: Mapping[str, Replica], run_id: bytes, rules: AuditRules, policy: VerdictPolicy
    ) -> None:
        self._replicas, self._run_id, self._rules, self._policy = replicas, run_id, rules, policy
        self._records: dict[int, Record] = {}
        self._verdicts: dict[tuple[str, str, int], Verdict] = {}

    def statements_after(self, record: Record) -> Iterator[StatementReceived]:
        """Yield the auditors' statements after ``record``, once all have taken its outer step.

        Audit bundles that no open audit needs are deleted.
        """
        self._records[record.plan.round] = record
        for node, replica in self._replicas.items():
            if replica.trace_recorder.bundles is not None:
                mine = {one.round for one in record.audit_state.audits if one.accused == node}
                replica.trace_recorder.bundles.forget(record.plan.round, keep=mine)
        for case in record.audit_state.audits:
            for node in case.candidates:
                if node in self._replicas and node not in record.audit_state.banned:
                    yield from self._statements(node, case, record.plan.round + 1)

    def _statements(self, node: str, case: Audit, round_number: int) -> Iterator[StatementReceived]:
        mine = next((one for one in case.opinions if one.auditor == node), None)
        key = node, case.accused, case.round
        if mine is None and node in asked(case, round_number, self._rules) and key not in self._verdicts:
            finding = self._policy(node, case, partial(self.audit, node, case))
            if finding is not None:
                salt = digest("salt", node.encode(), case.accused.encode(), case.round.to_bytes(8, "little"))
                self._verdicts[key] = Verdict(case.accused, case.round, finding, salt)
        if (verdict := self._verdicts.get(key)) is None or (mine is not None and mine.finding is not None):
            return
        body = SealedVerdict(case.accused, case.round, verdict.digest) if mine is None else verdict
        envelope = Envelope(body.DOMAIN, self._run_id, case.round, node, body.encode(), bytes(64))
        yield StatementReceived(node, body, encode_envelope(envelope))

    def audit(self, node: str, case: Audit) -> Finding:
        """Have ``node`` replay the contribution under audit."""
        replica, accused = self._replicas[node], self._replicas[case.accused]
        fragments, jury = replica.run.overlap.fragments, case.looks == JURY
        opened = open_case(case.accused, case.round, self._records, self._run_id, fragments, jury=jury)
        bundles = accused.trace_recorder.bundles
        bundle = None if bundles is None else bundles.bundle(case.round)
        if opened is None or bundles is None or bundle is None:
            return UNSERVED
        return audit(replica, opened, bundle, partial(bundles.read, case.round))
