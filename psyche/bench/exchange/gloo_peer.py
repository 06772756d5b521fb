"""PyTorch's gloo all-reduce, as DistributedDataParallel uses it on CPUs: plain TCP, no encryption, no identities."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from psyche.bench.exchange.peer_process import HANG_SECONDS, AveragingPeer, Connected, Done, PeerSpec, Ready, Verified
from psyche.bench.exchange.vectors import blocks, draw, relative_error


class GlooPeer(AveragingPeer):
    """One rank."""

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

    def verify(self, names: tuple[str, ...]) -> Verified:
        return Verified(self.spec.peers, relative_error(self._values, range(self.spec.peers)))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
