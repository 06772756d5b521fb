from __future__ import annotations

import errno
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.errors import PsycheError
from psyche.telemetry.event_log import EventLog, read_events
from psyche.telemetry.events import AnyEvent, Event, Notice, PeerJoined, PeerLeft, RunFinished, StepDone


def finite(event: Event) -> Event:
    """JSON has no NaN or infinity: such a measurement is ``None`` when it comes back."""
    values = msgspec.structs.asdict(event)
    lost = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return msgspec.structs.replace(event, **lost)


class TestRoundTrip:
    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_any_event_comes_back(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(AnyEvent.__args__))
        fields = {f.name: data.draw(_values(f.type)) for f in msgspec.structs.fields(kind) if f.name not in STAMPS}
        path = tmp_path_factory.mktemp("log") / "events.jsonl"
        log = EventLog(path, "me", clock=lambda: 12.5)
        log.emit(kind(**fields))
        log.close()
        assert list(read_events(path)) == [finite(kind(**fields, time=12.5, node="me"))]
        assert path.read_bytes().count(b"\n") == 1

    def test_not_finite_is_not_measured(self, tmp_path: Path) -> None:
        log = EventLog(tmp_path / "e", "me")
        log.emit(StepDone(1, 1, 1, math.nan, 1e-3, math.inf))
        (event,) = read_events(tmp_path / "e")
        assert isinstance(event, StepDone)
        assert event.loss is None
        assert event.tokens_per_second is None


STAMPS = ("time", "node")


def _values(kind: object) -> st.SearchStrategy[object]:
    if kind is float:  # durations and rates we measure ourselves
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind is int:
        return st.integers(-(2**63), 2**63 - 1)
    if kind is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    if kind == tuple[str, ...]:
        return st.lists(_values(str), max_size=3).map(tuple)
    if kind == tuple[tuple[str, str], ...]:
        return st.lists(st.tuples(_values(str), _values(str)), max_size=3).map(tuple)
    return st.from_type(kind)  # type: ignore[arg-type]


class TestTornLines:
    def test_skipped_and_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "e"
        log = EventLog(path, "me")
        log.emit(Notice("info", "one"))
        log.emit(Notice("info", "two"))
        log.close()
        path.write_bytes(path.read_bytes()[:-20])
        reader = read_events(path)
        assert [event.text for event in reader if isinstance(event, Notice)] == ["one"]
        assert reader.skipped == 1

    def test_a_restart_loses_nothing_to_the_torn_line(self, tmp_path: Path) -> None:
        path = tmp_path / "e"
        path.write_bytes(b'{"type":"Notice","lev')
        EventLog(path, "me").emit(Notice("info", "after"))
        reader = read_events(path)
        assert [event.text for event in reader if isinstance(event, Notice)] == ["after"]
        assert reader.skipped == 1

    @given(st.binary(max_size=200))
    @settings(max_examples=100, deadline=None)
    def test_rubbish_never_raises(self, tmp_path_factory: pytest.TempPathFactory, rubbish: bytes) -> None:
        path = tmp_path_factory.mktemp("log") / "e"
        path.write_bytes(rubbish)
        list(read_events(path))

    def test_event_of_a_newer_version(self, tmp_path: Path) -> None:
        (tmp_path / "e").write_bytes(b'{"type":"Teleported"}\n{"type":"RunFinished","rounds":1,"reason":"x"}\n')
        reader = read_events(tmp_path / "e")
        assert list(reader) == [RunFinished(1, "x")]
        assert reader.skipped == 1


class TestEmit:
    def test_full_disk_is_said_once_and_raises_nothing(self, tmp_path: Path) -> None:
        heard: list[Event] = []
        log = EventLog(tmp_path / "e", "me", (heard.append,))
        log._file.close()

        class Full:
            closed = False

            def write(self, line: bytes) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        log._file = Full()  # type: ignore[assignment]
        for number in range(3):
            log.emit(PeerJoined("p", "cpu", number))
        notices = [event for event in heard if isinstance(event, Notice)]
        assert len(notices) == 1
        assert "No space left" in notices[0].text
        assert sum(isinstance(event, PeerJoined) for event in heard) == 3
        assert log.dropped == 4  # the notice could not be written either

    def test_text_that_is_not_unicode_is_dropped(self, tmp_path: Path) -> None:
        log = EventLog(tmp_path / "e", "me")
        log.emit(PeerJoined("p", "lone surrogate \udc80", 1))
        log.emit(PeerJoined("p", "cpu", 1))
        assert log.dropped == 1
        assert len(list(read_events(tmp_path / "e"))) == 2  # the notice and the last one

    def test_a_broken_listener_is_said_once_and_the_others_still_hear(self, tmp_path: Path) -> None:
        heard: list[Event] = []

        def broken(event: Event) -> None:
            raise KeyError("oops")

        log = EventLog(tmp_path / "e", "me", (broken, heard.append))
        log.emit(PeerJoined("p", "cpu", 1))
        log.emit(PeerLeft("p", "bored", 1))
        assert [type(event).__name__ for event in heard] == ["PeerJoined", "Notice", "PeerLeft"]

    def test_what_a_listener_emits_comes_after_for_everybody(self, tmp_path: Path) -> None:
        heard: list[Event] = []
        log = EventLog(tmp_path / "e", "me")

        def echo(event: Event) -> None:
            if isinstance(event, PeerJoined):
                log.emit(Notice("info", "echo"))

        log.subscribe(echo)
        log.subscribe(heard.append)
        log.emit(PeerJoined("p", "cpu", 1))
        assert [type(event).__name__ for event in heard] == ["PeerJoined", "Notice"]
        assert list(read_events(tmp_path / "e")) == heard

    def test_unwritable_place_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(PsycheError, match="cannot write the event log"):
            EventLog(tmp_path / "file" / "e", "me")
        with pytest.raises(PsycheError, match="cannot read the event log"):
            read_events(tmp_path / "none")


def test_events_import_nothing_heavy() -> None:
    code = "import sys, psyche.telemetry.events; print({'torch', 'wandb', 'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
