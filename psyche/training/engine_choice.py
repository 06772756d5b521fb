"""The choice of a node's engine, from its hardware and settings, with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from psyche.config import InnerOptimizer, Node, Run
from psyche.errors import ConfigError, PsycheError
from psyche.training.devices import gpu_memory, memory_limit
from psyche.training.engine import Engine
from psyche.training.memory import available_memory
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine
from psyche.training.zero.deepspeed_engine import DeepSpeedEngine
from psyche.training.zero.zero_memory import Stage, least_stage

INSTALL = "pip install 'psyche[deepspeed]'"


@dataclass(frozen=True)
class Hardware:
    """What the machine has."""

    deepspeed: bool
    """Whether DeepSpeed is installed."""
    memory: int
    """Free RAM in bytes."""
    gpus: tuple[int, ...]
    """Free memory of each GPU in bytes."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine and the reason for it."""

    devices: tuple[str, ...]
    """The devices that train; with a ``stage``, one rank on each."""
    stage: Stage | None
    """The stage of ZeRO; None means TorchEngine on a single device."""
    offload: bool
    reason: str
    """One sentence for the log."""
    remedy: str = ""
    """How to use the hardware better; empty where nothing is lost."""
    free: int = 0
    """Bytes of memory that the node may use on each device, at least."""

    @property
    def device(self) -> torch.device:
        """The first one."""
        return torch.device(self.devices[0])


def choose_engine(node: Node, elements: int, optimizer: InnerOptimizer) -> EngineChoice:
    """Choose the engine for a model of ``elements`` parameters on this machine. Raises :class:`PsycheError`."""
    there = Hardware(find_spec("deepspeed") is not None, available_memory(), gpu_memory(_gpus()))
    return decide_engine(node, elements, there, optimizer)


def decide_engine(node: Node, elements: int, machine: Hardware, optimizer: InnerOptimizer = "adamw") -> EngineChoice:
    """Choose the engine for given hardware. Raises :class:`PsycheError`."""
    devices, asked = _devices(node, len(machine.gpus))
    on_cpu = devices[0] == "cpu"
    free = machine.memory // len(devices) if on_cpu else min(machine.gpus[int(one[5:])] for one in devices)
    if not on_cpu and (limit := memory_limit(node)) is not None:
        free = min(free, limit)
    if node.deepspeed is None and len(devices) == 1:
        reason = f"TorchEngine on {devices[0]}: there is one device to train on"
        return EngineChoice(devices, None, False, reason, free=free)
    if optimizer != "adamw":
        because = "it needs whole matrices, which ZeRO partitions"
        if asked:
            remedy = f"remove node.deepspeed and node.gpus and train on one device (--device {devices[0]})"
            raise PsycheError(f"run.inner.optimizer is {optimizer}: {because}; {remedy}")
        reason = f"TorchEngine on {devices[0]}, one of {len(devices)} GPUs, with {optimizer}: {because}"
        remedy = f"start one more node per idle GPU (--device {devices[1]}, another --directory)"
        return EngineChoice(devices[:1], None, False, reason, remedy, free)
    if not machine.deepspeed:
        remedy = f"install DeepSpeed: {INSTALL}"
        if asked:
            raise PsycheError(f"training on {_counted(devices)} needs DeepSpeed, which is not installed; {remedy}")
        reason = f"TorchEngine on {devices[0]}, one of {len(devices)} GPUs: without DeepSpeed the others are idle"
        return EngineChoice(devices[:1], None, False, reason, remedy, free)
    offload = node.deepspeed is not None and node.deepspeed.offload == "cpu"
    stage = None if node.deepspeed is None else node.deepspeed.stage
    because = "set by node.deepspeed.stage"
    if stage is None:
        stage = least_stage(elements, len(devices), free, offload=offload)
        because = "which needs the least memory" if stage == 3 else "the lowest that fits into free memory"
    reason = f"DeepSpeedEngine on {_counted(devices)}, ZeRO {stage}, {because}"
    reason += "; the optimizer is offloaded to the CPU" if offload else ""
    return EngineChoice(devices, stage, offload, reason, free=free)


def make_engine(
    run: Run,
    node: Node,
    choice: EngineChoice,
    directory: Path,
    *,
    end: int | None = None,
) -> Engine:
    """Create the chosen engine with the run's initial parameters. The output of ranks goes below ``directory``.

    ``end`` is the token that precedes padding. Raises :class:`PsycheError`.
    """
    if choice.stage is None:
        one = node.model_copy(update={"device": choice.devices[0]})
        return TorchEngine(build(run.model, seed=run.seed), run.inner, one, end)
    return DeepSpeedEngine(
        run.model,
        run.seed,
        run.inner,
        devices=choice.devices,
        stage=choice.stage,
        offload=choice.offload,
        precision=node.precision,
        micro_batch=node.micro_batch,
        checkpoints=node.activation_checkpointing,
        end=end,
        memory_limit=memory_limit(node),
        threads=max(1, (node.threads or torch.get_num_threads()) // len(choice.devices)),
        directory=directory,
    )


def describe_device(node: Node, optimizer: InnerOptimizer = "adamw") -> str:
    """Describe the devices in at most 64 characters: ``8 × NVIDIA H100 80GB HBM3``, or ``CPU, 4 threads``."""
    devices, _ = _devices(node, _gpus())
    if devices[0] == "cpu":
        threads = node.threads or torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads > 1)}"
    count = len(devices) if optimizer == "adamw" and find_spec("deepspeed") is not None else 1
    return (f"{count} × " * (count > 1) + torch.cuda.get_device_name(devices[0]))[:64]


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _devices(node: Node, gpus: int) -> tuple[tuple[str, ...], bool]:
    """Return the devices to train on, and whether the settings ask for more than the first one."""
    ranks = node.deepspeed.ranks if node.deepspeed is not None else None
    if node.device != "auto" and node.gpus != "auto":
        raise ConfigError(f"node.gpus and node.device ({node.device}) are both set: remove one")
    if node.device == "cpu" or (gpus == 0 and node.gpus == "auto" and node.device == "auto"):
        return ("cpu",) * (ranks or 1), node.deepspeed is not None
    if ranks is not None:
        raise ConfigError("node.deepspeed.ranks is for CPUs only: each GPU has one rank, and --gpus selects the GPUs")
    if node.device != "auto":
        named, wanted = f"node.device is {node.device}", [int(node.device.partition(":")[2] or 0)]
    else:
        named, wanted = f"node.gpus is {node.gpus}", _numbers(node.gpus, gpus)
    if not wanted or max(wanted) >= gpus:
        raise PsycheError(
            f"{named}, but torch sees {gpus} CUDA devices here: install the NVIDIA driver, ask for fewer, "
            "or use --device cpu"
        )
    return tuple(f"cuda:{number}" for number in wanted), node.gpus != "auto" or node.deepspeed is not None


def _numbers(wanted: str, gpus: int) -> list[int]:
    """Return the indices of the GPUs that ``node.gpus`` selects."""
    if "," in wanted:
        return list(dict.fromkeys(int(number) for number in wanted.split(",")))
    return list(range(int(wanted) if wanted.isdigit() else gpus))


def _counted(devices: tuple[str, ...]) -> str:
    kind = "CPU rank" if devices[0] == "cpu" else "GPU"
    return f"{len(devices)} {kind}{'s' * (len(devices) > 1)}"
