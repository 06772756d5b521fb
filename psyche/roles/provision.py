"""What a newcomer needs before it can train, fetched from whoever is there and believed by hash alone."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from psyche.config import Manifest
from psyche.data.index import MAX_INDEX_BYTES, decode_index
from psyche.data.store import INDEX, TOKENIZER, TokenStore, store_path
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.network.fetch import fetch
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.network.node import NetworkNode
from psyche.network.streams import Refused, Unreachable, Violation
from psyche.numerics.digest import CHUNK, index_blob
from psyche.protocol import envelope as envelopes
from psyche.protocol.envelope import MalformedMessage

MAX_MANIFEST = 1 << 20
CALL_SECONDS = 15.0
DOMAIN = "manifest"

T = TypeVar("T")


async def serve_provisions(network: NetworkNode, manifest: bytes, store: TokenStore) -> None:
    """Serve the signed manifest (as received), the token store's index, and its files as blobs."""

    async def give_index(peer: str, request: bytes) -> bytes:
        return store.index.encode()

    await serve_manifest(network, manifest)
    await network.rpc.serve("store", give_index, max_request=0)
    for path, root in _files(store):
        await asyncio.to_thread(serve_file, network, path, root)


async def serve_manifest(network: NetworkNode, manifest: bytes) -> None:
    """Serve the signed manifest, as received."""

    async def give_manifest(peer: str, request: bytes) -> bytes:
        return manifest

    await network.rpc.serve("manifest", give_manifest, max_request=0)


def sign_manifest(manifest: Manifest, identity: Identity) -> bytes:
    """The manifest as it travels: in an envelope signed by one of its coordinators."""
    return envelopes.encode(identity.seal(DOMAIN, manifest.run_id, 0, manifest.encode()))


async def fetch_manifest(network: NetworkNode, run_id: bytes, sources: Sequence[str]) -> tuple[Manifest, bytes]:
    """The manifest whose hash is ``run_id``, and the envelope it came in.

    Raises :class:`PsycheError` where none of ``sources`` has it: each one's reason is named.
    """

    async def ask(peer: str) -> tuple[Manifest, bytes]:
        data = await network.rpc.call(peer, "manifest", b"", timeout=CALL_SECONDS, max_reply=MAX_MANIFEST)
        return check_manifest(data, run_id), data

    return await _first(sources, ask, "the run manifest")


def check_manifest(data: bytes, run_id: bytes) -> Manifest:
    """The manifest in an envelope. Raises where it is not that of the run, or not signed by a coordinator of it."""
    envelope = envelopes.decode(data, MAX_MANIFEST)
    manifest = Manifest.decode(envelope.body)
    if manifest.run_id != run_id:
        raise WrongContext("its hash is not that of the invite: this is another run's manifest, or a forged one")
    open_envelope(envelope, domain=DOMAIN, run_id=run_id)
    if envelope.author not in manifest.resolved.coordinators:
        raise BadSignature("it is not signed by a coordinator of the run")
    return manifest


@dataclass(frozen=True)
class Found:
    """The run's token store: on this machine, or what is known of it and how many bytes are still to be fetched."""

    store: TokenStore
    encoded: bytes | None
    """Its index as it came, until everything is here."""
    missing: int


async def find_store(network: NetworkNode, manifest: Manifest, cache: Path, sources: Sequence[str]) -> Found:
    """The store in the cache if it is there; its index from ``sources`` otherwise."""
    with contextlib.suppress(PsycheError):
        return Found(local_store(manifest, cache), None, 0)
    root = bytes.fromhex(manifest.resolved.store)

    async def ask(peer: str) -> bytes:
        data = await network.rpc.call(peer, "store", b"", timeout=CALL_SECONDS, max_reply=MAX_INDEX_BYTES)
        index = decode_index(data, f"what {peer} sent")
        if index.root != root:
            raise Violation("its token store is not the run's")
        return data

    encoded = await _first(sources, ask, "the token store's index")
    store = TokenStore(_fetched_path(cache, root), decode_index(encoded, "the token store's index"))
    sizes = file_sizes(store)
    return Found(store, encoded, sum(sizes[file] for path, file in _files(store) if not _is_here(path, sizes[file])))


async def obtain_store(
    network: NetworkNode,
    found: Found,
    sources: Sequence[str],
    progress: Callable[[int, int], None] = lambda received, total: None,
) -> TokenStore:
    """What :func:`find_store` found, complete: file by file from ``sources``.

    ``progress`` gets bytes received and bytes in all. What was fetched before an interruption is kept.
    """
    if found.encoded is not None:
        path = found.store.path
        with disk_errors(path):
            await _fetch_files(network, found.store, sources, progress)
            write_durably(path / INDEX, found.encoded)
    return found.store


def file_sizes(store: TokenStore) -> dict[bytes, int]:
    """Root -> bytes of every file of a store but its index."""
    index = store.index
    sizes = {bytes.fromhex(item.root): item.bytes for item in index.tokenizer}
    return sizes | {bytes.fromhex(shard.root): shard.bytes for shard in (*index.train, *index.heldout)}


def _is_here(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def local_store(manifest: Manifest, cache: Path) -> TokenStore:
    """The run's token store on this machine, prepared or fetched. Raises :class:`PsycheError` if it is not here."""
    root = bytes.fromhex(manifest.resolved.store)
    for path in (store_path(cache, manifest.run.data), _fetched_path(cache, root)):
        with contextlib.suppress(PsycheError):  # not there, or prepared here from other text than the run's
            store = TokenStore.open(path, root)
            if store.whole():
                return store
    raise PsycheError(f"the run's token store is not under {cache}: join the run once to fetch it")


def _fetched_path(cache: Path, root: bytes) -> Path:
    return cache / "data" / f"run-{root.hex()[:16]}"


async def _fetch_files(
    network: NetworkNode, store: TokenStore, sources: Sequence[str], progress: Callable[[int, int], None]
) -> None:
    sizes, received = file_sizes(store), 0
    for path, root in _files(store):
        size = sizes[root]
        if not _is_here(path, size):
            data = await fetch(network, root, sources=sources, size=size, max_size=size)
            path.parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(write_durably, path, bytes(data))
        received += size
        progress(received, sum(sizes.values()))


async def _first(sources: Sequence[str], ask: Callable[[str], Awaitable[T]], what: str) -> T:
    """The first good answer; a :class:`PsycheError` with everyone's reason if there is none."""
    reasons = []
    for peer in dict.fromkeys(sources):
        try:
            return await ask(peer)
        except (Unreachable, Refused, Violation, MalformedMessage, BadSignature, WrongContext, PsycheError) as error:
            reasons.append(f"{peer[-6:]}: {error}")
    raise PsycheError(
        f"could not get {what} ({'; '.join(reasons)}): ask the run's operator whether the run is still up, "
        "and for a new invite"
    )


def _files(store: TokenStore) -> list[tuple[Path, bytes]]:
    """Path and root of every file of a store but its index."""
    index = store.index
    files = [(store.path / TOKENIZER / item.file, bytes.fromhex(item.root)) for item in index.tokenizer]
    return files + [(store.path / s.file, bytes.fromhex(s.root)) for s in (*index.train, *index.heldout)]


def serve_file(network: NetworkNode, path: Path, root: bytes) -> None:
    """Serve a file as a blob without keeping it in memory. One whose content is not ``root`` is not served."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        index = index_blob(content)
    if index.root != root:
        return

    def read(number: int) -> bytes:
        with path.open("rb") as file:
            file.seek(number * CHUNK)
            return file.read(CHUNK)

    network.blobs.add(index, read)
