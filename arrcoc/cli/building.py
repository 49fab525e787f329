"""`arrcoc build`: LOD engines ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arrcoc.cli.options import Debug, Json, Model
from arrcoc.cli.root import app
from arrcoc.console import phases, quiet_transformers, reporting, working

if TYPE_CHECKING:
    from torch import Tensor

    from arrcoc.config import Config
    from arrcoc.lod.build import Judge, Progress
    from arrcoc.lod.manifest import Accuracy, Manifest
    from arrcoc.lod.recipe import Recipe
    from arrcoc.qwen import QwenVL

PLACARD_PX = 1024
"""Side of placards' images that fp8 is judged by."""
_RECIPE_HELP = "YAML recipe, as in engines/; options replace its keys."


@app.command()
def build(
    ctx: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help=_RECIPE_HELP)] = None,
    model: Model = None,
    preset: Annotated[str | None, typer.Option(help="A preset's name or a YAML file.")] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="tensorrt|tensorrt_rtx|onnx|torch", help="What runs the engines.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="fp16|bf16|fp32|fp8", help="Of weights and activations.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of your images; fp8 is calibrated on their tiles."),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="Of a layer's inputs, the largest that fp8 holds; 100 unless given.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest relative error of fp8 encodings; 0.1 unless given.")
    ] = None,
    max_accuracy_loss: Annotated[
        float | None, typer.Option(help="Largest share of questions that fp8 may cost; 0.01 is one in 100.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Questions for that: placards, FILE.jsonl or FILE.parquet.")
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Most of these; 200 unless given.")] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="current|sm80,sm89,sm120", help="GPUs to build for.")
    ] = None,
    separate: Annotated[bool, typer.Option("--separate", help="A plan for each LOD instead of one.")] = False,
    workspace_gb: Annotated[
        float | None, typer.Option(help="Most GPU memory that one kernel may use besides tensors.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File of kernel timings, kept between builds.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(metavar="0-5", help="How long to search for fast kernels.")
    ] = None,
    max_batch: Annotated[
        str | None, typer.Option(metavar="N,N,N,N", help="Largest batch at each LOD, background first.")
    ] = None,
    plan_stage: Annotated[
        str | None,
        typer.Option(metavar="HxW,HxW", help="Sizes of images to measure and score by engines too."),
    ] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder to write.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Build LOD engines for a model and a preset into a folder, for --engines and Engine.from_pretrained."""
    given = {
        "model": model,
        "preset": preset,
        "backend": backend,
        "precision": precision,
        "calibrate": calibrate,
        "percentile": percentile,
        "max_error": max_error,
        "max_accuracy_loss": max_accuracy_loss,
        "dataset": dataset,
        "questions": questions,
        "arch": None if arch is None else tuple(arch.split(",")),
        "separate": separate or None,
        "workspace_gb": workspace_gb,
        "timing_cache": timing_cache,
        "optimization_level": optimization_level,
        "max_batch": None if max_batch is None else tuple(max_batch.split(",")),
        "plan_stage": None if plan_stage is None else tuple(plan_stage.split(",")),
        "out": out,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    with reporting(debug or ctx.obj):
        from arrcoc.lod import build as builds
        from arrcoc.lod.recipe import Recipe, check

        made = Recipe.make(changes) if recipe is None else Recipe.read(recipe, changes)
        config, judge = check(made), _judge(made)
        with working("loading the model"):
            quiet_transformers()
            qwen = _load(made)
        from arrcoc import query_free

        edge = qwen.vision.token_px
        beside = [query_free.exportable(config, edge, *size) for size in made.image_sizes]
        with phases() as progress:
            tiles = _tiles(made, config, edge)
            manifest = builds.build(made, qwen, progress, beside, tiles, judge)
        _finish(manifest, made.out, json)


def _load(recipe: Recipe) -> QwenVL:
    """The recipe's checkpoint on the CPU, in the recipe's precision."""
    import torch

    from arrcoc import qwen
    from arrcoc.demo.bundled import bundled_checkpoint
    from arrcoc.lod.static_engine import DTYPES

    source: Any = recipe.model
    if source is None:
        source, _ = bundled_checkpoint()
    return qwen.load(source, torch.device("cpu"), DTYPES[recipe.precision])


def _tiles(recipe: Recipe, config: Config, token_px: int) -> list[Tensor]:
    """Tiles to calibrate on, where the recipe asks for that."""
    from arrcoc.calibration import read_tiles

    return [] if recipe.calibrate is None else read_tiles(recipe.calibrate, config, token_px)


def _judge(recipe: Recipe) -> Judge | None:
    """What asks questions with and without fp8, where the recipe limits what that may cost."""
    if recipe.max_accuracy_loss is None:
        return None
    from arrcoc.evaluation import datasets, float8_loss

    cases = datasets.load(recipe.dataset, PLACARD_PX, recipe.questions, 0)

    def judge(largest: Mapping[str, float], progress: Progress) -> Accuracy:
        chosen = recipe.model, recipe.preset, largest, cases, recipe.questions
        return float8_loss.measure(*chosen, progress)

    return judge


def _finish(manifest: Manifest, out: Path, json: bool) -> None:
    if json:
        from arrcoc.report import to_json

        typer.echo(to_json(manifest.model_dump(mode="json") | {"out": str(out)}))
        return
    size = sum(file.bytes for file in manifest.files.values())
    sides = "/".join(map(str, manifest.sides))
    typer.echo(
        f"{out}: {manifest.builder} {manifest.precision} for {', '.join(manifest.archs)}, sides {sides}, "
        f"{len(manifest.files)} files, {size / 1e6:,.1f} MB, {manifest.build_seconds:.1f} s"
    )
