"""The libp2p daemon (p2pd), a child process that never outlives this one, controlled over unix sockets.

hivemind starts p2pd too, but leaves it running when its parent is killed, does not notice a port that is taken,
and cannot read Ed25519 identities. So the process is ours and hivemind attaches to it (``P2P.replicate``).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from psyche.errors import PsycheError
from psyche.network.address import check_port_free
from psyche.network.identity import Identity

START_SECONDS = 15.0
STOP_SECONDS = 3.0
READ_BUFFER = 1 << 18
"""Bytes that asyncio buffers of one stream before it stops reading from the daemon."""

log = logging.getLogger(__name__)

# Becomes p2pd, after asking the kernel to kill it when its parent is gone. A wrapper instead of preexec_fn, because
# Python code between fork and exec may deadlock where other threads run. The parent may have died before the
# request was made; then getppid() is somebody else already.
_WRAPPER = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class DaemonError(PsycheError):
    """The daemon refused a request, or has ended; the text says why."""


class Daemon:
    """A running p2pd. :meth:`start` it from the thread that lives as long as the process.

    Linux sends the parent-death signal when the *thread* that started the child ends. Our event loop runs on the
    main thread, so that is the process's end; a loop on a short-lived thread would take its daemon with it.
    """

    def __init__(self, process: Process, directory: Path, lock: int) -> None:
        self.process = process
        self._lock = lock
        self.p2p: Any = None
        self._directory = directory
        self._output: asyncio.Task[str] | None = None

    @classmethod
    async def start(
        cls,
        identity: Identity,
        listen: Sequence[str],
        announce: Sequence[str],
        relays: Sequence[str],
        *,
        relays_others: bool,
    ) -> Self:
        """Start p2pd and attach to it.

        ``listen`` and ``announce`` are multiaddresses without a PeerID; ``relays`` are those (with PeerID) through
        which to be reachable behind a NAT; with ``relays_others`` it does the same for them. Raises
        :class:`PsycheError` naming the cause and the mend.
        """
        for address in listen:
            check_port_free(address)
        async with contextlib.AsyncExitStack() as undo:
            lock = _lock(identity.path)
            undo.callback(os.close, lock)
            # Not under $TMPDIR: the path of a unix socket has at most 107 bytes. mkdtemp makes it ours alone (0700).
            directory = Path(tempfile.mkdtemp(prefix="psyche-", dir="/tmp"))
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            process = await _spawn(_arguments(directory, identity, listen, announce, relays, relays_others))
            undo.push_async_callback(_end, process)
            daemon = cls(process, directory, lock)
            await daemon._attach(identity)
            undo.pop_all()
        return daemon

    @property
    def control(self) -> Path:
        """The unix socket on which the daemon takes requests."""
        return self._directory / "control"

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def request(self, request: Any, seconds: float) -> tuple[Any, StreamReader, StreamWriter]:
        """Send one control request on a connection of its own: (response, reader, writer), the last to be closed.

        Raises :class:`DaemonError` with the daemon's reason, or TimeoutError after ``seconds``. hivemind's
        own client leaks the connection whenever a peer cannot be dialled; here a failure always closes it.
        """
        writer = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(str(self.control), limit=READ_BUFFER)
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise DaemonError(response.error.msg)
            return response, reader, writer
        except BaseException as error:
            if writer is not None:
                writer.close()
            if isinstance(error, (OSError, EOFError)) and not isinstance(error, TimeoutError):
                raise DaemonError("the local libp2p daemon is gone; start psyche again") from None
            raise

    async def close(self) -> None:
        """Detach, end the process and remove its sockets."""
        if self.p2p is not None:
            await self.p2p.shutdown()
        await _end(self.process)
        if self._output is not None:
            await self._output
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)

    async def _attach(self, identity: Identity) -> None:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._output = asyncio.create_task(_drain(self.process, ready))
        try:
            peer_id = await asyncio.wait_for(ready, START_SECONDS)
        except TimeoutError:
            raise PsycheError(f"the libp2p daemon did not start within {START_SECONDS:.0f} s; try again") from None
        if peer_id != identity.peer_id:
            raise PsycheError(f"the identity file {identity.path} changed while it was being read; start again")
        self.p2p = await _private_p2p(self._directory).replicate(Multiaddr(f"/unix{self._directory}/control"))


def _private_p2p(directory: Path) -> Any:
    """hivemind's P2P, with its listening socket in our directory instead of /tmp."""
    return type("PrivateP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{directory}/"})


def _arguments(
    directory: Path,
    identity: Identity,
    listen: Sequence[str],
    announce: Sequence[str],
    relays: Sequence[str],
    relays_others: bool,
) -> list[str]:
    """p2pd's command line, as ``hivemind.P2P.create`` would write it, less its bootstrap.

    Given bootstrap peers p2pd dials them one after another for up to a minute and exits if none answers, so
    NetworkNode connects by itself.
    """
    arguments = {
        "listen": f"/unix{directory}/control",
        "id": str(identity.path.resolve()),
        "hostAddrs": ",".join(listen),
        "dhtServer": "1",
        "autonat": "1",
        "connManager": "1",
        "natPortMap": "1",
        "relay": "1",
        "relayService": "1" if relays_others else "0",
        "tls": "1",
        "noise": "0",  # AES in hardware moves a quarter more bytes than ChaCha20; all our nodes speak TLS
        "idleTimeout": f"{START_SECONDS:.0f}s",
        "persistentConnMaxMsgSize": str(4 << 20),
    }
    if announce:
        arguments["announceAddrs"] = ",".join(announce)
    if relays:
        # Unless relayDiscovery is 0 the daemon searches the DHT for relays, finds none, and ignores the trusted ones.
        arguments |= {"autoRelay": "1", "relayDiscovery": "0", "trustedRelays": ",".join(relays)}
    return [f"-{name}={value}" for name, value in arguments.items()]


async def _spawn(arguments: list[str]) -> Process:
    binary = str(resources.files("hivemind.hivemind_cli") / "p2pd")
    if not os.access(binary, os.X_OK):
        raise PsycheError("hivemind is installed without its libp2p daemon; reinstall it from a wheel (Linux x86_64)")
    environment = os.environ | {"GOLOG_LOG_LEVEL": "debug" if log.isEnabledFor(logging.DEBUG) else "fatal"}
    command = [sys.executable, "-I", "-S", "-c", _WRAPPER, str(os.getpid()), binary, *arguments]
    # A session of its own: Ctrl-C is for us, and we end the daemon when the goodbyes are said.
    return await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment, start_new_session=True
    )


async def _drain(process: Process, ready: asyncio.Future[str]) -> str:
    """Read the daemon's output for as long as it runs (a full pipe would stop it); tell ``ready`` its PeerID."""
    assert process.stdout is not None
    line = ""
    while raw := await _line(process.stdout):
        line = raw.decode(errors="replace").strip()
        log.debug("p2pd: %s", line)
        if line.startswith("Peer ID:") and not ready.done():
            ready.set_result(line.removeprefix("Peer ID:").strip())
    if not ready.done():
        ready.set_exception(PsycheError(_explain(line)))
    return line


async def _line(reader: StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await reader.readexactly(error.consumed)


def _explain(line: str) -> str:
    """Return a person's sentence for p2pd's last words."""
    reason = re.sub(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ", "", line)
    if "failed to parse multiaddr" in reason or "can only dial TCP" in reason:
        return f"a listen or announce address is not valid ({reason}); write it like /ip4/0.0.0.0/tcp/4001"
    if "failed to listen" in reason:
        return f"cannot listen ({reason}); choose an address of this machine and a free port with --listen or --port"
    return f"the libp2p daemon did not start: {reason or 'it said nothing'}"


def _lock(path: Path) -> int:
    """Lock a key file until the returned descriptor is closed or the process ends.

    Two nodes with one PeerID would receive each other's calls, and sign conflicting messages.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise PsycheError(f"cannot read the identity file {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise PsycheError(f"another psyche runs with the identity {path}; give this one a file of its own") from None
    except OSError:  # a file system without locks: nothing is lost but this check
        log.debug("%s cannot be locked", path)
    return descriptor


async def _end(process: Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
            return
