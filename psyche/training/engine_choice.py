"""Which engine a node trains with, decided from what the machine has and what its settings say, and why."""

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
    """What there is to choose from."""

    deepspeed: bool
    """Whether it is installed."""
    memory: int
    """Bytes free."""
    gpus: tuple[int, ...]
    """Bytes free on each."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and one sentence that says why; ``mend`` is empty where nothing is lost by it."""

    devices: tuple[str, ...]
    """What trains: a rank each, where there is a ``stage``."""
    stage: Stage | None
    """Of ZeRO; None is TorchEngine on the one device."""
    offload: bool
    why: str
    mend: str = ""
    free: int = 0
    """Bytes that the node may take on each of the devices, at least."""

    @property
    def device(self) -> torch.device:
        """The first one."""
        return torch.device(self.devices[0])


def choose_engine(node: Node, elements: int, optimizer: InnerOptimizer) -> EngineChoice:
    """The engine for a model of ``elements`` parameters on this machine. Raises :class:`PsycheError`."""
    there = Hardware(find_spec("deepspeed") is not None, available_memory(), gpu_memory(_gpus()))
    return decide_engine(node, elements, there, optimizer)


def decide_engine(node: Node, elements: int, machine: Hardware, optimizer: InnerOptimizer = "adamw") -> EngineChoice:
    """The same for a machine that somebody has looked at."""
    devices, asked = _devices(node, len(machine.gpus))
    on_cpu = devices[0] == "cpu"
    free = machine.memory // len(devices) if on_cpu else min(machine.gpus[int(one[5:])] for one in devices)
    if not on_cpu and (limit := memory_limit(node)) is not None:
        free = min(free, limit)
    if node.deepspeed is None and len(devices) == 1:
        why = f"TorchEngine on {devices[0]}: there is one device to train on"
        return EngineChoice(devices, None, False, why, free=free)
    if optimizer != "adamw":
        reason = "it looks at whole matrices, and ZeRO cuts them up"
        if asked:
            mend = f"leave out node.deepspeed and node.gpus, and train on one device (--device {devices[0]})"
            raise PsycheError(f"run.inner.optimizer is {optimizer}: {reason}; {mend}")
        why = f"TorchEngine on {devices[0]}, one of {len(devices)} GPUs, with {optimizer}: {reason}"
        mend = f"a node for each of the others (--device {devices[1]}, another --directory) uses them, too"
        return EngineChoice(devices[:1], None, False, why, mend, free)
    if not machine.deepspeed:
        mend = f"install DeepSpeed: {INSTALL}"
        if asked:
            raise PsycheError(f"training on {_counted(devices)} needs DeepSpeed, which is not installed; {mend}")
        why = f"TorchEngine on {devices[0]}, one of {len(devices)} GPUs: the others idle without DeepSpeed"
        return EngineChoice(devices[:1], None, False, why, mend, free)
    offload = node.deepspeed is not None and node.deepspeed.offload == "cpu"
    stage = None if node.deepspeed is None else node.deepspeed.stage
    because = "as node.deepspeed.stage says"
    if stage is None:
        stage = least_stage(elements, len(devices), free, offload=offload)
        because = "which needs the least memory" if stage == 3 else "the lowest whose tensors fit into what is free"
    why = f"DeepSpeedEngine on {_counted(devices)}, ZeRO {stage}, {because}"
    why += "; the optimizer is on the CPU" if offload else ""
    return EngineChoice(devices, stage, offload, why, free=free)


def make_engine(
    run: Run,
    node: Node,
    choice: EngineChoice,
    directory: Path,
    *,
    end: int | None = None,
) -> Engine:
    """The chosen engine with the run's initial parameters. Ranks' output goes below ``directory``.

    ``end``: of padded sequences, the token that padding follows. Raises :class:`PsycheError`.
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
    """What a node trains on, in at most 64 characters: ``8 × NVIDIA H100 80GB HBM3``, or ``CPU, 4 threads``."""
    devices, _ = _devices(node, _gpus())
    if devices[0] == "cpu":
        threads = node.threads or torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads > 1)}"
    count = len(devices) if optimizer == "adamw" and find_spec("deepspeed") is not None else 1
    return (f"{count} × " * (count > 1) + torch.cuda.get_device_name(devices[0]))[:64]


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _devices(node: Node, gpus: int) -> tuple[tuple[str, ...], bool]:
    """What is to train, and whether the settings name more than the first of it."""
    ranks = node.deepspeed.ranks if node.deepspeed is not None else None
    if node.device != "auto" and node.gpus != "auto":
        raise ConfigError(f"node.gpus: node.device is {node.device} already; leave one of them out")
    if node.device == "cpu" or (gpus == 0 and node.gpus == "auto" and node.device == "auto"):
        return ("cpu",) * (ranks or 1), node.deepspeed is not None
    if ranks is not None:
        raise ConfigError("node.deepspeed.ranks: for CPUs only; GPUs have one rank each, and --gpus says which")
    if node.device != "auto":
        named, wanted = f"node.device is {node.device}", [int(node.device.partition(":")[2] or 0)]
    else:
        named, wanted = f"node.gpus is {node.gpus}", _numbers(node.gpus, gpus)
    if not wanted or max(wanted) >= gpus:
        raise PsycheError(
            f"{named}, but torch sees {gpus} CUDA devices here: install the NVIDIA driver, ask for what is there, "
            "or use --device cpu"
        )
    return tuple(f"cuda:{number}" for number in wanted), node.gpus != "auto" or node.deepspeed is not None


def _numbers(wanted: str, gpus: int) -> list[int]:
    """Of the GPUs that ``node.gpus`` means."""
    if "," in wanted:
        return list(dict.fromkeys(int(number) for number in wanted.split(",")))
    return list(range(int(wanted) if wanted.isdigit() else gpus))


def _counted(devices: tuple[str, ...]) -> str:
    kind = "CPU rank" if devices[0] == "cpu" else "GPU"
    return f"{len(devices)} {kind}{'s' * (len(devices) > 1)}"
