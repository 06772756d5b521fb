"""The rivals' processes: hivemind and gloo."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from psyche.bench.exchange.peer_process import HANG_SECONDS, AveragingPeer, Connected, Done, PeerSpec, Ready, Verified
from psyche.bench.exchange.vectors import blocks, draw, relative_error
from psyche.errors import PsycheError

MATCHMAKING_SECONDS, REQUEST_SECONDS = 2.0, 1.0
"""How long the leader of a group waits for others, and a follower for the leader. The latter must be smaller."""
GROUP_SECONDS = 120.0
"""Time limit for matchmaking: at times all of hivemind's peers follow each other and none leads."""
POLL_SECONDS = 0.01
"""hivemind publishes the stage of a step in shared memory without a notification."""


class GlooPeer(AveragingPeer):
    """One rank of PyTorch's gloo all-reduce, as DistributedDataParallel uses it on CPUs: plain TCP, no identities."""

    def __init__(self, spec: PeerSpec) -> None:
        super().__init__(spec)
        self._values = torch.empty(spec.parameters)

    def connect(self, rendezvous: str) -> Connected:
        spec = self.spec
        os.environ["GLOO_SOCKET_IFNAME"] = spec.device
        first = not rendezvous
        address, port = (spec.address, "0") if first else rendezvous.split(":")
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), spec.peers, first, timedelta(seconds=HANG_SECONDS), False
        )
        return Connected(f"{address}:{self._store.port}", f"rank {spec.number}")

    def prepare(self) -> Ready:
        took = 0.0
        if not dist.is_initialized():
            began = time.monotonic()
            dist.init_process_group("gloo", store=self._store, rank=self.spec.number, world_size=self.spec.peers)
            dist.all_reduce(torch.zeros(1))  # connects all ranks
            took = time.monotonic() - began
        for block in blocks(self.spec.parameters):
            self._values[block] = draw(self.spec.number, block)
        return Ready(took)

    def exchange(self) -> Done:
        began = time.monotonic()
        dist.all_reduce(self._values)
        self._values.div_(self.spec.peers)
        return Done(began, time.monotonic(), {}, self._values.nbytes)

    def verify(self, *names: str) -> Verified:
        return Verified(self.spec.peers, relative_error(self._values, range(self.spec.peers)))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class HivemindPeer(AveragingPeer):
    """One peer of hivemind's DecentralizedAverager: butterfly all-reduce over libp2p.

    Its DHT, its averager and its libp2p daemon are separate processes.
    """

    def __init__(self, spec: PeerSpec) -> None:
        super().__init__(spec)
        self._dht: Any = None
        self._averager: Any = None
        self._step: Any = None
        self._group = 0

    def connect(self, rendezvous: str) -> Connected:
        from hivemind import DHT, DecentralizedAverager
        from hivemind.compression import Float16Compression, NoCompression

        spec = self.spec
        self._dht = DHT(
            initial_peers=[rendezvous] if rendezvous else [],
            start=True,
            host_maddrs=[f"/ip4/{spec.address}/tcp/0"],
            use_relay=False,
            use_auto_relay=False,
        )
        self._averager = DecentralizedAverager(
            [torch.zeros(spec.parameters)],
            self._dht,
            start=True,
            prefix="bench",
            target_group_size=spec.peers,
            min_group_size=spec.peers,
            min_matchmaking_time=MATCHMAKING_SECONDS,
            request_timeout=REQUEST_SECONDS,
            compression=Float16Compression() if spec.codec == "fp16" else NoCompression(),
        )
        return Connected(str(self._dht.get_visible_maddrs()[0]), str(self._dht.peer_id))

    def prepare(self) -> Ready:
        """Load the vector and find a group; the exchange then waits for a trigger. Raises :class:`PsycheError`."""
        from hivemind.averaging.control import AveragingStage

        with self._averager.get_tensors() as (values,):
            for block in blocks(self.spec.parameters):
                values[block] = draw(self.spec.number, block)
        began = time.monotonic()
        self._step = self._averager.step(timeout=HANG_SECONDS, require_trigger=True, wait=False)
        while self._step.stage != AveragingStage.AWAITING_TRIGGER:
            if self._step.done() or time.monotonic() - began > GROUP_SECONDS:
                raise PsycheError("no group was found")
            time.sleep(POLL_SECONDS)
        return Ready(time.monotonic() - began)

    def exchange(self) -> Done:
        began = time.monotonic()
        self._step.allow_allreduce()
        self._group = len(self._step.result(HANG_SECONDS))
        element = 2 if self.spec.codec == "fp16" else 4
        return Done(began, time.monotonic(), {}, element * self.spec.parameters)

    def verify(self, *names: str) -> Verified:
        with self._averager.get_tensors() as (values,):
            return Verified(self._group, relative_error(values, range(self.spec.peers)))

    def close(self) -> None:
        if self._averager is not None:
            self._averager.shutdown()
        if self._dht is not None:
            self._dht.shutdown()
