"""The interface of both ways of exchanging a round's payloads, as one member sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from psyche.exchange.aggregation import Aggregation
from psyche.exchange.payload_store import PayloadLayout, PayloadStore
from psyche.network.spool import Blob
from psyche.network.transport import FetchError
from psyche.numerics.aggregate import Gradient
from psyche.protocol.messages import Contribution, Plan, Record, ReductionStatus


def applied_blobs(record: Record) -> Mapping[bytes, int]:
    """Return the blobs that the outer step of ``record`` applies: root -> approximate bytes."""
    size = max(one.contribution.payload_bytes for one in record.accepted)
    if record.results:
        return dict.fromkeys(record.results, size // len(record.results))
    return {one.contribution.payload_root: one.contribution.payload_bytes for one in record.accepted}


class Exchange(ABC):
    """One round's exchange at one member. A payload is the round's fragment, encoded with one chunk per slice."""

    def __init__(self, store: PayloadStore, plan: Plan, layout: PayloadLayout, aggregation: Aggregation) -> None:
        self.store, self.plan, self.layout, self.aggregation = store, plan, layout, aggregation
        self.me = store.peer_id
        self.members = [member.node for member in plan.members]
        self.followers: Sequence[str] = ()
        """PeerIDs, besides the members, that may hold what the round applied because they followed it."""
        self.payloads: dict[str, Blob] = {}
        """Payloads by author, possibly partial; the chunks that are present can be decoded."""
        self.reduced: dict[int, bytes] = {}
        """Roots of the results that this node has reduced, by group of slices."""
        self._requested: set[str] = set()

    async def publish(self, payload: Sequence[bytes]) -> None:
        """Serve this node's own payload."""
        self.payloads[self.me] = await self.store.retention.put(payload)

    async def fetch_payload(self, author: str, contribution: Contribution) -> None:
        """Fetch the slices that this node needs of a contribution's payload, from its author and other holders.

        Raises ``FetchError`` where no peer has it, ``BadBlob`` where its content is not what the codec allows.
        """
        self._requested.add(author)
        if author in self.held:
            return
        try:
            self.payloads[author] = await self.store.fetch(
                contribution.payload_root,
                [author, *self.members, *self.followers],
                self.layout,
                self.needed_slices(),
                size=contribution.payload_bytes,
                into=self.payloads.get(author),
            )
        except FetchError as error:
            if error.partial is not None:  # the next attempt resumes from there
                self.payloads[author] = error.partial
            raise

    @property
    def held(self) -> frozenset[str]:
        """Authors whose payloads this node holds, as far as it needs them."""
        needed = self.needed_slices()
        return frozenset(
            author
            for author in self._requested | set(self.payloads)
            if not needed or (author in self.payloads and all(map(self.payloads[author].present, needed)))
        )

    def set_reducers(self, reducing: ReductionStatus) -> None:
        """Adopt the current assignment of reducers. Gather has none."""
        return

    def groups_due(self, reducing: ReductionStatus) -> Sequence[int]:
        """Groups that this node is to reduce, has not reduced yet, and holds all inputs of."""
        return ()

    async def reduce(self, reducing: ReductionStatus, contributions: Mapping[str, Contribution]) -> Mapping[int, bytes]:
        """Reduce :meth:`groups_due` over the selected contributions; return the root of each group's result."""
        return {}

    @abstractmethod
    def needed_slices(self) -> Sequence[int]:
        """Return the slices that this node needs of every payload."""

    @abstractmethod
    async def outer_gradient(self, record: Record) -> Gradient:
        """Fetch what is missing for the outer step of ``record`` and return its gradient.

        Raises what :meth:`fetch_payload` raises.
        """
