"""What an engine is made of, in words and numbers that go into JSON."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from arrcoc import jpeg
from arrcoc.cache import CacheStats
from arrcoc.config import Config, PresetChoice
from arrcoc.devices import device_name
from arrcoc.prefix_store import PrefixStats
from arrcoc.qwen import QwenVL
from arrcoc.records import Lod
from arrcoc.viewer import Viewer


def describe(
    qwen: QwenVL,
    presets: PresetChoice,
    viewer: Viewer,
    decoder: str,
    cache: CacheStats,
    prefixes: PrefixStats,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What runs where: model, presets, scorers, engines, decoder, cache, versions, notes.

    Args:
        qwen: the checkpoint.
        presets: which configuration serves which image.
        viewer: encodes images.
        decoder: its backend, in words.
        cache: counts of the tile cache.
        prefixes: counts of the store of overviews.
        notes: what else is worth knowing.
    """
    base = presets.base
    return {
        "model": {"name": qwen.name, "parameters": qwen.n_parameters, "fingerprint": qwen.fingerprint},
        "device": device_name(qwen.device),
        "dtype": str(qwen.dtype).removeprefix("torch."),
        **_settings(presets),
        "scorers": _scorers(qwen, viewer),
        "plan_stage": viewer.plan_stage(),
        "lod_engines": viewer.backends(),
        "jpeg": jpeg.describe(base.jpeg, qwen.device),
        "decoder": _decoder(decoder, base),
        "prompts": qwen.describe_layers(),
        "cache": _cache(cache) | {"location": base.cache_location},
        "prefixes": dataclasses.asdict(prefixes) | {"dtype": base.prefix_dtype},
        "versions": {
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "notes": list(notes),
    }


def _settings(presets: PresetChoice) -> dict[str, Any]:
    base = presets.base
    return {
        "preset": presets.name,
        "sides": {name: list(config.sides) for name, config in presets.by_name.items()},
        "layout": base.layout.value,
        "glimpse": base.glimpse,
        "halo": base.halo,
        "overview_stride": base.overview_stride,
    }


def _scorers(qwen: QwenVL, viewer: Viewer) -> dict[str, str]:
    parallel = "three CUDA streams, or a graph" if qwen.device.type == "cuda" else "in sequence"
    return {"participatory": "texture" if viewer.has_head else "glimpse", "parallel": parallel}


def _decoder(backend: str, base: Config) -> str:
    return backend if base.decode_weights == "bf16" else f"{backend}, {base.decode_weights} weights"


def _cache(stats: CacheStats) -> dict[str, Any]:
    """Cache statistics with LODs by name."""
    by_lod = {
        name: {Lod(lod).name.lower(): count for lod, count in sorted(getattr(stats, name).items())}
        for name in ("hits_by_lod", "misses_by_lod")
    }
    return dataclasses.asdict(stats) | by_lod
