"""`arrcoc fit`: a texture head for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arrcoc.cli.options import Debug, Device, Dtype, Json, Preset
from arrcoc.cli.root import app
from arrcoc.console import quiet_transformers, reporting, stdout


@app.command()
def fit(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the images.")],
    questions: Annotated[
        Path,
        typer.Argument(metavar="QUESTIONS.jsonl", help="Lines of image, question and, where known, boxes."),
    ],
    model: Annotated[str, typer.Option(help="Qwen3-VL folder, or hub name (then with --out).")],
    preset: Preset = "auto",
    target: Annotated[str, typer.Option(metavar="auto|boxes|glimpse", help="What is fitted to.")] = "auto",
    steps: Annotated[int, typer.Option(help="Most optimiser steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Questions in a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Of weights, batches and held-out images.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the images to judge by.")] = 0.1,
    patience: Annotated[int, typer.Option(help="Judgements without gain before it stops.")] = 8,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 30.0,
    out: Annotated[
        Path | None, typer.Option(metavar="F.safetensors", help="Default: beside the model, for the engine.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit the texture head to a model, from boxes or by distilling the glimpse; resumes what was cut off."""
    with reporting(debug or ctx.obj):
        from arrcoc import fitting
        from arrcoc.fitting.display import metrics_table, showing

        quiet_transformers()
        given = {"target": target, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
        more = {"held_out": held_out, "patience": patience, "save_every": save_every}
        settings = fitting.FitSettings.make(**given, **more)
        with showing() as progress:
            made = fitting.fit(folder, questions, model, preset, settings, out, device, dtype, progress)
        if json:
            from arrcoc.report import to_json

            typer.echo(to_json(made.report | {"weights": str(made.weights), "work": str(made.work)}))
            return
        stdout().print(metrics_table(made.held_out))
        for name, path in {"weights": made.weights, "report": made.work / "report.json"}.items():
            typer.echo(f"{name}: {path}")
