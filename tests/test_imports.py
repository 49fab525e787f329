"""Who may import whom, read from the source: stages know nothing of one another."""

import ast
from pathlib import Path

import pytest

import arrcoc

PACKAGE = Path(arrcoc.__file__).parent
STAGES = {"image", "texture", "scorers", "glimpse", "opponent", "allocation", "encoder", "sequence", "decode"}
"""Modules of one stage each. `decode` and `lod` are packages; an engine is a part of stage encoder."""

BASE = {"errors", "records", "config", "timing", "transfer", "triton_support"}
HELPERS = {
    "texture": {"texture_kernel"},
    "image": {"pixels", "hashing", "resample", "area_kernel", "host_tiles"},
    "glimpse": {"qwen", "prefixes", "lod", "vision", "glimpse_tail", "prefix_graph", "attention_probe"},
    "encoder": {"cache", "lod", "streams"},
    "decode": {"qwen", "kv", "prefixes", "decode", "text", "text_layers", "capture"},
}
"""What a stage may import besides `BASE`."""

ORDER = {
    *("engine", "pipeline", "judging", "viewer", "scene", "plan_graph", "query_free", "prompting", "fitting"),
    "evaluation",
}
"""The only modules that know more than one stage, or the engine's side of one."""

HUGGING_FACE = {"qwen", "vision", "loading", "text"}
PATHS = {"language_model", "visual", "lm_head", "embed_tokens", "self_attn", "rotary_emb", "rope_deltas"}
"""Attributes of a Hugging Face Qwen-VL model."""


def sources() -> dict[str, list[ast.Module]]:
    """Syntax trees by first name below `arrcoc`: a module, or a package with all that is in it."""
    trees: dict[str, list[ast.Module]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        trees.setdefault(first, []).append(ast.parse(path.read_text("utf-8")))
    return trees


SOURCES = sources()


def imported(name: str) -> set[str]:
    """First names below `arrcoc` that a module or package imports, wherever the statement stands."""
    found: set[str] = set()
    for node in (node for tree in SOURCES[name] for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parts = (node.module or "").split(".")
            if parts == ["arrcoc"]:
                found |= {alias.name for alias in node.names}
            elif parts[0] == "arrcoc":
                found.add(parts[1])
        elif isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] if len(parts) > 1 else "arrcoc" for parts in dotted if parts[0] == "arrcoc"}
    return found


def outside(name: str) -> set[str]:
    """Other packages that a module or package imports, and what it takes from them, as dotted names."""
    nodes = [node for tree in SOURCES[name] for node in ast.walk(tree)]
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    names = {f"{n.module}.{alias.name}" for n in froms for alias in n.names}
    return names | {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_imports_its_helpers_alone(stage: str) -> None:
    assert stage in SOURCES
    assert imported(stage) - BASE - HELPERS.get(stage, set()) == set()


@pytest.mark.parametrize("helper", sorted(set().union(*HELPERS.values(), BASE) - STAGES))
def test_helpers_import_no_stage(helper: str) -> None:
    assert imported(helper) & (STAGES | ORDER) == set()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_few_modules_know_two_stages(name: str) -> None:
    if name in ORDER or name == "demo" or name in STAGES:
        return
    # The command line and the public names may take the engine's records and inputs, not its order.
    assert len(imported(name) & (STAGES - {"decode"})) <= 1, imported(name)


def test_the_pipeline_knows_every_stage_but_decoding() -> None:
    known = imported("pipeline") | imported("judging") | imported("scene")
    assert known >= STAGES - {"decode"}
    assert "decode" not in known
    assert {"decode", "viewer"} <= imported("engine")


@pytest.mark.parametrize("name", sorted(set(SOURCES) - HUGGING_FACE - {"demo"}))
def test_only_qwen_knows_hugging_face(name: str) -> None:
    taken = {package for package in outside(name) if package.split(".")[0] == "transformers"}
    assert taken <= {"transformers.utils.logging"}  # the command line quiets its progress bars
    nodes = [node for tree in SOURCES[name] for node in ast.walk(tree)]
    assert {node.attr for node in nodes if isinstance(node, ast.Attribute)} & PATHS == set()


def test_demo_imports_nothing_of_the_command_line_and_the_core_little_of_demo() -> None:
    assert imported("demo") & {"cli", "console"} == set()
    users = {name for name in SOURCES if "demo" in imported(name)} - {"demo"}
    assert users <= {"engine", "cli", "console", "evaluation"}


def test_the_checker_sees_every_form_of_import() -> None:
    SOURCES["_example"] = [
        ast.parse(
            "import arrcoc.image\nfrom arrcoc import texture\ndef f():\n    from arrcoc.lod.tower import x"
        )
    ]
    try:
        assert imported("_example") == {"image", "texture", "lod"}
    finally:
        del SOURCES["_example"]
