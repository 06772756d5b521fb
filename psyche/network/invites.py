"""An invite from any node's directory: whoever is in a run can bring others into it."""

from __future__ import annotations

from pathlib import Path

from psyche.config import MANIFEST, Manifest
from psyche.errors import PsycheError
from psyche.network.address import is_loopback
from psyche.network.identity import IDENTITY, in_use
from psyche.network.invite import MAX_ADDRESSES, Invite
from psyche.network.peer_book import PEERS, PeerBook, in_turns


def invite_of(directory: Path) -> Invite:
    """An invite with the addresses of the node in ``directory``, if it runs, and of the peers it met last.

    Raises :class:`PsycheError` where there is no node, or it has met nobody.
    """
    try:
        manifest = Manifest.decode((directory / MANIFEST).read_bytes())
    except OSError as error:
        raise PsycheError(
            f"there is no run in {directory} ({error.strerror}): give the --directory of a node or coordinator"
        ) from None
    book = PeerBook(directory / PEERS)
    own = book.own if in_use(directory / IDENTITY) else ()
    addresses = in_turns([own, *book.by_peer()])
    if not addresses:
        raise PsycheError(
            f"the node in {directory} does not run and has met nobody: start it, or pass on the invite it joined with"
        )
    return Invite(manifest.run_id, tuple(sorted(addresses[: 2 * MAX_ADDRESSES], key=is_loopback)[:MAX_ADDRESSES]))


def only_directory(runs: Path) -> Path:
    """The only run joined from this machine. Raises :class:`PsycheError` where there is none or more than one."""
    found = sorted(path.parent for path in runs.glob(f"*/{MANIFEST}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise PsycheError(f"several runs were joined from here, say which: {', '.join(map(str, found[:8]))}")
    raise PsycheError(f"no run was joined from here ({runs}): give the --directory of a node or coordinator")
