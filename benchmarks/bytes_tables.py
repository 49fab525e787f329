"""Tables of what `preprocess.py` and `ttft.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import markdown_table

_STOCK = {"stock_torchvision": "stock, torchvision (its default)", "stock_pil": "stock, PIL"}


def preprocess_cpu(result: Mapping[str, Any]) -> str:
    """Stock over arrcoc from JPEG bytes to tiles on the CPU, which took turns."""
    names = [name for name in _STOCK if all(name in case["median_ms"] for case in result["cases"])]
    head = ("image", "JPEG", *(f"{_STOCK[name]}, over arrcoc" for name in names))
    rows = []
    for case in result["cases"]:
        ratios = [f"{case['stock_over_arrcoc'][name]:.2f} x" for name in names]
        rows.append([_size(case), _megabytes(case), *ratios])
    return markdown_table(head, rows) + _run(result)


def preprocess_gpu(result: Mapping[str, Any]) -> str:
    """Milliseconds from JPEG bytes to tiles on a GPU, by stage, and how far nvJPEG is from Pillow."""
    head = (
        "image", "JPEG", "decode", "frame", "tiles", "hashes to the host", "in all", "Pillow's decode alone",
        "levels off Pillow: mean, most",
    )  # fmt: skip
    rows = []
    for case in result["cases"]:
        stages, off = case["stages_ms"], case.get("nvjpeg_levels_off")
        names = ("decode", "frame", "tiles", "hash_copy", "total")
        levels = "not measured" if off is None else f"{off['mean']:g}, {off['most']}"
        times = [f"{stages[name]:.2f} ms" for name in names]
        rows.append([_size(case), _megabytes(case), *times, f"{case['pillow_decode_ms']:.0f} ms", levels])
    return markdown_table(head, rows) + _run(result)


def first_token_table(result: Mapping[str, Any], shape: str) -> str:
    """Milliseconds to the first token of a model size: stock, vLLM's from another run, arrcoc by budget."""
    cases = [case for case in result["cases"] if case["shape"] == shape]
    if not cases:
        return "Not measured yet.\n"
    head = (
        "image", "system", "vision tokens", "first token", "half of the image seen", "next question",
        "the same, its tiles cached", "ms per further token", "peak memory",
    )  # fmt: skip
    rows = []
    for case in cases:
        rows.append(_first_token_row(case))
        theirs = result["vllm"]["first_token_ms"].get(str(case["image_px"]))
        if case["system"] == "stock" and shape == result["vllm"]["shape"] and theirs is not None:
            decode = result["vllm"]["decode_ms_per_token"][str(case["image_px"])]
            rows.append(
                [_edge(case), "vLLM (another run)", "", f"{theirs:.0f} ms", *[""] * 3, f"{decode:g}", ""]
            )
    note = (
        f"\nvLLM's figures are of {result['vllm']['source']}.\n" if shape == result["vllm"]["shape"] else ""
    )
    return markdown_table(head, rows) + note + _run(result)


def _first_token_row(case: Mapping[str, Any]) -> list[str]:
    peak = "not measured" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 2**30:.2f} GiB"
    ours = case["system"] == "arrcoc"
    later = ["", "", ""]
    if ours:
        asked = (case["half_seen"], case["follow_up"]["new_tiles"], case["follow_up"]["tiles_cached"])
        later = [f"{one['first_token_ms']:.0f} ms" for one in asked]
    name = f"arrcoc, {case['budget']:g}" if ours else "transformers"
    decode = case.get("decode_ms_per_token")
    return [
        _edge(case),
        name,
        f"{case['tokens']:,}",
        f"{case['first_token_ms']:.0f} ms",
        *later,
        "not measured" if decode is None else f"{decode:.1f}",
        peak,
    ]


def _edge(case: Mapping[str, Any]) -> str:
    return f"{case['image_px']} x {case['image_px']}"


def _size(case: Mapping[str, Any]) -> str:
    return f"{case['width']} x {case['height']}"


def _megabytes(case: Mapping[str, Any]) -> str:
    return f"{case['jpeg_bytes'] / 1e6:.1f} MB"


def _run(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    about = [f"`{result['command']}`", result["date"], result["device"]]
    if result["device"].startswith("cpu"):
        about.append(f"{result.get('cores', 'unknown')} cores")
    about += [f"torch {versions['torch']}", f"transformers {versions['transformers']}"]
    about += [f"JPEG by {result['jpeg']}"] if "jpeg" in result else [result["dtype"]]
    counts = sorted({case.get("repeats", result["repeats"]) for case in result["cases"]})
    return f"\n{', '.join(about)}, median of {' or '.join(map(str, counts))} runs.\n"
