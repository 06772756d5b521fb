"""``psyche bench``: measurements, with the rival in the same run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from psyche.rates import bits_per_second

app = typer.Typer(help="Measure, with the rival in the same run.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option(help="Write the rows here, too.", show_default=False)]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_CHUNK = 4096


@app.command()
def convergence(
    json: JsonFile = None,
    full: Annotated[
        bool, typer.Option("--full", help="20 tokens per parameter and a third seed; takes four times as long.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(help="Run only rows whose name contains this text.", show_default=False),
    ] = None,
    codecs: Annotated[
        bool,
        typer.Option("--codecs", help="Compare all codecs instead, against tokens, rounds and bytes; half an hour."),
    ] = False,
    overlap: Annotated[
        bool,
        typer.Option("--overlap", help="Compare ways to train on during the exchange instead; half an hour."),
    ] = False,
    federated: Annotated[
        bool,
        typer.Option("--federated", help="Compare private corpora with a pooled one instead; ten minutes."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --codecs: draw the curves to this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Held-out loss of large-batch AdamW, DiLoCo fp32 and DiLoCo int8, at equal tokens and at equal steps."""
    from psyche.bench import convergence as large_batch
    from psyche.bench import federated as private_corpora
    from psyche.bench.overlap import compare as ways_to_overlap
    from psyche.bench.quality import compare as codec_quality
    from psyche.data.progress_display import progress_display

    if codecs + overlap + federated > 1:
        raise typer.BadParameter("one section at a time", param_hint="--codecs, --overlap, --federated")
    if codecs:
        codec_quality.main(json, plot, full=full, only=only, preparing=progress_display)
    elif plot is not None:
        raise typer.BadParameter("only the curves of --codecs are drawn", param_hint="--plot")
    elif federated:
        private_corpora.main(json, only=only, preparing=progress_display)
    elif overlap:
        ways_to_overlap.main(json, full=full, only=only, preparing=progress_display)
    else:
        large_batch.main(json, full=full, only=only, preparing=progress_display)


def parameters(text: str) -> int:
    """``64M`` or ``16Mi`` as a number, rounded up to whole chunks of 4096. Raises ``typer.BadParameter``."""
    match = re.fullmatch(r"(\d+)([kMG]|[KMG]i)?", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number of parameters such as 4194304, 64M or 16Mi")
    return -(-int(match[1]) * _UNITS[match[2] or ""] // _CHUNK) * _CHUNK


@app.command()
def codec(
    codec: Annotated[
        list[str] | None,
        typer.Option(help="One of psyche's codecs; repeatable. Default: all but the densities other than 64."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="One of psyche's backends; repeatable. Default: all that work here."),
    ] = None,
    size: Annotated[
        int,
        typer.Option(
            parser=parameters,
            metavar="COUNT",
            help="Parameters to time on, such as 64M or 16Mi; should not fit the cache.",
        ),
    ] = "16Mi",  # type: ignore[assignment]  # typer parses defaults, too
    rivals: Annotated[bool, typer.Option(help="Measure other people's codecs beside ours.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    json: JsonFile = None,
) -> None:
    """Speed and error of the codecs and the outer step, beside hivemind, bitsandbytes, torchao and plain PyTorch."""
    from psyche.bench.codec.compare import Plan, main
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
    """Speed and memory of psyche data prepare, and of random access to what it makes, beside a plain memory map."""
    from psyche.bench.data import Plan, main

    main(json, Plan(text_bytes=text * 10**6, sequence_length=sequence_length, batch=batch))


def rate(text: str) -> int:
    """``100mbit`` as bits a second. Raises ``typer.BadParameter``."""
    try:
        return bits_per_second(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def exchange(
    peers: Annotated[int, typer.Option(help="Peers that exchange, each a process.", min=2)] = 4,
    params: Annotated[
        int, typer.Option(parser=parameters, metavar="COUNT", help="Parameters of each, such as 25M.")
    ] = "25M",  # type: ignore[assignment]  # typer parses defaults, too
    codec: Annotated[list[str] | None, typer.Option(help="One of psyche's codecs; repeatable. Default: int8.")] = None,
    exchange: Annotated[list[str] | None, typer.Option(help="gather, sharded or auto; repeatable.")] = None,
    reducers: Annotated[int, typer.Option(help="Sharded: peers that add up each slice.", min=1)] = 2,
    rate: Annotated[
        int | None,
        typer.Option(parser=rate, metavar="RATE", help="Of each link, such as 100mbit; needs root. Default: no limit."),
    ] = None,
    up: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="Of each link's way up, where that differs.")
    ] = None,
    slow_node: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="Of the last peer's link, where that differs.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Exchanges of each system; medians are shown.", min=1)] = 3,
    rivals: Annotated[bool, typer.Option(help="Measure hivemind and gloo in the same run.")] = True,
    json: JsonFile = None,
) -> None:
    """Seconds, bytes, CPU and memory of whole exchanges on shaped links, beside hivemind and gloo."""
    from psyche.bench.exchange.compare import Plan, main

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
    peers: Annotated[int, typer.Option(help="Nodes, each behind a link of its own.", min=2)] = 4,
    ratio: Annotated[
        float, typer.Option(help="What the exchange takes without overlap, over a round's computing.", min=0.01, max=10)
    ] = 0.3,
    rate: Annotated[
        int | None,
        typer.Option(parser=rate, metavar="RATE", help="Of each link. Default: as RATIO asks, with 40 steps a round."),
    ] = None,
    overlap: Annotated[
        list[str] | None, typer.Option(help="none, tail or fragments; repeatable. Default: all of them.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count; two more come before.", min=1)] = 6,
    step_seconds: Annotated[float, typer.Option(help="What an inner step takes.", min=0.001)] = 0.2,
    json: JsonFile = None,
) -> None:
    """The share of its time that a node trains on slow links, with and without overlap. Needs root."""
    from psyche.bench.utilisation.compare import main
    from psyche.bench.utilisation.plan import Plan, only

    plan = Plan(peers=peers, ratio=ratio, rate=rate, rounds=rounds, step_seconds=step_seconds, config=config)
    main(json, only(plan, overlap or ()))


@app.command()
def join(
    peers: Annotated[int, typer.Option(help="Donors, each behind a link of its own.", min=1)] = 4,
    params: Annotated[
        int,
        typer.Option(parser=parameters, metavar="COUNT", help="Parameters, about; the state is 8 bytes each."),
    ] = "15M",  # type: ignore[assignment]  # typer parses defaults, too
    rate: Annotated[int, typer.Option(parser=rate, metavar="RATE", help="Of each link.")] = "100mbit",  # type: ignore[assignment]
    at: Annotated[
        list[float] | None,
        typer.Option(
            help="After which share of a round's steps a newcomer comes; repeatable, one newcomer after the other. "
            "Default: 0 and 0.8, so that the second one's state changes on the way.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    inner_steps: Annotated[int, typer.Option(help="H: inner steps a round.", min=1)] = 30,
    step_seconds: Annotated[float, typer.Option(help="What an inner step takes.", min=0.001)] = 1.0,
    codec: Annotated[str, typer.Option(help="Of what a round exchanges.")] = "int8",
    json: JsonFile = None,
) -> None:
    """From psyche join to the first inner step, beside what the line takes, and the cost to the donors. Needs root."""
    from psyche.bench.join.compare import main
    from psyche.bench.join.plan import Plan

    plan = Plan(
        peers=peers, parameters=params, rate=rate, inner_steps=inner_steps, step_seconds=step_seconds, codec=codec
    )
    main(json, replace(plan, at=tuple(at)) if at else plan)


@app.command()
def engine(
    config: Annotated[Path, typer.Option(help="A run to take model, data and batch from.")] = Path("configs/demo.yaml"),
    steps: Annotated[int, typer.Option(help="Steps that count, of each way in each repeat.", min=1)] = 40,
    repeat: Annotated[int, typer.Option(help="Turns of all ways; medians are shown.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of whoever trains.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda[:n].")] = "cpu",
    json: JsonFile = None,
) -> None:
    """Tokens/s of a node in a run, beside a plain PyTorch loop and transformers.Trainer on the same batches."""
    from psyche.bench.engine.compare import main
    from psyche.bench.engine.plan import Plan
    from psyche.data.progress_display import progress_display

    plan = Plan(config=str(config), steps=steps, repeats=repeat, threads=threads, device=device)
    main(json, plan, progress_display)


@app.command()
def mixed(
    speed: Annotated[
        list[float] | None,
        typer.Option(help="Of a node, relative to the others; repeatable. Default: 1, 2 and 4.", min=0.01),
    ] = None,
    inner_steps: Annotated[int, typer.Option(help="H: inner steps that the fastest owes a round.", min=1)] = 40,
    step_seconds: Annotated[float, typer.Option(help="What an inner step takes the fastest.", min=0.001)] = 0.2,
    rounds: Annotated[int, typer.Option(help="Rounds that count; three more come before.", min=1)] = 6,
    loss: Annotated[
        bool, typer.Option("--loss", help="Compare losses at equal tokens instead, of 1:2:4 and of equal nodes.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Nodes of different speeds in one run: whether all end together, and each one's idle share."""
    from psyche.bench.mixed import loss as losses
    from psyche.bench.mixed.compare import main
    from psyche.bench.mixed.plan import Plan
    from psyche.data.progress_display import progress_display

    if loss:
        losses.main(json, preparing=progress_display)
        return
    plan = Plan(tuple(speed or (1.0, 2.0, 4.0)), step_seconds=step_seconds, inner_steps=inner_steps, rounds=rounds)
    main(json, plan)
