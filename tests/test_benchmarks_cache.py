"""Benchmarks of the tile cache: which tiles are new, lines fitted, memory's slope, and their tables."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from arrcoc.demo.desktop import Screenshot

ROOT = Path(__file__).parent.parent
ABOUT = {
    "command": "python it.py",
    "date": "2026-01-02",
    "device": "cpu (here)",
    "versions": {"torch": "2.0", "transformers": "5.0"},
}


@pytest.fixture(scope="module")
def screenshots(scripts: None) -> ModuleType:
    import screenshots

    return screenshots


@pytest.fixture(scope="module")
def soak(scripts: None) -> ModuleType:
    import soak

    return soak


@pytest.fixture(scope="module")
def tables(scripts: None) -> ModuleType:
    import cache_tables

    return cache_tables


def test_a_new_tile_is_one_whose_surroundings_were_never_seen(screenshots: ModuleType) -> None:
    """2 x 3 tiles of 4 pixels: with a margin of one, a changed corner pixel is part of four tiles."""
    first = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    second = first.copy()
    second[3, 3] = 255
    shots = [Screenshot(image, "type", "?") for image in (first, second, first)]
    assert [int(new.sum()) for new in screenshots.new_tiles(shots, 4, 0)] == [6, 1, 0]
    with_margin = screenshots.new_tiles(shots, 4, 1)
    assert [int(new.sum()) for new in with_margin] == [6, 4, 0]
    assert with_margin[1].tolist() == [[True, True, False], [True, True, False]]
    blank = [Screenshot(np.zeros((8, 12, 3), np.uint8), "start", "?")]
    assert int(screenshots.new_tiles(blank, 4, 1)[0].sum()) == 1, "equal tiles are encoded once"


def test_the_line_says_how_far_frames_lie_from_it(screenshots: ModuleType) -> None:
    exact = screenshots.fit([0, 10, 20], [5.0, 25.0, 45.0])
    assert (exact["ms_per_new_tile"], exact["ms_at_none"], exact["r_squared"]) == (2.0, 5.0, 1.0)
    assert exact["share_of_frames_within_20_percent"] == 1.0
    off = screenshots.fit([0, 0, 10, 10], [5.0, 15.0, 100.0, 100.0])  # the line is 10 at none: 50 % away
    assert off["share_of_frames_within_20_percent"] == 0.5


def test_the_slope_of_memory_leaves_the_warm_up_out(soak: ModuleType) -> None:
    """100 MiB, growing by 6 MiB an hour; a jump before second 600."""
    samples = [
        soak.Sample(float(at), int(((40 if at < 600 else 100) + at / 600) * 2**20), {})
        for at in range(0, 2400, 60)
    ]
    found = soak.flatness(samples, 600.0)
    assert found["mib_per_hour"] == pytest.approx(6.0, abs=0.01)
    assert found["standard_error"] < 0.01
    assert found["least_mib"] == 101.0
    assert soak.flatness(samples, 0.0)["mib_per_hour"] > 50


def test_tables_say_what_was_measured(tables: ModuleType) -> None:
    frames = [
        {"action": "start", "new_tiles": 8, "hits": 0, "misses": 8, "cached_ms": 80.0, "plain_ms": 80.0},
        {"action": "blink", "new_tiles": 1, "hits": 7, "misses": 1, "cached_ms": 10.0, "plain_ms": 80.0},
        {"action": "scroll", "new_tiles": 4, "hits": 4, "misses": 4, "cached_ms": 40.0, "plain_ms": 80.0},
        {"action": "blink", "new_tiles": 0, "hits": 8, "misses": 0, "cached_ms": 4.0, "plain_ms": 80.0},
    ]
    line = {"ms_per_new_tile": 10.0, "ms_at_none": 5.0, "r_squared": 0.9871}
    stream = ABOUT | {
        "tiles": 8,
        "frames": frames,
        "fit": line | {"share_of_frames_within_20_percent": 0.95},
        "same_answers": 3,
        "answers": 3,
        "largest_relative_difference": 2e-6,
        "clock": "a clock",
        "repeats": 2,
    }
    made = tables.screenshots_table(stream)
    assert "| blink | 2 | 0.5 | 94% | 11.4 x |" in made
    assert "| all | 3 | 1.7 | 79% | 4.4 x |" in made
    assert "R² 0.9871, 1 of the 2 frames with new tiles within 20 % of it (the farthest: 33%)" in made
    assert "The 1 frames without new tiles cost 0.4 new tiles' worth each" in made
    assert "median of 2 runs" in made
    rates = {"tiles_asked_for": 1000, "hit_rate": 0.5, "hit_rate_of_follow_ups": 0.6}
    ahead = rates | {"hit_rate": 0.7, "prefetched": 40, "prefetched_and_used": 10}
    talk = ABOUT | {"images": 50, "canvas": 1024, "questions": 5, "claimed_in_the_literature": [0.4, 0.6]}
    case = {"budget": 0.25, "prefetch_off": rates, "prefetch_on": ahead}
    made = tables.conversation_table(talk | {"cases": [case]})
    assert "| 0.25 | 1,000 | 50% | 60% | 70% | 60% | 25% |" in made
