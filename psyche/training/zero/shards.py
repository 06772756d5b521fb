"""What one rank holds of parameters and moments: which elements of which tensor, and where DeepSpeed keeps them.

DeepSpeed has two copies of a parameter: the master weights, of which each rank keeps its share and the optimizer steps,
and the model's own. ``safe_set_full_fp32_param`` sets the first only, and the next forward pass would be of the
old weights. So what is written here goes to the masters, and :meth:`Shards.publish` does what DeepSpeed does at the end
of a step: masters to the model, then gathered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psyche.numerics.flat import FlatLayout
from psyche.training.zero.wire import Kind

Parts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shard:
    """``master[at : at + count]`` is ``flat[start : start + count]``."""

    master: Tensor
    """Flat fp32, of one parameter group of this rank; the optimizer's state is by this tensor."""
    at: int
    start: int
    count: int


class Shards(ABC):
    """One rank's share, between the shared flat vector and DeepSpeed's tensors."""

    def __init__(self, zero: Any, model: nn.Module, layout: FlatLayout) -> None:
        """``zero`` is DeepSpeed's optimizer, which wraps torch's."""
        self._zero = zero
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        starts = {span.name: span.start for span in layout.spans}
        self._shards = [
            Shard(master, at, starts[name] + first, count)
            for name, parameter in names.items()
            for master, at, first, count in self._held(parameter)
        ]

    @abstractmethod
    def _held(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
        """(master, position in it, first element of the parameter, count): what this rank holds of it."""

    @abstractmethod
    def publish(self) -> None:
        """Give the model what the masters hold. All ranks call it."""

    @torch.no_grad()
    def read(self, kind: Kind, flat: Tensor) -> None:
        """Copy this rank's share to ``flat``."""
        for shard in self._shards:
            flat[shard.start : shard.start + shard.count].copy_(self._tensor(kind, shard))

    @torch.no_grad()
    def write(self, kind: Kind, flat: Tensor, parts: Parts) -> None:
        """Take this rank's share of ``parts`` from ``flat``."""
        for target, source in self._within(kind, flat, parts):
            target.copy_(source)

    @torch.no_grad()
    def shift(self, flat: Tensor, parts: Parts) -> None:
        """Add ``flat`` to this rank's share of the parameters in ``parts``."""
        for target, source in self._within("theta", flat, parts):
            target.add_(source.to(target.device))

    def resume(self, steps: int) -> None:
        """The optimizer stands after ``steps``; what it keeps is as it was written."""
        for shard in self._shards:
            if steps:
                self._state(shard)["step"].fill_(steps)
            else:
                self._zero.optimizer.state.pop(shard.master, None)

    def _within(self, kind: Kind, flat: Tensor, parts: Parts) -> Iterator[tuple[Tensor, Tensor]]:
        """What of each shard lies in ``parts``, and the same elements of ``flat``."""
        for shard in self._shards:
            held = self._tensor(kind, shard)
            for start, stop in parts:
                low, high = max(start, shard.start), min(stop, shard.start + shard.count)
                if low < high:
                    yield held[low - shard.start : high - shard.start], flat[low:high]

    def _tensor(self, kind: Kind, shard: Shard) -> Tensor:
        whole = shard.master if kind == "theta" else self._state(shard)[kind]
        return whole.detach()[shard.at : shard.at + shard.count]

    def _state(self, shard: Shard) -> dict[str, Tensor]:
        """AdamW's, which makes it at its first step; made here where it has to be there before."""
        state: dict[str, Tensor] = self._zero.optimizer.state[shard.master]
        if not state:
            state["step"] = torch.zeros((), device=shard.master.device)
            state["exp_avg"] = torch.zeros_like(shard.master)
            state["exp_avg_sq"] = torch.zeros_like(shard.master)
        return state


class OptimizerShards(Shards):
    """ZeRO 1 and 2: masters and moments are cut over the ranks; each has the whole model."""

    def _held(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's: None where all is elsewhere
        if mapping is not None:
            master = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            held, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield master, held.start, own.start, own.numel

    def publish(self) -> None:
        self._zero.update_lp_params()


class ParameterShards(Shards):
    """ZeRO 3: the model is cut over the ranks, too, tensor by tensor."""

    def _held(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
        group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        ds: Any = parameter
        first = ds.ds_tensor.ds_numel * torch.distributed.get_rank()
        count = min(ds.ds_tensor.ds_numel, ds.ds_numel - first)  # the last ranks' shares are padded
        if count > 0:
            yield self._zero.fp32_partitioned_groups_flat[group], at, first, count

    def publish(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()  # those that are gathered hold the old weights
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept := zero.persistent_parameters:  # small ones, which stay gathered
            kept[0].all_gather(kept)
