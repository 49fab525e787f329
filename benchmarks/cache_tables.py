"""Tables of what `screenshots.py`, `conversation.py` and `soak.py` measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import markdown_table


def screenshots_table(result: Mapping[str, Any]) -> str:
    """By what happened between two screenshots: new tiles, hit rate, and what stage encode costs."""
    frames = result["frames"][1:]
    named = [
        (name, [f for f in frames if f["action"] == name]) for name in sorted({f["action"] for f in frames})
    ]
    head = (
        "what happened",
        "frames",
        f"new tiles of {result['tiles']}",
        "hit rate",
        "encode, without / with",
    )
    rows = [_stream_row(name, some) for name, some in [*named, ("all", frames)]]
    line, costs = result["fit"], [(f["new_tiles"], f["cached_ms"]) for f in frames]
    slope, level = line["ms_per_new_tile"], line["ms_at_none"]
    off = [abs(ms / (level + slope * new) - 1) for new, ms in costs if new]
    none = [ms for new, ms in costs if not new]
    fit = (
        f"Stage encode over new tiles, a straight line: R² {line['r_squared']:.4f}, "
        f"{sum(x <= 0.2 for x in off)} of the {len(off)} frames with new tiles within 20 % of it "
        f"(the farthest: {max(off):.0%}). "
    )
    if none:
        worth = statistics.mean(none) / slope
        fit += f"The {len(none)} frames without new tiles cost {worth:.1f} new tiles' worth each. "
    fit += (
        f"Answers equal: {result['same_answers']} of {result['answers']}; largest relative difference of a "
        f"vision token: {result['largest_relative_difference']:.1g}. Times: {result['clock']}."
    )
    return markdown_table(head, rows) + f"\n{fit}\n" + _source(result)


def _stream_row(name: str, frames: Sequence[Mapping[str, Any]]) -> list[str]:
    hits, asked = (
        sum(sum(f[key] for key in keys) for f in frames) for keys in (["hits"], ["hits", "misses"])
    )
    ratio = sum(f["plain_ms"] for f in frames) / sum(f["cached_ms"] for f in frames)
    new = statistics.mean(f["new_tiles"] for f in frames)
    return [name, str(len(frames)), f"{new:.1f}", f"{hits / asked:.0%}", f"{ratio:.1f} x"]


def conversation_table(result: Mapping[str, Any]) -> str:
    """Hit rates of five questions about one image, with the cache alone and with tiles encoded ahead."""
    head = (
        "budget", "tiles asked for", "hit rate", "of follow-ups", "encoded ahead: hit rate",
        "of follow-ups", "used of those encoded ahead",
    )  # fmt: skip
    rows = []
    for case in result["cases"]:
        alone, ahead = case["prefetch_off"], case["prefetch_on"]
        rates = (found[key] for found in (alone, ahead) for key in ("hit_rate", "hit_rate_of_follow_ups"))
        used = ahead["prefetched_and_used"] / ahead["prefetched"] if ahead["prefetched"] else 0.0
        shares = [f"{rate:.0%}" for rate in (*rates, used)]
        rows.append([f"{case['budget']:g}", f"{alone['tiles_asked_for']:,}", *shares])
    low, high = result["claimed_in_the_literature"]
    size = f"{result['canvas']} x {result['canvas']}"
    what = (
        f"{result['images']} images of {size}, {result['questions']} questions each, every image with an "
        f"empty cache. The literature claims {low:.0%} to {high:.0%}."
    )
    return markdown_table(head, rows) + f"\n{what}\n" + _source(result)


def soak_table(result: Mapping[str, Any]) -> str:
    """The most that each tier held against its bound; then requests, errors and the slope of memory."""
    most, bounds = result["most_bytes_held"], result["bounds"]
    rows = [[name, f"{most.get(name, 0) >> 10:,}", f"{bound >> 10:,}"] for name, bound in bounds.items()]
    done = (
        f"{sum(result['requests'].values()):,} requests in {result['seconds'] / 60:.0f} minutes, "
        f"{result['error_count']} errors, {result['evictions']:,} evictions, "
        f"hit rate {result['hit_rate']:.0%}. {_flatness(result['memory'])}"
    )
    table = markdown_table(("tier", "most held, KiB", "bound, KiB"), rows)
    return f"{table}\n{done}\n{_source(result)}"


def _flatness(memory: Mapping[str, float] | None) -> str:
    if memory is None:
        return "Too short a run for a slope of memory."
    first, last = memory["median_of_first_third_mib"], memory["median_of_last_third_mib"]
    return (
        f"Resident memory, the first {memory['from_second'] / 60:.1f} minutes left out: "
        f"{memory['mib_per_hour']:+.1f} ± {memory['standard_error']:.1f} MiB an hour; "
        f"median of the first third {first:.0f} MiB, of the last {last:.0f} MiB."
    )


def _source(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    repeats = f", median of {result['repeats']} runs" if result.get("repeats", 1) > 1 else ""
    return (
        f"\n`{result['command']}`, {result['date']}, {result['device']}, bundled checkpoint, "
        f"torch {versions['torch']}, transformers {versions['transformers']}{repeats}.\n"
    )
