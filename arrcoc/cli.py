"""The command line: `arrcoc demo | ask | encode | describe`.

Exit codes: 0 done; 1 the input or the work failed (one line on stderr); 2 the command was misused; 130
Ctrl-C. Commands import torch and the engine when they run, never before, so that help comes at once.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arrcoc
from arrcoc.console import counting, facts_table, quiet_transformers, reporting, stdout, working
from arrcoc.errors import ImageError

if TYPE_CHECKING:
    from arrcoc.encoding import Encoding
    from arrcoc.engine import Engine

# Written out, because the modules that own them import torch; tests compare the two.
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
LAYOUTS = ("replace", "refine", "crops")

app = typer.Typer(
    help="Answers questions about images with Qwen-VL, spending vision tokens only where they are needed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help and usage errors as plain lines
    pretty_exceptions_enable=False,
)


def parse_budget(text: str) -> int | float:
    """A budget as people write it: `300` is tokens; `0.1`, `1.0` and `10%` are shares of full resolution.

    Raises:
        typer.BadParameter: none of these.
    """
    number = text.strip()
    try:
        if number.endswith("%"):
            return float(number[:-1]) / 100
        return int(number) if re.fullmatch(r"[+-]?\d+", number) else float(number)
    except ValueError:
        wanted = "a share (0.1 or 10%) or a number of tokens (300)"
        raise typer.BadParameter(f"{text!r} is not {wanted}") from None


def _plot_path(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in PLOT_SUFFIXES:
        raise typer.BadParameter(f"{str(path)!r} does not end in {', '.join(PLOT_SUFFIXES)}")
    return path


def _out_file(path: Path) -> Path:
    if path.is_dir() or not path.absolute().parent.is_dir():
        wrong = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise typer.BadParameter(f"{str(path)!r} {wrong}")
    return path


def _layout(name: str | None) -> str | None:
    if name is not None and name not in LAYOUTS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(LAYOUTS)}")
    return name


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"arrcoc {arrcoc.__version__}")
        raise typer.Exit


ImageArg = Annotated[str, typer.Argument(metavar="IMAGE", help="Image file; - reads it from stdin.")]
QuestionArg = Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")]
# An int is a float to mypy, while typer takes no unions.
Budget = Annotated[
    float | None,
    typer.Option(
        parser=parse_budget,
        metavar="SHARE|TOKENS",
        help="Most vision tokens: 0.1 or 10% of full resolution, or a number such as 300.",
    ),
]
Model = Annotated[str | None, typer.Option(help="Qwen3-VL folder or hub name; default: the bundled one.")]
Preset = Annotated[str, typer.Option(help="auto, a preset's name, or a YAML file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
LayoutName = Annotated[
    str | None, typer.Option("--layout", callback=_layout, metavar="|".join(LAYOUTS), help="Order of tokens.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, above 0 samples.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampling, to repeat it.")]
Plot = Annotated[
    Path | None, typer.Option(callback=_plot_path, metavar="OUT.png", help="Draw where it looked, and why.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]
Stream = Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
]
OutFile = Annotated[Path, typer.Option(callback=_out_file, metavar="F.safetensors", help="File to write.")]
OutFolder = Annotated[Path, typer.Option(file_okay=False, help="Folder to write to.")]


@app.callback()
def _main(ctx: typer.Context, debug: Debug = False, version: Version = False) -> None:
    ctx.obj = debug


@app.command()
def demo(
    ctx: typer.Context,
    out: OutFolder = Path("out"),
    budget: Budget = None,
    model: Model = None,
    preset: Preset = "auto",
    debug: Debug = False,
) -> None:
    """Ask two questions about each bundled photograph; write pictures and a JSON file."""
    with reporting(debug or ctx.obj):
        from arrcoc.demo import run

        with working("loading the model"):
            quiet_transformers()
            engine = run.make_engine(model, preset)
        cases = run.demo_cases()
        with counting(sum(len(case.questions) for case in cases) + 1) as begin:
            results = run.run(engine, cases, out, budget, begin)
        console = stdout()
        console.print(run.table(results))
        for line in run.closing_lines(engine, out):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


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
        engine = _load(model, preset, device, dtype, layout)
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
    layout: LayoutName = None,
    plot: Plot = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Encode an image for a question, and write the vision tokens to a safetensors file."""
    with reporting(debug or ctx.obj):
        source = _image_source(image)
        engine = _load(model, preset, device, dtype, layout)
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
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what runs where: model, presets, backends, precision, cache, versions."""
    with reporting(debug or ctx.obj):
        description = _load(model, preset, device, dtype, None).describe()
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


def _load(model: str | None, preset: str, device: str, dtype: str, layout: str | None) -> Engine:
    with working("loading the model"):
        quiet_transformers()
        overrides: dict[str, Any] = {} if layout is None else {"layout": layout}
        return arrcoc.Engine.from_pretrained(model, preset, device, dtype, **overrides)


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
