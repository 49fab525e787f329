"""`arrcoc ask | encode | describe`: an engine at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import arrcoc
from arrcoc.cli.options import (
    Budget,
    Debug,
    Device,
    Dtype,
    Engines,
    ImageArg,
    Json,
    LayoutName,
    MaxNewTokens,
    Model,
    OutFile,
    Plot,
    Preset,
    QuestionArg,
    Seed,
    Stream,
    Temperature,
)
from arrcoc.cli.root import app
from arrcoc.console import facts_table, quiet_transformers, reporting, stdout, working
from arrcoc.errors import ImageError

if TYPE_CHECKING:
    from arrcoc.encoding import Encoding
    from arrcoc.engine import Engine


@app.command()
def ask(
    ctx: typer.Context,
    image: ImageArg,
    question: QuestionArg,
    budget: Budget = None,
    model: Model = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    engines: Engines = None,
    layout: LayoutName = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    plot: Plot = None,
    json: Json = False,
    stream: Stream = False,
    debug: Debug = False,
) -> None:
    """Answer a question about an image. The answer goes to stdout, what it cost to stderr."""
    if json and stream:
        raise typer.BadParameter("--json and --stream exclude one another")
    with reporting(debug or ctx.obj):
        source = _image_source(image)
        engine = _load(model, preset, device, dtype, engines, layout)
        with working("looking at the image"):
            pieces = engine.stream(source, question, budget, max_new_tokens, temperature, seed=seed)
            text = "" if stream else "".join(pieces)
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        assert pieces.answer is not None, "the stream has ended"
        encoding = pieces.answer.encoding
        assert encoding is not None, "an answer about an image"
        _draw(encoding, plot)

        from arrcoc.report import answer_facts

        _finish(engine, answer_facts(pieces.answer), {"plot": plot}, text, encoding, json)


@app.command()
def encode(
    ctx: typer.Context,
    image: ImageArg,
    question: QuestionArg,
    out: OutFile,
    budget: Budget = None,
    model: Model = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    engines: Engines = None,
    layout: LayoutName = None,
    plot: Plot = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Encode an image for a question, and write the vision tokens to a safetensors file."""
    with reporting(debug or ctx.obj):
        source = _image_source(image)
        engine = _load(model, preset, device, dtype, engines, layout)
        with working("encoding the image"):
            encoding = engine.encode(source, question, budget)
            encoding.save(out)
        _draw(encoding, plot)

        from arrcoc.report import encoding_facts

        _finish(engine, encoding_facts(encoding), {"out": out, "plot": plot}, str(out), encoding, json)


@app.command()
def describe(
    ctx: typer.Context,
    model: Model = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    engines: Engines = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what runs where: model, presets, backends, precision, cache, versions."""
    with reporting(debug or ctx.obj):
        description = _load(model, preset, device, dtype, engines, None).describe()
        if json:
            from arrcoc.report import to_json

            typer.echo(to_json(description))
        else:
            stdout().print(facts_table(description))


def _image_source(argument: str) -> str | bytes:
    """What the engine takes; a path that is not there is refused here, before a model is loaded."""
    if argument == "-":
        return sys.stdin.buffer.read()
    is_path = "://" not in argument and not argument.lower().startswith("data:")
    if is_path and not Path(argument).exists():
        raise ImageError(f"{argument} does not exist", "the path of a readable image file", "Check the path")
    return argument


def _load(
    model: str | None, preset: str, device: str, dtype: str, engines: Path | None, layout: str | None
) -> Engine:
    with working("loading the model"):
        quiet_transformers()
        overrides: dict[str, Any] = {} if layout is None else {"layout": layout}
        return arrcoc.Engine.from_pretrained(model, preset, device, dtype, engines, **overrides)


def _draw(encoding: Encoding, path: Path | None) -> None:
    if path is not None:
        with working("drawing"):
            encoding.plot(path)


def _finish(
    engine: Engine,
    facts: dict[str, Any],
    files: dict[str, Path | None],
    text: str,
    encoding: Encoding,
    json: bool,
) -> None:
    """The result on stdout, as JSON or as text; what it cost on stderr."""
    from arrcoc.report import engine_facts, to_json, tokens_line

    if json:
        written = {name: None if path is None else str(path) for name, path in files.items()}
        typer.echo(to_json(facts | written | {"engine": engine_facts(engine.describe())}))
        return
    typer.echo(text)
    milliseconds = facts["timings_ms"]["total"]
    typer.echo(f"{tokens_line(encoding)}, {milliseconds / 1e3:.2f} s", err=True)
