"""``psyche eval`` and ``psyche generate``: look at what a run has trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from psyche.errors import PsycheError

Where = Annotated[
    Path, typer.Argument(help="A node's directory (its newest checkpoint), or an exported model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-evaluation-harness: hellaswag,arc_easy. Needs psyche[eval].", show_default=False),
]
Shots = Annotated[
    int | None, typer.Option(help="With --tasks: examples before each question.", min=0, show_default=False)
]
Limit = Annotated[int | None, typer.Option(help="With --tasks: questions of each.", min=1, show_default=False)]
Include = Annotated[
    Path | None, typer.Option(help="With --tasks: a directory with tasks of your own.", show_default=False)
]


def evaluate(
    directory: Where,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 file to judge on, instead of the held-out split.", show_default=False)
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(help="Held-out sequences to judge on. Default: as many as the run.", min=1, show_default=False),
    ] = None,
    tasks: Tasks = None,
    shots: Shots = None,
    limit: Limit = None,
    include: Include = None,
    device: Device = "auto",
) -> None:
    """Judge a model: loss, perplexity and bits per byte on text, or scores on benchmark tasks."""
    from rich.console import Console
    from rich.progress import Progress

    from psyche.telemetry.formatting import number
    from psyche.tools.evaluate import heldout_loss, task_scores, text_loss
    from psyche.tools.load import load_trained

    if tasks is None and (shots is not None or limit is not None or include is not None):
        raise PsycheError("--shots, --limit and --include are for --tasks: name some")
    trained = load_trained(directory, device)
    typer.echo(f"{trained.name}, {trained.model.num_parameters():,} parameters")
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        for score in task_scores(trained, names, shots=shots, limit=limit, include=include):
            error = "" if score.stderr is None else f" ± {number(score.stderr, '.4f')}"
            typer.echo(f"{score.task:28} {score.metric:20} {number(score.value, '.4f')}{error}")
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("judging", total=None)

        def told(done: int, total: int) -> None:
            bar.update(line, completed=done, total=total)

        found = heldout_loss(trained, sequences, told) if text is None else text_loss(trained, text, told)
    typer.echo(f"loss            {found.loss:.4f} nats a token")
    typer.echo(f"perplexity      {number(found.perplexity, '.2f')}")
    typer.echo(f"bits per byte   {found.bits_per_byte:.4f}")
    typer.echo(f"predicted       {found.tokens:,} tokens")


def generate(
    directory: Where,
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads it from stdin.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="At most so many new ones.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, always.", min=0.0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among so many; 0: among all.", min=0)] = 40,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest that have so much probability together.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a model."""
    from psyche.tools.generate import Sampling, generate
    from psyche.tools.load import load_trained

    given = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(tokens, temperature, top_k, top_p, seed)
    generate(load_trained(directory, device), given, sampling, lambda text: typer.echo(text, nl=False))
    typer.echo()
