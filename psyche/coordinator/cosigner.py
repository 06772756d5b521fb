"""Coordinators' signatures: each persists what it has signed, and asks the others for their signatures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from psyche.config import Manifest
from psyche.ledger.signing_record import load_signed, save_signed
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.network.rpc import Rpc
from psyche.network.transport import Refused, Unreachable, Violation
from psyche.protocol.certificates import ConflictingSignature, SignedState, lead, seal, sign_reconfiguration
from psyche.protocol.messages import Reconfiguration, Seal, SigningRefused
from psyche.protocol.wire import MalformedMessage, decode, decode_envelope, encode_envelope

SIGNED_STATE = "signed.msgpack"
MAX_REQUEST = 1 << 20
CALL_SECONDS = 10.0
RETRY_SECONDS = 1.0


class Cosigner:
    """Signs reconfigurations and seals for this coordinator, and collects those of the others."""

    def __init__(self, manifest: Manifest, identity: Identity, rpc: Rpc, directory: Path) -> None:
        self._manifest, self._identity, self._rpc = manifest, identity, rpc
        self._path = directory / SIGNED_STATE
        self._signed_state = load_signed(self._path, manifest.run_id, SignedState())
        self._coordinators = manifest.resolved.coordinators
        self._lock = asyncio.Lock()

    async def serve(self) -> None:
        """Answer the other coordinators' requests for signatures."""
        await self._rpc.serve("sign", self._sign_for, max_request=MAX_REQUEST)

    async def term(self, above: int) -> int:
        """Return and persist a new term to lead in, above ``above`` and every term this coordinator has used."""
        place = self._coordinators.index(self._identity.peer_id)
        await self._persist(lambda signed_state: lead(signed_state, place, len(self._coordinators), above))
        return self._signed_state.term

    async def gather(
        self,
        body: Reconfiguration | Seal,
        round_number: int,
        needed: int,
        hinder: Callable[[ConflictingSignature | None], None],
    ) -> tuple[bytes, ...]:
        """Collect the signatures of ``needed`` coordinators for ``body``, however long it takes.

        ``hinder`` is called each time all were asked and too few signed: with the conflict of the highest number, or
        with None where nobody refuses and too few answer.
        """
        found: dict[str, bytes] = {}
        me = self._identity.peer_id
        others = [peer for peer in self._coordinators if peer != me]
        while True:
            refused: list[ConflictingSignature] = []
            if isinstance(body, Reconfiguration):
                # A signature binds its coordinator even if the reconfiguration never comes into force: sign last here.
                await self._ask_all(others, body, round_number, needed - 1, found, refused)
                if len(found) >= needed - 1:
                    await self._ask_all([me], body, round_number, needed, found, refused)
            else:
                await self._ask_all([me], body, round_number, needed, found, refused)
                await self._ask_all(others, body, round_number, needed, found, refused)
            if len(found) >= needed:
                return tuple(found.values())
            hinder(max(refused, key=lambda conflict: (conflict.reconfiguration, conflict.sealed), default=None))
            await asyncio.sleep(RETRY_SECONDS)

    async def _ask_all(
        self,
        peers: Sequence[str],
        body: Reconfiguration | Seal,
        round_number: int,
        enough: int,
        found: dict[str, bytes],
        refused: list[ConflictingSignature],
    ) -> None:
        """Ask ``peers`` that are not in ``found`` yet until ``enough`` are found; the rest is not waited for."""
        waiting = {asyncio.create_task(self._ask(peer, body, round_number)) for peer in peers if peer not in found}
        try:
            while waiting and len(found) < enough:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for peer, answer in (task.result() for task in done):
                    if isinstance(answer, ConflictingSignature):
                        refused.append(answer)
                    elif answer is not None:
                        found[peer] = answer
        finally:
            for task in waiting:
                task.cancel()

    async def _sign(self, body: Reconfiguration | Seal, round_number: int) -> bytes:
        if isinstance(body, Reconfiguration):
            await self._persist(
                lambda signed_state: sign_reconfiguration(
                    signed_state, round_number, body.previous, body.number, body.electorate
                )
            )
        else:
            await self._persist(
                lambda signed_state: seal(signed_state, round_number, body.previous, body.reconfiguration, body.record)
            )
        return self._sealed(body, round_number)

    def _sealed(self, body: Reconfiguration | Seal | SigningRefused, round_number: int) -> bytes:
        return encode_envelope(self._identity.seal(body.DOMAIN, self._manifest.run_id, round_number, body.encode()))

    async def _persist(self, step: Callable[[SignedState], SignedState]) -> None:
        async with self._lock:
            signed_state = step(self._signed_state)
            if signed_state != self._signed_state:
                await asyncio.to_thread(save_signed, self._path, self._manifest.run_id, signed_state)
                self._signed_state = signed_state

    async def _ask(
        self, peer: str, body: Reconfiguration | Seal, round_number: int
    ) -> tuple[str, bytes | ConflictingSignature | None]:
        """Return ``peer`` and its signature, or the conflict it names; None where it does not answer."""
        if peer != self._identity.peer_id:
            return peer, await self._call(peer, body, round_number)
        try:
            return peer, await self._sign(body, round_number)
        except ConflictingSignature as reason:
            return peer, reason

    async def _call(
        self, peer: str, body: Reconfiguration | Seal, round_number: int
    ) -> bytes | ConflictingSignature | None:
        with contextlib.suppress(
            Unreachable, Refused, Violation, MalformedMessage, BadSignature, WrongContext, TimeoutError
        ):
            reply = await self._rpc.call(
                peer, "sign", self._sealed(body, round_number), timeout=CALL_SECONDS, max_reply=MAX_REQUEST
            )
            envelope = decode_envelope(reply)
            open_envelope(envelope, domain=envelope.domain, run_id=self._manifest.run_id, round_number=round_number)
            if envelope.author != peer:
                raise WrongContext(f"{peer} answers with what {envelope.author} signed")
            if envelope.domain == SigningRefused.DOMAIN:
                against = decode(SigningRefused, envelope.body)
                return ConflictingSignature(
                    against.reason, reconfiguration=against.reconfiguration, sealed=against.sealed or b""
                )
            if (envelope.domain, envelope.body) == (body.DOMAIN, body.encode()):
                return reply
        return None

    async def _sign_for(self, peer: str, request: bytes) -> bytes:
        if peer not in self._coordinators:
            raise Refused("only coordinators of this run may ask for signatures")
        try:
            envelope = decode_envelope(request, MAX_REQUEST)
            open_envelope(envelope, domain=envelope.domain, run_id=self._manifest.run_id)
            if envelope.author != peer or envelope.domain not in (Reconfiguration.DOMAIN, Seal.DOMAIN):
                raise WrongContext("the request is not the caller's own reconfiguration or seal")
            reconfiguration = envelope.domain == Reconfiguration.DOMAIN
            body = decode(Reconfiguration, envelope.body) if reconfiguration else decode(Seal, envelope.body)
        except (MalformedMessage, BadSignature, WrongContext) as error:
            raise Refused(str(error)) from None
        try:
            return await self._sign(body, envelope.round)
        except ConflictingSignature as reason:
            against = SigningRefused(str(reason)[:200], reason.reconfiguration, reason.sealed or None)
            return self._sealed(against, envelope.round)
