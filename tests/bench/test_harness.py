"""The harness: rows declare their table and their JSON, ways take turns, processes are ended."""

from __future__ import annotations

import io
import signal
import time
from pathlib import Path
from typing import Annotated

import pytest
from rich.console import Console

from psyche.bench.harness.child_processes import last_line, reap, running, sigterm_as_ctrl_c, spawn
from psyche.bench.harness.rows import Column, Row, columns_of, table, to_json, transposed_table
from psyche.bench.harness.shaped_links import on_loopback
from psyche.bench.harness.turns import in_turn, percent_above, spread, take_turns, with_error
from psyche.bench.joining import IMPORTED, import_seconds
from psyche.errors import PsycheError
from tests.processes.swarm import PATIENCE, alive


class Example(Row, frozen=True):
    name: Annotated[str, Column("name", left=True)]
    seed: int
    loss: Annotated[float | None, Column("loss", ".2f", fold=spread(".2f"))]

    @property
    def shout(self) -> Annotated[str, Column("SHOUT", after="name")]:
        return self.name.upper()


ROWS = [Example("one", 0, 1.0), Example("one", 1, 2.0), Example("two", 0, None)]


def _text(shown: object) -> str:
    screen = io.StringIO()
    Console(file=screen, width=80).print(shown)
    return screen.getvalue()


def test_a_field_without_a_column_is_in_the_json_only() -> None:
    assert list(columns_of(Example)) == ["name", "shout", "loss"]
    assert to_json(ROWS)[0] == {"name": "one", "seed": 0, "loss": 1.0}


def test_neighbours_of_a_group_are_one_line_and_none_is_a_dash() -> None:
    text = _text(table("Title", ROWS, group=lambda row: row.name))
    assert "1.50 ± 0.50" in text
    assert [line.split()[-2] for line in text.splitlines() if "TWO" in line] == ["–"]
    assert text.index("name") < text.index("SHOUT") < text.index("loss")


def test_a_transposed_table_has_a_line_for_each_field() -> None:
    text = _text(transposed_table("Title", ROWS[:2], "field", lambda row: f"seed {row.seed}"))
    assert "seed 0" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == ["name", "SHOUT", "loss"]


def test_every_way_comes_first_in_turn() -> None:
    ways = ["a", "b", "c"]
    assert [in_turn(ways, repeat)[0] for repeat in range(-1, 4)] == ["c", "a", "b", "c", "a"]
    assert all(sorted(in_turn(ways, repeat)) == ways for repeat in range(5))


def test_negative_repeats_warm_up() -> None:
    calls: list[tuple[str, int]] = []
    found = take_turns(["a", "b"], range(-1, 2), lambda way, repeat: calls.append((way, repeat)) or repeat)
    assert found == {"a": [0, 1], "b": [0, 1]}
    assert len(calls) == 6


def test_a_way_that_fails_is_left_out_or_stops_the_measurement() -> None:
    def run(way: str, repeat: int) -> int:
        if way == "bad" and repeat == 1:
            raise PsycheError("no")
        return repeat

    told: list[str] = []
    assert take_turns(["good", "bad"], range(3), run, lambda way, error: told.append(way)) == {"good": [0, 1, 2]}
    assert told == ["bad"]
    with pytest.raises(PsycheError):
        take_turns(["good", "bad"], range(3), run)


def test_statistics() -> None:
    assert percent_above(1.1, 1.0) == pytest.approx(10)
    assert spread("+.1f")([1.0, 3.0]) == "+2.0 ± 1.0"
    assert with_error([0.0, 0.0]) == "–"
    assert with_error([1.0]) == "+1.00"
    assert with_error([1.0, 3.0]) == "+2.00 ± 1.00"


def test_a_process_is_reaped_with_its_children_and_its_last_line_is_known(tmp_path: Path) -> None:
    (place,), log = on_loopback(1), tmp_path / "log"
    program = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    reap(spawn(["timeit", "-n", "1", "-r", "1", program], place, log), time.monotonic() + PATIENCE)
    child = int(log.read_text().splitlines()[0])
    deadline = time.monotonic() + PATIENCE
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)
    assert "loop" in last_line(log)


def test_a_process_ends_with_its_block(tmp_path: Path) -> None:
    (place,) = on_loopback(1)
    with running(["http.server", "0"], place, tmp_path / "log") as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_sigterm_is_like_ctrl_c_within_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_what_a_node_imports_can_be_imported() -> None:
    assert "psyche.processes.node_process" in IMPORTED
    assert 0 < import_seconds() < 300
