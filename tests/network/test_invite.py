"""Invites: an encoded invite yields the same run and addresses; anything else is refused in one sentence."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.errors import PsycheError
from psyche.network.address import is_loopback, peer_of, split_address
from psyche.network.invite import Invite

PEER = "12D3KooWFSX9rPxi5p8zYYzETNrXG8a7d7bHTxcQW3SGSkKiB9Qh"
INVITE = Invite(bytes(range(32)), (f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}", f"/dns4/a.example/tcp/1/p2p/{PEER}"))
TEXT = INVITE.encode()


def test_an_invite_round_trips_through_its_text() -> None:
    assert TEXT.startswith("psyche1")
    assert Invite.parse(f"  {TEXT}\n") == INVITE


@given(st.integers(8, len(TEXT) - 1), st.characters(codec="ascii"))
def test_a_mistyped_character_is_detected(at: int, typed: str) -> None:
    text = TEXT[:at] + typed + TEXT[at + 1 :]
    if text.strip() != TEXT:
        with pytest.raises(PsycheError):
            Invite.parse(text)


@given(st.integers(0, len(TEXT) - 1))
def test_a_truncated_invite_is_detected(length: int) -> None:
    with pytest.raises(PsycheError):
        Invite.parse(TEXT[:length])


@given(st.text(max_size=60) | st.text(max_size=60).map("psyche1".__add__))
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(PsycheError) as refusal:
        Invite.parse(text)
    assert "\n" not in str(refusal.value)


def test_another_version_is_named() -> None:
    with pytest.raises(PsycheError, match=r"version 2.*install"):
        Invite.parse("psyche2" + TEXT[7:])


@pytest.mark.parametrize("addresses", [(), (INVITE.addresses[0],) * 17, ("/ip4/1.2.3.4/tcp/1",), ("garbage",)])
def test_an_invite_holds_a_few_valid_addresses(addresses: tuple[str, ...]) -> None:
    with pytest.raises(PsycheError):
        Invite(bytes(32), addresses)


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/1.2.3.4/tcp/4001/p2p/{PEER}",
        f"/ip6/::1/tcp/4001/p2p/{PEER}",
        f"/dns/node.example.org/tcp/1/p2p/{PEER}",
        f"/ip4/1.2.3.4/udp/4001/quic-v1/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
    ],
)
def test_addresses_are_split(text: str) -> None:
    transport, peer_id = split_address(text)
    assert (f"{transport}/p2p/{peer_id}", peer_of(text)) == (text, PEER)


@pytest.mark.parametrize(
    "transport",
    [
        "",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3/tcp/1",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/udp/1",
        "ip4/1.2.3.4/tcp/1",
        "/ip4/1.2.3.4/tcp/1/x",
        "/dns/-a/tcp/1",
        "/ip4/01.2.3.4/tcp/1",
        "/unix/tmp/x",
        "/ip6/::g/tcp/1",
    ],
)
def test_bad_addresses_are_refused(transport: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        split_address(f"{transport}/p2p/{PEER}")


def test_loopback_is_recognised() -> None:
    assert is_loopback("/ip4/127.0.0.1/tcp/1")
    assert is_loopback("/ip6/::1/tcp/1")
    assert not is_loopback("/ip4/10.0.0.1/tcp/1")
    assert not is_loopback("/dns/localhost/tcp/1")


def test_a_garbled_invite_is_refused_without_loading_torch() -> None:
    code = "import sys, psyche.network.invite; sys.exit('torch' in sys.modules or 'hivemind' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
