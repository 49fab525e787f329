"""`arrcoc build`: LOD engines ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arrcoc.cli.options import Debug, Json, Model
from arrcoc.cli.root import app
from arrcoc.console import quiet_transformers, reporting, working

if TYPE_CHECKING:
    from arrcoc.lod.manifest import Manifest
    from arrcoc.lod.recipe import Recipe
    from arrcoc.qwen import QwenVL

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
        str | None, typer.Option(metavar="fp16|bf16|fp32", help="Of weights and activations.")
    ] = None,
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
    max_batch: Annotated[
        str | None, typer.Option(metavar="N,N,N,N", help="Largest batch at each LOD, background first.")
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
        "arch": None if arch is None else tuple(arch.split(",")),
        "separate": separate or None,
        "workspace_gb": workspace_gb,
        "timing_cache": timing_cache,
        "max_batch": None if max_batch is None else tuple(max_batch.split(",")),
        "out": out,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    with reporting(debug or ctx.obj):
        from arrcoc.lod import build as builds
        from arrcoc.lod.recipe import Recipe, check

        made = Recipe.make(changes) if recipe is None else Recipe.read(recipe, changes)
        check(made)
        with working("loading the model"):
            quiet_transformers()
            qwen = _load(made)
        with _showing() as progress:
            manifest = builds.build(made, qwen, progress)
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


@contextmanager
def _showing() -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr: a bar of the builder's phase on a terminal, else a line for each step of ours."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: None if total else typer.echo(what, err=True)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        yield show


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
