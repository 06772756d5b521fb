"""Events as lines of a log file: plain text, one line each, understandable on its own."""

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
    "joining": "fetching what the run needs, then waiting for the next round",
    "compiling": "compiling the model so that it trains faster; this machine joins when that is done",
    "warming": "warming up until the next round begins",
    "waiting": "waiting for enough members to start",
    "following": "waiting for the next round; the other members train this one",
    "auditing": "auditing: repeating another member's work to check it, for the same credit as training",
    "training": "training on this machine",
    "committing": "sealing this round's work",
    "exchanging": "exchanging work with the other members",
    "certifying": "waiting for the members to agree on the round",
    "paused": "paused: too few members are left, waiting for more",
    "finished": "finished",
}
"""What a node's phase means to the person who owns the machine."""


GRADES = {
    "pass": "it is what was asked for",
    "fail": "it is not what was asked for",
    "unsure": "too close to say",
    "unserved": "what it rests on was not handed over",
}
"""What an audit found, in words."""

EXCLUSIONS = {
    ExclusionReason.NO_COMMITMENT: (
        "no commitment before the deadline",
        "this machine was not done when the round closed",
    ),
    ExclusionReason.NOT_REVEALED: (
        "the commitment was not revealed in time",
        "this machine committed its work but did not reveal it in time",
    ),
    ExclusionReason.NOT_HELD: (
        "the payload reached too few members in time",
        "it did not reach enough members in time; the upload may be too slow",
    ),
    ExclusionReason.LOST_CONTACT: (
        "the coordinator lost contact with it",
        "the coordinator lost contact with this machine",
    ),
}
"""Why a member's work was not used: the sentence for others, and the one for the owner of the machine."""


def round_of(state: ViewState, number: int | None) -> str:
    """``round 3/16``; empty before the first."""
    if not number:
        return ""
    return f"round {number}/{state.run.rounds}" if state.run else f"round {number}"


def exclusion_sentence(reason: str, *, own: bool = False) -> str:
    """Say why work was not used, to others or to the owner of the machine. Codes not known here stay as they are."""
    for code, sentences in EXCLUSIONS.items():
        if reason == code:
            return sentences[own]
    return clean(reason)


def swarm_line(state: ViewState, event: Event) -> str:
    """``event`` for somebody who watches the run; ``state`` already includes it. Empty: not worth a line."""
    match event:
        case GenesisJudged():
            return f"before training  held-out {number(event.heldout_loss)}"
        case RoundStarted() if state.certified is None:
            return f"{round_of(state, event.round)}  started with {plural(len(event.members), 'member')}"
        case RoundCertified() if event.excluded:
            out = ", ".join(f"{peer_name(peer)} ({exclusion_sentence(reason)})" for peer, reason in event.excluded)
            return f"{round_of(state, event.round)}  left out: {out}"
        case RoundSummary():
            return (
                f"{round_of(state, event.round)}  held-out {number(event.heldout_loss)}  "
                f"train {number(event.train_loss)}  {rate(event.tokens_per_second)}  "
                f"{plural(event.members, 'member')}  sent {size(event.bytes_up)}  state {root_name(event.state_root)}"
            )
        case PeerJoined() | PeerLeft():
            present = sum(not peer.gone for peer in state.peers.values())
            return f"{message(event)}, {plural(present, 'member')} now"
        case RunStarted():
            invite = f"  join with: psyche join {clean(event.invite, 4096)}" if event.invite else ""
            waiting = f"starts with {plural(event.peers, 'member')}"
            return f"{_run(event)}, {waiting}{invite}"
        case StepDone() | PhaseChanged() | Downloading() | MemberMetrics() | Attested():
            return ""
        case _:
            return message(event)


def contributor_line(state: ViewState, event: Event) -> str:
    """``event`` for somebody whose machine takes part; ``state`` already includes it. Empty: not worth a line."""
    match event:
        case RunStarted():
            return f"{_run(event)}; this machine is {peer_name(state.me)}"
        case PhaseChanged():
            where = round_of(state, event.round)
            return f"{where}  {PHASES[event.phase]}" if where else PHASES[event.phase]
        case AuditStarted():
            what = f"repeating {peer_name(event.peer)}'s work in round {event.round} to check it"
            return f"{round_of(state, event.during)}  auditing: {what}, for the same credit as training"
        case StepDone():
            return (
                f"{round_of(state, event.round)}  step {event.step}/{state.inner_steps}  "
                f"loss {number(event.loss)}  {rate(event.tokens_per_second)}"
            )
        case Downloading():
            return f"fetching {clean(event.what)}: {size(event.received)} of {size(event.total)}"
        case RoundCertified():
            return f"{round_of(state, event.round)}  {_verdict(state, event)}"
        case MemberMetrics() if event.peer == state.me:
            return f"{round_of(state, event.round)}  sent {size(event.bytes_up)}, received {size(event.bytes_down)}"
        case PeerJoined() | PeerLeft() | Attested() | MemberMetrics() | GenesisJudged() | RoundStarted():
            return ""
        case _:
            return message_for(state, event)


def message_for(state: ViewState, event: Event) -> str:
    """As :func:`message`, but events about the viewer's own machine say so."""
    match event:
        case Rejected() if state.is_mine(event.peer):
            return f"refused: this machine's {clean(event.what)} ({clean(event.reason)})"
        case Diverged() if state.is_mine(event.peer):
            return f"this machine's model is not the others' {_moment(event.round)}; fetching theirs"
        case _:
            return message(event)


def message(event: Event) -> str:
    """``event`` as one line that needs nothing else to be understood; empty for those that have no such line."""
    match event:
        case PeerJoined():
            return f"{peer_name(event.peer)} joined ({clean(event.device, 60)})"
        case PeerLeft():
            return f"{peer_name(event.peer)} left ({clean(event.reason)})"
        case Rejected():
            return f"refused: {clean(event.what)} from {peer_name(event.peer)} ({clean(event.reason)})"
        case Diverged():
            held = f"holds {root_name(event.found)}, the others {root_name(event.expected)}"
            return f"diverged: {peer_name(event.peer)} {held} {_moment(event.round)}"
        case Resynchronised():
            return f"model restored to the state {_moment(event.round)}, fetched from {donor_name(event.donor)}"
        case CaughtUp():
            return f"caught up: took the outer steps of {plural(event.rounds, 'round')}, up to round {event.round}"
        case Checkpointed():
            return f"checkpoint {_moment(event.round)}: {clean(event.path, 400)}"
        case RoundSummary():
            return f"{_moment(event.round)} the model's held-out loss is {number(event.heldout_loss)}"
        case Audited():
            whose = f"{peer_name(event.peer)}'s work in round {event.round}"
            return f"audited {whose}: {GRADES[event.grade]}" + (
                f" (relative error {event.error:.4f})" if event.outcome == "measured" else ""
            )
        case AuditEnded():
            return _ended(event)
        case PrivacySpent():
            spent = f"ε {event.epsilon:.3g} of {event.budget:g} at δ {event.delta:g}"
            return f"privacy spent {_moment(event.round)}: {spent}; {plural(event.rounds_left, 'round')} left in it"
        case Leaving():
            bound = f" (at most {event.seconds:.0f} s)" if event.seconds else ""
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


def _ended(event: AuditEnded) -> str:
    """Nothing of an audit that came to nothing, as most do."""
    said = [f"{peer_name(one)} was convicted of what it said of {peer_name(event.peer)}" for one in event.lied]
    if event.outcome == "convicted":
        said.append(f"{peer_name(event.peer)} was convicted of its work in round {event.round}")
    elif event.outcome == "unserved":
        said.append(f"{peer_name(event.peer)} did not show its work in round {event.round}, and is not paid for it")
    return "; ".join(said)


def _moment(number: int) -> str:
    return f"after round {number}" if number else "before round 1"


def _run(event: RunStarted) -> str:
    shape = f"{plural(event.rounds, 'round')} of {plural(event.inner_steps, 'step')}"
    return f"run {clean(event.name)}: {amount(event.parameters)} parameters, {shape}, codec {clean(event.codec, 40)}"


def _verdict(state: ViewState, event: RoundCertified) -> str:
    reason = dict(event.excluded).get(state.me)
    if reason is not None:
        return f"your work was not used: {exclusion_sentence(reason, own=True)}"
    if state.me in event.accepted:
        so_far = f"{plural(state.rounds_accepted, 'round')} so far"
        return f"your work was accepted ({so_far}), state {root_name(event.state_root)}"
    if (audit := state.audit) is not None and audit.during == event.round:
        return f"this machine audited {peer_name(audit.peer)} instead of training, state {root_name(event.state_root)}"
    return f"certified without work of this machine, state {root_name(event.state_root)}"
