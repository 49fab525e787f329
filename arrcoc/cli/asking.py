"""`arrcoc ask | encode | describe`: an engine at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import arrcoc
from arrcoc.cli.options import (
    Budget,
    Conversation,
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
    QuestionsArg,
    Seed,
    Stream,
    Temperature,
    WarmUp,
)
from arrcoc.cli.root import app
from arrcoc.console import facts_table, phases, quiet_transformers, reporting, stdout, working
from arrcoc.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arrcoc.answer import Answer, AnswerStream
    from arrcoc.encoding import Encoding
    from arrcoc.engine import Engine


@app.command()
def ask(
    ctx: typer.Context,
    image: ImageArg,
    questions: QuestionsArg,
    budget: Budget = None,
    conversation: Conversation = False,
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
    """Answer questions about an image. Answers go to stdout, what they cost to stderr."""
    if json and stream:
        raise typer.BadParameter("--json and --stream exclude one another")
    if plot is not None and len(questions) > 1:
        raise typer.BadParameter("--plot draws one question")
    with reporting(debug or ctx.obj):
        source = _image_source(image)
        engine = _load(model, preset, device, dtype, engines, layout)
        how = (max_new_tokens, temperature, seed)
        streams, answers = _streams(engine, source, questions, budget, conversation, how), []
        for _ in questions:
            with working("looking at the image"):
                pieces = next(streams)
                text = "" if stream else "".join(pieces)
            for piece in pieces:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            assert pieces.answer is not None, "the stream has ended"
            answers.append(pieces.answer)
            if not json:
                _tell(text, _encoding(pieces.answer), pieces.answer.timings)
        _draw(_encoding(answers[-1]), plot)
        if json:
            _tell_json(engine, answers, plot)


def _streams(
    engine: Engine,
    source: str | bytes,
    questions: list[str],
    budget: float | None,
    conversation: bool,
    how: tuple[int | None, float, int | None],
) -> Iterator[AnswerStream]:
    """The answer to each question in turn; several are asked in one session."""
    most, temperature, seed = how
    if len(questions) == 1:
        yield engine.stream(source, questions[0], budget, most, temperature, seed=seed)
        return
    with engine.open(source, budget, conversation=conversation) as session:
        for question in questions:
            yield session.stream(question, None, most, temperature, seed=seed)


def _encoding(answer: Answer) -> Encoding:
    assert answer.encoding is not None, "an answer about an image"
    return answer.encoding


def _tell_json(engine: Engine, answers: list[Answer], plot: Path | None) -> None:
    """One document: of one answer its facts, of several a list of them."""
    from arrcoc.report import answer_facts, engine_facts, to_json

    facts = [answer_facts(answer) for answer in answers]
    said = facts[0] | {"plot": None if plot is None else str(plot)} if len(facts) == 1 else {"answers": facts}
    typer.echo(to_json(said | {"engine": engine_facts(engine.describe())}))


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

        from arrcoc.report import encoding_facts, engine_facts, to_json

        if json:
            files = {"out": str(out), "plot": None if plot is None else str(plot)}
            facts = encoding_facts(encoding) | files | {"engine": engine_facts(engine.describe())}
            typer.echo(to_json(facts))
        else:
            _tell(str(out), encoding, encoding.timings)


@app.command()
def describe(
    ctx: typer.Context,
    model: Model = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    engines: Engines = None,
    warm_up: WarmUp = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what runs where: model, presets, backends, precision, cache, versions."""
    with reporting(debug or ctx.obj):
        engine = _load(model, preset, device, dtype, engines, None)
        if warm_up:
            with phases() as progress:
                engine.warm_up(progress)
        description = engine.describe()
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


def _tell(text: str, encoding: Encoding, timings: dict[str, float]) -> None:
    """The result on stdout; what it cost on stderr."""
    from arrcoc.report import tokens_line

    typer.echo(text)
    typer.echo(f"{tokens_line(encoding)}, {timings['total'] / 1e3:.2f} s", err=True)
