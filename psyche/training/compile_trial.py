"""``torch.compile`` where a trial on this machine with this model shows that it pays.

The trial runs in a child process before the node joins: no other member waits for it, it can be killed after
:data:`TRIAL_SECONDS`, and Ctrl-C in a terminal does not reach its compilers. Its measurements are cached on disk; a
failure is not, because its cause may be gone at the next start. The trial also warms Inductor's own cache, so the
node's process compiles in seconds.
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
"""Seconds of training below which there is no trial, because it delays joining."""
TRIAL_SECONDS = 300.0
"""Time limit of a trial in seconds. With 0.1M parameters a trial takes 30 s on one core, mostly for imports and the C++
compiler."""
CHILD = (sys.executable, "-P", "-m", "psyche.training.compile_trial")
MAX_ANSWER = 64 << 10
"""Maximum size in bytes of the child's output."""


Do = Callable[..., Awaitable[Any]]
"""Runs a function with arguments on the training thread. PyTorch's number of threads is set per thread."""


class TrialFailed(Exception):
    """A trial without a measurement; the message is the reason."""


@dataclass(frozen=True)
class Speeds:
    """Durations of a forward and backward pass, in seconds."""

    eager: float
    compiled: float
    compiling: float
    """Duration of the first compiled pass, which compiles."""

    def pays(self, passes: int) -> bool:
        """Return whether compiling saves time over ``passes`` passes."""
        return (self.eager - self.compiled) * passes > self.compiling


async def compile_if_it_pays(
    engine: Engine, run: Run, node: Node, steps: int, *, do: Do, say: Callable[[str], None], begin: Callable[[], None]
) -> None:
    """Compile the model of ``engine``, if that pays over ``steps`` inner steps or ``node.compile`` is ``on``.

    Calls ``begin`` before anything that takes long, and ``say`` with progress and result. A model that cannot be
    compiled is trained eagerly; only cancellation raises.
    """
    if not isinstance(engine, TorchEngine) or node.compile == "off":
        return
    batch = np.zeros((run.inner.batch_size, run.data.sequence_length), np.int64)
    notes = node.cache.expanduser() / "compile"
    # Inductor's default is in /tmp: after a reboot a node would compile again, without the time limit of a trial
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(notes.absolute() / "inductor"))
    try:
        rows = await do(engine.rows, batch)
        passes = steps * -(-len(batch) // rows)
        path = notes / f"{_key(engine, run, node, rows)}.json"
        speeds = cached = _cached(path)
        if speeds is None:
            if node.compile == "auto" and passes * rows * await do(engine.pass_seconds, batch[:1], 1) < WORTH_TRYING:
                return
            begin()
            say(
                "measuring whether torch.compile makes this model faster on this machine: once, at most "
                f"{TRIAL_SECONDS / 60:.0f} minutes; the node joins afterwards (node.compile: off skips this)"
            )
            speeds = await _trial(run, node, rows, await do(torch.get_num_threads), engine.end)
            _cache(path, speeds)
        gain = f"a pass takes {speeds.compiled:.3g} s compiled and {speeds.eager:.3g} s eager"
        if node.compile == "auto" and not speeds.pays(passes):
            say(f"training without torch.compile, which is not worth it here: {gain}")
            return
        if cached:
            begin()
        say(f"compiling the model: {gain}")
        await do(engine.use_compiled, batch[:rows])
    except TrialFailed as error:
        say(f"training without torch.compile: {error}")
    except Exception as error:  # Dynamo, Inductor, Triton and the C++ compiler raise exceptions of their own
        say(f"training without torch.compile: {_summary(error)}")


async def _trial(run: Run, node: Node, rows: int, threads: int, end: int | None = None) -> Speeds:
    """Measure speeds in a child process; ``end`` is the engine's. Raises :class:`TrialFailed`."""
    child = await asyncio.create_subprocess_exec(
        *CHILD,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C goes to this process only, and _kill ends the compilers, too
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
    """Kill the child and the compilers that it started: it leads its own session."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _key(engine: TorchEngine, run: Run, node: Node, rows: int) -> str:
    """Hash everything that the speeds depend on."""
    threads = torch.get_num_threads() if node.threads is None else node.threads
    where = f"{platform.node()}, {threads} threads"  # several machines can share a cache
    if engine.device.type == "cuda":
        where = torch.cuda.get_device_name(engine.device)
    what = (run.model.model_dump_json(), run.data.sequence_length, rows, node.precision, engine.checkpoints)
    versions = torch.__version__, version("transformers")
    return blake2b(repr((*versions, where, engine.end is None, *what)).encode(), digest_size=16).hexdigest()


def _cached(path: Path) -> Speeds | None:
    try:
        return Speeds(**{name: float(value) for name, value in json.loads(path.read_bytes()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _cache(path: Path, speeds: Speeds) -> None:
    """Cache speeds atomically: several nodes may do so at once. A failed write only costs another trial."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(json.dumps(asdict(speeds)).encode())
        os.replace(file.name, path)


def _summary(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------- the child


def measure(engine: TorchEngine, batch: Batch) -> Speeds:
    """Measure passes over ``batch`` as one micro-batch. Passes on the exceptions of the compiler."""
    eager = engine.pass_seconds(batch)
    began = perf_counter()
    engine.use_compiled(batch)
    compiling = perf_counter() - began
    return Speeds(eager, engine.pass_seconds(batch), compiling)


def main() -> None:
    """Measure the task on the first line of stdin and print the result. Kill the process group when stdin closes."""
    output = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the answer
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run, node = Run.model_validate_json(task["run"]), Node.model_validate_json(task["node"])
        torch.set_num_threads(task["threads"])
        engine = TorchEngine(build(run.model, seed=run.seed), run.inner, node, task["end"])
        batch = np.zeros((task["rows"], run.data.sequence_length), np.int64)
        answer: dict[str, object] = {"speeds": asdict(measure(engine, batch))}
    except Exception as error:
        answer = {"fault": _summary(error)}
    os.write(output, json.dumps(answer).encode())


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: this thread would hold its lock when the interpreter exits
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
