"""Markdown of what relevance.py, tensions.py and decisions.py measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common import markdown_table

_ALL = "all"
_FIGURES = {
    "auc": "AUC",
    "recall_at_targets": "recall@targets",
    "recall_at_4": "recall@4",
    "recall_at_8": "recall@8",
    "share": "share of relevance",
}
Result = Mapping[str, Any]


def accuracy_table(result: Result) -> str:
    """Exact match of every method at every budget with its interval, and how much longer an answer takes.

    Times are ratios to the same method's stock rival: downscale at full resolution, in the same run.
    """
    cells = {(cell["method"], cell["budget"]): cell for cell in result["cells"]}
    budgets = sorted({budget for _, budget in cells})
    rows = [
        [method, *(_exact(cells.get((method, budget))) for budget in budgets)]
        for method in dict.fromkeys(method for method, _ in cells)
    ]
    return markdown_table(("method", *(f"{budget:g}" for budget in budgets)), rows) + _evaluated(result)


def accuracy_times(result: Result) -> str:
    """Time of an answer as a share of the stock model's at full resolution, in the same run."""
    cells = {(cell["method"], cell["budget"]): cell for cell in result["cells"]}
    budgets = sorted({budget for _, budget in cells})
    stock = cells["downscale", budgets[-1]]["milliseconds"]
    rows = []
    for method in dict.fromkeys(method for method, _ in cells):
        found = [cells.get((method, budget), {}).get("milliseconds") for budget in budgets]
        rows.append([method, *("" if ms is None else f"{ms / stock:.2f}" for ms in found)])
    return markdown_table(("method", *(f"{budget:g}" for budget in budgets)), rows) + _evaluated(result)


def accuracy_families(result: Result) -> str:
    """Exact match of arrcoc, of downscaling and of an ideal scorer at every budget, family by family."""
    budgets = sorted({cell["budget"] for cell in result["cells"]})
    rows = []
    for family, part in result["families"].items():
        cells = {(cell["method"], cell["budget"]): cell for cell in part}
        for method in ("arrcoc", "downscale", "oracle"):
            shown = [cells.get((method, budget)) for budget in budgets]
            rows.append(
                [family, method, *("" if c is None else f"{100 * c['exact']['mean']:.0f}" for c in shown)]
            )
    return markdown_table(("family", "method", *(f"{b:g}" for b in budgets)), rows) + _evaluated(result)


def _evaluated(result: Result) -> str:
    versions, workers = result["versions"], result["workers"]
    shared = f", {workers} processes side by side" if workers > 1 else ""
    return (
        f"\n`{result['command']}`, {result['date']}, {result['device']}{shared}, {result['dtype']}, "
        f"{result['cases']} questions, seed {result['seed']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}.\n"
    )


def _exact(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["exact"] is None:
        return ""
    exact = cell["exact"]
    return f"{100 * exact['mean']:.0f} ({100 * exact['low']:.0f} to {100 * exact['high']:.0f})"


def relevance_table(result: Result) -> str:
    """Every figure of every scorer over all families."""
    rows = (
        [scorer, *(_plain(by_family[_ALL][figure], interval=figure == "auc") for figure in _FIGURES)]
        for scorer, by_family in result["scorers"].items()
    )
    return markdown_table(("scorer", *_FIGURES.values()), rows) + _source(result)


def relevance_families(result: Result, figure: str) -> str:
    """One figure of every scorer by family, with the number of images."""
    scorers = result["scorers"]
    first = next(iter(scorers.values()))
    head = ("scorer", *(f"{family} ({part['images']})" for family, part in first.items()))
    rows = (
        [scorer, *(_plain(part[figure], interval=False) for part in by_family.values())]
        for scorer, by_family in scorers.items()
    )
    return markdown_table(head, rows) + _source(result)


def tension_table(result: Result) -> str:
    """Mean and standard deviation of each tension by family."""
    names = ("compress_particularize", "explore_exploit", "diversify_focus")
    rows = (
        [f"{family} ({part['questions']:,})", *(_mean_and_spread(part[name]) for name in names)]
        for family, part in result["tensions"].items()
    )
    head = ("family (questions)", *(name.replace("_", "-") for name in names))
    return markdown_table(head, rows) + _source(result)


def ablation_table(result: Result) -> str:
    """Exact match with each tension fixed, at every budget and for every family, beside all tensions."""
    return _accuracy(result["ablation"], result["budgets"], "relevance") + _source(result)


def decision_table(result: Result, name: str) -> str:
    """Exact match of the variants of one choice; a line that says so where it was not measured."""
    found = [choice for choice in result["choices"] if choice["name"] == name]
    if not found:
        return "Not measured yet.\n"
    return _accuracy(found[0]["variants"], result["budgets"], "variant") + _source(result)


def decision_tables(result: Result) -> str:
    """All choices, a heading each."""
    parts = (
        f"### {c['name']}: {c['question']}\n\n{decision_table(result, c['name'])}" for c in result["choices"]
    )
    return "\n".join(parts)


def _accuracy(variants: Sequence[Result], budgets: Sequence[float], what: str) -> str:
    """Variant by budget: tokens, exact match, its difference to the first variant, and each family."""
    measured = [variant for variant in variants if "cells" in variant]
    names = list(dict.fromkeys(cell["family"] for variant in measured for cell in variant["cells"]))
    counts = {cell["family"]: cell["cases"] for cell in measured[0]["cells"]} if measured else {}
    families = [name for name in names if name != _ALL]
    head = (what, "budget", "tokens", f"all ({counts.get(_ALL, 0):,})", "against the first")
    rows = [
        line for variant in measured for line in _lines(variant, budgets, families, variant is measured[0])
    ]
    refused = [
        [v["label"], "refused", *[""] * (len(head) + len(families) - 2)] for v in variants if "refused" in v
    ]
    return markdown_table((*head, *(f"{name} ({counts[name]:,})" for name in families)), rows + refused)


def _lines(
    variant: Result, budgets: Sequence[float], families: Sequence[str], first: bool
) -> Iterable[list[str]]:
    for budget in budgets:
        cells = {cell["family"]: cell for cell in variant["cells"] if cell["budget"] == budget}
        overall = cells[_ALL]
        tokens = "not possible" if overall["tokens"] is None else f"{overall['tokens']:,.0f}"
        gap = "" if first else _per_cent(overall["over_reference"], signed=True)
        parts = (_per_cent(cells[name]["exact"], interval=False) for name in families)
        yield [variant["label"], f"{budget:g}", tokens, _per_cent(overall["exact"]), gap, *parts]


def _per_cent(value: Mapping[str, float] | None, interval: bool = True, signed: bool = False) -> str:
    if value is None:
        return ""
    sign = "+" if signed else ""
    mean, low, high = (f"{100 * value[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if interval else mean


def _plain(value: Mapping[str, float] | None, interval: bool) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + (f" ({value['low']:.3f} to {value['high']:.3f})" if interval else "")


def _mean_and_spread(value: Mapping[str, Any]) -> str:
    spread = "" if value["deviation"] is None else f" ± {value['deviation']:.2f}"
    return f"{value['mean']:+.2f}{spread}"


def _source(result: Result) -> str:
    versions, model, data = result["versions"], result["model"], result["data"]
    return (
        f"\n`{result['command']}`, {result['date']}, {result['device']}, {result['dtype']}, checkpoint "
        f"{model['name']} ({model['parameters'] / 1e6:.1f} M parameters), participatory scorer "
        f"{result['participatory']}, preset {result['preset']}, {result['count']:,} questions on "
        f"{data['canvas']} px test placards (seed {data['seed']}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}.\n"
    )
