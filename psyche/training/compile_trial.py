"""``torch.compile`` where it pays, which a trial on this machine with this model decides.

The trial runs in a child process before the node joins: no other member waits for it, it can be ended after
:data:`TRIAL_SECONDS`, and Ctrl-C in a terminal does not reach its compilers. What it measures is remembered on disk; a
trial that failed is not, because the cause may be gone at the next start. It also leaves Inductor's own cache warm, so
that the node's process compiles in seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter
from typing import Any

import numpy as np
import torch

from psyche.config import Node, Run
from psyche.training.engine import Batch, Engine
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine

WORTH_TRYING = 4 * 3600.0
"""Seconds of training below which no trial is made: the node joins later by what the trial takes."""
TRIAL_SECONDS = 300.0
"""A trial is ended after so long. One of a model of 0.1M parameters takes half a minute on one core, most of it for
imports and the C++ compiler."""
CHILD = (sys.executable, "-P", "-m", "psyche.training.compile_trial")
MAX_ANSWER = 64 << 10
"""Bytes of what the child prints."""


Do = Callable[..., Awaitable[Any]]
"""Runs a function, with the arguments after it, on the thread that trains: each thread has its own number of PyTorch
threads."""


class TrialFailed(Exception):
    """There is no measurement; the message says why."""


@dataclass(frozen=True)
class Speeds:
    """Seconds of a forward and backward pass."""

    eager: float
    compiled: float
    compiling: float
    """The first compiled pass, which compiles."""

    def pays(self, passes: int) -> bool:
        """Whether compiling saves time over ``passes`` of them."""
        return (self.eager - self.compiled) * passes > self.compiling


async def compile_if_it_pays(
    engine: Engine, run: Run, node: Node, steps: int, *, do: Do, say: Callable[[str], None], begin: Callable[[], None]
) -> None:
    """Have ``engine`` train compiled for ``steps`` inner steps, if that pays or ``node.compile`` is ``on``.

    ``begin`` is called before anything that takes long, ``say`` with what is done and what came of it. Whatever cannot
    be compiled is trained as it is: only cancelling raises.
    """
    if not isinstance(engine, TorchEngine) or node.compile == "off":
        return
    batch = np.zeros((run.inner.batch_size, run.data.sequence_length), np.int64)
    notes = node.cache.expanduser() / "compile"
    # Inductor's own default is below /tmp: after a reboot a node would compile anew, without the trial's bound.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(notes.absolute() / "inductor"))
    try:
        rows = await do(engine.rows, batch)
        passes = steps * -(-len(batch) // rows)
        path = notes / f"{_key(engine, run, node, rows)}.json"
        speeds = remembered = _remembered(path)
        if speeds is None:
            if node.compile == "auto" and passes * rows * await do(engine.pass_seconds, batch[:1], 1) < WORTH_TRYING:
                return
            begin()
            say(
                "measuring in a process of its own whether torch.compile makes this model faster here: at most "
                f"{TRIAL_SECONDS / 60:.0f} minutes, once; the node joins afterwards (node.compile: off skips it)"
            )
            speeds = await _trial(run, node, rows, await do(torch.get_num_threads), engine.end)
            _remember(path, speeds)
        gain = f"a pass takes {speeds.compiled:.3g} s compiled, {speeds.eager:.3g} s otherwise"
        if node.compile == "auto" and not speeds.pays(passes):
            say(f"training without torch.compile, which does not pay here: {gain}")
            return
        if remembered:
            begin()
        say(f"compiling the model: {gain}")
        await do(engine.use_compiled, batch[:rows])
    except TrialFailed as error:
        say(f"training without torch.compile: {error}")
    except Exception as error:  # Dynamo, Inductor, Triton and the C++ compiler have each their own
        say(f"training without torch.compile: {_in_short(error)}")


async def _trial(run: Run, node: Node, rows: int, threads: int, end: int | None = None) -> Speeds:
    """Speeds as a child process measures them; ``end`` is the engine's. Raises :class:`TrialFailed`."""
    child = await asyncio.create_subprocess_exec(
        *CHILD,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is this process's to handle; and its compilers end with it, see _kill
    )
    assert child.stdin is not None
    assert child.stdout is not None
    task = {
        "run": run.model_dump_json(),
        "node": node.model_copy(update={"micro_batch": rows}).model_dump_json(),
        "rows": rows,
        "threads": threads,
        "end": end,
    }
    try:
        async with asyncio.timeout(TRIAL_SECONDS):
            child.stdin.write(json.dumps(task).encode() + b"\n")
            await child.stdin.drain()
            answer = await child.stdout.read(MAX_ANSWER)
            while more := await child.stdout.read(MAX_ANSWER):
                answer = (answer + more)[:MAX_ANSWER]
            code = await child.wait()
    except TimeoutError:
        raise TrialFailed(f"the trial took more than {TRIAL_SECONDS:.0f} s") from None
    except OSError as error:
        raise TrialFailed(f"the trial could not be started ({error.strerror})") from None
    finally:
        _kill(child.pid)
        await child.wait()
    if not answer:
        raise TrialFailed(f"the trial ended with exit code {code} and without a result; the next start tries again")
    found = json.loads(answer)
    if "fault" in found:
        raise TrialFailed(found["fault"])
    return Speeds(**found["speeds"])


def _kill(pid: int) -> None:
    """The child and the compilers it started: it leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _key(engine: TorchEngine, run: Run, node: Node, rows: int) -> str:
    """All that the speeds depend on, hashed."""
    threads = torch.get_num_threads() if node.threads is None else node.threads
    where = f"{platform.node()}, {threads} threads"  # several machines may share a cache
    if engine.device.type == "cuda":
        where = torch.cuda.get_device_name(engine.device)
    what = (run.model.model_dump_json(), run.data.sequence_length, rows, node.precision, engine.checkpoints)
    versions = torch.__version__, version("transformers")
    return blake2b(repr((*versions, where, engine.end is None, *what)).encode(), digest_size=16).hexdigest()


def _remembered(path: Path) -> Speeds | None:
    try:
        return Speeds(**{name: float(value) for name, value in json.loads(path.read_bytes()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _remember(path: Path, speeds: Speeds) -> None:
    """Several nodes of one machine may do so at once. A disk that does not take it costs another trial."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(json.dumps(asdict(speeds)).encode())
        os.replace(file.name, path)


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------- the child


def measure(engine: TorchEngine, batch: Batch) -> Speeds:
    """Speeds of passes over ``batch`` as one piece. Raises what the compiler raises."""
    eager = engine.pass_seconds(batch)
    began = perf_counter()
    engine.use_compiled(batch)
    compiling = perf_counter() - began
    return Speeds(eager, engine.pass_seconds(batch), compiling)


def main() -> None:
    """Measure what the first line of stdin describes, and print it; end with all that was started as stdin closes."""
    output = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not spoil the answer
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run, node = Run.model_validate_json(task["run"]), Node.model_validate_json(task["node"])
        torch.set_num_threads(task["threads"])
        engine = TorchEngine(build(run.model, seed=run.seed), run.inner, node, task["end"])
        batch = np.zeros((task["rows"], run.data.sequence_length), np.int64)
        answer: dict[str, object] = {"speeds": asdict(measure(engine, batch))}
    except Exception as error:
        answer = {"fault": _in_short(error)}
    os.write(output, json.dumps(answer).encode())


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread that waits would hold when the interpreter ends
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
