"""The state of a terminal view: a pure fold over events."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import msgspec

from psyche.telemetry.events import (
    Attested,
    AuditEnded,
    AuditStarted,
    CaughtUp,
    Checkpointed,
    Diverged,
    Downloading,
    Event,
    GenesisJudged,
    Leaving,
    Left,
    MemberMetrics,
    Notice,
    PeerJoined,
    PeerLeft,
    PhaseChanged,
    PrivacySpent,
    Rejected,
    Resynchronised,
    RoundCertified,
    RoundStarted,
    RoundSummary,
    RunFinished,
    RunStarted,
    StepDone,
)

HISTORY = 64
"""Held-out losses kept for the sparkline."""
MESSAGES = 5
"""Messages shown below the table."""
FEW_MEMBERS = 16
"""A run's view reports audits that pass up to this many members; in a larger run they would hide everything else."""


class Member(msgspec.Struct, frozen=True):
    """What events say about one peer."""

    device: str = ""
    status: str = "connected"
    gone: bool = False
    accepted: int = 0
    """Number of its contributions that were accepted."""
    excluded: str = ""
    """Code of the reason for which its last excluded contribution was excluded."""
    metrics: MemberMetrics | None = None
    """Its latest metrics."""
    root: str = ""
    """State root that it attested last."""
    root_round: int = 0
    """Round of that state root; 0 before it attested any."""


class ViewState(msgspec.Struct, frozen=True):
    """Everything that a view shows. :meth:`apply` returns the next state and changes nothing in place."""

    me: str = ""
    """PeerID of this machine's node; empty for a view of the whole run."""
    run: RunStarted | None = None
    phase: str = "waiting"
    round: int | None = None
    inner_steps: int = 0
    members: tuple[str, ...] = ()
    peers: dict[str, Member] = {}
    step: StepDone | None = None
    download: Downloading | None = None
    audit: AuditStarted | None = None
    """The last audit that this machine's node started."""
    certified: RoundCertified | None = None
    summary: RoundSummary | None = None
    heldout: tuple[float, ...] = ()
    diverged: int = 0
    # The following fields are about this machine's node.
    without_metrics: dict[int, bool] = {}
    """Certified rounds for which the node has not reported metrics yet: whether its contribution was accepted."""
    uncertified: dict[int, int] = {}
    """Tokens that the node trained on in rounds that are not certified yet."""
    rounds_accepted: int = 0
    rounds_excluded: int = 0
    left_out: tuple[int, str] | None = None
    """The last round from which the node's contribution was excluded, and the code of the reason."""
    tokens_accepted: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    messages: tuple[Event, ...] = ()
    finished: RunFinished | None = None

    def apply(self, event: Event) -> ViewState:
        """Return the state after ``event``. Events that no view shows change nothing."""
        changes = _changes(event, self)
        if (
            (isinstance(event, Notice) and event.level != "debug")
            or isinstance(
                event,
                PeerJoined
                | PeerLeft
                | Rejected
                | Diverged
                | Resynchronised
                | CaughtUp
                | Checkpointed
                | PrivacySpent
                | Leaving
                | Left,
            )
            or (isinstance(event, AuditEnded) and self.shows(event))
        ):
            changes["messages"] = (*self.messages, event)[-MESSAGES:]
        return msgspec.structs.replace(self, **changes)

    def shows(self, event: AuditEnded) -> bool:
        """Return whether the view reports how an audit ended: its owner's, one with consequences, or any in a small
        run."""
        return event.matters or self.is_mine(event.peer) or (not self.me and len(self.members) <= FEW_MEMBERS)

    def is_mine(self, peer: str) -> bool:
        """Return whether ``peer`` is this machine's node."""
        return bool(self.me) and peer == self.me

    def agreeing(self) -> tuple[int, int]:
        """(members that attest the certified state of the last round, members that attest any state for it)."""
        if self.certified is None:
            return 0, 0
        roots = [peer.root for peer in self.peers.values() if peer.root_round == self.certified.round]
        return roots.count(self.certified.state_root), len(roots)

    def with_peer(self, peer: str, **changes: Any) -> dict[str, Member]:
        """``peers`` with the fields of one peer changed."""
        return self.peers | {peer: msgspec.structs.replace(self.peers.get(peer, Member()), **changes)}


@singledispatch
def _changes(event: Event, state: ViewState) -> dict[str, Any]:
    return {}


@_changes.register
def _(event: RunStarted, state: ViewState) -> dict[str, Any]:
    return {"run": event, "inner_steps": event.inner_steps}


@_changes.register
def _(event: GenesisJudged, state: ViewState) -> dict[str, Any]:
    return {"heldout": () if event.heldout_loss is None else (event.heldout_loss,)}


@_changes.register
def _(event: PeerJoined, state: ViewState) -> dict[str, Any]:
    return {"peers": state.with_peer(event.peer, device=event.device, status="connected", gone=False)}


@_changes.register
def _(event: PeerLeft, state: ViewState) -> dict[str, Any]:
    return {"peers": state.with_peer(event.peer, status=f"gone: {event.reason}", gone=True)}


@_changes.register
def _(event: PhaseChanged, state: ViewState) -> dict[str, Any]:
    return {"phase": event.phase, "round": event.round, "download": None}


@_changes.register
def _(event: AuditStarted, state: ViewState) -> dict[str, Any]:
    return {"audit": event, "phase": "auditing", "round": event.during}


@_changes.register
def _(event: Downloading, state: ViewState) -> dict[str, Any]:
    return {"download": event if event.received < event.total else None}


@_changes.register
def _(event: RoundStarted, state: ViewState) -> dict[str, Any]:
    # Peers that have left are forgotten: identities are free, so a list of all of them would grow without bound.
    peers = {name: peer for name, peer in state.peers.items() if not peer.gone or name in event.members}
    for name in event.members:
        peers[name] = msgspec.structs.replace(peers.get(name, Member()), status="training", gone=False)
    return {
        "round": event.round,
        "members": event.members,
        "inner_steps": event.inner_steps,
        "peers": peers,
        "step": None,
        "phase": "training",
        "download": None,
    }


@_changes.register
def _(event: StepDone, state: ViewState) -> dict[str, Any]:
    return {"step": event, "round": event.round}


@_changes.register
def _(event: RoundCertified, state: ViewState) -> dict[str, Any]:
    peers = dict(state.peers)
    for name in event.accepted:
        peer = peers.get(name, Member())
        peers[name] = msgspec.structs.replace(peer, status="accepted", accepted=peer.accepted + 1)
    for name, reason in event.excluded:
        peers[name] = msgspec.structs.replace(peers.get(name, Member()), status="excluded", excluded=reason)
    changes: dict[str, Any] = {"certified": event, "peers": peers}
    why = dict(event.excluded).get(state.me)
    if why is not None:
        changes["left_out"] = (event.round, why)
    if why is not None or state.me in event.accepted:
        changes |= _count_own(state, event.round, why is None)
    return changes


def _count_own(state: ViewState, number: int, used: bool) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "rounds_accepted": state.rounds_accepted + used,
        "rounds_excluded": state.rounds_excluded + (not used),
    }
    if number in state.uncertified:
        tokens = state.uncertified[number] if used else 0
        rest = {later: tokens for later, tokens in state.uncertified.items() if later > number}
        return changes | {"tokens_accepted": state.tokens_accepted + tokens, "uncertified": rest}
    return changes | {"without_metrics": state.without_metrics | {number: used}}


@_changes.register
def _(event: MemberMetrics, state: ViewState) -> dict[str, Any]:
    changes: dict[str, Any] = {"peers": state.with_peer(event.peer, metrics=event)}
    if event.peer != state.me:
        return changes
    changes |= {"bytes_up": state.bytes_up + event.bytes_up, "bytes_down": state.bytes_down + event.bytes_down}
    if event.round in state.without_metrics:  # the round was certified before its metrics were ready
        tokens = event.tokens if state.without_metrics[event.round] else 0
        rest = {later: used for later, used in state.without_metrics.items() if later > event.round}
        return changes | {"tokens_accepted": state.tokens_accepted + tokens, "without_metrics": rest}
    return changes | {"uncertified": state.uncertified | {event.round: event.tokens}}


@_changes.register
def _(event: Attested, state: ViewState) -> dict[str, Any]:
    return {"peers": state.with_peer(event.peer, root=event.state_root, root_round=event.round)}


@_changes.register
def _(event: RoundSummary, state: ViewState) -> dict[str, Any]:
    heldout = state.heldout if event.heldout_loss is None else (*state.heldout, event.heldout_loss)[-HISTORY:]
    return {"summary": event, "heldout": heldout}


@_changes.register
def _(event: Diverged, state: ViewState) -> dict[str, Any]:
    return {"diverged": state.diverged + 1, "peers": state.with_peer(event.peer, status="diverged")}


@_changes.register
def _(event: RunFinished, state: ViewState) -> dict[str, Any]:
    return {"finished": event, "phase": "finished"}
