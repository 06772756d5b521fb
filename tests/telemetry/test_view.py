from __future__ import annotations

import io

import pytest
from rich.console import Console

from psyche.protocol.messages import ExclusionReason
from psyche.telemetry.events import (
    Attested,
    AuditEnded,
    AuditStarted,
    Checkpointed,
    Diverged,
    Downloading,
    Event,
    Notice,
    PeerJoined,
    PeerLeft,
    PhaseChanged,
    Rejected,
    Resynchronised,
    RoundStarted,
    RunFinished,
    StepDone,
)
from psyche.telemetry.formatting import amount, sparkline
from psyche.telemetry.lines import EXCLUSIONS
from psyche.telemetry.view import ContributorView, SwarmView, View, live
from psyche.telemetry.view_state import ViewState

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
        pair: list[Event] = [metrics(1, ME, tokens=100), certified(1)]
        state = after(pair if metrics_first else pair[::-1], ME)
        assert (state.rounds_accepted, state.rounds_excluded, state.tokens_accepted) == (1, 0, 100)
        out = certified(2, (OTHER,), excluded=((ME, "late"),))
        pair = [metrics(2, ME, tokens=100), out]
        for event in pair if metrics_first else pair[::-1]:
            state = state.apply(event)
        assert (state.rounds_accepted, state.rounds_excluded, state.tokens_accepted) == (1, 1, 100)
        assert state.uncertified == state.without_metrics == {}

    def test_apply_changes_nothing_in_place(self) -> None:
        first = after(list(story(1)))
        peers = dict(first.peers)
        first.apply(PeerLeft(PEERS[0], "bored", 2))
        assert first.peers == peers

    def test_agreement(self) -> None:
        state = after(list(story(2)))
        assert state.agreeing() == (4, 4)
        assert state.apply(Attested(2, OTHER, root(7))).agreeing() == (3, 4)

    def test_those_who_left_are_forgotten(self) -> None:
        state = ViewState()
        for number in range(1, 51):
            state = state.apply(PeerJoined(f"peer{number}", "cpu", number))
            state = state.apply(PeerLeft(f"peer{number}", "bored", number))
            state = state.apply(RoundStarted(number, PEERS, STEPS))
        assert set(state.peers) == set(PEERS)


class TestPlain:
    def test_swarm(self) -> None:
        events = [
            *list(story(2))[:-1],
            PeerLeft(OTHER, "silent for 15 s", 3),
            certified(3, PEERS[:1], excluded=((ME, ExclusionReason.NOT_HELD),)),
            Rejected(ME, "scale is not finite", "payload"),
            Diverged(OTHER, 3, "7c1f" * 16, "aaaa" * 16),
            AuditEnded(OTHER, 2, "passed", ()),
            AuditEnded(OTHER, 2, "convicted", (ME,)),
            Checkpointed(3, "runs/demo/3"),
            RunFinished(3, "all rounds done"),
        ]
        assert plain(SwarmView(), events) == [
            "run demo: 1.9M parameters, 16 rounds of 20 inner steps, codec int8; "
            "training starts when 4 members are ready",
            "join with: psyche join psyche1abc",
            "held-out loss before training: 8.317",
            "…AAAAAA joined (cpu); 1 member now",
            "…BBBBBB joined (cpu); 2 members now",
            "…CCCCCC joined (cpu); 3 members now",
            "…DDDDDD joined (cpu); 4 members now",
            "round 1/16  started with 4 members",
            "round 1/16  held-out loss 8.300, training loss 8.400, 8192 tok/s, 4 contributions, 23.2 MB sent, "
            "state root 1000…",
            "round 2/16  held-out loss 7.557, training loss 7.657, 8192 tok/s, 4 contributions, 23.2 MB sent, "
            "state root 2000…",
            "…CCCCCC left (silent for 15 s); 3 members now",
            "round 3/16  certified without the contribution of …BBBBBB, its payload reached too few members in time",
            "refused a payload from …BBBBBB: scale is not finite",
            "…CCCCCC holds a different model after round 3 (state root aaaa… instead of 7c1f…)",
            "audit of …CCCCCC's contribution to round 2 passed: re-running the training gave the same contribution",
            "audit of …CCCCCC's contribution to round 2 failed: auditors re-ran the training and got a different "
            "contribution; the node is banned; auditor …BBBBBB reported a false result and is banned",
            "checkpoint after round 3: runs/demo/3",
            "run finished after 3 rounds: all rounds done",
        ]

    def test_contributor(self) -> None:
        events = [
            PhaseChanged(0, "joining"),
            started(),
            Downloading("the model", 3_000_000, 15_200_000),
            RoundStarted(1, PEERS, STEPS),
            PhaseChanged(1, "training"),
            StepDone(1, 1, 1, 8.3, 4e-4, 512.0, time=100.0),
            StepDone(1, 2, 2, 8.2, 4e-4, 512.0, time=101.0),
            StepDone(1, 12, 12, None, 4e-4, 512.0, time=131.0),
            metrics(1, OTHER),
            metrics(1, ME),
            certified(1),
            certified(2, PEERS[:1], excluded=((ME, "a-code-of-a-newer-version"),)),
            certified(3, PEERS[:1], excluded=((ME, ExclusionReason.NO_COMMITMENT),)),
            Rejected(ME, "scale is not finite", "payload"),
            Diverged(ME, 3, "7c1f" * 16, "aaaa" * 16),
            Resynchronised(3, "7c1f" * 16, "the members"),
            Notice("warning", "your upload is slow"),
        ]
        assert plain(ContributorView(ME), events) == [
            "joining: fetching the model and the training data",
            "run demo: 1.9M parameters, 16 rounds of 20 inner steps, codec int8; this node is …BBBBBB",
            "fetching the model: 3.0 MB of 15.2 MB",
            "round 1/16  training",
            "round 1/16  step 1/20, loss 8.300, 512 tok/s",
            "round 1/16  step 12/20, loss –, 512 tok/s",
            "round 1/16  5.8 MB sent, 5.8 MB received",
            "round 1/16  contribution accepted (1 so far); state root 1000…",
            "round 2/16  contribution not accepted: a-code-of-a-newer-version; "
            "kept as error feedback for the next round",
            "round 3/16  contribution not accepted: this node did not finish its steps before the deadline; "
            "kept as error feedback for the next round",
            "this node's payload was refused: scale is not finite",
            "this node's model differs from the certified one after round 3; fetching that",
            "model restored to the state after round 3, fetched from the members",
            "warning: your upload is slow",
        ]

    def test_a_round_of_auditing_is_shown_as_one(self) -> None:
        events: list[Event] = [
            started(),
            AuditStarted(OTHER, 1, 2),
            PhaseChanged(2, "following"),
            certified(2, (OTHER,)),
            PhaseChanged(3, "following"),
            certified(3, (OTHER,)),
        ]
        assert plain(ContributorView(ME), events)[1:] == [
            "round 2/16  auditing …CCCCCC's contribution to round 1: re-running it as a check "
            "(earns the same credit as training)",
            "round 2/16  not training in this round; waiting for the next one",
            "round 2/16  certified; this node audited …CCCCCC instead of training; state root 2000…",
            "round 3/16  not training in this round; waiting for the next one",
            "round 3/16  certified without a contribution of this node; state root 3000…",
        ]
        assert "auditing: re-running another member's training" in drawn(ContributorView(ME), events[:2])

    def test_what_peers_send_cannot_steer_the_terminal(self) -> None:
        hostile = "\x1b[2J\x1b]0;owned\x07\n[bold red]round 9/9[/]" + "x" * 10_000
        events: list[Event] = [PeerJoined(hostile, hostile, 1), Rejected(hostile, hostile, hostile)]
        lines = plain(SwarmView(), events)
        assert len(lines) == 2
        assert all(line.isprintable() and len(line) < 700 for line in lines)
        picture = drawn(SwarmView(), events)
        assert "\x1b" not in picture
        assert "[bold red]" in picture  # shown, not obeyed

    def test_a_donor_is_a_peer_or_words(self) -> None:
        events: list[Event] = [Resynchronised(0, root(0), OTHER), Resynchronised(2, root(2), "the members")]
        assert plain(ContributorView(ME), events) == [
            "model restored to the state before round 1, fetched from …CCCCCC",
            "model restored to the state after round 2, fetched from the members",
        ]

    def test_every_reason_for_an_exclusion_has_a_sentence(self) -> None:
        assert set(EXCLUSIONS) == set(ExclusionReason)
        (line,) = plain(ContributorView(ME), [certified(1, (OTHER,), excluded=((ME, ExclusionReason.NOT_HELD),))])
        assert line == (
            "round 1  contribution not accepted: the payload reached too few members in time; "
            "the upload may be too slow; kept as error feedback for the next round"
        )


class TestDrawn:
    def test_contributor(self) -> None:
        events = [*list(story(3))[:-1], RoundStarted(4, PEERS, STEPS), StepDone(4, 12, 72, 6.1, 4e-4, 512.0)]
        picture = drawn(ContributorView(ME), events)
        for words in ("demo, round 4/16", "step 12 of 20", "3 contributions accepted", "122.9k tokens", "512 tok/s"):
            assert words in picture

    def test_contributor_sees_what_became_of_their_own_work(self) -> None:
        out = certified(2, (OTHER,), excluded=((ME, ExclusionReason.NO_COMMITMENT),))
        rejections = [Rejected(ME, "scale is not finite", "payload"), Rejected(OTHER, "too long", "payload")]
        picture = drawn(ContributorView(ME), [started(), certified(1), out, *rejections])
        for words in (
            "1 contribution accepted, 1 not accepted",
            "round 2: this node did not finish its steps before the deadline",
            "this node's payload was refused: scale is not finite",
            "refused a payload from …CCCCCC: too long",
        ):
            assert words in picture

    def test_swarm(self) -> None:
        picture = drawn(SwarmView(), list(story(3)))
        for words in ("✓ 3000… after round 3, the same on 4 members", "payloads 3.9×", "…DDDDDD", "6.948"):
            assert words in picture

    def test_swarm_says_so_when_roots_differ(self) -> None:
        picture = drawn(SwarmView(), [*story(3), Attested(3, OTHER, root(9))])
        assert "✗ 3000… after round 3, but only 3 of 4 members hold it" in picture

    def test_live_on_a_terminal(self) -> None:
        out = io.StringIO()
        with live(SwarmView(), Console(file=out, force_terminal=True, width=100)) as listener:
            for event in story(2):
                listener(event)
        assert "the same on 4 members" in out.getvalue()

    def test_nothing_known_yet(self) -> None:
        assert "waiting for the round to start" in drawn(ContributorView(ME), [])
        assert "no round is certified yet" in drawn(SwarmView(), [])

    def test_absurd_metrics_stay_short(self) -> None:
        picture = drawn(SwarmView(), [metrics(1, ME, train_loss=1e300, bytes_up=-(2**63), train_seconds=5e-324)])
        assert max(map(len, picture.splitlines())) <= 100


def test_wording() -> None:
    assert [amount(n) for n in (0, 980, 9999, 30_700, 1.85e6, 7.2e10)] == ["0", "980", "9999", "30.7k", "1.9M", "72.0B"]
    assert sparkline([]) == ""
    assert sparkline([5.0]) == "▁"
    assert sparkline([8.0, 1.0]) == "█▁"
