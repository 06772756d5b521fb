"""The codec bench end to end on small vectors: its rows are right; speeds are not asserted."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from psyche.bench.codec import codec_speed as bench
from psyche.bench.codec import passes, samples
from psyche.bench.codec.codec_speed import Plan, against_rival
from psyche.bench.codec.coders import LR, MOMENTUM, USUAL_CODECS, Coder, psyche_coder
from psyche.bench.codec.passes import PROBE, CodecRow, bytes_per_parameter
from psyche.bench.codec.rival_coders import plain_int8, plain_sgd, plain_topk, rivals
from psyche.bench.codec.samples import default_setting, loss_of, pseudo_gradient
from psyche.bench.convergence.trial import Setting
from psyche.bench.harness.rows import Result, to_json
from psyche.cli.bench_commands import parameters
from psyche.errors import PsycheError
from psyche.numerics.backends.base import TorchBackend
from psyche.numerics.backends.selection import available_backends
from psyche.numerics.outer import OuterSettings, outer_step

FIELDS = {
    "system",
    "codec",
    "backend",
    "pass",
    "gbps",
    "share_of_copy",
    "bits_per_param",
    "rel_l2_gaussian",
    "rel_l2_real",
    "parameters",
    "threads",
    "copy_gbps",
    "seconds",
}


@pytest.fixture(scope="module")
def gradient(setting: Setting) -> torch.Tensor:
    """A real pseudo-gradient of a tiny model."""
    return pseudo_gradient(setting)


@pytest.fixture(scope="module", autouse=True)
def _quick(gradient: torch.Tensor) -> Iterator[None]:
    """One model for all tests, a small Gaussian sample, no more repetitions than the least, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "pseudo_gradient", lambda setting: gradient)
        patch.setattr(samples, "SAMPLE", 1 << 17)
        patch.setattr(passes, "ENOUGH_SECONDS", 0.0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def everything(setting: Setting) -> Result[CodecRow]:
    return bench.measure(Plan(size=PROBE), setting)


def test_every_codec_has_both_passes_and_every_backend_an_outer_step(everything: Result[CodecRow]) -> None:
    ours = [(row.codec, row.backend, row.pass_) for row in everything.rows if row.system == "psyche"]
    names = [backend.name for backend in available_backends()]
    passes = [
        (codec, backend, which) for codec in USUAL_CODECS for backend in names for which in ("encode", "decode_add")
    ]
    assert ours == passes + [(None, backend, "outer") for backend in names]


def test_rivals_are_measured_in_the_same_run(everything: Result[CodecRow]) -> None:
    found = {(row.system, row.codec, row.pass_) for row in everything.rows}
    for codec in ("Uniform8Bit", "Quantile8Bit", "Float16", "ScaledFloat16"):
        assert {("hivemind", codec, "encode"), ("hivemind", codec, "decode_add")} <= found
    for codec in ("int8-256", "topk-64"):
        assert {("pytorch", codec, "encode"), ("pytorch", codec, "decode_add")} <= found
    assert {("pytorch", "SGD", "outer"), ("pytorch", "SGD, fused", "outer")} <= found


def test_rows_are_flat_and_finite_and_omit_what_does_not_apply(everything: Result[CodecRow]) -> None:
    for row in to_json(everything.rows):
        assert set(row) == FIELDS
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, (int, float)))
        assert min(row["gbps"], row["seconds"], row["copy_gbps"], row["parameters"], row["threads"]) > 0
        is_outer = row["pass"] == "outer"
        for field in ("bits_per_param", "rel_l2_gaussian", "rel_l2_real"):
            assert (row[field] is None) == is_outer
        is_sparse = row["codec"] is not None and row["codec"].startswith("topk")
        assert (row["share_of_copy"] is None) == (is_sparse and row["pass"] == "decode_add")


def test_errors_and_sizes_match_the_codecs(everything: Result[CodecRow]) -> None:
    rows = {row.codec: row for row in everything.rows if row.system == "psyche" and row.pass_ == "encode"}
    assert rows["fp32"].rel_l2_real == rows["fp32"].rel_l2_gaussian == 0.0
    errors = [rows[name].rel_l2_gaussian for name in ("fp32", "int8", "int4-32", "int4", "int2", "topk2")]
    assert errors == sorted(errors)  # type: ignore[type-var]
    assert rows["topk2e"].rel_l2_real == rows["topk2"].rel_l2_real
    int8 = rows["int8"]
    assert int8.rel_l2_real is not None
    assert int8.rel_l2_gaussian is not None
    assert 0 < int8.rel_l2_real < 0.02
    assert 0.006 < int8.rel_l2_gaussian < 0.008
    assert int8.bits_per_param == pytest.approx(8.125, abs=5e-3)
    topk2, topk2e = rows["topk2"].bits_per_param, rows["topk2e"].bits_per_param
    assert topk2 is not None
    assert topk2e is not None
    assert topk2e < topk2 < 0.22


def test_bytes_to_move_counted_by_hand() -> None:
    # int8: 1 byte a code, 4 bytes a scale of 256. encode: read base, local, e (12), write e (4) and the payload.
    assert bytes_per_parameter("encode", 8.125, error_feedback=True, sparse=False) == 12 + 4 + 1 + 4 / 256
    # decode_add: read the payload, read and write the sum
    assert bytes_per_parameter("decode_add", 8.125, error_feedback=True, sparse=False) == 8 + 1 + 4 / 256
    # fp32, which has no e: read base and local, write the payload
    assert bytes_per_parameter("encode", 32, error_feedback=False, sparse=False) == 4 + 4 + 4
    # read gradient, θ, m; write θ, m, the local copy
    assert bytes_per_parameter("outer", 0, error_feedback=False, sparse=False) == 3 * 4 + 3 * 4
    assert bytes_per_parameter("decode_add", 0.164, error_feedback=True, sparse=True) is None


def test_the_share_of_a_copy_follows_from_what_was_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes 1 s and a pass that takes 4 s: the pass moves 17.016/8 of the copy's bytes at a quarter."""

    def told(clock: object, work: object, copy: passes.Copy) -> passes.PassTiming:
        return passes.PassTiming(seconds=4.0, copy_gbps=copy.bytes / 1e9, copies=0.25)

    monkeypatch.setattr("psyche.bench.codec.passes.time_beside_copy", told)
    rows = bench.measure(Plan(size=PROBE, codecs=["int8"], backends=["torch"], rivals=False), setting).rows
    encode = rows[0]
    assert encode.share_of_copy == pytest.approx(17.0156 / 8 / 4, rel=1e-3)
    assert encode.gbps == 4 * PROBE / 4.0 / 1e9


def test_filters_keep_what_they_name(setting: Setting) -> None:
    plan = Plan(size=PROBE, codecs=["topk2-256", "int8"], backends=["torch"], rivals=False)
    rows = bench.measure(plan, setting).rows
    assert [(row.codec, row.pass_) for row in rows] == [
        ("int8", "encode"),
        ("int8", "decode_add"),
        ("topk2-256", "encode"),
        ("topk2-256", "decode_add"),
        (None, "outer"),
    ]
    assert {row.backend for row in rows} == {"torch"}


def test_an_unknown_name_is_refused_with_the_known_ones(setting: Setting) -> None:
    with pytest.raises(PsycheError, match="--codec int9: unknown or unavailable here; choose from fp32, int8, "):
        bench.measure(Plan(codecs=["int8", "int9"]), setting)
    with pytest.raises(PsycheError, match=r"--backend abacus: unknown or unavailable here; choose from .*torch"):
        bench.measure(Plan(backends=["abacus"]), setting)
    with pytest.raises(PsycheError, match="--size must be"):
        bench.measure(Plan(size=4096), setting)


@pytest.mark.parametrize("system", ["torchao", "bitsandbytes"])
def test_a_missing_rival_is_left_out_with_a_note(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == system]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, system, None)  # what Python itself does to forbid an import
    coders, absent = rivals()
    assert system not in {coder.system for coder in coders}
    assert {"hivemind", "pytorch"} <= {coder.system for coder in coders}
    (word,) = (line for line in absent if line.startswith(system))
    assert "pip install -e '.[bench]'" in word


def broken(*arguments: object) -> None:
    """Fail as a rival does that does not run on this platform."""
    raise RuntimeError("no kernel for this CPU\nand a page of advice")


def test_a_rival_that_fails_is_left_out_with_its_reason(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Coder] = [replace(plain_int8(), system="broken", codec="int8", decode_add=broken), plain_int8()]
    monkeypatch.setattr(bench, "rivals", lambda: (others, []))
    result = bench.measure(Plan(size=PROBE, codecs=["int8"]), setting)
    assert "broken int8 is left out: it fails here (no kernel for this CPU)" in result.notes
    assert {row.system for row in result.rows} == {"psyche", "pytorch"}


def test_plain_rivals_are_written_fairly(gradient: torch.Tensor) -> None:
    """What they lose is what psyche's counterparts lose: a straw man would lose more."""
    backend = TorchBackend()
    int8, topk = loss_of(plain_int8(), gradient), loss_of(plain_topk(), gradient)
    assert int8.rel_l2 == pytest.approx(loss_of(psyche_coder(backend, "int8"), gradient).rel_l2, rel=1e-3)
    assert topk.rel_l2 <= loss_of(psyche_coder(backend, "topk2"), gradient).rel_l2
    assert topk.bits == 64 * (16 + 16) / 4096


@pytest.mark.parametrize("fused", [False, True])
def test_the_outer_step_of_pytorch_is_the_same_step(fused: bool) -> None:
    theta, momentum, gradient = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)).unbind()
    expected_theta, expected_momentum, local = theta.clone(), momentum.clone(), torch.zeros(4096)
    outer_step(expected_theta, expected_momentum, gradient, OuterSettings(LR, MOMENTUM))
    theta, momentum = theta.clone(), momentum.clone()
    plain_sgd(fused=fused).bind(theta, momentum, gradient, local)()
    torch.testing.assert_close(momentum, expected_momentum)
    torch.testing.assert_close(theta, expected_theta)
    assert torch.equal(local, theta)


def test_a_pseudo_gradient_is_reproducible_and_leaves_the_threads_alone(
    setting: Setting, gradient: torch.Tensor
) -> None:
    threads = torch.get_num_threads()
    assert torch.equal(pseudo_gradient(setting), gradient)
    assert torch.get_num_threads() == threads
    assert gradient.numel() % 4096 == 0
    assert 0 < float(gradient.norm()) < math.inf


def test_the_default_model_has_about_a_million_parameters() -> None:
    from psyche.bench.codec.samples import NODES
    from psyche.bench.convergence.trial import Trial, run_of
    from psyche.tools.costs import costs_of

    run = run_of(default_setting(), Trial(system="diloco", codec="fp32", nodes=NODES, steps=1))
    assert 0.5e6 < costs_of(run).parameters < 2e6


def test_main_writes_the_rows_and_prints_tables_for_132_columns(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "default_setting", lambda: setting)
    path = tmp_path / "new" / "rows.json"
    bench.main(path, Plan(size=PROBE, codecs=["int8"], backends=["torch"]))
    found = json.loads(path.read_text())
    assert {row["system"] for row in found} >= {"psyche", "hivemind", "pytorch"}
    assert all(set(row) == FIELDS for row in found)
    captured = capsys.readouterr()
    assert "int8 (torch): encode " in captured.out
    assert "× hivemind Uniform8Bit" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 132
    assert "psyche int8 (torch)" in captured.err


def test_comparison_with_hivemind_takes_the_fastest_backend() -> None:
    def row(system: str, codec: str, backend: str, which: str, gbps: float) -> CodecRow:
        return CodecRow(
            system=system,
            codec=codec,
            backend=backend,
            pass_=which,  # type: ignore[arg-type]
            gbps=gbps,
            share_of_copy=None,
            bits_per_param=8.0,
            rel_l2_gaussian=0.0,
            rel_l2_real=0.0,
            parameters=1,
            threads=1,
            copy_gbps=1.0,
            seconds=1.0,
        )

    ours = [
        row("psyche", "int8", backend, which, gbps)
        for backend, gbps in (("native", 5.0), ("torch", 0.1))
        for which in ("encode", "decode_add")
    ]
    rival = [row("hivemind", "Uniform8Bit", "cpu", which, 0.25) for which in ("encode", "decode_add")]
    assert against_rival(ours + rival) == ["int8 (native): encode 20.0×, decode_add 20.0× hivemind Uniform8Bit"]
    assert against_rival(ours) == []


def test_tables_without_rivals_can_be_shown(setting: Setting) -> None:
    result = bench.measure(Plan(size=PROBE, codecs=["fp32"], rivals=False), setting)
    console = Console(file=io.StringIO(), width=132)
    bench.show(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "fp32" in text
    assert "Outer step" in text
    assert "hivemind Uniform8Bit" not in text


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("4097", 8192), ("64M", 64_000_000), ("16Mi", 1 << 24), ("1G", 1_000_001_536), ("100k", 102_400)],
)
def test_sizes_are_parsed(text: str, count: int) -> None:
    assert parameters(text) == count


@pytest.mark.parametrize("text", ["", "M", "1.5M", "-4096", "16 Mi", "12ki", "many"])
def test_malformed_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="number of parameters"):
        parameters(text)
