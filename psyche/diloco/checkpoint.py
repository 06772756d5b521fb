"""Checkpoints: one safetensors file a round, whose name holds its own hash.

A file is written under a temporary name, flushed to disk, hashed and only then renamed to
``round-00000012-<hash>.safetensors``: a file with a final name is whole, or its hash says that it is not.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psyche.durable import sync_directory
from psyche.errors import PsycheError
from psyche.protocol.acceptor import Chain
from psyche.protocol.audit_messages import EMPTY, AuditState
from psyche.protocol.messages import Standing

FORMAT = 3
_NAME = re.compile(r"round-(\d{8})-([0-9a-f]{16})\.safetensors")


class _Meta(msgspec.Struct, frozen=True):
    format: int
    run_id: str
    rounds: int
    head: str
    state_root: str
    position: int
    standing: tuple[Standing, ...] = ()
    audit_state: AuditState = EMPTY


@dataclass(frozen=True)
class Checkpoint:
    """What a node needs to continue after a restart."""

    run_id: bytes
    chain: Chain
    outer: Tensor
    """θ and m, ``[2, n]`` fp32."""
    residual: Tensor | None
    """Error-feedback buffer, ``[n]`` fp32."""
    inner: dict[str, Tensor]
    """The engine's optimizer state."""
    certificates: tuple[bytes, ...]
    """Encoded: that of the last round this node has seen certified. Earlier versions kept the whole chain, in order,
    which is now the ledger's."""


def save(checkpoint: Checkpoint, directory: Path, *, keep: int) -> Path:
    """Write a checkpoint and drop all but the newest ``keep`` up to it. Raises :class:`PsycheError` on a full disk."""
    tensors = {"outer": checkpoint.outer, "certificates": _pack(checkpoint.certificates)}
    if checkpoint.residual is not None:
        tensors["residual"] = checkpoint.residual
    tensors |= {f"inner/{name}": value.contiguous() for name, value in checkpoint.inner.items()}
    chain = checkpoint.chain
    meta = _Meta(
        FORMAT,
        checkpoint.run_id.hex(),
        chain.rounds,
        chain.head.hex(),
        chain.state_root.hex(),
        chain.position,
        chain.standing,
        chain.audit_state,
    )
    staging = directory / ".writing"  # always the same, so that what a killed process left there goes with it
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        temporary = staging / "checkpoint"
        save_file(tensors, temporary, metadata={"psyche": msgspec.json.encode(meta).decode()})
        path = directory / f"round-{chain.rounds:08d}-{_file_hash(temporary)}.safetensors"
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(directory)
        staging.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space there or choose another --directory" if full else "check its permissions"
        raise PsycheError(f"cannot write a checkpoint to {directory}: {error}; {mend}") from None
    # Later rounds than this one are corrupt, or another run's: they must not count against the good ones.
    for _, old in [found for found in _files(directory) if found[1].name[:14] <= path.name[:14]][keep:]:
        old.unlink(missing_ok=True)
    return path


def load_latest(directory: Path, run_id: bytes, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run, or None. ``warn`` hears of every file that is passed over."""
    for digest, path in _files(directory):
        try:
            if _file_hash(path) != digest:
                warn(f"{path.name} is corrupt (its content does not have the hash in its name); trying an older one")
                continue
            checkpoint = _load(path)
        except (OSError, SafetensorError, msgspec.MsgspecError, KeyError, ValueError) as error:
            warn(f"{path.name} cannot be read ({error}); trying an older one")
            continue
        if checkpoint.run_id == run_id:
            return checkpoint
        warn(f"{path.name} belongs to another run; trying an older one")
    return None


def _load(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        meta = msgspec.json.decode((file.metadata() or {})["psyche"], type=_Meta)
        if meta.format != FORMAT:
            raise ValueError(f"format {meta.format}; this version of psyche reads {FORMAT}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Checkpoint(
        run_id=bytes.fromhex(meta.run_id),
        chain=Chain(
            meta.rounds,
            bytes.fromhex(meta.head),
            bytes.fromhex(meta.state_root),
            meta.position,
            meta.standing,
            meta.audit_state,
        ),
        outer=tensors["outer"],
        residual=tensors.get("residual"),
        inner={name.removeprefix("inner/"): value for name, value in tensors.items() if name.startswith("inner/")},
        certificates=_unpack(tensors["certificates"]),
    )


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """(hash, path) of finished checkpoints, newest round first."""
    if directory.is_dir():
        for path in sorted(directory.iterdir(), reverse=True):
            if match := _NAME.fullmatch(path.name):
                yield match[2], path


def _file_hash(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()[:16]


def _pack(items: tuple[bytes, ...]) -> Tensor:
    return torch.frombuffer(bytearray(msgspec.msgpack.encode(items)), dtype=torch.uint8)


def _unpack(tensor: Tensor) -> tuple[bytes, ...]:
    return msgspec.msgpack.decode(tensor.numpy().tobytes(), type=tuple[bytes, ...])
