"""`arrcoc eval`: accuracy against vision tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from arrcoc.cli.options import (
    METHODS,
    Debug,
    Device,
    Dtype,
    LayoutName,
    Model,
    Preset,
    budget_list,
    parse_budget,
)
from arrcoc.cli.root import app
from arrcoc.console import counting, quiet_transformers, reporting, working


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for answers, tables and the curve.")],
    dataset: Annotated[str, typer.Option(help="placards, FILE.jsonl or FILE.parquet.")] = "placards",
    methods: Annotated[str, typer.Option(help="Any of these, with commas.")] = METHODS,
    budgets: Annotated[
        str, typer.Option(callback=budget_list, help="Shares or tokens, with commas.")
    ] = "0.0625,0.125,0.25,0.5,1.0",
    model: Model = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    layout: LayoutName = None,
    canvas: Annotated[int, typer.Option(help="Side of placards' images, px.")] = 1024,
    count: Annotated[int, typer.Option(min=1, help="Number of placards' questions.")] = 200,
    families: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Kinds of placards' questions; default: all but picture."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of placards, and of method random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions, from the first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 16,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the questions; times then mean little.")
    ] = 1,
    resume: Annotated[bool, typer.Option(help="Keep the answers that are already in the folder.")] = True,
    debug: Debug = False,
) -> None:
    """Measure accuracy against vision tokens, beside other methods on the same checkpoint."""
    with reporting(debug or ctx.obj):
        from arrcoc.evaluation import command, datasets
        from arrcoc.evaluation.methods import LabChoice

        quiet_transformers()
        overrides: dict[str, Any] = {} if layout is None else {"layout": layout}
        choice = LabChoice(model, preset, device, dtype, max_new_tokens, seed, overrides)
        chosen = None if families is None else command.split(families)
        job = command.Job(
            cases=datasets.load(dataset, canvas, count, seed, chosen),
            methods=command.split(methods),
            budgets=[parse_budget(part) for part in budgets.split(",")],
            out=out,
            limit=limit,
            resume=resume,
            workers=workers,
        )
        cells = command.evaluate(choice, job, counting, lambda: working("loading the model"))
        for line in command.closing_lines(cells, out):
            typer.echo(line)
