"""When a member promises and votes: the rules of a Paxos acceptor. Pure.

A member takes part in nothing of a term earlier than the one it promised, never votes for two records in one term, and
votes only for what it has checked itself. The returned state is on its disk before any message about it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from psyche.protocol.assignment import ReducerAssignment, reducer_order_fault
from psyche.protocol.audit_messages import EMPTY, AuditState
from psyche.protocol.audits import audits_fault
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import NO_COMMITMENT, Contribution, Plan, Proposal, Record, Standing
from psyche.protocol.pacing import quota_fault
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import Rules
from psyche.protocol.standing import standing_fault, weights_of


@dataclass(frozen=True)
class Acceptor:
    """A member's voting state, which survives restarts."""

    promised: int = 0
    """The term of the leader it follows. It takes part in nothing of an earlier term."""
    term: int = 0
    """The highest term it voted in."""
    record: bytes = b""
    """Hash of the record it voted for in that term."""


@dataclass(frozen=True)
class Chain:
    """A member's position in the chain, which the next plan must build on."""

    rounds: int
    head: bytes
    state_root: bytes
    position: int
    standing: tuple[Standing, ...] = ()
    """Standing in the last record; empty before the first."""
    audit_state: AuditState = EMPTY
    """Audit state of the last record."""

    @cached_property
    def weights(self) -> dict[str, int]:
        """Voting weights in the next round; nobody's before the first."""
        return weights_of(self.standing)


def promise(acceptor: Acceptor, term: int) -> Acceptor:
    """Return the acceptor after following the leader of ``term``. Raises :class:`Refusal` if it follows a later one."""
    if term != acceptor.promised and term < max(acceptor.promised, acceptor.term):
        raise Refusal(f"term {term} is over; this node is in term {max(acceptor.promised, acceptor.term)}")
    return replace(acceptor, promised=term)


def plan_fault(plan: Plan, chain: Chain) -> str | None:
    """Return why a plan cannot be the next round for a member at ``chain``, or None."""
    if plan.round != chain.rounds + 1 or plan.previous != chain.head:
        return "the plan does not follow this node's last record"
    if plan.base_root != chain.state_root:
        return "the plan starts from another state"
    if plan.seed != round_seed(chain.head) or plan.position != chain.position:
        return "the plan's data is not what follows from the last record"
    if plan.is_sharded != (plan.reducers > 0):
        return f"the plan contradicts itself: a {plan.exchange} exchange with {plan.reducers} reducers"
    nodes = [member.node for member in plan.members]
    if banned := set(nodes) & set(chain.audit_state.banned):
        return f"{min(banned)[-6:]} is a member of the plan and was convicted"
    return None if nodes == sorted(set(nodes)) else "the plan's members are not in ascending order"


class Refusal(ValueError):
    """This member does not vote for a proposal; the text says why."""


def consider(
    acceptor: Acceptor,
    proposal: Proposal,
    *,
    rules: Rules,
    chain: Chain,
    committed: Mapping[str, bytes],
    opened: Mapping[str, Contribution],
    held: frozenset[str],
    reduced: Mapping[int, bytes] = MappingProxyType({}),
) -> Acceptor:
    """Return the acceptor after voting for ``proposal``. Raises :class:`Refusal` if it must not vote for it.

    ``chain`` is this member's own; ``committed`` are the commitments that were published when they closed; ``opened``
    the contributions whose signed commitment and opening it has checked; ``held`` the nodes of whose payload it has
    fetched and checked what its own part of the exchange takes; ``reduced`` the results it found itself, by group. The
    results of the record must have been fetched and checked before, and its reconfiguration found in force.
    """
    record, plan = proposal.record, proposal.record.plan
    if proposal.term < max(acceptor.promised, acceptor.term):
        raise Refusal(f"term {proposal.term} is over; this node is in term {max(acceptor.promised, acceptor.term)}")
    if proposal.term == acceptor.term and record.hash != acceptor.record:
        raise Refusal(f"two different records in term {proposal.term}")
    if fault := plan_fault(plan, chain) or quota_fault(plan, rules):
        raise Refusal(fault)
    if fault := _results_fault(record, rules, committed, reduced):
        raise Refusal(fault)
    nodes = [accepted.node for accepted in record.accepted]
    if nodes != sorted(set(nodes)):
        raise Refusal("accepted contributions are not in ascending order of node")
    for accepted in record.accepted:
        member = plan.member(accepted.node)
        if member is None:
            raise Refusal(f"{accepted.node[-6:]} is no member of the round")
        if opened.get(accepted.node) != accepted.contribution:
            raise Refusal(f"the contribution of {accepted.node[-6:]} is not the one it committed to")
        if fault := contribution_fault(rules, plan, member, accepted.contribution):
            raise Refusal(f"the contribution of {accepted.node[-6:]}: {fault}")
        if accepted.node not in held:
            raise Refusal(f"the payload of {accepted.node[-6:]} has not been fetched and checked here")
    if fault := standing_fault(record, chain.standing, chain.audit_state, rules):
        raise Refusal(fault)
    if fault := audits_fault(record, chain.audit_state, chain.standing, rules):
        raise Refusal(fault)
    return replace(acceptor, term=proposal.term, record=record.hash)


def _results_fault(
    record: Record, rules: Rules, committed: Mapping[str, bytes], reduced: Mapping[int, bytes]
) -> str | None:
    """Return what is wrong with the reducers of a record or their results, or None."""
    plan = record.plan
    if not plan.is_sharded:  # allowed in any round: where everybody aggregates nobody has to be believed
        found = record.results or record.reducer_order or record.dissenters or record.commitments
        return "a gathered round has no results or reducers" if found else None
    if plan.reducers != rules.reducers_for(len(plan.members)):
        return "the plan does not choose the exchange as the manifest does"
    if fault := reducer_order_fault(record):
        return fault
    for node, commitment in zip(plan.weights, record.commitments, strict=True):
        if commitment not in (NO_COMMITMENT, committed.get(node)):
            return f"the commitment of {node[-6:]} is not the one that was published when commitments closed"
    for one in record.accepted:
        expected = one.contribution.commitment(one.node, rules.run_id, plan.round)
        if one.node in plan.weights and expected not in record.commitments:
            return f"{one.node[-6:]} contributed and is left out of the commitments"
    if list(record.dissenters) != sorted(set(record.dissenters) & set(record.reducer_order)):
        return "dissenters are not named in ascending order, or did not reduce"
    assignment = ReducerAssignment(record.reducer_order, frozenset(), (), plan.reducers, rules.slices_in(plan.round))
    if len(record.results) != assignment.groups or not assignment.groups:
        return "there is not one result for each group"
    if any(record.results[group] != root for group, root in reduced.items()):
        return "a result is not what this node found"
    return None
