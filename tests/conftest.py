"""Fixtures shared by all tests, and the visible skip of tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from arrcoc.demo.checkpoint import make_checkpoint

# One thread a process: xdist already fills the cores, and sums come out in the same order on every machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; `-ra` lists them."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """Makes benchmarks/ importable: its scripts find one another through the folder they lie in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the untrained `tiny` Qwen3-VL; do not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def stock_model(tiny_checkpoint: Path) -> Qwen3VLForConditionalGeneration:
    """Stock transformers' model of `tiny_checkpoint`: fp32, SDPA, on the CPU; do not change it."""
    model: Qwen3VLForConditionalGeneration = Qwen3VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photograph, RGB, 512 x 512 pixels: a portrait of the astronaut Eileen Collins (NASA)."""
    return Image.fromarray(skimage.data.astronaut())
