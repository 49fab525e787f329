"""How a decode step is divided among programs, and when its kernels wait for one another."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arrcoc.decode import quantize_text
from arrcoc.decode.blocking import (
    BYTES,
    NARROW,
    NARROW_COLUMNS,
    Blocking,
    Blocks,
    blocking_for,
    is_even,
)
from arrcoc.decode.launch import KernelStep
from arrcoc.decode.slots import Slot
from arrcoc.qwen import load
from arrcoc.text import Matrix


@pytest.fixture
def qwen(tiny_checkpoint):
    return load(str(tiny_checkpoint), "cpu", "float32")


class Launches:
    """In place of the kernels: notes every launch."""

    def __init__(self) -> None:
        self.made: list[SimpleNamespace] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(
            warmup=lambda *arguments, grid, **constants: self.made.append(
                SimpleNamespace(name=name, grid=grid, arguments=arguments, constants=constants)
            )
        )


def launches(qwen, blocking: Blocking, pdl: bool) -> list[SimpleNamespace]:
    """All launches of one step."""
    step, noted = KernelStep(qwen.text, blocking, pdl, compile_only=True), Launches()
    vars(step).update(_kernels=noted, _attention=noted)
    slot = Slot(qwen.text, 1024)
    step.logits(slot)
    step.finish(slot)
    return noted.made


@pytest.mark.parametrize(("pdl", "early", "dependent"), [(True, True, 2), (True, False, 1), (False, True, 0)])
def test_every_kernel_knows_when_the_next_one_may_begin(qwen, pdl: bool, early: bool, dependent: int) -> None:
    made = launches(qwen, Blocking(early=early), pdl)
    assert {launch.constants["PDL"] for launch in made} == {dependent}


@pytest.mark.parametrize(
    ("columns", "rows", "even"),
    [((64, 64), (32, 8), True), ((64, 64), (32, 4), False), ((48, 48), (8, 8), False)],
)
def test_even(columns: tuple[int, int], rows: tuple[int, int], even: bool) -> None:
    matrices = tuple(Matrix(torch.empty(r, c)) for r, c in zip(rows, columns, strict=True))
    assert is_even(Blocks(8, 32, 4), matrices) is even


def test_weights_of_one_byte_have_blocks_of_their_own(qwen) -> None:
    pytest.importorskip("torchao")
    assert blocking_for(qwen.text) == NARROW
    quantize_text(qwen, "int8")
    assert blocking_for(qwen.text) == BYTES != NARROW


def test_wide_layers_have_blocks_of_their_own(qwen) -> None:
    wide = replace(qwen.text, embedding=torch.empty(2, NARROW_COLUMNS + 64))
    assert blocking_for(wide) == Blocking() != NARROW


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "i8"])
def test_a_product_for_hopper_loads_weights_before_it_waits(kind: str, early: bool) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from arrcoc.decode.kernels import product

    types = dict.fromkeys(("w0", "w1", "w2"), f"*{kind}") | {"eps": "fp32", "gain": "*bf16"}
    constants = {"N0": 64, "N1": 0, "N2": 0, "K": 2048, "NORM": True, "ADD": False, "SCALED": kind == "i8"}
    constants |= {"BLOCK_N": 8, "BLOCK_K": 1024, "EVEN": True, "PDL": early + 1}
    names = product.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=product, signature=signature, constexprs=values)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True}
    )
    text = made.asm["ptx"]
    before, after = text.split("griddepcontrol.wait")
    assert "ld.global" in before  # its first weights
    assert ("griddepcontrol.launch_dependents" in before) == early
    assert ("griddepcontrol.launch_dependents" in after) == (not early)


def test_a_step_begins_after_the_one_before_has_ended() -> None:
    """The attention reads the length before it waits: no kernel of a step may run beside the last one's."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from arrcoc.decode.kernels import begin

    constants = {"D": 2048, "HALF": 64, "BLOCK": 512, "PDL": 2}
    types = {"token": "*i64", "table": "*bf16"}
    names = begin.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=begin, signature=signature, constexprs=values)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
    before, after = made.asm["ptx"].split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" not in before
    assert "griddepcontrol.launch_dependents" in after
