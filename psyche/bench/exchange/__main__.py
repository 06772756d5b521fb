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
    AveragingPeer,
    Command,
    Connect,
    Exchange,
    Failed,
    PeerProcess,
    PeerSpec,
    Prepare,
    Quit,
    Reply,
    Verify,
    decode_command,
    decode_spec,
    encode,
)


def main() -> None:
    """Answer commands until told to quit. If the bench ends, this process and all its children end, too."""
    source, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    # hivemind forks, and the fork closes sys.stdin, which blocks forever if a thread is reading from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # output of libraries goes to the log
    spec = decode_spec(source.readline())
    commands: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_listen, args=[source, commands], daemon=True).start()
    torch.set_num_threads(spec.threads)
    process = _process(spec)

    def serve() -> None:
        while not isinstance(command := commands.get(), Quit):
            replies.write(encode(_answer(process, command)) + b"\n")

    try:
        process.run(serve)
    finally:
        process.close()


def _listen(source: IO[bytes], commands: SimpleQueue[Command]) -> None:
    for line in source:
        commands.put(decode_command(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the bench started this process in a session of its own


def _answer(process: PeerProcess, command: Command) -> Reply:
    try:
        if isinstance(command, Connect):
            return process.connect(command.rendezvous)
        assert isinstance(process, AveragingPeer), "a coordinator exchanges nothing"
        match command:
            case Prepare():
                return process.prepare()
            case Exchange():
                return process.exchange()
            case Verify(names):
                return process.verify(names)
            case _:
                raise AssertionError(f"{command} is not answered")
    except Exception as error:  # a rival may raise anything; the bench reports it as one sentence
        traceback.print_exc()
        return Failed(" ".join((str(error) or type(error).__name__).split())[:300])


def _process(spec: PeerSpec) -> PeerProcess:
    if spec.system == "gloo":
        from psyche.bench.exchange.gloo_peer import GlooPeer

        return GlooPeer(spec)
    if spec.system == "hivemind":
        from psyche.bench.exchange.hivemind_peer import HivemindPeer

        return HivemindPeer(spec)
    from psyche.bench.exchange.psyche_peer import PsycheCoordinator, PsychePeer

    return PsycheCoordinator(spec) if spec.number < 0 else PsychePeer(spec)


if __name__ == "__main__":
    main()
