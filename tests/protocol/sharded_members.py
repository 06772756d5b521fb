"""Members of a sharded round that act as their workers would, with payloads that may be withheld from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from psyche.numerics.digest import digest
from psyche.protocol.assignment import ReducerAssignment, assignment_of
from psyche.protocol.messages import Record
from psyche.protocol.round_state import Phase, Reduction, Reported, Round, Stage
from tests.protocol.one_leader import Leader, root_after

WRONG = b"w" * 32

Gets = Callable[[str, str, int], bool]
"""Whether a node can fetch an author's slices of a group; called with node, author, group."""


def round_of(leader: Leader) -> Round:
    assert leader.state.round is not None
    return leader.state.round


def reduction_of(current: Round) -> Reduction:
    """Return the reduction of a round, or an empty one."""
    return current.reduction or Reduction(())


def assignment(leader: Leader) -> ReducerAssignment:
    current = round_of(leader)
    return assignment_of(leader.rules, current.plan, reduction_of(current))


def right(seed: bytes, group: int, accepted: Iterable[str]) -> bytes:
    """Return what honest reducers compute for a group of these contributions."""
    return digest("result", seed, group.to_bytes(4, "little"), "".join(sorted(accepted)).encode())


def right_results(record: Record) -> tuple[bytes, ...]:
    accepted = [one.node for one in record.accepted]
    return tuple(right(record.plan.seed, group, accepted) for group in range(len(record.results)))


def report(leader: Leader, node: str, root: bytes | None = None) -> None:
    """Report on the groups that ``node`` has not reported on: ``root``, or the honest result."""
    current = round_of(leader)
    found = {
        group: root or right(current.plan.seed, group, reduction_of(current).selected)
        for group in assignment(leader).duties(node)
        if node not in reduction_of(current).reports.get(group, {})
    }
    leader.send(Reported(node, current.plan.round, reduction_of(current).term, found))


class Honest:
    """All honest members: each acts when due, holds what it can get, and votes for results it has."""

    def __init__(self, leader: Leader, nodes: Collection[str], gets: Gets = lambda node, author, group: True) -> None:
        self.leader, self.nodes, self.gets = leader, list(nodes), gets
        self.results: dict[str, set[bytes]] = defaultdict(set)
        """Results that each node has and serves."""
        self.served: set[bytes] = set()
        """Results that malicious members serve to all nodes."""

    def turn(self) -> None:
        for act in (self._commit_or_reveal, self._hold, self._reduce, self._vote, self._attest):
            for node in self.nodes:
                current = self.leader.state.round
                if current is not None and current.plan.member(node) is not None and node in self.leader.state.peers:
                    act(node, current)

    def live(self, seconds: float, hostile: Callable[[], None] = lambda: None, alive: list[str] | None = None) -> None:
        """Let time pass while all members do what is due."""
        until = self.leader.now + seconds
        while self.leader.now < until and self.leader.state.phase is not Phase.FINISHED:
            hostile()
            self.turn()
            self.leader.wait(1, alive=alive)

    def exchange(self) -> None:
        """Commit, reveal and hold for all members, and no more."""
        for act in (self._commit_or_reveal, self._commit_or_reveal, self._hold):
            for node in self.nodes:
                act(node, round_of(self.leader))

    def held(self, node: str) -> frozenset[str]:
        current = round_of(self.leader)
        groups = assignment(self.leader).duties(node) if current.plan.is_sharded else range(len(current.plan.members))
        return frozenset(
            author
            for author in current.contributions
            if author == node or all(self.gets(node, author, group) for group in groups)
        )

    def _commit_or_reveal(self, node: str, current: Round) -> None:
        if current.stage is Stage.COMMITTING:
            if node not in current.commitments:
                self.leader.commit(node)
        elif node in current.commitments and node not in current.contributions:
            self.leader.reveal(node)

    def _hold(self, node: str, current: Round) -> None:
        if (
            current.stage is not Stage.COMMITTING
            and not current.certified
            and current.holdings.get(node) != self.held(node)
        ):
            self.leader.hold(node, self.held(node))

    def _reduce(self, node: str, current: Round) -> None:
        if current.stage is Stage.REDUCING and reduction_of(current).selected <= self.held(node):
            report(self.leader, node)
            self.results[node] |= {
                right(current.plan.seed, group, reduction_of(current).selected)
                for group in assignment(self.leader).duties(node)
            }

    def _has_results(self, node: str, record: Record) -> bool:
        around = self.served.union(*(self.results[one] for one in self.nodes if one in self.leader.state.peers))
        if set(record.results) <= around | self.results[node]:
            self.results[node] |= set(record.results)
            return True
        return False

    def _vote(self, node: str, current: Round) -> None:
        record = current.proposal
        if record is None or current.certified or node in current.votes or node not in record.electorate:
            return
        if not {one.node for one in record.accepted} <= self.held(node) or not self._has_results(node, record):
            return
        mine = {group: found[node] for group, found in reduction_of(current).reports.items() if node in found}
        if all(record.results[group] == root for group, root in mine.items()):
            self.leader.vote(node)

    def _attest(self, node: str, current: Round) -> None:
        record = current.proposal
        if record is None or not current.certified or node in current.attestations:
            return
        if self._has_results(node, record):
            self.leader.attest(node, root_after(record))
