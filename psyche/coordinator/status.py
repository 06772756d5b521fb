"""The run status: what members see of a coordinator's state, and which changes are published at once."""

from __future__ import annotations

from psyche.protocol.messages import Certificate, ReductionStatus, RunStatus
from psyche.protocol.proposals import electorate_weights, mostly_done
from psyche.protocol.round_state import Phase, Reduction, Stage, State
from psyche.protocol.standing import total


def status_of(
    state: State,
    *,
    version: int,
    claim: bytes,
    proposal: bytes | None,
    certificate: Certificate | None,
    attestations: tuple[bytes, ...],
) -> RunStatus:
    """Build the run status. ``proposal`` and ``certificate`` have all their signatures; see :class:`RunStatus`."""
    current = state.round
    closed = current is not None and current.stage is not Stage.COMMITTING
    return RunStatus(
        version=version,
        term=state.lead_term,
        claim=claim,
        phase=(state.phase if state.resumed or state.phase is Phase.FINISHED else Phase.ELECTING).value,
        rounds=state.rounds,
        state_root=state.state_root or bytes(32),
        plan=current.plan if current else None,
        allowed=current.deadline - current.opened if current and not closed else 0.0,
        mostly_done=current is not None and not closed and mostly_done(state, current),
        commitments=tuple(proof for _, proof in current.commitments.values()) if current and closed else (),
        contributions=tuple(proof for _, proof in current.contributions.values()) if current else (),
        reducing=_reducing(current.reduction) if current and current.reduction else None,
        proposal=proposal if current and current.proposal else None,
        certificate=certificate,
        attestations=attestations,
        note=state.note[:500],
    )


class StateAttestations:
    """Collects the voters' signed statements of the state they hold, which prove it to nodes that do not hold it yet.

    A coordinator's word proves no state: a node replaces one that it has computed itself only for more than half of the
    voting weight.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, bytes, bytes]] = {}
        """Last statement of each voter: round, state root, signed message."""
        self._complete: tuple[tuple[int, bytes], tuple[bytes, ...]] | None = None

    def add(self, node: str, round_number: int, state_root: bytes, proof: bytes) -> None:
        """Record that ``node``, a voter or member, holds ``state_root`` after a round."""
        self._held[node] = round_number, state_root, proof

    def proof(self, state: State) -> tuple[bytes, ...]:
        """Return statements for the run's current state, by nodes with more than half of the weight if there are."""
        if not state.rounds or not state.state_root:
            return ()
        key = state.rounds, state.state_root
        if self._complete is not None and self._complete[0] == key:
            return self._complete[1]
        weights = electorate_weights(state)
        self._held = {node: one for node, one in self._held.items() if node in weights and one[0] >= state.rounds}
        needed, found = total(weights), []
        for node in sorted(weights, key=lambda node: -weights[node]):
            if node in self._held and self._held[node][:2] == key:
                found.append(self._held[node][2])
                needed -= 2 * weights[node]
            if needed < 0:
                self._complete = key, tuple(found)
                break
        return tuple(found)


def visible(state: State) -> tuple[object, ...]:
    """Return the part of the state that members see. A change here is published immediately."""
    current = state.round
    seen: tuple[object, ...] = (state.phase, state.rounds, state.note, state.resumed, state.state_root)
    if current is None:
        return seen
    drawn = (current.reduction.failed, current.reduction.reassigned) if current.reduction else ()
    complete = len(current.contributions) == len(current.commitments)
    training = (current.deadline, mostly_done(state, current)) if current.stage is Stage.COMMITTING else ()
    return (*seen, current.plan, training, current.closed, complete, drawn, current.term, current.certified)


def revealed_count(state: State) -> int:
    """Return how many contributions are revealed. Members see them too, up to ``BURST_SECONDS`` later."""
    return len(state.round.contributions) if state.round else 0


def _reducing(reduction: Reduction) -> ReductionStatus:
    return ReductionStatus(
        term=reduction.term,
        reducer_order=reduction.reducer_order,
        failed=tuple(sorted(reduction.failed)),
        reassigned=reduction.reassigned,
        selected=tuple(sorted(reduction.selected)),
    )
