"""One process of a system under measurement: ``python -m psyche.bench.exchange``, driven over stdin."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from queue import SimpleQueue
from typing import IO

import torch

from psyche.bench.exchange.participant import Participant, Process
from psyche.bench.exchange.talk import (
    Command,
    Exchange,
    Failed,
    Meet,
    Prepare,
    Quit,
    Reply,
    Spec,
    Verify,
    decode_command,
    decode_spec,
    encode,
)


def main() -> None:
    """Serve until told to quit. Where the bench is gone, so is this process, and all that it started."""
    source, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    # hivemind forks, and the fork closes sys.stdin, which hangs for ever where a thread was reading from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print goes to the log
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
    os.killpg(os.getpgrp(), signal.SIGKILL)  # a group of our own: the bench starts each process in a new session


def _answer(process: Process, command: Command) -> Reply:
    try:
        return process.meet(command.meeting) if isinstance(command, Meet) else _take_part(process, command)
    except Exception as error:  # other people's code: whatever it raises ends up in the bench's own words
        traceback.print_exc()
        return Failed(" ".join((str(error) or type(error).__name__).split())[:300])


def _take_part(participant: Process, command: Command) -> Reply:
    assert isinstance(participant, Participant), "who leads is not asked to exchange"
    match command:
        case Prepare():
            return participant.prepare()
        case Exchange():
            return participant.exchange()
        case Verify(names):
            return participant.verify(names)
        case _:
            raise AssertionError(f"{command} is not answered")


def _process(spec: Spec) -> Process:
    if spec.system == "gloo":
        from psyche.bench.exchange.gloo_node import GlooNode

        return GlooNode(spec)
    if spec.system == "hivemind":
        from psyche.bench.exchange.hivemind_node import HivemindNode

        return HivemindNode(spec)
    from psyche.bench.exchange.psyche_node import PsycheLead, PsycheNode

    return PsycheLead(spec) if spec.number < 0 else PsycheNode(spec)


if __name__ == "__main__":
    main()
