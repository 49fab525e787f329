"""What the kernels of a decode step are told to fetch, and that they do so before they wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arrcoc.decode import quantize_text
from arrcoc.decode.blocking import BYTES, Blocking, Blocks, blocking_for, is_even
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
    vars(step)["_kernels"] = noted
    slot = Slot(qwen.text, 1024)
    step.logits(slot)
    step.finish(slot)
    return noted.made


def eager_to_fetch(qwen) -> Blocking:
    """Blocks that divide every matrix, with far more to fetch than there is."""
    layer = qwen.text.layers[0]
    least = min(min(m.rows for m in layer.matrices), min(m.columns for m in layer.matrices))
    one = Blocks(4, least & -least, 4, 1000)
    return Blocking(one, one, one, one, one, Blocks(16, 4, 4, 1000), 1_000_000)


def launches_of(made: list[SimpleNamespace], name: str) -> list[SimpleNamespace]:
    """Those of one kernel."""
    return [launch for launch in made if launch.name == name]


def test_no_more_is_fetched_of_the_next_matrices_than_they_have(qwen) -> None:
    layer = qwen.text.layers[0]
    blocking = eager_to_fetch(qwen)._replace(out=Blocks(layer.out.rows, 32, 4))  # one program
    made = launches_of(launches(qwen, blocking, pdl=True), "product")
    assert [launch.constants["NEXT"] > 0 for launch in made] == [False, True, False] * qwen.n_layers
    first = made[1]
    assert first.arguments[-2] is layer.gate.values
    assert first.arguments[-1] is layer.up.values
    whole = layer.gate.values.numel()
    assert whole - 1024 < first.constants["NEXT"] * first.grid[0] * 1024 <= whole


def test_without_dependent_launches_nothing_is_fetched_ahead(qwen) -> None:
    for launch in launches(qwen, eager_to_fetch(qwen), pdl=False):
        assert launch.constants.get("AHEAD", 0) == launch.constants.get("NEXT", 0) == 0


def test_uneven_blocks_fetch_nothing_ahead(qwen) -> None:
    uneven = Blocking(*[Blocks(128, 4096, 4, 3)] * 5, Blocks(16, 4, 4, 2))  # type: ignore[arg-type]
    made = launches(qwen, uneven, pdl=True)
    assert {launch.constants["AHEAD"] for launch in launches_of(made, "product")} == {0}
    assert {launch.constants["AHEAD"] for launch in launches_of(made, "attend")} == {2}


@pytest.mark.parametrize(
    ("columns", "rows", "even"),
    [((64, 64), (32, 8), True), ((64, 64), (32, 4), False), ((48, 48), (8, 8), False)],
)
def test_even(columns: tuple[int, int], rows: tuple[int, int], even: bool) -> None:
    matrices = tuple(Matrix(torch.empty(r, c)) for r, c in zip(rows, columns, strict=True))
    assert is_even(Blocks(8, 32, 4), matrices) is even


def test_weights_of_one_byte_have_blocks_of_their_own(qwen) -> None:
    pytest.importorskip("torchao")
    assert blocking_for(qwen.text) == Blocking()
    quantize_text(qwen, "int8")
    assert blocking_for(qwen.text) == BYTES != Blocking()


@pytest.mark.parametrize(("kind", "ahead", "pieces"), [("bf16", 1, 8), ("i8", 1, 0), ("bf16", 0, 0)])
def test_a_product_for_hopper_fetches_before_it_waits(kind: str, ahead: int, pieces: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from arrcoc.decode.kernels import product

    types = dict.fromkeys(("w0", "w1", "w2", "next0", "next1"), f"*{kind}") | {"eps": "fp32", "gain": "*bf16"}
    constants = {"N0": 64, "N1": 0, "N2": 0, "K": 2048, "NORM": True, "ADD": False, "SCALED": kind == "i8"}
    constants |= {"BLOCK_N": 8, "BLOCK_K": 1024, "EVEN": True, "AHEAD": ahead, "NEXT": pieces, "PDL": True}
    names = product.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=product, signature=signature, constexprs=values)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True}
    )
    text = made.asm["ptx"]
    before, after = text.split("griddepcontrol.wait")
    assert (before.count("cp.async.bulk.prefetch.L2") > 0) == (ahead > 0)
    assert "cp.async.bulk.prefetch.L2" not in after
    assert "ld.global" in before  # its first weights
