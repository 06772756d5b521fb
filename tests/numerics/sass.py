"""What is in a cubin: each kernel's instructions, as NVIDIA's disassembler names them."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import pytest

_KERNEL = re.compile(r"\.text\.(\w+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")


def tool(name: str) -> Path:
    """A program of the wheels nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump. Skips the test where it is missing."""
    nvidia = pytest.importorskip("nvidia", reason=f"nvidia-cuda-{name} is not installed")
    for directory in nvidia.__path__:
        for found in sorted(Path(directory).glob(f"*/bin/{name}")):
            return found
    pytest.skip(f"nvidia-cuda-{name} is not installed")


@lru_cache
def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """How often each kernel has each instruction, modifiers included (``LDG.E.128``)."""
    command = [str(tool("nvdisasm")), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Counter[str]] = defaultdict(Counter)
    kernel = None
    for line in text.splitlines():
        if match := _KERNEL.match(line):
            kernel = match[1]
        elif kernel is not None and (match := _INSTRUCTION.match(line)):
            found[kernel][match[1]] += 1
    return dict(found)


def local_memory(cubin: Path) -> dict[str, int]:
    """Bytes of stack and of local memory that each kernel uses, for spilled registers or arrays."""
    command = [str(tool("cuobjdump")), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return {kernel: int(stack) + int(local) for kernel, stack, local in usage}
