"""Sentences for people, made from events and codes: each is one line of a log that needs no other line.

A *member* takes part in a round, its work in the round is its *contribution*, and a round that the members have voted
for is *certified*. The terminal views and the plain output both take their sentences from here.
"""

from __future__ import annotations

from psyche.protocol.messages import ExclusionReason
from psyche.telemetry.events import (
    Attested,
    Audited,
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
from psyche.telemetry.formatting import amount, clean, donor_name, number, peer_name, plural, rate, root_name, size
from psyche.telemetry.view_state import ViewState

PHASES = {
    "joining": "joining: fetching the model and the training data",
    "compiling": "compiling the model for faster training; this node joins when that is done",
    "warming": "warming up the optimizer until the next round starts",
    "waiting": "waiting for the round to start",
    "following": "not training in this round; waiting for the next one",
    "auditing": "auditing: re-running another member's training to check it (earns the same credit as training)",
    "training": "training",
    "committing": "committing: publishing the hash of this round's contribution",
    "exchanging": "exchanging contributions with the other members",
    "certifying": "waiting for the members to certify the round",
    "paused": "paused: too few members; waiting for more",
    "finished": "finished",
}
"""What a node does in each phase."""


GRADES = {
    "pass": "passed, the re-run gives the same contribution",
    "fail": "failed, the re-run gives a different contribution",
    "unsure": "inconclusive, the difference is between the thresholds for pass and fail",
    "unserved": "impossible, the audited node did not provide the states it trained from",
}
"""What this node found in an audit."""

OUTCOMES = {
    "passed": "passed: re-running the training gave the same contribution",
    "inconclusive": "ended without a result: the auditors' findings do not settle it, so nothing follows from it",
    "dropped": "was dropped: no auditor could do it in time, so nothing follows from it",
    "unserved": "was impossible: the node did not provide the states it trained from; it earns nothing for the round",
    "convicted": "failed: auditors re-ran the training and got a different contribution; the node is banned",
}
"""How an audit ended, by the members' records."""

EXCLUSIONS = {
    ExclusionReason.NO_COMMITMENT: (
        "it did not finish before the deadline",
        "this node did not finish its steps before the deadline",
    ),
    ExclusionReason.NOT_REVEALED: (
        "it committed to a contribution but did not reveal it in time",
        "this node committed to its contribution but did not reveal it in time",
    ),
    ExclusionReason.NOT_HELD: (
        "its payload reached too few members in time",
        "the payload reached too few members in time; the upload may be too slow",
    ),
    ExclusionReason.LOST_CONTACT: (
        "the coordinator lost contact with it",
        "the coordinator lost contact with this node",
    ),
}
"""Why a contribution was excluded from a round: the sentence for others, and the one for the node's owner."""

KEPT = "; kept as error feedback for the next round"
"""True of every codec but fp32, which has no error feedback."""


def round_of(state: ViewState, number: int | None) -> str:
    """``round 3/16``; empty before the first round."""
    if not number:
        return ""
    return f"round {number}/{state.run.rounds}" if state.run else f"round {number}"


def exclusion_sentence(reason: str, *, own: bool = False) -> str:
    """Say why a contribution was excluded, to others or to the node's owner. Unknown codes stay as they are."""
    for code, sentences in EXCLUSIONS.items():
        if reason == code:
            return sentences[own]
    return clean(reason)


def swarm_line(state: ViewState, event: Event) -> str:
    """``event`` as seen by somebody who watches the run; ``state`` includes it already. Empty: no line."""
    where = round_of(state, getattr(event, "round", None))
    match event:
        case GenesisJudged():
            return f"held-out loss before training: {number(event.heldout_loss)}"
        case RoundStarted() if state.certified is None:
            return f"{where}  started with {plural(len(event.members), 'member')}"
        case RoundCertified() if event.excluded:
            out = "; ".join(f"{peer_name(peer)}, {exclusion_sentence(reason)}" for peer, reason in event.excluded)
            return f"{where}  certified without the contribution of {out}"
        case RoundSummary():
            return (
                f"{where}  held-out loss {number(event.heldout_loss)}, training loss {number(event.train_loss)}, "
                f"{rate(event.tokens_per_second)}, {plural(event.members, 'contribution')}, "
                f"{size(event.bytes_up)} sent, state root {root_name(event.state_root)}"
            )
        case PeerJoined() | PeerLeft():
            present = sum(not peer.gone for peer in state.peers.values())
            return f"{message(event)}; {plural(present, 'member')} now"
        case RunStarted():
            invite = f"\njoin with: psyche join {clean(event.invite, 4096)}" if event.invite else ""
            return f"{_run(event)}; training starts when {plural(event.peers, 'member')} are ready{invite}"
        case AuditEnded() if not state.shows(event):
            return ""
        case StepDone() | PhaseChanged() | Downloading() | MemberMetrics() | Attested():
            return ""
        case _:
            return message(event)


def contributor_line(state: ViewState, event: Event) -> str:
    """``event`` as seen by the owner of a node that takes part; ``state`` includes it already. Empty: no line."""
    where = round_of(state, getattr(event, "round", None))
    match event:
        case RunStarted():
            return f"{_run(event)}; this node is {peer_name(state.me)}"
        case PhaseChanged():
            return f"{where}  {PHASES[event.phase]}" if where else PHASES[event.phase]
        case AuditStarted():
            whose = f"{peer_name(event.peer)}'s contribution to round {event.round}"
            what = f"auditing {whose}: re-running it as a check (earns the same credit as training)"
            return f"{round_of(state, event.during)}  {what}"
        case StepDone():
            speed = rate(event.tokens_per_second)
            return f"{where}  step {event.step}/{state.inner_steps}, loss {number(event.loss)}, {speed}"
        case Downloading():
            return f"fetching {clean(event.what)}: {size(event.received)} of {size(event.total)}"
        case RoundCertified():
            return f"{where}  {_own_contribution(state, event)}"
        case MemberMetrics() if event.peer == state.me:
            return f"{where}  {size(event.bytes_up)} sent, {size(event.bytes_down)} received"
        case PeerJoined() | PeerLeft() | Attested() | MemberMetrics() | GenesisJudged() | RoundStarted():
            return ""
        case AuditEnded() if not state.shows(event):
            return ""
        case _:
            return message_for(state, event)


def message_for(state: ViewState, event: Event) -> str:
    """Return :func:`message`, worded for the viewer if the event is about its own node."""
    match event:
        case Rejected() if state.is_mine(event.peer):
            return f"this node's {clean(event.what)} was refused: {clean(event.reason)}"
        case Diverged() if state.is_mine(event.peer):
            return f"this node's model differs from the certified one {_moment(event.round)}; fetching that"
        case _:
            return message(event)


def message(event: Event) -> str:
    """``event`` as a sentence; empty for events that have none."""
    match event:
        case PeerJoined():
            return f"{peer_name(event.peer)} joined ({clean(event.device, 60)})"
        case PeerLeft():
            return f"{peer_name(event.peer)} left ({clean(event.reason)})"
        case Rejected():
            return f"refused a {clean(event.what)} from {peer_name(event.peer)}: {clean(event.reason)}"
        case Diverged():
            roots = f"state root {root_name(event.found)} instead of {root_name(event.expected)}"
            return f"{peer_name(event.peer)} holds a different model {_moment(event.round)} ({roots})"
        case Resynchronised():
            return f"model restored to the state {_moment(event.round)}, fetched from {donor_name(event.donor)}"
        case CaughtUp():
            return f"caught up: applied {plural(event.rounds, 'missed round')}, up to round {event.round}"
        case Checkpointed():
            return f"checkpoint {_moment(event.round)}: {clean(event.path, 400)}"
        case RoundSummary():
            return f"held-out loss {_moment(event.round)}: {number(event.heldout_loss)}"
        case Audited():
            error = f" (relative error {event.error:.4f})" if event.outcome == "measured" else ""
            whose = f"{peer_name(event.peer)}'s contribution to round {event.round}"
            return f"audit of {whose}: {GRADES[event.grade]}{error}"
        case AuditEnded():
            lied = [f"; auditor {peer_name(one)} reported a false result and is banned" for one in event.lied]
            whose = f"{peer_name(event.peer)}'s contribution to round {event.round}"
            return f"audit of {whose} {OUTCOMES[event.outcome]}{''.join(lied)}"
        case PrivacySpent():
            spent = f"ε = {event.epsilon:.3g} of {event.budget:g} at δ = {event.delta:g}"
            return f"privacy budget {_moment(event.round)}: {spent}; {plural(event.rounds_left, 'round')} left"
        case Leaving():
            bound = f" (up to {event.seconds:.0f} s)" if event.seconds else ""
            return f"leaving{bound}: {clean(event.what)}"
        case Left():
            return f"left the run: {clean(event.outcome)}"
        case Notice(level="debug"):
            return ""
        case Notice(level="info"):
            return clean(event.text, 400)
        case Notice():
            return f"{event.level}: {clean(event.text, 400)}"
        case RunFinished():
            return f"run finished after {plural(event.rounds, 'round')}: {clean(event.reason)}"
        case _:
            return ""


def _moment(number: int) -> str:
    return f"after round {number}" if number else "before round 1"


def _run(event: RunStarted) -> str:
    length = f"{plural(event.rounds, 'round')} of {plural(event.inner_steps, 'inner step')}"
    return f"run {clean(event.name)}: {amount(event.parameters)} parameters, {length}, codec {clean(event.codec, 40)}"


def _own_contribution(state: ViewState, event: RoundCertified) -> str:
    root = f"state root {root_name(event.state_root)}"
    reason = dict(event.excluded).get(state.me)
    if reason is not None:
        kept = "" if state.run is not None and state.run.codec == "fp32" else KEPT
        return f"contribution not accepted: {exclusion_sentence(reason, own=True)}{kept}"
    if state.me in event.accepted:
        return f"contribution accepted ({state.rounds_accepted:,} so far); {root}"
    if (audit := state.audit) is not None and audit.during == event.round:
        return f"certified; this node audited {peer_name(audit.peer)} instead of training; {root}"
    return f"certified without a contribution of this node; {root}"
