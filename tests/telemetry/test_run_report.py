from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from psyche.errors import PsycheError
from psyche.telemetry.events import Attested, Event, GenesisJudged, RoundStarted
from psyche.telemetry.monitor import summarise
from psyche.telemetry.run_report import attestations, build_report, ddp_bytes, plot_loss, render_summary

from .story import LIMITS, PARAMETERS, PAYLOAD, PEERS, RUN, STEPS, certified, metrics, root, started, story


def test_ring_all_reduce() -> None:
    assert ddp_bytes(1, 1000, 10) == 0
    assert ddp_bytes(0, 1000, 10) == 0
    assert ddp_bytes(2, 1000, 1) == 4000  # two members: each sends half of the vector twice
    assert ddp_bytes(4, 1000, 10) == 60_000


class TestReport:
    def test_numbers(self) -> None:
        report = build_report(story(16))
        assert (report["peers"], report["members"]) == (4, 4)
        assert report["rounds"] == 16
        assert report["initial_loss"] == pytest.approx(8.317)
        assert report["final_loss"] < 4.5
        assert report["tokens"] == 16 * 4 * STEPS * RUN.tokens_per_step
        assert report["bytes_sent_per_peer"] == 16 * 3 * PAYLOAD
        assert report["ddp_bytes_per_peer"] == 2 * 3 * 4 * PARAMETERS * STEPS * 16 // 4
        assert report["ddp_ratio"] == pytest.approx(report["ddp_bytes_per_peer"] / report["bytes_sent_per_peer"])
        assert report["payload_ratio"] == pytest.approx(4 * PARAMETERS / PAYLOAD)
        assert report["bytes_per_token"] == pytest.approx(4 * report["bytes_sent_per_peer"] / report["tokens"])
        assert report["compute_utilisation"] == pytest.approx(0.9)
        assert report["state_roots"] == [root(number) for number in range(1, 17)]
        assert report["state_roots_agree"] is True
        assert report["seconds"] == pytest.approx(321)
        assert json.loads(json.dumps(report)) == report

    def test_ddp_follows_members_and_steps_of_each_round(self) -> None:
        rounds: list[Event] = [RoundStarted(1, PEERS, 10), certified(1), certified(2, PEERS[:2])]
        report = build_report([started(), *rounds])
        assert report["ddp_bytes_per_peer"] == ddp_bytes(4, PARAMETERS, 10) + ddp_bytes(2, PARAMETERS, STEPS)

    def test_peers_are_counted_once_and_bytes_are_a_members(self) -> None:
        members = [PEERS[:2], PEERS[1:3], PEERS[:2]]
        events: list[Event] = [started()]
        for number, accepted in enumerate(members, start=1):
            done = certified(number, accepted)
            reports = [metrics(number, peer) for peer in accepted[: 1 if number == 2 else 2]]  # one never reports
            events += [done, summarise(number, reports, parameters=PARAMETERS, limits=LIMITS, certified=done)]
        report = build_report(events)
        assert (report["peers"], report["members"]) == (3, 2)
        assert report["bytes_sent_per_peer"] == 3 * 3 * PAYLOAD

    def test_one_other_root_is_no_agreement(self) -> None:
        events = list(story(3))
        assert build_report([*events, Attested(2, PEERS[0], root(9))])["state_roots_agree"] is False
        lacking = {number: roots for number, roots in attestations(events).items() if number != 1}
        assert build_report(events, lacking)["state_roots_agree"] is False
        assert build_report(events, {})["state_roots_agree"] is False

    def test_a_repeated_round_counts_once(self) -> None:
        events = list(story(3))
        again = [msgspec.structs.replace(e) for e in events if getattr(e, "round", 0) == 2]
        assert build_report([*events, *again])["rounds"] == 3

    def test_a_run_that_ended_before_its_first_round(self) -> None:
        report = build_report([started()])
        assert (report["rounds"], report["tokens"], report["final_loss"]) == (0, 0, None)
        assert report["state_roots_agree"] is False
        Console(quiet=True).print(render_summary(report))

    def test_no_genesis(self) -> None:
        report = build_report(event for event in story(3) if not isinstance(event, GenesisJudged))
        assert report["initial_loss"] == pytest.approx(8.3)

    def test_no_run(self) -> None:
        with pytest.raises(PsycheError, match="holds no run"):
            build_report([])


def test_summary_says_what_matters() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_summary(build_report(story(16))))
    text = console.export_text()
    for words in ("8.317 → 4.404", "92.6 MB", "3.6 GB", "39× less", "3.9×", "✓ all nodes"):
        assert words in text


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot_loss(story(16), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    plot_loss([started()], tmp_path / "empty.png")
