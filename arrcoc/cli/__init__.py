"""The command line: `arrcoc demo | ask | encode | describe | build | fit | eval`.

Exit codes: 0 done; 1 the input or the work failed (one line on stderr); 2 the command was misused; 130
Ctrl-C. Commands import torch and the engine when they run, never before, so that help comes at once.
"""

from arrcoc.cli import asking, building, demo, evaluating, fitting
from arrcoc.cli.options import LAYOUTS, METHODS, PLOT_SUFFIXES, parse_budget
from arrcoc.cli.root import app

__all__ = [
    "LAYOUTS",
    "METHODS",
    "PLOT_SUFFIXES",
    "app",
    "asking",
    "building",
    "demo",
    "evaluating",
    "fitting",
    "parse_budget",
]
