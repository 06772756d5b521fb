"""The exchange bench: its arithmetic, and the rows of one small run."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import msgspec
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from psyche.bench.exchange.averaging_systems import (
    RIVALS,
    System,
    all_reduce_seconds,
    gather_seconds,
    own_systems,
    sharded_seconds,
)
from psyche.bench.exchange.exchange_speed import ExchangeRow, Plan, against_rivals, measure, show
from psyche.bench.exchange.peer_group import PeerGroup
from psyche.bench.exchange.peer_process import PeerSpec
from psyche.bench.exchange.vectors import BLOCK, SCALE, RelativeError, blocks, checked, draw, true_mean
from psyche.bench.harness.resource_usage import parse_sockets, traffic, tree
from psyche.bench.harness.rows import Result, table, to_json
from psyche.bench.harness.shaped_links import Link, on_loopback
from psyche.cli.bench_commands import app
from psyche.cli.bench_commands import rate as rate_option
from psyche.errors import PsycheError
from tests.processes.swarm import alive

FIELDS = set(ExchangeRow.__struct_fields__)
MBIT = 10**6
EQUAL = [Link(100 * MBIT, 100 * MBIT)] * 4


# -------------------------------------------------------------------------------------- arithmetic


def test_gather_takes_what_all_others_payloads_take_to_come_down() -> None:
    assert gather_seconds(10**6, EQUAL, range(4)) == pytest.approx(8 * 3 * 10**6 / 1e8)


def test_gather_on_thin_uplinks_takes_what_all_uplinks_together_take() -> None:
    links = [Link(20 * MBIT, 100 * MBIT)] * 4
    assert gather_seconds(10**6, links, range(4)) == pytest.approx(8 * 3 * 10**6 / 2e7)


def test_a_slow_peer_that_is_not_waited_for_costs_only_its_own_payloads_way_up() -> None:
    links = [*EQUAL[:3], Link(10 * MBIT, 10 * MBIT)]
    assert gather_seconds(10**6, links, range(4)) == pytest.approx(8 * 3 * 10**6 / 1e7)
    assert gather_seconds(10**6, links, range(3)) == pytest.approx(8 * 10**6 / 1e7)


def test_sharded_takes_the_reducers_shares_and_the_results() -> None:
    moved = (2 * 3 * 4000 + 2 * 1000) / 4
    assert sharded_seconds(4000, 1000, 2, EQUAL) == pytest.approx(8 * moved / 1e8)


def test_sharded_hardly_grows_with_the_peers() -> None:
    few, many = (sharded_seconds(4000, 4000, 2, [EQUAL[0]] * count) for count in (4, 64))
    assert many < 1.5 * few


def test_an_all_reduce_moves_twice_the_vector_less_a_share() -> None:
    assert all_reduce_seconds(4 * 10**6, EQUAL) == pytest.approx(8 * 6 * 10**6 / 1e8)


def test_on_unshaped_links_nothing_is_ideal() -> None:
    for system in [*RIVALS, *own_systems(["int8"], ["gather", "sharded"], 2)]:
        assert system.ideal_seconds(4096, 4096, [Link()] * 4, range(4)) is None


def test_links_follow_the_options() -> None:
    assert not Plan(peers=2, parameters=4096).shaped
    plan = Plan(peers=3, parameters=4096, rate=100, up=20, slow=10)
    assert plan.links == [Link(20, 100), Link(20, 100), Link(10, 10)]
    assert plan.served == range(2)
    assert Plan(peers=3, parameters=4096, rate=100).served == range(3)


def test_vectors_are_the_same_wherever_they_are_drawn_and_differ_between_peers() -> None:
    block = slice(BLOCK, 2 * BLOCK)
    assert torch.equal(draw(1, block), draw(1, block))
    assert not torch.equal(draw(1, block), draw(2, block))
    assert not torch.equal(draw(1, block), draw(1, slice(0, BLOCK)))
    assert float(draw(3, block).std()) == pytest.approx(SCALE, rel=0.02)


@pytest.mark.parametrize("count", [4096, BLOCK, BLOCK + 4096, 100 * BLOCK])
def test_blocks_cover_a_vector_and_the_first_and_last_are_checked(count: int) -> None:
    every, some = blocks(count), list(checked(count))
    assert [block.start for block in every[1:]] == [block.stop for block in every[:-1]]
    assert (some[0], some[-1], every[-1].stop) == (every[0], every[-1], count)
    assert len(some) == len({block.start for block in some}) <= 8


def test_an_error_is_relative_to_the_true_mean() -> None:
    block, error = slice(0, 4096), RelativeError()
    truth = true_mean(range(3), block)
    error.add((1.01 * truth).float(), truth)
    assert error.value == pytest.approx(0.01, rel=1e-4)


def test_bytes_are_those_of_a_process_and_of_sockets_that_are_still_there() -> None:
    line = 'ESTAB 0 0 10.0.0.1:1 10.0.0.2:{port} users:(("p2pd",pid={pid},fd=4)) cubic bytes_sent:9 bytes_acked:{up}'
    text = "\n".join(
        line.format(port=port, pid=pid, up=up) + f" bytes_received:{down}"
        for port, pid, up, down in [(2, 7, 100, 50), (3, 8, 999, 999), (4, 9, 30, 0)]
    )
    before, after = parse_sockets(text, frozenset({7})), parse_sockets(text, frozenset({7, 9}))
    assert before == {"10.0.0.1:1 10.0.0.2:2": (100, 50)}
    assert traffic(before, after) == (30, 0)
    assert traffic(None, after) is None


def test_rates_on_the_command_line_are_checked() -> None:
    assert rate_option("20mbit") == 20 * MBIT
    with pytest.raises(typer.BadParameter, match="not a rate"):
        rate_option("20")


@pytest.mark.parametrize("option", [("--codec", "zip"), ("--exchange", "shouting")])
def test_unknown_names_are_refused_with_those_that_exist(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["exchange", "--no-rivals", *option])
    assert isinstance(result.exception, PsycheError)
    assert option[1] in str(result.exception)


def test_a_plan_that_exceeds_memory_is_refused_before_processes_start() -> None:
    with pytest.raises(PsycheError, match="name fewer codecs and exchanges, or lower --peers or --params"):
        measure(Plan(peers=2, parameters=1 << 44))


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def tiny() -> tuple[Plan, Result[ExchangeRow]]:
    plan = Plan(peers=2, parameters=1 << 20, repeats=2, rivals=False)
    return plan, measure(plan)


@pytest.mark.slow
def test_a_row_describes_the_whole_exchange(tiny: tuple[Plan, Result[ExchangeRow]]) -> None:
    (row,) = tiny[1].rows
    assert (row.system, row.exchange, row.codec, row.repeats) == ("psyche", "gather", "int8", 2)
    assert (row.averaged, row.payload_bytes > 1 << 20) == (2, True)
    assert row.relative_error < 0.02, "both contributions are in the mean, in 8 bits"
    parts = [row.encode_seconds, row.wire_seconds, row.apply_seconds]
    assert all(part is not None and 0 < part <= row.seconds for part in parts)
    assert row.rate_mbit is row.ideal_seconds is row.share_of_line is None
    assert row.cpu_seconds >= 0
    assert row.peak_rss_mb > row.rss_growth_mb >= 0
    if row.bytes_up is not None and row.bytes_down is not None:
        assert row.bytes_up == pytest.approx(row.payload_bytes, rel=0.1)
        assert row.bytes_down == pytest.approx(row.payload_bytes, rel=0.1)


@pytest.mark.slow
def test_json_rows_are_flat_and_finite(tiny: tuple[Plan, Result[ExchangeRow]]) -> None:
    for row in to_json(tiny[1].rows):
        assert set(row) == FIELDS
        assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


@pytest.mark.slow
def test_the_preface_says_what_was_measured(tiny: tuple[Plan, Result[ExchangeRow]]) -> None:
    screen = io.StringIO()
    show(*tiny, Console(file=screen, width=150))
    assert "2 peers, 1.0M parameters, on the loopback interface, not shaped" in screen.getvalue()
    assert "2 of 2" in screen.getvalue()


@pytest.mark.slow
def test_every_ratio_is_against_a_rival_of_the_same_run(tiny: tuple[Plan, Result[ExchangeRow]]) -> None:
    (own,) = tiny[1].rows
    assert against_rivals([own]) == []
    rival = msgspec.structs.replace(own, system="gloo", exchange="ring", codec="fp32", seconds=3 * own.seconds)
    assert against_rivals([own, rival]) == ["psyche gather int8: as fast as 3.0× gloo fp32"]
    assert table("Exchanges", [own, rival]).row_count == 2


@pytest.mark.slow
def test_a_process_that_fails_is_named_and_none_is_left(tmp_path: Path) -> None:
    spec = PeerSpec(
        system="psyche",
        number=0,
        peers=2,
        parameters=4096,
        address="",
        device="",
        folder=str(tmp_path),
        threads=1,
        codec="no such codec",
        exchange="gather",
        reducers=2,
    )
    *places, lead = on_loopback(3)
    before = set(tree(os.getpid()))
    with pytest.raises(PsycheError, match=r"process -1 failed: .*no such codec"):
        PeerGroup(spec, places, lead)
    assert not [pid for pid in set(tree(os.getpid())) - before if alive(pid)]


def test_systems_are_told_apart_by_what_they_do() -> None:
    names = [str(system) for system in [*own_systems(["int8", "topk2"], ["gather", "sharded"], 3), *RIVALS]]
    assert len(set(names)) == len(names)
    assert System("psyche", "sharded", "int8", 3) in own_systems(["int8"], ["sharded"], 3)
