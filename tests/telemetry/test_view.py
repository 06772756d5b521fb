from __future__ import annotations

import io

import pytest
from rich.console import Console

from psyche.telemetry.events import (
    Attested,
    Checkpointed,
    Diverged,
    Downloading,
    Event,
    Notice,
    PeerJoined,
    PeerLeft,
    PhaseChanged,
    Rejected,
    RoundStarted,
    RunFinished,
    StepDone,
)
from psyche.telemetry.view import ContributorView, SwarmView, View, live
from psyche.telemetry.view_state import ViewState
from psyche.telemetry.wording import amount, sparkline

from .story import PEERS, STEPS, certified, metrics, root, started, story

ME, OTHER = PEERS[1], PEERS[2]


def after(events: list[Event], me: str = "") -> ViewState:
    state = ViewState(me=me)
    for event in events:
        state = state.apply(event)
    return state


def plain(view: View, events: list[Event]) -> list[str]:
    out = io.StringIO()
    with live(view, Console(file=out, force_terminal=False)) as listener:
        for event in events:
            listener(event)
    return out.getvalue().splitlines()


def drawn(view: View, events: list[Event]) -> str:
    for event in events:
        view.state = view.state.apply(event)
    console = Console(file=io.StringIO(), width=100, color_system=None, record=True)
    console.print(view.render())
    return console.export_text()


class TestReducer:
    @pytest.mark.parametrize("metrics_first", [True, False])
    def test_work_counts_once_it_is_accepted(self, metrics_first: bool) -> None:
        pair: list[Event] = [metrics(0, ME, tokens=100), certified(0)]
        state = after(pair if metrics_first else pair[::-1], ME)
        assert (state.rounds_accepted, state.rounds_excluded, state.tokens_accepted) == (1, 0, 100)
        out = certified(1, (OTHER,), excluded=((ME, "late"),))
        pair = [metrics(1, ME, tokens=100), out]
        for event in pair if metrics_first else pair[::-1]:
            state = state.apply(event)
        assert (state.rounds_accepted, state.rounds_excluded, state.tokens_accepted) == (1, 1, 100)
        assert state.unjudged == state.verdicts == {}

    def test_apply_changes_nothing_in_place(self) -> None:
        first = after(list(story(1)))
        peers = dict(first.peers)
        first.apply(PeerLeft(PEERS[0], "bored", 1))
        assert first.peers == peers

    def test_agreement(self) -> None:
        state = after(list(story(2)))
        assert state.agreeing() == (4, 4)
        assert state.apply(Attested(1, OTHER, root(7))).agreeing() == (3, 4)

    def test_those_who_left_are_forgotten(self) -> None:
        state = ViewState()
        for number in range(50):
            state = state.apply(PeerJoined(f"peer{number}", "cpu", number))
            state = state.apply(PeerLeft(f"peer{number}", "bored", number))
            state = state.apply(RoundStarted(number, PEERS, STEPS))
        assert set(state.peers) == set(PEERS)


class TestPlain:
    def test_swarm(self) -> None:
        events = [
            *list(story(2))[:-1],
            PeerLeft(OTHER, "silent for 15 s", 2),
            certified(2, PEERS[:1], excluded=((ME, "arrived after the deadline"),)),
            Rejected(ME, "scale is not finite", "payload"),
            Diverged(OTHER, 2, "7c1f" * 16, "aaaa" * 16),
            Checkpointed(2, "runs/demo/2"),
            RunFinished(3, "all rounds done"),
        ]
        assert plain(SwarmView(), events) == [
            "run demo: 1.9M parameters, 16 rounds of 20 steps, codec int8, starts with 4 members"
            "  join with: psyche join psyche1abc",
            "before training  held-out 8.317",
            "…AAAAAA joined (cpu), 1 member now",
            "…BBBBBB joined (cpu), 2 members now",
            "…CCCCCC joined (cpu), 3 members now",
            "…DDDDDD joined (cpu), 4 members now",
            "round 1/16  started with 4 members",
            "round 1/16  held-out 8.300  train 8.400  8192 tok/s  4 members  sent 23.2 MB  state 0000…",
            "round 2/16  held-out 7.557  train 7.657  8192 tok/s  4 members  sent 23.2 MB  state 1000…",
            "…CCCCCC left (silent for 15 s), 3 members now",
            "round 3/16  left out: …BBBBBB (arrived after the deadline)",
            "refused: payload from …BBBBBB (scale is not finite)",
            "diverged: …CCCCCC holds aaaa…, the others 7c1f… after round 3",
            "checkpoint after round 3: runs/demo/2",
            "run finished after 3 rounds: all rounds done",
        ]

    def test_contributor(self) -> None:
        events = [
            started(),
            PhaseChanged(0, "joining"),
            Downloading("the model", 3_000_000, 15_200_000),
            RoundStarted(0, PEERS, STEPS),
            PhaseChanged(0, "training"),
            StepDone(0, 1, 1, 8.3, 4e-4, 512.0, time=100.0),
            StepDone(0, 2, 2, 8.2, 4e-4, 512.0, time=101.0),
            StepDone(0, 12, 12, None, 4e-4, 512.0, time=131.0),
            metrics(0, OTHER),
            metrics(0, ME),
            certified(0),
            certified(1, PEERS[:1], excluded=((ME, "arrived after the deadline"),)),
            Rejected(ME, "scale is not finite", "payload"),
            Notice("warning", "your upload is slow"),
        ]
        assert plain(ContributorView(ME), events) == [
            "run demo: 1.9M parameters, 16 rounds of 20 steps, codec int8; this machine is …BBBBBB",
            "round 1/16  fetching the model as it is now",
            "fetching the model: 3.0 MB of 15.2 MB",
            "round 1/16  training on this machine",
            "round 1/16  step 1/20  loss 8.300  512 tok/s",
            "round 1/16  step 12/20  loss –  512 tok/s",
            "round 1/16  sent 5.8 MB, received 5.8 MB",
            "round 1/16  your work was accepted (1 round so far), state 0000…",
            "round 2/16  your work was not used: arrived after the deadline",
            "your payload was refused: scale is not finite",
            "warning: your upload is slow",
        ]

    def test_what_peers_send_cannot_steer_the_terminal(self) -> None:
        hostile = "\x1b[2J\x1b]0;owned\x07\n[bold red]round 9/9[/]" + "x" * 10_000
        events: list[Event] = [PeerJoined(hostile, hostile, 0), Rejected(hostile, hostile, hostile)]
        lines = plain(SwarmView(), events)
        assert len(lines) == 2
        assert all(line.isprintable() and len(line) < 700 for line in lines)
        picture = drawn(SwarmView(), events)
        assert "\x1b" not in picture
        assert "[bold red]" in picture  # shown, not obeyed


class TestDrawn:
    def test_contributor(self) -> None:
        events = [*list(story(3))[:-1], RoundStarted(3, PEERS, STEPS), StepDone(3, 12, 72, 6.1, 4e-4, 512.0)]
        picture = drawn(ContributorView(ME), events)
        for words in ("demo, round 4/16", "step 12 of 20", "3 rounds accepted", "122.9k tokens", "512 tok/s"):
            assert words in picture

    def test_swarm(self) -> None:
        picture = drawn(SwarmView(), list(story(3)))
        for words in ("✓ state 2000… after round 3, attested by 4 members", "payloads 3.9×", "…DDDDDD", "6.948"):
            assert words in picture

    def test_swarm_says_so_when_roots_differ(self) -> None:
        picture = drawn(SwarmView(), [*story(3), Attested(2, OTHER, root(9))])
        assert "✗ state 2000… after round 3, but only 3 of 4 members hold it" in picture

    def test_live_on_a_terminal(self) -> None:
        out = io.StringIO()
        with live(SwarmView(), Console(file=out, force_terminal=True, width=100)) as listener:
            for event in story(2):
                listener(event)
        assert "attested by 4 members" in out.getvalue()

    def test_nothing_known_yet(self) -> None:
        assert "waiting for enough members" in drawn(ContributorView(ME), [])
        assert "no round is certified yet" in drawn(SwarmView(), [])

    def test_absurd_metrics_stay_short(self) -> None:
        picture = drawn(SwarmView(), [metrics(0, ME, train_loss=1e300, bytes_up=-(2**63), tokens_per_second=1e300)])
        assert max(map(len, picture.splitlines())) <= 100


def test_wording() -> None:
    assert [amount(n) for n in (0, 980, 9999, 30_700, 1.85e6, 7.2e10)] == ["0", "980", "9999", "30.7k", "1.9M", "72.0B"]
    assert sparkline([]) == ""
    assert sparkline([5.0]) == "▁"
    assert sparkline([8.0, 1.0]) == "█▁"
