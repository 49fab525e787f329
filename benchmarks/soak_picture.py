"""The picture of the soak test: resident memory, and what each tier of the cache held, over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {"device": "#0072b2", "host": "#56b4e9", "disk": "#009e73", "prefixes": "#cc79a7"}
_INK, _FAINT = "#222222", "#999999"


def draw_soak(result: Mapping[str, Any]) -> Figure:
    """Draw what the benchmark writes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _memory(left, result)
    _held(right, result)
    for axes in (left, right):
        axes.set_xlabel("minutes")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _memory(axes: Axes, result: Mapping[str, Any]) -> None:
    minutes = [sample["seconds"] / 60 for sample in result["samples"]]
    axes.plot(minutes, [sample["resident_mib"] for sample in result["samples"]], color=_INK, linewidth=1)
    memory = result["memory"]
    if memory is not None:
        axes.axvspan(0, memory["from_second"] / 60, color=_FAINT, alpha=0.15, linewidth=0)
        label = (
            f"{memory['mib_per_hour']:+.1f} ± {memory['standard_error']:.1f} MiB an hour after the warm-up"
        )
        axes.text(0.98, 0.06, label, transform=axes.transAxes, ha="right", color=_INK)
    axes.set_ylabel("resident memory, MiB")
    requests = sum(result["requests"].values())
    axes.set_title(f"{requests:,} requests, {result['error_count']} errors", loc="left", color=_INK)


def _held(axes: Axes, result: Mapping[str, Any]) -> None:
    minutes = [sample["seconds"] / 60 for sample in result["samples"]]
    for name, colour in _COLOURS.items():
        held = np.array([sample["held_kib"].get(name, 0) for sample in result["samples"]]) / 1024
        axes.plot(minutes, held, color=colour, linewidth=1, label=name)
        axes.axhline(result["bounds"][name] / 2**20, color=colour, linewidth=0.8, linestyle=":")
    axes.set_ylabel("held, MiB (dotted: the bound)")
    axes.set_title("Tiers of the tile cache, and prefixes", loc="left", color=_INK)
    axes.legend(loc="center right", frameon=False)
