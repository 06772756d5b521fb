"""Members of a sharded round as their workers would act, and a world in which bytes may be withheld from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from psyche.numerics.digest import digest
from psyche.protocol.assignment import ReducerAssignment, assignment_of
from psyche.protocol.messages import Record
from psyche.protocol.round_state import Phase, Reduction, Reported, Round, Stage
from tests.protocol.one_leader import Table, root_after

WRONG = b"w" * 32

Gets = Callable[[str, str, int], bool]
"""Whether a node can fetch an author's slices of a group; called with node, author, group."""


def round_of(table: Table) -> Round:
    assert table.state.round is not None
    return table.state.round


def reduction_of(current: Round) -> Reduction:
    """The reduction of a round; an empty one where there is none."""
    return current.reduction or Reduction(())


def assignment(table: Table) -> ReducerAssignment:
    current = round_of(table)
    return assignment_of(table.rules, current.plan, reduction_of(current))


def right(seed: bytes, group: int, accepted: Iterable[str]) -> bytes:
    """What honest reducers find for a group of these contributions."""
    return digest("result", seed, group.to_bytes(4, "little"), "".join(sorted(accepted)).encode())


def right_results(record: Record) -> tuple[bytes, ...]:
    accepted = [one.node for one in record.accepted]
    return tuple(right(record.plan.seed, group, accepted) for group in range(len(record.results)))


def report(table: Table, node: str, root: bytes | None = None) -> None:
    """``node`` reports on whatever it reduces and has not reported on: ``root``, or what is right."""
    current = round_of(table)
    found = {
        group: root or right(current.plan.seed, group, reduction_of(current).selected)
        for group in assignment(table).duties(node)
        if node not in reduction_of(current).reports.get(group, {})
    }
    table.send(Reported(node, current.plan.round, reduction_of(current).term, found))


class Honest:
    """All honest members: they do what is due, hold what they can get, and vote for what they have."""

    def __init__(self, table: Table, nodes: Collection[str], gets: Gets = lambda node, author, group: True) -> None:
        self.table, self.nodes, self.gets = table, list(nodes), gets
        self.results: dict[str, set[bytes]] = defaultdict(set)
        """Results that a node has and serves."""
        self.served: set[bytes] = set()
        """Results that hostile members serve to everybody."""

    def turn(self) -> None:
        for act in (self._hand_in, self._hold, self._reduce, self._vote, self._attest):
            for node in self.nodes:
                current = self.table.state.round
                if current is not None and current.plan.member(node) is not None and node in self.table.state.peers:
                    act(node, current)

    def live(self, seconds: float, hostile: Callable[[], None] = lambda: None, alive: list[str] | None = None) -> None:
        """Time passes; all do what is due."""
        until = self.table.now + seconds
        while self.table.now < until and self.table.state.phase is not Phase.FINISHED:
            hostile()
            self.turn()
            self.table.wait(1, alive=alive)

    def hand_in(self) -> None:
        """All commit, open and hold, and no more."""
        for act in (self._hand_in, self._hand_in, self._hold):
            for node in self.nodes:
                act(node, round_of(self.table))

    def held(self, node: str) -> frozenset[str]:
        current = round_of(self.table)
        groups = assignment(self.table).duties(node) if current.plan.is_sharded else range(len(current.plan.members))
        return frozenset(
            author
            for author in current.contributions
            if author == node or all(self.gets(node, author, group) for group in groups)
        )

    def _hand_in(self, node: str, current: Round) -> None:
        if current.stage is Stage.COMMITTING:
            if node not in current.commitments:
                self.table.commit(node)
        elif node in current.commitments and node not in current.contributions:
            self.table.open(node)

    def _hold(self, node: str, current: Round) -> None:
        if (
            current.stage is not Stage.COMMITTING
            and not current.certified
            and current.holdings.get(node) != self.held(node)
        ):
            self.table.hold(node, self.held(node))

    def _reduce(self, node: str, current: Round) -> None:
        if current.stage is Stage.REDUCING and reduction_of(current).selected <= self.held(node):
            report(self.table, node)
            self.results[node] |= {
                right(current.plan.seed, group, reduction_of(current).selected)
                for group in assignment(self.table).duties(node)
            }

    def _has_results(self, node: str, record: Record) -> bool:
        around = self.served.union(*(self.results[one] for one in self.nodes if one in self.table.state.peers))
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
            self.table.vote(node)

    def _attest(self, node: str, current: Round) -> None:
        record = current.proposal
        if record is None or not current.certified or node in current.attestations:
            return
        if self._has_results(node, record):
            self.table.attest(node, root_after(record))
