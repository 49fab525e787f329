"""The command line: `arrcoc demo | ask | encode | describe | fit | eval`.

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
METHODS = "arrcoc,downscale,random,saliency,fastv,visionzip"

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


def _budgets(text: str) -> str:
    for part in text.split(","):
        parse_budget(part)
    return text


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for answers, tables and the curve.")],
    dataset: Annotated[str, typer.Option(help="placards, FILE.jsonl or FILE.parquet.")] = "placards",
    methods: Annotated[str, typer.Option(help="Any of these, with commas.")] = METHODS,
    budgets: Annotated[
        str, typer.Option(callback=_budgets, help="Shares or tokens, with commas.")
    ] = "0.0625,0.125,0.25,0.5,1.0",
    model: Model = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    layout: LayoutName = None,
    canvas: Annotated[int, typer.Option(help="Side of placards' images, px.")] = 1024,
    count: Annotated[int, typer.Option(min=1, help="Number of placards' questions.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of placards, and of method random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions, from the first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 16,
    resume: Annotated[bool, typer.Option(help="Keep the answers that are already in the folder.")] = True,
    debug: Debug = False,
) -> None:
    """Measure accuracy against vision tokens, beside other methods on the same checkpoint."""
    with reporting(debug or ctx.obj):
        from arrcoc.evaluation import command, datasets
        from arrcoc.evaluation import methods as lab_methods

        def make_lab() -> lab_methods.Lab:
            with working("loading the model"):
                quiet_transformers()
                overrides: dict[str, Any] = {} if layout is None else {"layout": layout}
                return lab_methods.Lab.open(model, preset, device, dtype, max_new_tokens, seed, **overrides)

        cases = datasets.load(dataset, canvas, count, seed)
        chosen = [parse_budget(part) for part in budgets.split(",")]
        cells = command.evaluate(
            make_lab, cases, command.split(methods), chosen, out, limit, resume, counting
        )
        for line in command.closing_lines(cells, out):
            typer.echo(line)


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
