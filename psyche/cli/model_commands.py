"""``psyche eval | generate | export``: use the model that a run has trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from psyche.errors import PsycheError

ModelPath = Annotated[
    Path, typer.Argument(help="A node's directory (its newest checkpoint) or an exported model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Benchmark tasks of lm-evaluation-harness, such as hellaswag,arc_easy. Needs psyche[eval].",
        show_default=False,
    ),
]
Shots = Annotated[
    int | None, typer.Option(help="With --tasks: few-shot examples per question.", min=0, show_default=False)
]
Limit = Annotated[int | None, typer.Option(help="With --tasks: questions per task.", min=1, show_default=False)]
Include = Annotated[
    Path | None, typer.Option(help="With --tasks: directory of additional task definitions.", show_default=False)
]


def evaluate(
    directory: ModelPath,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file to evaluate on instead of the held-out split.", show_default=False),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            help="Held-out sequences to evaluate on. Default: run.heldout_sequences.", min=1, show_default=False
        ),
    ] = None,
    tasks: Tasks = None,
    shots: Shots = None,
    limit: Limit = None,
    include: Include = None,
    device: Device = "auto",
) -> None:
    """Evaluate a model: loss, perplexity and bits per byte on text, or scores on benchmark tasks."""
    from rich.console import Console
    from rich.progress import Progress

    from psyche.telemetry.formatting import number
    from psyche.tools.evaluate import heldout_loss, task_scores, text_loss
    from psyche.tools.load import load_trained

    if tasks is None and (shots is not None or limit is not None or include is not None):
        raise PsycheError("--shots, --limit and --include need --tasks")
    trained = load_trained(directory, device)
    typer.echo(f"{trained.name}, {trained.model.num_parameters():,} parameters")
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        for score in task_scores(trained, names, shots=shots, limit=limit, include=include):
            error = "" if score.stderr is None else f" ± {number(score.stderr, '.4f')}"
            typer.echo(f"{score.task:28} {score.metric:20} {number(score.value, '.4f')}{error}")
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("evaluating", total=None)

        def report(done: int, total: int) -> None:
            bar.update(line, completed=done, total=total)

        found = heldout_loss(trained, sequences, report) if text is None else text_loss(trained, text, report)
    typer.echo(f"loss            {found.loss:.4f} nats per token")
    typer.echo(f"perplexity      {number(found.perplexity, '.2f')}")
    typer.echo(f"bits per byte   {found.bits_per_byte:.4f}")
    typer.echo(f"tokens          {found.tokens:,} predicted")


def generate(
    directory: ModelPath,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.", min=0.0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: from all.", min=0)] = 40,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: cumulative probability (top-p).", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a trained model."""
    from psyche.tools.generate import Sampling, generate
    from psyche.tools.load import load_trained

    given = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(tokens, temperature, top_k, top_p, seed)
    generate(load_trained(directory, device), given, sampling, lambda text: typer.echo(text, nl=False))
    typer.echo()


def export(
    directory: Annotated[Path, typer.Argument(help="A node's directory, with a checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Directory for the model and its tokenizer.", show_default=False)],
) -> None:
    """Write the model of a node's newest checkpoint as a directory that transformers loads."""
    from psyche.tools.load import export_node

    rounds = export_node(directory, output)
    typer.echo(
        f"{output}: the model after round {rounds}; AutoModelForCausalLM.from_pretrained({str(output)!r}) loads it"
    )
