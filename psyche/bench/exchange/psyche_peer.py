"""psyche's processes: the real coordinator and the real worker, with an inner step that costs no time.

Each exchange is a whole round as in a run: encode, commit, reveal, fetch and check, vote, certify, outer step, state
root. The inner step waits for the bench, and then changes the parameters by the vector to be averaged. The outer step
has lr 1 and no momentum, so that θ moves by minus the mean.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import torch
from torch import Tensor

from psyche.bench.exchange.peer_process import (
    HANG_SECONDS,
    AveragingPeer,
    Connected,
    Done,
    PeerProcess,
    PeerSpec,
    Ready,
    Verified,
)
from psyche.bench.exchange.vectors import RelativeError, blocks, checked, draw, true_mean
from psyche.config import CodecSpec, Deadlines, ExchangeSpec, Inner, Manifest, Model, Node, Outer, Resolved, Rounds, Run
from psyche.config.run_config import Audits
from psyche.coordinator.coordinator import Coordinator
from psyche.data.token_store import TokenStore
from psyche.diloco.replica import LocalUpdate, Replica, TrainingCancelled
from psyche.errors import PsycheError
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.ledger.writer import LedgerWriter
from psyche.network.discovery import KINDS
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.numerics.aggregate import Gradient
from psyche.numerics.flat import ALIGNMENT, FlatLayout
from psyche.numerics.outer import OuterState
from psyche.protocol.assignment import ShardLayout
from psyche.protocol.messages import Record
from psyche.telemetry.event_log import LOG_NAME, EventLog
from psyche.training.engine import Batch
from psyche.worker.worker import Worker

T = TypeVar("T")

NEVER = 10**9
LONG_SECONDS = 86400.0
"""Deadline of training, which waits for the bench. The deadlines of the exchange are the defaults."""


class PsycheProcess(PeerProcess):
    """A process with a network node. Its event loop has the main thread, as p2pd requires; commands come on another."""

    def run(self, serve: Callable[[], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(asyncio.to_thread(serve))

    def connect(self, rendezvous: str) -> Connected:
        return self._on_loop(self._connect(rendezvous))

    @abstractmethod
    async def _connect(self, rendezvous: str) -> Connected:
        """:meth:`connect` on the event loop."""

    async def _start(self, run_id: bytes, bootstrap: list[str], kind: str) -> None:
        folder = Path(self.spec.folder)
        self.identity = Identity.load_or_create(folder / "identity.key")
        self.log = EventLog(folder / LOG_NAME, self.identity.peer_id)
        self.ledger = LedgerWriter(Ledger.open(folder / LEDGER, run_id), print)
        self.network = await NetworkNode.create(
            self.identity,
            run_id=run_id,
            kinds=KINDS,
            listen=[f"/ip4/{self.spec.address}/tcp/0"],
            bootstrap=bootstrap,
            spool=folder,
        )
        self._announcing = asyncio.create_task(self.network.announce(kind))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(HANG_SECONDS)

    async def _leave(self, work: asyncio.Task[None]) -> None:
        for task in (work, self._announcing):
            task.cancel()
        await asyncio.gather(work, self._announcing, return_exceptions=True)
        self.ledger.close()
        await self.network.close()


class PsycheCoordinator(PsycheProcess):
    """The coordinator, which transfers no tensors."""

    async def _connect(self, rendezvous: str) -> Connected:
        identity = Identity.load_or_create(Path(self.spec.folder) / "identity.key")
        manifest = manifest_of(self.spec, identity.peer_id)
        await self._start(manifest.run_id, [], "coordinator")
        coordinator = Coordinator(manifest, self.identity, self.network, self.log, self.ledger, Path(self.spec.folder))
        self._work = asyncio.create_task(coordinator.run())
        addresses = await self.network.addresses()
        return Connected(msgspec.json.encode([manifest.encode(), addresses]).decode(), self.identity.peer_id)

    def close(self) -> None:
        self._loop.run_until_complete(self._leave(self._work))


class PsychePeer(PsycheProcess, AveragingPeer):
    """A member."""

    async def _connect(self, rendezvous: str) -> Connected:
        encoded, addresses = msgspec.json.decode(rendezvous, type=tuple[bytes, list[str]])
        manifest = Manifest.decode(encoded)
        await self._start(manifest.run_id, addresses, "member")
        self._engine = WaitingEngine(self.spec)
        zero = OuterState.initial(torch.zeros(self.spec.parameters))
        store = cast(TokenStore, _NoText())
        me, secret = self.identity.peer_id, self.identity.secret_digest(b"salt")
        self._replica = TimedReplica(manifest, self._engine, store, zero, me, secret)
        settings = Node(threads=self.spec.threads, device="cpu", checkpoint_every=NEVER)
        folder = Path(self.spec.folder)
        worker = Worker(self._replica, settings, folder, self.identity, self.network, self.log, self.ledger)
        self._work = asyncio.create_task(worker.run())
        self._work.add_done_callback(self._ended)
        return Connected("", me)

    def prepare(self) -> Ready:
        _awaited(self._engine.waiting)
        theta = self._replica.outer.theta
        self._before = {block.start: theta[block].clone() for block in checked(self.spec.parameters)}
        return Ready(0.0)

    def exchange(self) -> Done:
        began = time.monotonic()
        self._engine.go.put(True)
        times: RoundTimes = _awaited(self._replica.finished)
        if times.record is None:
            raise PsycheError("the round ended without this peer, which fetched the new state instead")
        self._record = times.record
        phases = {
            "encode": times.encoded - began,
            "wire": times.fetched - times.encoded,
            "apply": times.applied - times.fetched,
        }
        return Done(began, times.applied, phases, times.payload_bytes)

    def verify(self, *names: str) -> Verified:
        error, theta = RelativeError(), self._replica.outer.theta
        numbers = [names.index(accepted.node) for accepted in self._record.accepted]
        for block in checked(self.spec.parameters):
            error.add(self._before[block.start] - theta[block], true_mean(numbers, block))
        return Verified(len(numbers), error.value)

    def close(self) -> None:
        self._engine.go.put(False)
        self._loop.run_until_complete(self._leave(self._work))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Report a worker that ended by itself to the waiting command."""
        if not task.cancelled():
            error = task.exception() or PsycheError("the worker ended")
            self._engine.waiting.put(error)
            self._replica.finished.put(error)


class RoundTimes(msgspec.Struct):
    """When the phases of an exchange ended, on the monotonic clock."""

    encoded: float = 0.0
    fetched: float = 0.0
    applied: float = 0.0
    payload_bytes: int = 0
    record: Record | None = None
    """``None`` if the round ended without this node and it fetched the state."""


class TimedReplica(Replica):
    """A replica that records when each phase ended."""

    def __init__(self, *arguments: Any) -> None:
        self.finished: SimpleQueue[Any] = SimpleQueue()
        self.times = RoundTimes()
        super().__init__(*arguments)

    def train(self, *arguments: Any, **options: Any) -> LocalUpdate:
        work = super().train(*arguments, **options)
        self.times = RoundTimes(encoded=time.monotonic(), payload_bytes=work.contribution.payload_bytes)
        return work

    def outer_step(self, round_number: int, gradient: Gradient, outer: OuterState | None = None) -> None:
        self.times.fetched = time.monotonic()
        super().outer_step(round_number, gradient, outer)

    def apply_record_update(self, record: Record) -> None:
        super().apply_record_update(record)
        self.times.applied, self.times.record = time.monotonic(), record

    def commit_state(self, record: Record) -> None:
        super().commit_state(record)
        self.finished.put(self.times)

    def adopt(self, outer: OuterState, record: Record | None) -> None:
        super().adopt(outer, record)
        if record is not None:
            self.finished.put(RoundTimes())


class WaitingEngine:
    """An engine whose inner step waits for the bench, and then changes the parameters by this peer's vector."""

    steps = 0
    """Steps of the optimizer, which does not exist."""

    def __init__(self, spec: PeerSpec) -> None:
        self._spec = spec
        self.layout = FlatLayout.of([("vector", (spec.parameters,))])
        self.waiting: SimpleQueue[Any] = SimpleQueue()
        """Receives an item when an inner step is reached."""
        self.go: SimpleQueue[bool] = SimpleQueue()
        """True ends the inner step, False ends training."""
        self._local = torch.empty(self.layout.size)

    def step(self, batch: Batch, lr: float) -> float:
        for block in blocks(self._spec.parameters):
            self._local[block] -= draw(self._spec.number, block)
        self.waiting.put(None)
        if not self.go.get():
            raise TrainingCancelled
        return 0.0

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        return 0.0, 1

    def read(self, flat: Tensor) -> None:
        flat.copy_(self._local)

    def write(self, flat: Tensor, parts: Sequence[slice] | None = None) -> None:
        for part in parts or [slice(None)]:
            self._local[part].copy_(flat[part])

    def shift(self, flat: Tensor, parts: Sequence[slice]) -> None:
        """Do nothing: there are no overlap steps."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is no state."""


class _NoText:
    """A token store without text."""

    def __init__(self) -> None:
        self.train = self.heldout = self
        self.layout = ShardLayout(1, 1)

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Any) -> Batch:
        return np.zeros((len(indices), 1), np.int64)


def manifest_of(spec: PeerSpec, coordinator: str) -> Manifest:
    """Describe a run whose rounds only exchange ``spec.parameters`` parameters, a multiple of 4096."""
    assert spec.parameters % ALIGNMENT == 0
    zero = OuterState.initial(torch.zeros(spec.parameters))
    resolved = Resolved(
        coordinators=(coordinator,),
        store=bytes(32).hex(),
        layout=FlatLayout.of([("vector", (spec.parameters,))]).digest.hex(),
        genesis=zero.index().root.hex(),
        parameters=spec.parameters,
        flat_size=spec.parameters,
    )
    run = Run(
        name="bench",
        model=Model(settings={"vocab_size": 1 << 16}),
        codec=CodecSpec(name=spec.codec),
        exchange=ExchangeSpec(kind=cast(Any, spec.exchange), reducers=spec.reducers),
        inner=Inner(batch_size=1),
        outer=Outer(lr=1.0, momentum=0.0),
        rounds=Rounds(total=NEVER, inner_steps=1, start_members=spec.peers),
        deadlines=Deadlines(round_min=LONG_SECONDS, round_max=LONG_SECONDS),
        audits=Audits(rate=0.0),  # no audit would accept random vectors
    )
    return Manifest(run=run, resolved=resolved)


def _awaited(queue: SimpleQueue[Any]) -> Any:
    try:
        found = queue.get(timeout=HANG_SECONDS)
    except Empty:
        raise PsycheError(f"psyche's worker did nothing for {HANG_SECONDS:g} s") from None
    if isinstance(found, BaseException):
        raise found
    return found
