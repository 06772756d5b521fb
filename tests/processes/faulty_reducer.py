"""Run ``psyche join`` as a node that fails as a reducer from round 3 on; the first argument names the fault.

``kill``, ``freeze``: the process kills or stops itself while reducing. ``lie``: it reports wrong results. ``withhold``:
it reports its results but does not serve them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from typing_extensions import Buffer

from psyche.cli import main
from psyche.exchange.payload_store import BlobRetention
from psyche.exchange.sharded import Sharded
from psyche.network.spool import Blob
from psyche.numerics.aggregate import Gradient
from psyche.protocol.messages import Contribution, ReductionStatus

FIRST = 3
add_up, put = Sharded._reduce_slices, BlobRetention.put


def install_fault(fault: str) -> None:
    """Make the reductions of this process fail."""

    def faulty_reduce_slices(self: Sharded, gradient: Gradient, slices: range) -> list[bytes]:
        parts = add_up(self, gradient, slices)
        if self.plan.round < FIRST:
            return parts
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "lie":
            parts[0] = parts[0][:-1] + bytes([parts[0][-1] ^ 1])
        return parts

    async def unserved(self: BlobRetention, parts: Sequence[Buffer]) -> Blob:
        blob = await put(self, parts)
        if adding:
            self._blobs.remove(blob.index.root)
        return blob

    async def reduce(
        self: Sharded, reducing: ReductionStatus, given: Mapping[str, Contribution]
    ) -> Mapping[int, bytes]:
        adding.append(reducing.term)
        try:
            return await honest(self, reducing, given)
        finally:
            adding.pop()

    adding: list[int] = []
    honest = Sharded.reduce
    Sharded._reduce_slices = faulty_reduce_slices  # type: ignore[method-assign]
    if fault == "withhold":
        Sharded.reduce, BlobRetention.put = reduce, unserved  # type: ignore[method-assign]


if __name__ == "__main__":
    install_fault(sys.argv.pop(1))
    sys.argv[0:1] = ["psyche", "join"]
    main()
