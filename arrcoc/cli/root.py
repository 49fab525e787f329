"""The command that all others belong to."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import arrcoc
from arrcoc.cli.options import Debug


class _InOrder(TyperGroup):
    """Help lists the commands in this order: what people try first comes first."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = ["demo", "ask", "encode", "describe", "build", "fit", "eval"]
        return sorted(self.commands, key=order.index)


app = typer.Typer(
    cls=_InOrder,
    help="Answers questions about images with Qwen-VL, spending vision tokens only where they are needed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help and usage errors as plain lines
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"arrcoc {arrcoc.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
]


@app.callback()
def _main(ctx: typer.Context, debug: Debug = False, version: Version = False) -> None:
    ctx.obj = debug
