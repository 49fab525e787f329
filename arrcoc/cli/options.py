"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

# Written out, because the modules that own them import torch; tests compare the two.
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
LAYOUTS = ("replace", "refine", "crops")
METHODS = "arrcoc,downscale,random,saliency,fastv,visionzip"


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


def budget_list(text: str) -> str:
    """The text as it is, if it is budgets with commas between; else `typer.BadParameter`."""
    for part in text.split(","):
        parse_budget(part)
    return text


ImageArg = Annotated[str, typer.Argument(metavar="IMAGE", help="Image file; - reads it from stdin.")]
QuestionArg = Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")]
QuestionsArg = Annotated[
    list[str], typer.Argument(metavar="QUESTION...", help="What to ask about it; several share the work.")
]
Conversation = Annotated[
    bool, typer.Option("--conversation", help="Each question is a turn: earlier ones and answers are kept.")
]
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
Engines = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder that `arrcoc build` wrote; default: torch.")
]
LayoutName = Annotated[
    str | None, typer.Option("--layout", callback=_layout, metavar="|".join(LAYOUTS), help="Order of tokens.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, above 0 samples.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampling, to repeat it.")]
Plot = Annotated[
    Path | None, typer.Option(callback=_plot_path, metavar="OUT.png", help="Draw where it looked, and why.")
]
WarmUp = Annotated[
    bool, typer.Option("--warm-up", help="First compile kernels, for this and later processes.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]
Stream = Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
OutFile = Annotated[Path, typer.Option(callback=_out_file, metavar="F.safetensors", help="File to write.")]
OutFolder = Annotated[Path, typer.Option(file_okay=False, help="Folder to write to.")]
