"""One process of a system under measurement, ``python -m psyche.bench.exchange``, controlled over stdin."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from queue import SimpleQueue
from typing import IO

import torch

from psyche.bench.exchange.peer_process import (
    Call,
    Failed,
    PeerProcess,
    PeerSpec,
    Reply,
    decode_call,
    decode_spec,
    encode,
)


def main() -> None:
    """Answer calls until told to quit. If the bench ends, this process and all its children end, too."""
    source, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    # hivemind forks, and the fork closes sys.stdin, which blocks forever if a thread is reading from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # output of libraries goes to the log
    spec = decode_spec(source.readline())
    calls: SimpleQueue[Call] = SimpleQueue()
    threading.Thread(target=_listen, args=[source, calls], daemon=True).start()
    torch.set_num_threads(spec.threads)
    process = _process(spec)

    def serve() -> None:
        while (call := calls.get()).method != "quit":
            replies.write(encode(_answer(process, call)) + b"\n")

    try:
        process.run(serve)
    finally:
        process.close()


def _listen(source: IO[bytes], calls: SimpleQueue[Call]) -> None:
    for line in source:
        calls.put(decode_call(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the bench started this process in a session of its own


def _answer(process: PeerProcess, call: Call) -> Reply:
    try:
        reply: Reply = getattr(process, call.method)(*call.arguments)
        return reply
    except Exception as error:  # a rival may raise anything; the bench reports it as one sentence
        traceback.print_exc()
        return Failed(" ".join((str(error) or type(error).__name__).split())[:300])


def _process(spec: PeerSpec) -> PeerProcess:
    if spec.system == "psyche":
        from psyche.bench.exchange.psyche_peer import PsycheCoordinator, PsychePeer

        return PsycheCoordinator(spec) if spec.number < 0 else PsychePeer(spec)
    from psyche.bench.exchange.rival_peers import GlooPeer, HivemindPeer

    return GlooPeer(spec) if spec.system == "gloo" else HivemindPeer(spec)


if __name__ == "__main__":
    main()
