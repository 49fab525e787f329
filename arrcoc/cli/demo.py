"""`arrcoc demo`: questions about drawn signs; `arrcoc demo train`: the bundled checkpoint from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arrcoc.cli.options import Budget, Debug, Model, OutFolder, Preset
from arrcoc.cli.root import app
from arrcoc.console import counting, quiet_transformers, reporting, stdout, working

demo_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(demo_app, name="demo")


@demo_app.callback()
def demo(
    ctx: typer.Context,
    out: OutFolder = Path("out"),
    budget: Budget = None,
    model: Model = None,
    preset: Preset = "auto",
    debug: Debug = False,
) -> None:
    """Ask about signs on large images: at a tenth of the tokens, at full resolution, and downscaled."""
    ctx.obj = debug or ctx.obj
    if ctx.invoked_subcommand is not None:
        return
    with reporting(ctx.obj):
        from arrcoc.demo import run

        with working("loading the model"):
            quiet_transformers()
            subject = run.open_subject(model, preset)
        cases = run.demo_cases()
        steps = len(run.WAYS) * sum(len(case.questions) for case in cases) + 1
        with counting(steps) as begin:
            results = run.run(subject, cases, out, budget, begin)
        console = stdout()
        console.print(run.table(results))
        for line in run.closing_lines(subject, results, out):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@demo_app.command()
def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run; names one to resume it.")],
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and questions.")] = 0,
    devices: Annotated[int, typer.Option(help="GPUs of this machine to share the work.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw batches, for each device.")] = 2,
    stop_after: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Save and stop then, to be resumed.")
    ] = None,
    photographs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Further photographs for backgrounds.")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Exported folder to start from.")
    ] = None,
    begin: Annotated[float, typer.Option(help="Share of the curriculum to skip.")] = 0.0,
    source: Annotated[
        str | None,
        typer.Option(metavar="drawn|composed", help="How canvases are made; default: the recipe's."),
    ] = None,
    batch_scale: Annotated[float, typer.Option(help="Factor of every batch size.")] = 1.0,
    measure: Annotated[int, typer.Option(help="Most held-out batches of a canvas size; 0 for none.")] = 16,
    debug: Debug = False,
) -> None:
    """Train the demo's checkpoint from nothing, or go on where a run was cut off."""
    with reporting(debug or ctx.obj):
        from arrcoc.demo.training import command

        quiet_transformers()
        settings = command.Settings(
            folder=out,
            steps=steps,
            seed=seed,
            devices=devices,
            workers=workers,
            stop_after=stop_after,
            photographs=photographs,
            initial=initial,
            begin=begin,
            source=source,
            batch_scale=batch_scale,
            measure=measure,
        )
        record = command.train(settings)
        for line in command.closing_lines(record, out):
            typer.echo(line)
