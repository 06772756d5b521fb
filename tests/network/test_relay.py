"""A node that nobody can dial is reached through the member it joined by; each node has its own network namespace.

The addresses look public because libp2p does not ask peers to dial private ones back; they exist only in the
namespaces.
"""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm import start

NETWORK = "11.0.0"
UNREACHABLE = "/ip4/127.0.0.1/tcp/4001"
"""Listening address of a node behind a NAT: it can dial, but cannot be dialled."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Three namespaces on one bridge in a fourth."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    hub, *names = [f"psyche-test-{os.getpid()}-{number}" for number in range(4)]
    try:
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "name", "hub", "type", "bridge")
        ip("-n", hub, "link", "set", "hub", "up")
        for number, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "name", "wire", "type", "veth", "peer", "name", f"port{number}", "netns", hub)
            ip("-n", hub, "link", "set", f"port{number}", "master", "hub", "up")
            ip("-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "route", "add", "default", "dev", "wire")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def child(namespace: str, directory: Path, name: str, listen: str, *arguments: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__, str(directory), name, listen, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_two_nodes_that_nobody_can_dial_meet_through_a_relay(tmp_path: Path, namespaces: list[str]) -> None:
    processes = []
    try:
        relay = child(namespaces[0], tmp_path, "relay", f"/ip4/{NETWORK}.1/tcp/4001")
        processes.append(relay)
        address = line(relay)
        hidden = child(namespaces[1], tmp_path, "hidden", UNREACHABLE, address)
        processes.append(hidden)
        through = line(hidden)
        assert through.startswith(f"{address}/p2p-circuit/p2p/")
        caller = child(namespaces[2], tmp_path, "caller", UNREACHABLE, address, through.rpartition("/p2p/")[2])
        processes.append(caller)
        assert line(caller) == f"hello over {address}/p2p-circuit"
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def be_child(directory: Path, name: str, listen: str, bootstrap: list[str], target: list[str]) -> None:
    """Print an address (the relay its own, the hidden node the relayed one), or as the caller what it received."""
    async with await start(directory, name, bootstrap, listen=(listen,)) as node:

        async def echo(peer: str, request: bytes) -> bytes:
            return request

        await node.rpc.serve("echo", echo, max_request=16)
        if target:
            reply = await node.rpc.call(target[0], "echo", b"hello", timeout=60, max_reply=16)
            print(reply.decode(), "over", *(await node.connected())[target[0]], flush=True)
        known = await node.addresses()
        while bootstrap and not any("/p2p-circuit" in address for address in known):
            await asyncio.sleep(0.5)
            known = await node.addresses()
        print(next(text for text in known if not bootstrap or "/p2p-circuit" in text), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    folder, own, where, *others = sys.argv[1:]
    asyncio.run(be_child(Path(folder), own, where, others[:1], others[1:]))
