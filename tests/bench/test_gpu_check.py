"""scripts/gpu_check.sh: everything but the launch on a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from psyche.bench.gpu import __main__ as command
from psyche.bench.gpu import check, environment, training
from psyche.bench.gpu.environment import Budget
from psyche.bench.gpu.equality import OUTER, Difference, differences
from psyche.bench.gpu.machine import Emulated
from psyche.bench.gpu.report import Report
from psyche.bench.gpu.timing import TIMED, Timing, timings
from psyche.numerics.backends import emulated
from psyche.numerics.backends.cuda_compile import kernels_directory
from psyche.numerics.backends.emulated import EmulatedLauncher
from psyche.numerics.codecs.registry import CODECS
from tests.bench.stubs import Clock
from tests.bench.test_gpu_training import speed

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def machine() -> Emulated:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler to build the emulator with")
    return Emulated()


def content(folder: Path) -> Any:
    return json.loads((folder / "gpu_check.json").read_text())


def replaced(monkeypatch: pytest.MonkeyPatch, compare: Callable[[str, int], list[Difference]]) -> None:
    """Have the check take ``compare`` for the comparison with the definition, and find the kernels built."""

    def found(machine: object, name: str, count: int) -> Iterator[Difference]:
        yield from compare(name, count)

    monkeypatch.setattr(check, "differences", found)
    monkeypatch.setattr(check.Check, "_build", lambda self: SimpleNamespace(chunks=(1, 9), timed=False))
    monkeypatch.setattr(check, "timings", lambda machine, name: iter([_timing(name, 0.9)]))


def test_the_whole_check_writes_its_tables(
    machine: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Emulated, "chunks", (1,))
    assert command.main(["--emulate", "--out", str(tmp_path)]) == 0
    assert "Every bit is as defined." in capsys.readouterr().out
    found = content(tmp_path)
    assert found["differences"] == {}
    assert found["running"] is None
    assert not found["failures"]
    assert set(found["compared"]) == {*CODECS, OUTER}
    assert {(row["codec"], row["pass"]) for row in found["rows"]} >= {
        ("int8", "encode"), ("topk2", "decode_add"), ("int4", "check"), (OUTER, "step"),
    }  # fmt: skip
    assert all(row["bits"] == "equal" and row["milliseconds"] > 0 for row in found["rows"])
    assert [row["way"] for row in found["training"]] == [training.ENGINE, training.LOOP]
    assert found["left_out"][-1] == "training with torch.compile: only on a GPU"
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| topk2-512 | 4,096 | equal |" in table
    assert "| topk2-512 | encode | equal |" in table
    assert f"- torch: {torch.__version__}" in table


# ------------------------------------------------------------------- what is known when it ends early


def test_results_are_on_disk_as_they_come_and_ctrl_c_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def compare(name: str, count: int) -> list[Difference]:
        found = content(tmp_path)
        seen.append((found["running"], list(found["compared"])))
        if name == "int4":
            raise KeyboardInterrupt
        return []

    replaced(monkeypatch, compare)
    assert command.main(["--emulate", "--out", str(tmp_path)]) == 130
    assert seen == [
        ("fp32, 4,096 elements", []),
        ("int8, 4,096 elements", ["fp32"]),
        ("int4, 4,096 elements", ["fp32", "int8"]),
    ]
    assert "interrupted during int4, 4,096 elements" in capsys.readouterr().out
    assert content(tmp_path)["compared"] == {"fp32": [4096], "int8": [4096]}
    table = (tmp_path / "gpu_check.md").read_text()
    assert "**Not finished: interrupted during int4, 4,096 elements.**" in table
    assert "No difference in 2 of" in table


def test_each_part_ends_when_its_share_of_the_time_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def slow(name: str, count: int) -> list[Difference]:
        clock.now += 100
        return []

    replaced(monkeypatch, slow)
    monkeypatch.setattr(check, "speeds", lambda *_: iter([speed()]))
    assert command.main(["--emulate", "--minutes", "8", "--out", str(tmp_path)], clock) == 2
    found = content(tmp_path)
    assert list(found["compared"]) == list(CODECS)[:3], "half of 480 s were used after three of 100 s"
    left_out = {line.split(":")[0]: line for line in found["left_out"]}
    assert "the time was up before int4-32, 4,096 elements; int2" in left_out["kernels against the definition"]
    assert f"{OUTER}, 36,864 elements" in left_out["kernels against the definition"]
    assert [row["codec"] for row in found["rows"]] == list(TIMED), "300 s of the 312 until times end"
    assert {row["bits"] for row in found["rows"]} == {"equal", "not compared"}
    assert len(found["training"]) == 1


def test_nothing_is_begun_that_there_is_no_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda *_: pytest.fail("no time is left"))
    clock = Clock()
    report = Report(tmp_path, Budget(60, clock), timed=True)
    one = check.Check(report, report._budget, emulate=True, elements=4096)
    clock.now += 61
    one.run(environment.EVERYTHING)
    assert [line.split(":")[0] for line in report.left_out] == [
        *("kernels against the definition", "kernel times", "training with torch.compile", "training speed")
    ]


def test_when_all_the_time_is_used_the_process_ends_with_what_it_has(tmp_path: Path) -> None:
    report = Report(tmp_path, Budget(60, Clock()), timed=True)
    report.expected, report.compared, report.running = {"int8": 2}, {"int8": [4096]}, "int8, 36,864 elements"
    codes: list[int] = []
    command._give_up(report, codes.append)
    report.differences["int8"] = [Difference("the payload", "ties", 4096)]
    command._give_up(report, codes.append)
    assert codes == [2, 1]
    assert content(tmp_path)["stopped"] == "the time was up during int8, 36,864 elements"


@pytest.mark.parametrize(("left", "compiled"), [(91.0, True), (89.0, False)])
def test_on_a_gpu_both_models_are_trained_and_compiled_only_where_time_is_left(
    left: float, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, trained = Clock(), []

    def trains(workload: training.Workload, *_: object) -> Iterator[training.Speed]:
        trained.append((workload.name, training.ENGINE))
        clock.now = 1000 + 480 - left
        yield speed()

    def compiles(workload: training.Workload, device: torch.device, _: object, micro_batch: int) -> training.Speed:
        assert (device, micro_batch) == (torch.device("cuda:0"), 4)
        trained.append((workload.name, training.COMPILED))
        return speed(training.COMPILED)

    monkeypatch.setattr(check, "speeds", trains)
    monkeypatch.setattr(check, "compiled_speed", compiles)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report = Report(tmp_path, Budget(480, clock), timed=True)
    check.Check(report, report._budget, emulate=False, elements=4096).run(["training"])
    expected = [("30M", training.ENGINE), ("150M", training.ENGINE), ("150M", training.COMPILED)]
    assert trained == expected[: 2 + compiled]
    assert report.left_out == ([] if compiled else ["training speed: the time was up before training, 150M, compiled"])
    assert not report.failures


def test_a_gpu_that_a_kernel_has_broken_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    report = Report(tmp_path, Budget(480, Clock()), timed=True)
    check.Check(report, report._budget, emulate=False, elements=4096).run(["training"])
    assert "illegal memory access" in report.left_out[0]
    assert "run again with --only training" in report.left_out[0]


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(name: str, count: int) -> list[Difference]:
        if name == "int8":
            raise RuntimeError("an illegal memory access")
        return []

    replaced(monkeypatch, compare)
    assert command.main(["--emulate", "--only", "kernels", "--out", str(tmp_path)]) == 1
    found = content(tmp_path)
    assert found["failures"][0] == "int8, 4,096 elements: RuntimeError: an illegal memory access"
    assert set(found["compared"]) == {*CODECS, OUTER} - {"int8"}
    assert found["rows"] == found["training"] == []


# ------------------------------------------------------------------------------- what there may not be


def test_missing_packages_are_named_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced(monkeypatch, lambda *_: [])
    monkeypatch.setattr(environment, "_installed", lambda module: module not in ("transformers", "cuda.core"))
    assert command.main(["--emulate", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "gpu_check: transformers is not installed; left out without it: training speed" in said
    assert "gpu_check: cuda.core is not installed; left out without it: compiling the kernels for a GPU" in said
    assert "python -m pip install 'cuda-core>=1.2' 'transformers' 'nvidia-cuda-nvrtc>=13,<14'" in said
    found = content(tmp_path)
    assert found["left_out"] == [line.removeprefix("gpu_check: ") for line in said.splitlines()]
    assert found["rows"]
    assert not found["training"]


def test_on_a_gpu_training_needs_no_kernels() -> None:
    assert environment.parts_without(["cuda.core"], emulate=False) == {"kernels", "times"}
    assert environment.parts_without(["cuda.core"], emulate=True) == set()
    assert environment.parts_without(["torch"], emulate=True) == set(environment.EVERYTHING)


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "_installed", lambda module: module != "torch")
    assert command.main([]) == 2
    assert "torch is not installed" in capsys.readouterr().err


def test_what_it_says_to_install_is_what_the_package_needs() -> None:
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cuda"]
    assert {environment.NEEDED["cuda.core"][0], environment.NEEDED["cuda.bindings"][0]} <= set(wanted)
    assert environment.NVRTC in wanted


def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "torch is a CPU build: install" in capsys.readouterr().err
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "install or start NVIDIA's driver" in capsys.readouterr().err
    assert content(tmp_path)["left_out"][-1].startswith("everything: torch sees no GPU")


def test_the_script_installs_nothing_and_runs_from_the_checkout() -> None:
    script = REPOSITORY / "scripts" / "gpu_check.sh"
    done = subprocess.run([script, "--only", "times"], env={"PYTHON": "echo", "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, check=True, cwd="/")  # fmt: skip
    assert done.stdout == "-m psyche.bench.gpu --only times\n"


ONLY = {"torch", "torchgen", "functorch", "numpy", "safetensors", "transformers", "cuda", "nvidia", "psyche"}
THEIRS = {"tokenizers", "huggingface_hub", "hf_xet", "httpx", "httpcore", "httpx2", "httpcore2", "anyio", "sniffio"}
THEIRS |= {
    "h11",
    "idna",
    "certifi",
    "truststore",
    "click",
    "requests",
    "urllib3",
    "charset_normalizer",
    "tqdm",
    "regex",
}
THEIRS |= {"yaml", "_yaml", "packaging", "filelock", "fsspec", "typing_extensions", "sympy", "mpmath", "networkx"}
THEIRS |= {"jinja2", "markupsafe", "setuptools"}
"""What torch and transformers import."""

RESTRICTED = """
import importlib, pkgutil, sys

class Only:
    def __init__(self, allowed, finders):
        self.allowed, self.finders = allowed, finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.allowed:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)
    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)

sys.meta_path[:] = [Only({*sys.stdlib_module_names, *sys.argv[2:]}, list(sys.meta_path))]
import psyche.numerics
for module in pkgutil.walk_packages(psyche.numerics.__path__, "psyche.numerics."):
    if module.name != "psyche.numerics.backends.native":  # needs psyche's compiled module
        importlib.import_module(module.name)
from psyche.bench.gpu.__main__ import main
assert not {"blake3", "msgspec", "pydantic", "hivemind"} & set(sys.modules)
sys.exit(main(["--emulate", "--only", "training", "--out", sys.argv[1]]))
"""


def test_it_runs_with_only_torch_transformers_and_cuda_core(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", RESTRICTED, str(tmp_path), *sorted(ONLY | THEIRS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert len(content(tmp_path)["training"]) == 2


def test_the_card_and_its_driver_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**37))
    monkeypatch.setattr(
        environment, "_output", lambda *words: "NVIDIA H200, 580.1" if words[0] == "nvidia-smi" else None
    )
    found = environment.describe(torch.device("cuda"))
    assert found["compute capability"] == "9.0"
    assert found["memory"] == "64.0 GiB free of 128.0"
    assert found["driver, power limit, clocks"] == "NVIDIA H200, 580.1"
    assert found["commit"] == "unknown: no git checkout"


# -------------------------------------------------------------------------------------------- kernels


def test_a_kernel_that_rounds_otherwise_is_reported(machine: Emulated, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(kernels_directory(), kernels)
    header = kernels / "include" / "psyche_numerics.h"
    right = "{ return add(sum, mul(value, weight)); }"
    assert right in header.read_text()
    header.write_text(header.read_text().replace(right, "{ return __builtin_fmaf(value, weight, sum); }"))
    faulty = Emulated()
    faulty.launcher = EmulatedLauncher(emulated.build(kernels, cache=tmp_path))
    found = list(differences(faulty, "int8", 4096))
    assert {difference.what for difference in found} >= {"the decoded sum"}
    assert "the payload" not in {difference.what for difference in found}
    assert not list(differences(faulty, OUTER, 4096))
    report = _report(tmp_path, _timing("int8", 0.9))
    report.compared, report.differences = {"int8": [4096]}, {"int8": found}
    table = report.save()
    assert "| int8 | encode | DIFFERENT |" in table
    assert "int8: the decoded sum differs on normal values, 4096 elements" in table
    assert command._status(report, ["kernels"]) == 1


def _timing(codec: str, share: float) -> Timing:
    return Timing(codec, "encode", 4096, 4096 * 17, seconds=1.0, copy_seconds=share)


def _report(folder: Path, *timed: Timing) -> Report:
    report = Report(folder, Budget(480, Clock()), timed=True)
    report.timings += timed
    return report


def test_kernels_slower_than_the_bar_are_marked(tmp_path: Path) -> None:
    table = _report(tmp_path, _timing("int8", 0.84), _timing("int4", 0.86)).save()
    assert re.search(r"int8 .* 84% \(below 85%\) \|", table)
    assert re.search(r"int4 .* 86% \|", table)


def test_bytes_moved_are_those_of_the_formats(machine: Emulated) -> None:
    """Per parameter, as derived: encode 16 + b/8 + 4/B, decode and add 8 + b/8 + 4/B, outer step 24."""
    found = [timing for name in TIMED for timing in timings(machine, name)]
    moved = {(timing.codec, timing.step): timing.bytes_moved / timing.elements for timing in found}
    header = 32 / machine.elements
    assert moved["int8", "encode"] == pytest.approx(17 + 4 / 256 + header)
    assert moved["int8", "decode_add"] == pytest.approx(9 + 4 / 256 + header)
    assert moved["int4", "encode"] == pytest.approx(16.5 + 2 / 128 + header)
    assert moved["int2", "decode_add"] == pytest.approx(8.25 + 4 / 256 + header)
    assert moved[OUTER, "step"] == 24
