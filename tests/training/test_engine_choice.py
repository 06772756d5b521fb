"""Which engine trains: decided by what is there and what was asked for, and said in one sentence."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest

from psyche.config import BpeTokenizer, Data, DeepSpeed, Node, Run
from psyche.errors import ConfigError, PsycheError
from psyche.training import engine_choice as choice_module
from psyche.training.engine_choice import EngineChoice, Hardware, decide_engine, make_engine
from psyche.training.zero.zero_memory import OVERHEAD, STAGES, Stage, least_stage, rank_bytes, unallocated_bytes
from tests.training.tiny_models import SPEC

ELEMENTS = 1 << 30
BIG = 1 << 40


def machine(gpus: int, *, installed: bool = True, free: int = BIG) -> Hardware:
    return Hardware(installed, free, (free,) * gpus)


def decided(there: int, /, *, installed: bool = True, **node: object) -> EngineChoice:
    return decide_engine(Node(**node), ELEMENTS, machine(there, installed=installed))  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_device_is_trained_on_by_torch(gpus: int) -> None:
    choice = decided(gpus)
    assert (choice.devices, choice.stage, choice.remedy) == (("cuda:0" if gpus else "cpu",), None, "")
    assert "one device" in choice.reason


def test_several_gpus_are_shared_by_deepspeed() -> None:
    choice = decided(4)
    assert choice.devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert choice.stage == 1
    assert choice.reason.startswith("DeepSpeedEngine on 4 GPUs, ZeRO 1")


def test_without_deepspeed_the_first_gpu_trains_and_the_mend_is_said() -> None:
    choice = decided(4, installed=False)
    assert (choice.devices, choice.stage) == (("cuda:0",), None)
    assert "pip install 'psyche[deepspeed]'" in choice.remedy


@pytest.mark.parametrize("node", [{"gpus": "all"}, {"gpus": "0,2"}, {"deepspeed": DeepSpeed()}])
def test_but_who_asked_for_several_is_not_given_one(node: dict[str, object]) -> None:
    with pytest.raises(PsycheError, match="pip install"):
        decided(4, installed=False, **node)


@pytest.mark.parametrize(
    ("gpus", "devices"),
    [("all", "0123"), ("2", "01"), ("0,2", "02"), ("3,1", "31"), ("1", "0"), (2, "01"), ("auto", "0123")],
)
def test_gpus_are_counted_or_named(gpus: str | int, devices: str) -> None:
    assert decided(4, gpus=gpus).devices == tuple(f"cuda:{number}" for number in devices)


def test_one_named_device_is_that_device() -> None:
    assert decided(4, device="cuda:2").devices == ("cuda:2",)
    assert decided(4, device="cuda").devices == ("cuda:0",)
    assert decided(4, device="cpu").devices == ("cpu",)


@pytest.mark.parametrize("node", [{"gpus": "5"}, {"gpus": "0,9"}, {"device": "cuda:4"}])
def test_a_gpu_that_is_not_there_is_refused(node: dict[str, object]) -> None:
    with pytest.raises(PsycheError, match="torch sees 4 CUDA devices"):
        decided(4, **node)
    with pytest.raises(PsycheError, match="torch sees 0 CUDA devices"):
        decided(0, gpus="all")


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"node\.gpus"):
        decided(4, device="cuda:1", gpus="2")
    with pytest.raises(ConfigError, match=r"node\.deepspeed\.ranks"):
        decide_engine(Node(deepspeed=DeepSpeed(ranks=2)), ELEMENTS, machine(4))


@pytest.mark.parametrize("text", ["", "0", "none", "0,", "1,x", "-1"])
def test_gpus_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="gpus"):
        Node(gpus=text)


def test_a_cpu_has_as_many_ranks_as_it_is_told() -> None:
    choice = decide_engine(Node(device="cpu", deepspeed=DeepSpeed(ranks=3, stage=2)), ELEMENTS, machine(4))
    assert (choice.devices, choice.stage) == (("cpu",) * 3, 2)
    assert "3 CPU ranks" in choice.reason


def test_the_least_of_what_is_free_counts_where_it_is() -> None:
    there = Hardware(True, 800, (300, 100, 200))
    assert decide_engine(Node(), ELEMENTS, there).free == 100
    assert decide_engine(Node(gpus="0,2,2"), ELEMENTS, there).free == 200
    assert decide_engine(Node(device="cpu", deepspeed=DeepSpeed(ranks=4)), ELEMENTS, there).free == 200


def test_one_gpu_with_offload_is_deepspeeds() -> None:
    choice = decide_engine(Node(deepspeed=DeepSpeed(offload="cpu")), ELEMENTS, machine(1))
    assert (choice.devices, choice.offload) == (("cuda:0",), True)
    assert "optimizer is offloaded to the CPU" in choice.reason


def test_muon_trains_on_one_of_several_gpus_and_says_why_and_what_the_others_can_do() -> None:
    """ZeRO partitions matrices, and Muon needs whole ones."""
    choice = decide_engine(Node(), ELEMENTS, machine(4), "muon")
    assert (choice.devices, choice.stage) == (("cuda:0",), None)
    assert "one of 4 GPUs, with muon: it needs whole matrices" in choice.reason
    assert "--device cuda:1" in choice.remedy
    alone = decide_engine(Node(), ELEMENTS, machine(1), "muon")
    assert (alone.devices, alone.stage, alone.remedy) == (("cuda:0",), None, "")


@pytest.mark.parametrize(
    "node",
    [
        Node(gpus="all"),
        Node(deepspeed=DeepSpeed()),
        Node(device="cuda:1", deepspeed=DeepSpeed(offload="cpu")),
        Node(device="cpu", deepspeed=DeepSpeed(ranks=2)),
    ],
)
def test_but_who_asked_for_zero_with_muon_is_told(node: Node) -> None:
    with pytest.raises(PsycheError, match=r"run\.inner\.optimizer is muon: .*remove node\.deepspeed"):
        decide_engine(node, ELEMENTS, machine(4), "muon")


def test_a_limit_of_gpu_memory_counts_where_the_stage_is_chosen() -> None:
    """It is for each of them, and for none of a CPU's ranks."""
    tensors = ceil(OVERHEAD * rank_bytes(ELEMENTS, 2, 8, offload=False).device)
    limited = Node(max_gpu_memory=f"{tensors / 1e9 + 0.1:.1f}gb")
    assert decide_engine(Node(), ELEMENTS, machine(8)).stage == 1
    choice = decide_engine(limited, ELEMENTS, machine(8))
    assert choice.stage == 2
    assert tensors <= choice.free < tensors + 2e8
    on_cpu = limited.model_copy(update={"device": "cpu"})
    assert decide_engine(on_cpu, ELEMENTS, machine(8)).free == BIG


def test_every_rank_is_told_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(choice_module, "DeepSpeedEngine", lambda *_, **settings: given.append(settings))
    run = Run(name="x", model=SPEC, data=Data(tokenizer=BpeTokenizer(vocab_size=260), sequence_length=16))
    node = Node(max_gpu_memory="6gb")
    make_engine(run, node, decide_engine(node, ELEMENTS, machine(2)), tmp_path)
    make_engine(run, Node(), decide_engine(Node(), ELEMENTS, machine(2)), tmp_path)
    assert [one["memory_limit"] for one in given] == [6 * 10**9, None]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moments", [False, True])
def test_what_a_ranks_first_step_allocates_is_part_of_what_it_needs(stage: Stage, moments: bool) -> None:
    to_come = unallocated_bytes(ELEMENTS, stage, 8, moments=moments)
    assert 0 < to_come < rank_bytes(ELEMENTS, stage, 8, offload=False).device
    assert unallocated_bytes(ELEMENTS, stage, 8, moments=True) - to_come == (0 if moments else ELEMENTS)


@pytest.mark.parametrize("wanted", STAGES)
def test_the_stage_is_the_lowest_whose_tensors_fit(wanted: Stage) -> None:
    free = ceil(OVERHEAD * rank_bytes(ELEMENTS, wanted, 8, offload=False).device)
    assert decide_engine(Node(), ELEMENTS, machine(8, free=free)).stage == wanted
    assert least_stage(ELEMENTS, 8, free - 1, offload=False) == min(3, wanted + 1)


@pytest.mark.parametrize("offload", [False, True])
def test_higher_stages_and_more_ranks_need_less_of_each(offload: bool) -> None:
    def device(stage: Stage, ranks: int) -> int:
        return rank_bytes(ELEMENTS, stage, ranks, offload=offload).device

    assert device(1, 8) > device(2, 8) > device(3, 8)
    assert all(device(stage, 2) > device(stage, 8) for stage in STAGES[1:])
    if offload:
        assert all(rank_bytes(ELEMENTS, stage, 8, offload=True).host > 0 for stage in STAGES)
        assert device(2, 8) < rank_bytes(ELEMENTS, 2, 8, offload=False).device
