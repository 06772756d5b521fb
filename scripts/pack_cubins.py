"""Compile the CUDA kernels ahead of time, for all architectures or those given. Needs no GPU and no driver.

    python scripts/pack_cubins.py [--into DIRECTORY] [75 80 86 89 90 120]

The default directory is kernels/cuda/cubins, where the loader looks first and which a wheel includes. The name of a
cubin contains a hash of its sources and options; outdated ones are deleted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from psyche.numerics.backends.cuda_compile import (
    ARCHITECTURES,
    compile_for,
    kernels_directory,
    packed_directory,
    packed_name,
    write,
)


def main() -> None:
    kernels = kernels_directory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="compute capabilities: 90 is sm_90")
    parser.add_argument("--into", type=Path, default=packed_directory(kernels))
    chosen = parser.parse_args()
    for architecture in chosen.architectures:
        name = packed_name(architecture, kernels)
        for outdated in chosen.into.glob(f"sm_{architecture}-*.cubin"):
            if outdated.name != name:
                outdated.unlink()
        compiled = compile_for(architecture, kernels)
        write(chosen.into / name, compiled)
        print(f"{chosen.into / name}: {len(compiled)} bytes")


if __name__ == "__main__":
    main()
