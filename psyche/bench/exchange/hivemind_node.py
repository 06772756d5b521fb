"""hivemind's DecentralizedAverager: butterfly all-reduce over libp2p, what volunteer training runs on today."""

from __future__ import annotations

import time
from typing import Any

import torch

from psyche.bench.exchange.participant import PATIENCE, Participant
from psyche.bench.exchange.talk import Done, Met, Ready, Spec, Verified
from psyche.bench.exchange.tensors import Error, blocks, checked, draw, true_mean
from psyche.errors import PsycheError

MATCHMAKING_SECONDS, REQUEST_SECONDS = 2.0, 1.0
"""How long the leader of a group waits for others, and a follower for the leader. The latter must be the smaller."""
GROUP_SECONDS = 120.0
"""After which no group is hoped for any more: hivemind's peers at times all follow each other and none leads."""
POLL_SECONDS = 0.01
"""hivemind shows the stage of a step in shared memory and signals no change of it."""


class HivemindNode(Participant):
    """One peer. Its DHT and its averager are processes of their own, as is its libp2p daemon."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._dht: Any = None
        self._averager: Any = None
        self._step: Any = None
        self._group = 0

    def meet(self, meeting: str) -> Met:
        from hivemind import DHT, DecentralizedAverager
        from hivemind.compression import Float16Compression, NoCompression

        spec = self.spec
        self._dht = DHT(
            initial_peers=[meeting] if meeting else [],
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
        return Met(str(self._dht.get_visible_maddrs()[0]), str(self._dht.peer_id))

    def prepare(self) -> Ready:
        """Load the vector and find a group; the exchange then waits for a trigger. Raises :class:`PsycheError`."""
        from hivemind.averaging.control import AveragingStage

        with self._averager.get_tensors() as (values,):
            for block in blocks(self.spec.parameters):
                values[block] = draw(self.spec.number, block)
        began = time.monotonic()
        self._step = self._averager.step(timeout=PATIENCE, require_trigger=True, wait=False)
        while self._step.stage != AveragingStage.AWAITING_TRIGGER:
            if self._step.done() or time.monotonic() - began > GROUP_SECONDS:
                raise PsycheError("no group was found")
            time.sleep(POLL_SECONDS)
        return Ready(time.monotonic() - began)

    def exchange(self) -> Done:
        began = time.monotonic()
        self._step.allow_allreduce()
        self._group = len(self._step.result(PATIENCE))
        element = 2 if self.spec.codec == "fp16" else 4
        return Done(began, time.monotonic(), {}, element * self.spec.parameters)

    def verify(self, names: tuple[str, ...]) -> Verified:
        error = Error()
        with self._averager.get_tensors() as (values,):
            for block in checked(self.spec.parameters):
                error.add(values[block], true_mean(range(self.spec.peers), block))
        return Verified(self._group, error.relative)

    def close(self) -> None:
        if self._averager is not None:
            self._averager.shutdown()
        if self._dht is not None:
            self._dht.shutdown()
