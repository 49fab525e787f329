"""The benchmarks of bytes to tiles and of the time to the first token: what their results hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("scripts")


def test_files_are_the_same_every_time_and_differ_by_seed() -> None:
    import jpegs

    one, again, other = (jpegs.jpeg(200, 300, seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    with Image.open(io.BytesIO(one)) as opened:
        assert (opened.format, opened.size, opened.mode) == ("JPEG", (300, 200), "RGB")
    wide = np.asarray(jpegs.photographs(100, 4000))
    assert wide.shape == (100, 4000, 3)
    # Copies of the mosaic are mirrored, and no two places share their grain.
    off = np.abs(wide[:, :1792].astype(int) - wide[:, 3583:1791:-1])
    assert 0 < off.mean() < 6
    assert not np.array_equal(wide[:, :416], wide[:, 3584:])


def test_preprocess_compares_both_processors(tmp_path: Path) -> None:
    import preprocess

    out = tmp_path / "preprocess.json"
    preprocess.main(["--sizes", "256x384", "--repeats", "2", "--threads", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["jpeg"] == "Pillow"
    (case,) = result["cases"]
    assert (case["height"], case["width"], case["halo"]) == (256, 384, 1)
    assert set(case["stages_ms"]) == {"decode", "frame", "tiles", "hash_copy", "total"}
    assert set(case["median_ms"]) == {"arrcoc", *case["stock_over_arrcoc"]}
    assert "stock_pil" in case["median_ms"]
    for name, ratio in case["stock_over_arrcoc"].items():
        assert ratio == pytest.approx(case["median_ms"][name] / case["median_ms"]["arrcoc"], abs=0.02)
        assert case["fastest_ms"][name] <= case["median_ms"][name]


def test_stages_are_grouped_and_the_rest_is_between() -> None:
    import ttft
    from ttft_picture import STAGES

    names = {name: group for group, members in STAGES.items() for name in members}
    times = {"decode": 1.0, "frame": 2.0, "query": 3.0, "score": 4.0, "novelty": 5.0, "total": 99.0}
    found = ttft._grouped(times, names, 20.0)
    assert found == {
        **dict.fromkeys(STAGES, 0.0),
        "bytes": 3.0,
        "plan": 7.0,
        "between": 10.0,  # 20 of wall time, less 10 of known stages
        "wall": 20.0,
    }


def result(stages: dict[str, float]) -> dict[str, Any]:
    import ttft

    case = {"shape": "8b", "image_px": 1024, "stages_ms": stages}
    later = {"tiles_cached": {"stages_ms": stages}}
    return {
        "vllm": ttft.VLLM,
        "cases": [
            case | {"system": "stock"},
            case | {"system": "arrcoc", "budget": 0.25, "follow_up": later},
            case | {"system": "arrcoc", "budget": 0.125, "follow_up": later, "image_px": 3584},
        ],
    }


def test_the_picture_shows_every_system_once() -> None:
    from ttft_picture import draw

    figure = draw(result({"bytes": 2.0, "encode": 5.0}))
    small, large = figure.axes
    labels = [text.get_text() for text in small.get_xticklabels()]
    assert labels == ["trans-\nformers", "vLLM", "arrcoc\n0.25", "next\nquestion\n0.25"]
    heights = [text.get_text() for text in small.texts]
    assert heights == ["7", "62", "7", "7"]
    assert len(large.texts) == 2


def test_a_failed_case_is_left_out_with_its_reason(tmp_path: Path) -> None:
    import ttft

    out = tmp_path / "ttft.json"
    options = ttft._options(["--device", "cpu", "--out", str(out)])
    run = ttft.Run(options, [])

    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory\nand more")

    run.case({"image_px": 8960}, fail)
    run.seconds = -1
    run.case({"image_px": 1024}, fail)
    reasons = [case["reason"] for case in json.loads(out.read_text())["left_out"]]
    assert reasons == ["RuntimeError: out of memory", "more than -1 s had passed"]
