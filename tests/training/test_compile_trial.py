"""torch.compile where it pays: decided by a trial in a child process, which never keeps a node from training."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psyche.config import Inner, Node, Run
from psyche.training import compile_trial
from psyche.training.compile_trial import Speeds, TrialFailed, compile_if_it_pays
from psyche.training.torch_engine import TorchEngine
from tests.training.tiny_models import LENGTH, SETTINGS, SPLIT, steps, tiny

torch.set_num_threads(1)
INNER = Inner(lr=1e-2, batch_size=4, warmup_steps=0)
RUN = Run.model_validate(
    {
        "name": "tiny",
        "model": {"settings": SETTINGS},
        "data": {"sequence_length": LENGTH, "tokenizer": {"kind": "bpe", "vocab_size": 260}},
        "inner": {"lr": 1e-2, "batch_size": 4, "warmup_steps": 0},
    }
)
FASTER, SLOWER = Speeds(2.0, 1.0, 60.0), Speeds(1.0, 2.0, 60.0)


def engine() -> TorchEngine:
    return TorchEngine(tiny(), INNER, Node(device="cpu"))


@pytest.fixture(autouse=True)
def own_inductor_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


class Decision:
    """What came of asking for one engine."""

    def __init__(self, cache: Path, passes: int = 10**9, one: TorchEngine | None = None, **node: object) -> None:
        self.engine = one or engine()
        self.said: list[str] = []
        self.began = 0
        settings = Node(device="cpu", cache=cache, threads=1, **node)
        asyncio.run(self._ask(RUN, settings, passes))

    async def _ask(self, run: Run, node: Node, passes: int) -> None:
        async def do(function: Callable[..., object], *arguments: object) -> object:
            return function(*arguments)

        await compile_if_it_pays(self.engine, run, node, passes, do=do, say=self.said.append, begin=self._begin)

    def _begin(self) -> None:
        self.began += 1

    @property
    def compiled(self) -> bool:
        return self.engine._forward is not self.engine.model


def answers(monkeypatch: pytest.MonkeyPatch, *speeds: Speeds | Exception) -> list[int]:
    """Trials give these, one after the other; compiling does nothing. Rows of each trial."""
    trials: list[int] = []

    async def trial(run: Run, node: Node, rows: int, threads: int, end: int | None) -> Speeds:
        trials.append(rows)
        found = speeds[len(trials) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(compile_trial, "_trial", trial)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model.forward)
    return trials


@given(eager=st.floats(0, 10), compiled=st.floats(0, 10), first=st.floats(0, 1000), passes=st.integers(0, 10**6))
def test_it_pays_where_all_passes_save_more_than_compiling_takes(
    eager: float, compiled: float, first: float, passes: int
) -> None:
    assert Speeds(eager, compiled, first).pays(passes) == (passes * (eager - compiled) > first)


def test_short_trainings_are_not_worth_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = answers(monkeypatch)
    for decision in (Decision(tmp_path, 100), Decision(tmp_path, compile="off")):
        assert (decision.said, decision.began, decision.compiled) == ([], 0, False)
    assert not trials
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("speeds", "pays"), [(FASTER, True), (SLOWER, False)])
def test_long_ones_are_decided_by_one_trial_that_is_remembered(
    speeds: Speeds, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = answers(monkeypatch, speeds)
    for began in (1, pays):
        decision = Decision(tmp_path)
        assert decision.compiled == pays
        assert decision.began == began, "the panel says that it compiles whenever that takes time, and once"
    assert trials == [4]
    assert Decision(tmp_path, compile="on").compiled, "the owner insists"


@pytest.mark.parametrize("broken", ["", "{}", "[1]", '{"eager": "x", "compiled": 1, "compiling": 1}', "\x00"])
def test_a_note_that_cannot_be_read_costs_another_trial(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = answers(monkeypatch, SLOWER, FASTER)
    Decision(tmp_path)
    (note,) = (tmp_path / "compile").iterdir()
    note.write_text(broken)
    assert Decision(tmp_path).compiled
    assert len(trials) == 2


def test_a_failed_trial_is_made_again_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cause may be gone by then: a compiler is installed, memory is free, nobody presses Ctrl-C."""
    trials = answers(monkeypatch, TrialFailed("no C++ compiler"), TrialFailed("out of memory"), FASTER)
    assert Decision(tmp_path).said[-1] == "training without torch.compile: no C++ compiler"
    assert Decision(tmp_path).said[-1] == "training without torch.compile: out of memory"
    assert Decision(tmp_path).compiled
    assert len(trials) == 3


def test_what_cannot_be_compiled_is_trained_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, FASTER)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("killed by signal 2\nwhile compiling")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    one, plain = engine(), engine()
    assert Decision(tmp_path, one=one).said[-1] == "training without torch.compile: killed by signal 2 while compiling"
    assert steps(one, 2) == steps(plain, 2)


def test_measuring_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model.forward)
    one, plain = engine(), engine()
    first = steps(one, 1)
    compile_trial.measure(one, SPLIT.batch(range(4)))
    assert [*first, *steps(one, 2, start=1)] == steps(plain, 3)


# ------------------------------------------------------------------------------------ the child


STUBBORN = """
import os, pathlib, subprocess, sys, time
sys.stdin.readline()
compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {compiler.pid}")
time.sleep(1000)
"""
"""A child that starts a compiler and does not come back."""


async def _trial() -> Speeds:
    return await compile_trial._trial(RUN, Node(device="cpu"), 1, 1)


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _pids(path: Path) -> list[int]:
    return await asyncio.to_thread(_read_pids, path)


def _read_pids(path: Path) -> list[int]:
    while not path.exists() or len(path.read_text().split()) < 2:
        sleep(0.01)
    return [int(pid) for pid in path.read_text().split()]


async def _until_gone(pids: list[int]) -> None:
    await asyncio.to_thread(_wait_until_gone, pids)


def _wait_until_gone(pids: list[int]) -> None:
    while not all(_gone(pid) for pid in pids):
        sleep(0.01)


def test_a_trial_ends_at_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    def kill(pid: int) -> None:
        killed.append(pid)
        real(pid)

    real = compile_trial._kill
    monkeypatch.setattr(compile_trial, "_kill", kill)
    monkeypatch.setattr(compile_trial, "CHILD", (sys.executable, "-c", STUBBORN, str(tmp_path / "pids")))
    monkeypatch.setattr(compile_trial, "TRIAL_SECONDS", 0.2)
    with pytest.raises(TrialFailed, match="took more than"):
        asyncio.run(_trial())
    assert _gone(killed[0])


def test_leaving_ends_a_trial_with_the_compilers_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_trial, "CHILD", (sys.executable, "-c", STUBBORN, str(tmp_path / "pids")))

    async def cancelled() -> None:
        waiting = asyncio.create_task(_trial())
        pids = await _pids(tmp_path / "pids")
        assert all(os.getpgid(pid) != os.getpgrp() for pid in pids), "Ctrl-C in the terminal does not reach them"
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await _until_gone(pids)

    asyncio.run(cancelled())


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", "exit code"),
        ("import os; os._exit(3)", "exit code 3"),
        ("""print('{"fault": "no C++ compiler"}')""", "no C\\+\\+ compiler"),
    ],
)
def test_a_child_without_speeds_is_a_failed_trial(child: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_trial, "CHILD", (sys.executable, "-c", f"import sys; sys.stdin.readline(); {child}"))
    with pytest.raises(TrialFailed, match=reason):
        asyncio.run(_trial())


def test_the_child_ends_in_order_while_its_parent_lives() -> None:
    """Its last thread waits for the parent's end, which must not make the interpreter abort."""
    script = (
        "import psyche.training.compile_trial as c\n"
        "c.build = c.TorchEngine = lambda *a, **k: None\n"
        "c.measure = lambda engine, batch: c.Speeds(1.0, 2.0, 3.0)\n"
        "c.main()\n"
    )
    task = {"run": RUN.model_dump_json(), "node": Node().model_dump_json(), "rows": 1, "threads": 1, "end": None}

    async def answered() -> tuple[bytes, int]:
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdin=pipe, stdout=pipe)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(task).encode() + b"\n")
        return await child.stdout.read(), await child.wait()  # its stdin is open all the while

    answer, code = asyncio.run(answered())
    assert (json.loads(answer), code) == ({"speeds": {"eager": 1.0, "compiled": 2.0, "compiling": 3.0}}, 0)


def test_a_child_whose_parent_is_killed_ends_with_its_compilers(tmp_path: Path) -> None:
    """The real child, up to where it would build the model; its session has a compiler in it."""
    stall = (
        "import os, pathlib, subprocess, sys, time, psyche.training.compile_trial as c\n"
        "def build(*a, **k):\n"
        "    one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"    pathlib.Path({str(tmp_path / 'pids')!r}).write_text(f'{{os.getpid()}} {{one.pid}}')\n"
        "    time.sleep(1000)\n"
        "c.build = build\n"
        "c.main()\n"
    )
    parent = (
        "import asyncio, sys, psyche.training.compile_trial as c\n"
        f"c.CHILD = (sys.executable, '-c', {stall!r})\n"
        "from psyche.config import Node\n"
        "from tests.training.test_compile_trial import RUN\n"
        "asyncio.run(c._trial(RUN, Node(device='cpu'), 1, 1))\n"
    )

    async def killed() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", parent)
        pids = await _pids(tmp_path / "pids")
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await _until_gone(pids)

    asyncio.run(killed())


@pytest.mark.slow
def test_the_real_trial_measures_and_a_compiled_model_takes_the_same_steps(tmp_path: Path) -> None:
    one, plain = engine(), engine()
    decision = Decision(tmp_path, one=one, compile="on")
    assert decision.compiled, decision.said
    (note,) = (tmp_path / "compile").glob("*.json")
    assert all(seconds > 0 for seconds in json.loads(note.read_text()).values())
    assert any((tmp_path / "compile" / "inductor").iterdir()), "what the trial compiled is kept beside its note"
    assert one.evaluate(SPLIT.batch(range(4))) == plain.evaluate(SPLIT.batch(range(4))), "compiling changed something"
    assert steps(one, 6) == pytest.approx(steps(plain, 6), rel=1e-4)
    assert one.evaluate(SPLIT.batch(range(5))) == pytest.approx(plain.evaluate(SPLIT.batch(range(5))), rel=1e-4)
