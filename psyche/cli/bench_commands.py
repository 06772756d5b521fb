"""``psyche bench``: measurements, with the rival in the same run. They are in a checkout, not in the wheel."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from psyche.errors import PsycheError

app = typer.Typer(invoke_without_command=True)

JsonFile = Annotated[Path | None, typer.Option(help="Also write the rows to this file.", show_default=False)]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_CHUNK = 4096


class BenchMissing(PsycheError):
    """The package was installed without its measurements."""

    exit_code = 2


@app.callback(help="Measure psyche, with the rival in the same run. Needs a checkout of the repository.")
def require_checkout(context: typer.Context) -> None:
    if find_spec("psyche.bench") is None:
        raise BenchMissing(
            "the bench needs a checkout of the repository: clone it, then run pip install -e . and psyche bench there"
        )
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def parameters(text: str) -> int:
    """Parse ``64M`` or ``16Mi``, rounded up to whole chunks of 4096. Raises ``typer.BadParameter``."""
    match = re.fullmatch(r"(\d+)([kMG]|[KMG]i)?", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number of parameters such as 4194304, 64M or 16Mi")
    return -(-int(match[1]) * _UNITS[match[2] or ""] // _CHUNK) * _CHUNK


def rate(text: str) -> int:
    """Parse ``100mbit`` as bit/s. Raises ``typer.BadParameter``."""
    from psyche.config.units import bits_per_second

    try:
        return bits_per_second(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def convergence(
    json: JsonFile = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train 20 tokens per parameter and a third seed: four times as long.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Run only rows whose name contains this text.", show_default=False)
    ] = None,
    codecs: Annotated[
        bool, typer.Option("--codecs", help="Compare all codecs instead, against tokens, rounds and bytes; 30 min.")
    ] = False,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Compare ways to train on during the exchange instead; 30 min.")
    ] = False,
    federated: Annotated[
        bool, typer.Option("--federated", help="Compare private corpora with a pooled one instead; 10 min.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --codecs: draw the curves to this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Compare the held-out loss of large-batch AdamW, DiLoCo fp32 and DiLoCo int8, at equal tokens and equal steps."""
    from psyche.bench.convergence.codec_loss import codec_section
    from psyche.bench.convergence.large_batch import default_section
    from psyche.bench.convergence.overlap_loss import overlap_section
    from psyche.bench.convergence.private_corpora import federated_section
    from psyche.data.progress_display import progress_display

    if codecs + overlap + federated > 1:
        raise typer.BadParameter("choose one of them", param_hint="--codecs, --overlap, --federated")
    if plot is not None and not codecs:
        raise typer.BadParameter("only the curves of --codecs can be drawn", param_hint="--plot")
    if codecs:
        codec_section(full=full).main(json, only=only, preparing=progress_display, plot=plot)
    elif federated:
        federated_section().main(json, only=only, preparing=progress_display)
    elif overlap:
        overlap_section(full=full).main(json, only=only, preparing=progress_display)
    else:
        default_section(full=full).main(json, only=only, preparing=progress_display)


@app.command()
def codec(
    codec: Annotated[
        list[str] | None,
        typer.Option(help="One of psyche's codecs; repeatable. Default: all but the sparse ones of other densities."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="One of psyche's backends; repeatable. Default: all that work here.")
    ] = None,
    size: Annotated[
        int,
        typer.Option(
            parser=parameters,
            metavar="COUNT",
            help="Parameters to time on, such as 64M or 16Mi; choose more than the CPU cache holds.",
        ),
    ] = "16Mi",  # type: ignore[assignment]  # typer parses defaults, too
    rivals: Annotated[bool, typer.Option(help="Also measure the codecs of other systems.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    json: JsonFile = None,
) -> None:
    """Measure speed and error of codecs and outer step, beside hivemind, bitsandbytes, torchao and plain PyTorch."""
    from psyche.bench.codec.codec_speed import Plan, main
    from psyche.data.progress_display import progress_display

    plan = Plan(size=size, codecs=tuple(codec or ()), backends=tuple(backend or ()), rivals=rivals)
    main(json, plan, threads=threads, preparing=progress_display)


@app.command()
def data(
    text: Annotated[int, typer.Option(help="MB of text to prepare.", min=1)] = 100,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=8)] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences read at once.", min=1)] = 64,
    json: JsonFile = None,
) -> None:
    """Measure speed and memory of psyche data prepare, and of random reads beside a plain memory map."""
    from psyche.bench.corpus_speed import Plan, main

    main(json, Plan(text_bytes=text * 10**6, sequence_length=sequence_length, batch=batch))


@app.command()
def exchange(
    peers: Annotated[int, typer.Option(help="Peers that exchange, each in its own process.", min=2)] = 4,
    params: Annotated[
        int, typer.Option(parser=parameters, metavar="COUNT", help="Parameters of each peer, such as 25M.")
    ] = "25M",  # type: ignore[assignment]  # typer parses defaults, too
    codec: Annotated[list[str] | None, typer.Option(help="One of psyche's codecs; repeatable. Default: int8.")] = None,
    exchange: Annotated[list[str] | None, typer.Option(help="gather, sharded or auto; repeatable.")] = None,
    reducers: Annotated[int, typer.Option(help="Reducers of each slice in a sharded exchange.", min=1)] = 2,
    rate: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="Rate of each link, such as 100mbit; needs root.")
    ] = None,
    up: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="Upload rate of each link, if it differs.")
    ] = None,
    slow_node: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="Rate of the last peer's link, if it differs.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Exchanges of each system; medians are shown.", min=1)] = 3,
    rivals: Annotated[bool, typer.Option(help="Also measure hivemind and gloo.")] = True,
    json: JsonFile = None,
) -> None:
    """Measure time, bytes, CPU and memory of whole exchanges on shaped links, beside hivemind and gloo."""
    from psyche.bench.exchange.exchange_speed import Plan, main

    plan = Plan(
        peers=peers,
        parameters=params,
        codecs=tuple(codec or ("int8",)),
        exchanges=tuple(exchange or ("gather",)),
        reducers=reducers,
        rate=rate,
        up=up,
        slow=slow_node,
        repeats=repeat,
        rivals=rivals,
    )
    main(json, plan)


@app.command()
def utilisation(
    config: Annotated[
        Path | None,
        typer.Option(help="A run to take model, data and codec from. Default: a small one.", show_default=False),
    ] = None,
    peers: Annotated[int, typer.Option(help="Nodes, each behind its own link.", min=2)] = 4,
    ratio: Annotated[
        float, typer.Option(help="Transfer time over a round's computing, without overlap.", min=0.01, max=10)
    ] = 0.3,
    rate: Annotated[
        int | None,
        typer.Option(parser=rate, metavar="RATE", help="Rate of each link. Default: follows from RATIO, with H = 40."),
    ] = None,
    overlap: Annotated[
        list[str] | None, typer.Option(help="none, tail or fragments; repeatable. Default: all of them.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count; two more come before.", min=1)] = 6,
    step_seconds: Annotated[float, typer.Option(help="Duration of an inner step.", min=0.001)] = 0.2,
    json: JsonFile = None,
) -> None:
    """Measure the share of its time that a node trains on slow links, with and without overlap. Needs root."""
    from psyche.bench.utilisation import Plan, main, with_modes

    plan = Plan(peers=peers, ratio=ratio, rate=rate, rounds=rounds, step_seconds=step_seconds, config=config)
    main(json, with_modes(plan, overlap or ()))


@app.command()
def join(
    peers: Annotated[int, typer.Option(help="Donors, each behind its own link.", min=1)] = 4,
    params: Annotated[
        int, typer.Option(parser=parameters, metavar="COUNT", help="Approximate parameters, of 8 bytes in the state.")
    ] = "15M",  # type: ignore[assignment]  # typer parses defaults, too
    rate: Annotated[int, typer.Option(parser=rate, metavar="RATE", help="Rate of each link.")] = "100mbit",  # type: ignore[assignment]
    at: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of a round's steps after which a newcomer starts; repeatable, one newcomer after another. "
            "Default: 0 and 0.8, so that the state changes during the second one's transfer.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    inner_steps: Annotated[int, typer.Option(help="H: inner steps per round.", min=1)] = 30,
    step_seconds: Annotated[float, typer.Option(help="Duration of an inner step.", min=0.001)] = 1.0,
    codec: Annotated[str, typer.Option(help="Codec of the run.")] = "int8",
    json: JsonFile = None,
) -> None:
    """Measure the time from psyche join to the first inner step on slow links, and what it costs donors. Needs root."""
    from psyche.bench.joining import Plan, main

    plan = Plan(
        peers=peers, parameters=params, rate=rate, inner_steps=inner_steps, step_seconds=step_seconds, codec=codec
    )
    main(json, replace(plan, at=tuple(at)) if at else plan)


@app.command()
def engine(
    config: Annotated[Path, typer.Option(help="A run to take model, data and batch from.")] = Path("configs/demo.yaml"),
    steps: Annotated[int, typer.Option(help="Steps that count, of each way in each repeat.", min=1)] = 40,
    repeat: Annotated[int, typer.Option(help="Turns of all ways; medians are shown.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of a training process.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda[:n].")] = "cpu",
    json: JsonFile = None,
) -> None:
    """Measure tokens/s of a node in a run, beside a plain PyTorch loop and transformers.Trainer on the same batches."""
    from psyche.bench.engine_speed import Plan, main
    from psyche.data.progress_display import progress_display

    plan = Plan(config=str(config), steps=steps, repeats=repeat, threads=threads, device=device)
    main(json, plan, progress_display)


@app.command()
def mixed(
    speed: Annotated[
        list[float] | None,
        typer.Option(help="Speed of a node, relative to the others; repeatable. Default: 1, 2 and 4.", min=0.01),
    ] = None,
    inner_steps: Annotated[int, typer.Option(help="H: inner steps per round of the fastest node.", min=1)] = 40,
    step_seconds: Annotated[float, typer.Option(help="Duration of the fastest node's inner step.", min=0.001)] = 0.2,
    rounds: Annotated[int, typer.Option(help="Rounds that count; three more come before.", min=1)] = 6,
    loss: Annotated[
        bool, typer.Option("--loss", help="Compare the losses of 1:2:4 and of equal nodes at equal tokens instead.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Measure nodes of different speeds in one run: whether they finish together, and each one's idle share."""
    from psyche.bench.convergence.unequal_steps import unequal_section
    from psyche.bench.mixed_speeds import Plan, main
    from psyche.data.progress_display import progress_display

    if loss:
        unequal_section().main(json, preparing=progress_display)
        return
    plan = Plan(tuple(speed or (1.0, 2.0, 4.0)), step_seconds=step_seconds, inner_steps=inner_steps, rounds=rounds)
    main(json, plan)
