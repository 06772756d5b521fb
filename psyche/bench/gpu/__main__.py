"""``python -m psyche.bench.gpu``: see scripts/gpu_check.sh.

Exit status: 0 where every bit is as defined, 1 where one is not, 2 where kernels cannot run here.
"""

from __future__ import annotations

import argparse
import platform
import sys
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch

from psyche.bench.gpu.equality import differences, outer_differences
from psyche.bench.gpu.machine import Emulated, Gpu, Machine
from psyche.bench.gpu.report import write
from psyche.bench.gpu.timing import timings
from psyche.numerics.backends.cuda_device import missing
from psyche.numerics.codecs.names import CODECS

SHOWN = 10
"""Differences of one codec that are collected: more would say the same."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Check and time every kernel on this card.")
    parser.add_argument("--emulate", action="store_true", help="run the check itself without a GPU, on tiny tensors")
    parser.add_argument("--elements", type=int, default=1 << 26, help="fp32 values that are timed (default: 2^26)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="directory of the tables")
    chosen = parser.parse_args()
    reason = None if chosen.emulate else missing()
    if reason is not None:
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    if chosen.elements <= 0 or chosen.elements % 4096 != 0:
        parser.error("--elements must be a multiple of 4096")

    start = perf_counter()
    machine: Machine = Emulated() if chosen.emulate else Gpu(chosen.elements)
    system = {
        "device": machine.launcher.detail,
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "host": platform.platform(),
        "kernels built or loaded in": f"{perf_counter() - start:.1f} s",
    }
    print(f"{machine.launcher.detail}: comparing with the definition", flush=True)
    found = {}
    for name in CODECS:
        found[name] = list(islice(differences(machine, name), SHOWN))
        print(f"  {name}: {'DIFFERENT: ' + str(found[name][0]) if found[name] else 'equal'}", flush=True)
    found["outer step"] = list(islice(outer_differences(machine), SHOWN))
    print("timing", flush=True)
    print("\n" + write(chosen.out, system, found, list(timings(machine)), timed=machine.timed))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
