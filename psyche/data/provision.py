"""Provisioning: what a new node needs before it can train, fetched from peers and verified by hash."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import AsyncFileLock

from psyche.config import Manifest, Node
from psyche.config.units import byte_count
from psyche.data.cache import ShardCache
from psyche.data.index import MAX_INDEX_BYTES, Shard, TokenizerFile, decode_index
from psyche.data.shard_sources import ShardSources
from psyche.data.token_store import INDEX, TOKENIZER, ShardLocation, Split, TokenStore, has_size, store_path
from psyche.durable import disk_errors, durable_file, write_durably
from psyche.errors import PsycheError
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.network.transport import Network, Refused, Unreachable, Violation
from psyche.numerics.digest import CHUNK, BlobIndex, index_blob
from psyche.protocol.wire import MalformedMessage, decode_envelope, encode_envelope

MAX_MANIFEST = 1 << 20
CALL_SECONDS = 15.0
DOMAIN = "manifest"

T = TypeVar("T")


async def serve_provisions(network: Network, manifest: bytes, store: TokenStore) -> ShardOffers:
    """Serve the signed manifest (as received), the token store's index, and the store's local files as blobs."""

    async def give_index(peer: str, request: bytes) -> bytes:
        return store.index.encode()

    await serve_manifest(network, manifest)
    await network.rpc.serve("store", give_index, max_request=0)
    for item in store.index.tokenizer:
        serve_file(network, store.path / TOKENIZER / item.file, bytes.fromhex(item.root))
    for shard in store.index.heldout:
        serve_file(network, store.path_of(shard), bytes.fromhex(shard.root))
    offers = ShardOffers(network, store.train)
    await asyncio.to_thread(offers.add_all)
    return offers


class ShardOffers:
    """The training shards that this node serves, each while a local copy exists."""

    def __init__(self, network: Network, split: Split) -> None:
        self._network, self._split = network, split
        self._offered: set[int] = set()

    def add_all(self) -> None:
        """Offer all shards that are on this machine now."""
        for number in range(len(self._split.shards)):
            if self._split.copies(number):
                self.add(number)

    def add(self, number: int) -> None:
        """Offer a shard. It is hashed only when a peer asks for it."""
        if number not in self._offered:
            self._offered.add(number)
            root = bytes.fromhex(self._split.shards[number].root)
            _serve(self._network, root, lambda: self._split.copies(number)[0])


async def serve_manifest(network: Network, manifest: bytes) -> None:
    """Serve the signed manifest, as received."""

    async def give_manifest(peer: str, request: bytes) -> bytes:
        return manifest

    await network.rpc.serve("manifest", give_manifest, max_request=0)


def sign_manifest(manifest: Manifest, identity: Identity) -> bytes:
    """Wrap the manifest in an envelope signed by one of its coordinators."""
    return encode_envelope(identity.seal(DOMAIN, manifest.run_id, 0, manifest.encode()))


async def fetch_manifest(network: Network, run_id: bytes, sources: Sequence[str]) -> tuple[Manifest, bytes]:
    """Fetch the manifest whose hash is ``run_id``; return it and the envelope it came in.

    Raises :class:`PsycheError`, with every source's reason, where none of ``sources`` has it.
    """

    async def ask(peer: str) -> tuple[Manifest, bytes]:
        data = await network.rpc.call(peer, "manifest", b"", timeout=CALL_SECONDS, max_reply=MAX_MANIFEST)
        return check_manifest(data, run_id), data

    return await _first(sources, ask, "the run manifest")


def check_manifest(data: bytes, run_id: bytes) -> Manifest:
    """Decode the manifest in an envelope. Raises unless it is the run's and signed by one of its coordinators."""
    envelope = decode_envelope(data, MAX_MANIFEST)
    manifest = Manifest.decode(envelope.body)
    if manifest.run_id != run_id:
        raise WrongContext("the manifest's hash is not the invite's run id: it is another run's, or forged")
    open_envelope(envelope, domain=DOMAIN, run_id=run_id)
    if envelope.author not in manifest.resolved.coordinators:
        raise BadSignature("the manifest is not signed by a coordinator of the run")
    return manifest


@dataclass(frozen=True)
class FoundStore:
    """The run's token store, as far as it is on this machine."""

    store: TokenStore
    encoded: bytes | None
    """The index as received, if it was not on this machine."""
    missing: int
    """Most bytes of disk that the missing files will take."""


async def find_store(network: Network, manifest: Manifest, node: Node, sources: Sequence[str]) -> FoundStore:
    """Open the run's store on this machine; fetch its index from ``sources`` if that is missing."""
    cache = shard_cache(node)
    locations = shard_locations(node, cache)
    encoded = None
    store = _store_here(manifest, node.cache.expanduser(), locations)
    if store is None:
        root = bytes.fromhex(manifest.resolved.store)
        encoded = await _fetch_index(network, root, sources)
        index = decode_index(encoded, "the token store's index")
        store = TokenStore(_fetched_path(node.cache.expanduser(), root), index, locations)
    return FoundStore(store, encoded, await asyncio.to_thread(_missing, store, manifest, cache))


def _missing(store: TokenStore, manifest: Manifest, cache: ShardCache) -> int:
    required = sum(item.bytes for item, path in required_files(store, manifest) if not has_size(path, item.bytes))
    shards = sum(shard.bytes for number, shard in enumerate(store.train.shards) if not store.train.copies(number))
    return required + min(shards, cache.room())


async def _fetch_index(network: Network, root: bytes, sources: Sequence[str]) -> bytes:
    async def ask(peer: str) -> bytes:
        data = await network.rpc.call(peer, "store", b"", timeout=CALL_SECONDS, max_reply=MAX_INDEX_BYTES)
        if decode_index(data, f"what {peer} sent").root != root:
            raise Violation("it serves another token store than the run's")
        return data

    return await _first(sources, ask, "the token store's index")


def required_files(store: TokenStore, manifest: Manifest) -> list[tuple[Shard | TokenizerFile, Path]]:
    """Return the files of a store that every node holds: the tokenizer, and the held-out shards that it evaluates
    on."""
    files: list[tuple[Shard | TokenizerFile, Path]] = []
    files += [(item, store.path / TOKENIZER / item.file) for item in store.index.tokenizer]
    count = -(-min(manifest.run.heldout_sequences, len(store.heldout)) // store.heldout.layout.per_shard)
    return files + [(shard, store.path_of(shard)) for shard in store.index.heldout[:count]]


async def fetch_required_files(
    found: FoundStore,
    manifest: Manifest,
    shard_sources: ShardSources,
    progress: Callable[[int, int], None] = lambda received, total: None,
) -> None:
    """Fetch the missing :func:`required_files`; ``progress`` gets bytes received and total bytes.

    Complete local files are kept. Raises :class:`PsycheError`.
    """
    store, received = found.store, 0
    files = required_files(store, manifest)
    total = sum(item.bytes for item, _ in files)

    def report(count: int) -> None:
        progress(received + count, total)

    with disk_errors(store.path):
        store.path.mkdir(parents=True, exist_ok=True)
        async with AsyncFileLock(f"{store.path}.lock"):  # another node of this machine may fetch the same
            for item, path in files:
                if not await asyncio.to_thread(_is_whole, path, item):
                    path.parent.mkdir(exist_ok=True)
                    with durable_file(path) as file:
                        await shard_sources.fetch(item, path.relative_to(store.path).as_posix(), file.fileno(), report)
                received += item.bytes
            if found.encoded is not None:
                write_durably(store.path / INDEX, found.encoded)


def _is_whole(path: Path, item: Shard | TokenizerFile) -> bool:
    return has_size(path, item.bytes) and _index_of(path).root.hex() == item.root


def local_store(manifest: Manifest, cache: Path, locations: Sequence[ShardLocation] = ()) -> TokenStore:
    """Open the run's token store on this machine, prepared or fetched, with all its :func:`required_files`.

    Raises :class:`PsycheError` if any of them is missing.
    """
    store = _store_here(manifest, cache, locations)
    if store is None or not all(has_size(path, item.bytes) for item, path in required_files(store, manifest)):
        raise PsycheError(f"the run's token store is not under {cache}: join the run once (psyche join) to fetch it")
    return store


def _store_here(manifest: Manifest, cache: Path, locations: Sequence[ShardLocation]) -> TokenStore | None:
    """Return the run's store, complete or not; None if its index is not on this machine."""
    root = bytes.fromhex(manifest.resolved.store)
    for path in (store_path(cache, manifest.run.data), _fetched_path(cache, root)):
        with contextlib.suppress(PsycheError):  # missing, or prepared from other text than the run's
            return TokenStore.open(path, root, locations)
    return None


def shard_cache(node: Node) -> ShardCache:
    """Return the machine's cache of fetched shards, shared by all runs."""
    return ShardCache(node.cache.expanduser() / "data" / "shards", byte_count(node.data_cache))


def shard_locations(node: Node, cache: ShardCache) -> tuple[ShardLocation, ...]:
    """Return where shards may be on this machine, besides a store that was prepared on it."""
    directories = [Path(text).expanduser() for text in node.data_mirrors if "://" not in text]
    return (cache.path_of, *(partial(_named_in, directory) for directory in directories))


def _named_in(directory: Path, shard: Shard) -> Path:
    return directory / shard.file


def _fetched_path(cache: Path, root: bytes) -> Path:
    return cache / "data" / f"run-{root.hex()[:16]}"


async def _first(sources: Sequence[str], ask: Callable[[str], Awaitable[T]], what: str) -> T:
    """Return the first valid answer. Raises :class:`PsycheError` with every source's reason if there is none."""
    reasons = []
    for peer in dict.fromkeys(sources):
        try:
            return await ask(peer)
        except (Unreachable, Refused, Violation, MalformedMessage, BadSignature, WrongContext, PsycheError) as error:
            reasons.append(f"{peer[-6:]}: {error}")
    raise PsycheError(
        f"could not get {what} ({'; '.join(reasons)}): ask the run's operator whether the run is still up, "
        "or for a new invite"
    )


def serve_file(network: Network, path: Path, root: bytes) -> None:
    """Serve a file as a blob without loading it into memory; refused while its content does not match ``root``."""
    _serve(network, root, lambda: path)


def _serve(network: Network, root: bytes, find: Callable[[], Path]) -> None:
    """``find`` returns the file's path; it raises ``LookupError`` while the file is missing."""

    def load() -> BlobIndex:
        index = _index_of(find())
        if index.root != root:
            raise LookupError("the file is corrupt or another one")
        return index

    def read(number: int) -> bytes:
        with find().open("rb") as file:
            file.seek(number * CHUNK)
            return file.read(CHUNK)

    network.blobs.add_unread(root, load, read)


def _index_of(path: Path) -> BlobIndex:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return index_blob(content)
