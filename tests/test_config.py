from pathlib import Path

import pytest

from arrcoc import config
from arrcoc.config import Config
from arrcoc.errors import ConfigError
from arrcoc.records import Layout


@pytest.mark.parametrize("name", ["demo", "gigapixel", "photo"])
def test_every_preset_loads(name: str) -> None:
    assert name in config.preset_names()
    assert isinstance(config.load(name), Config)


def test_presets_hold_the_sides_of_the_blueprint() -> None:
    sides = {name: config.load(name).sides for name in config.preset_names()}
    assert sides["gigapixel"] == (4, 8, 14, 20)
    assert sides["photo"] == (2, 4, 6, 8)
    assert sides["demo"] == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("budgit", "budget"), ("side", "sides"), ("max_tile", "max_tiles"), ("min-lod", "min_lod"), (1, "mode")],
)
def test_unknown_key_names_the_nearest_field(typo: object, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.build({typo: 1})  # type: ignore[dict-item]
    assert raised.value.given == f"unknown key {typo!r}"
    assert raised.value.remedy.startswith("Did you mean '")
    if isinstance(typo, str):
        assert raised.value.remedy == f"Did you mean {nearest!r}"


@pytest.mark.parametrize(
    ("values", "given", "allowed"),
    [
        ({"max_tiles": 0}, "max_tiles = 0", "greater than or equal to 1"),
        ({"max_tiles": 1.5}, "max_tiles = 1.5", "a valid integer"),
        ({"budget": "much"}, "budget = 'much'", "a valid integer or a valid number"),
        ({"layout": "pile"}, "layout = 'pile'", "'replace', 'refine' or 'crops'"),
        ({"mode": "luck"}, "mode = 'luck'", "'budget' or 'threshold'"),
        ({"utility_exponent": 3}, "utility_exponent = 3", "less than or equal to 2"),
        ({"sides": [1, 2, 3]}, "sides = [1, 2, 3]", "one value more: item 3 is missing"),
        ({"sides": [1, 2, 3, None]}, "sides[3] = None", "a valid integer"),
        ({"sides": [0, 2, 3, 4]}, "sides = [0, 2, 3, 4]", "sides must ascend from at least 1"),
        ({"sides": [1, 3, 3, 4]}, "sides = [1, 3, 3, 4]", "sides must ascend from at least 1"),
        ({"probe_depth": []}, "probe_depth = []", "probe_depth needs one or more fractions in (0, 1]"),
        ({"probe_depth": [0.0]}, "probe_depth = [0.0]", "probe_depth needs"),
        ({"thresholds": [0.5, 0.4, 0.6]}, "thresholds = [0.5, 0.4, 0.6]", "thresholds must ascend"),
        ({"buckets": [2, 2]}, "buckets = [2, 2]", "buckets must ascend from at least 1"),
        ({"lod_limits": [1, "a", None]}, "lod_limits[1] = 'a'", "a valid integer"),
        ({"min_lod": 3, "max_lod": 1}, "min_lod = 3, max_lod = 1", "min_lod must not exceed max_lod"),
        ({"min_lod": 4}, "min_lod = 4", "less than or equal to 3"),
    ],
)
def test_invalid_value_is_reported_in_plain_words(
    values: dict[str, object], given: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        config.build(values)
    assert raised.value.given == given
    assert raised.value.allowed.startswith(allowed)
    assert "Value error" not in str(raised.value)
    assert "pydantic" not in str(raised.value)


@pytest.mark.parametrize(
    ("sides", "exponent", "layout", "concave"),
    [
        # replace: costs 1 4 9 16, steps 3 5 7; utilities 1/4 each: 1/12 > 1/20 > 1/28.
        ((1, 2, 3, 4), 1.0, "replace", True),
        # Utility = tokens / 16: the same for every token.
        ((1, 2, 3, 4), 2.0, "replace", True),
        # refine: steps 4 5 7, utilities 3/16 5/16 7/16: 0.047 < 0.0625, it rises.
        ((1, 2, 3, 4), 2.0, "refine", False),
        # refine: steps 121 23 25, utilities 1/13 each: 0.0006 < 0.0033, it rises.
        ((10, 11, 12, 13), 1.0, "refine", False),
    ],
)
def test_utility_per_token_must_not_rise(
    sides: tuple[int, ...], exponent: float, layout: str, concave: bool
) -> None:
    values = {"sides": sides, "utility_exponent": exponent, "layout": layout}
    if concave:
        assert config.build(values).sides == sides
    else:
        with pytest.raises(ConfigError, match="utility per token must not rise") as raised:
            config.build(values)
        assert raised.value.given == f"sides = {sides}, utility_exponent = {exponent}"


def test_costs_and_utilities() -> None:
    refine = config.build({"sides": (2, 4, 6, 8)})
    assert refine.utilities == (0.25, 0.5, 0.75, 1.0)
    assert refine.utility_steps == (0.25, 0.25, 0.25)
    assert refine.lod_costs == (0, 16, 36, 64)
    assert refine.step_costs == (16, 20, 28)
    replace = refine.updated({"layout": "replace"})
    assert replace.lod_costs == (4, 16, 36, 64)
    assert replace.step_costs == (12, 20, 28)


@pytest.mark.parametrize("stride", [1, 8, "auto"])
def test_strides_of_the_overview(stride: int | str) -> None:
    assert config.build({"overview_stride": stride}).overview_stride == stride


@pytest.mark.parametrize(
    "field",
    [
        *({"overview_stride": value} for value in (0, 9, "each", 1.5, None)),
        *({"halo": value} for value in (-1, 5, 0.5)),
        *({"overview_share": value} for value in (0, 1.1, "half")),
    ],
)
def test_overviews_and_halos_that_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        config.build(field)
    ((name, value),) = field.items()
    assert raised.value.given == f"{name} = {value!r}"
    if name == "overview_stride" and isinstance(value, int):
        assert raised.value.allowed.endswith("or 'auto'")


def test_overrides_replace_fields_and_are_checked() -> None:
    base = config.load("demo")
    changed = base.updated({"budget": 64, "layout": "crops"})
    assert (changed.budget, changed.layout, changed.sides) == (64, Layout.CROPS, base.sides)
    assert base.updated({}) is base
    with pytest.raises(ConfigError, match="Did you mean 'layout'"):
        base.updated({"layuot": "crops"})
    with pytest.raises(ConfigError, match="min_lod must not exceed"):
        changed.updated({"max_lod": 0}).updated({"min_lod": 1})


@pytest.mark.parametrize(("budget", "kind"), [(1, int), (1.0, float), (0.25, float), (512, int)])
def test_budget_keeps_its_kind(budget: float, kind: type) -> None:
    """1 is one token and 1.0 is everything, so neither may turn into the other."""
    assert type(config.build({"budget": budget}).budget) is kind
    assert type(config.build({}).updated({"budget": budget}).budget) is kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"sides: [1, 2\n", "a YAML mapping"),
        (b"\xff\xfe\x00", "a YAML mapping"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"", "holds a NoneType"),
        (b"max_tilez: 3\n", "Did you mean 'max_tiles'"),
        (b"max_tiles: many\n", "max_tiles = 'many'"),
        (b"x: !!python/object/apply:os.getcwd []\n", "a YAML mapping"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as raised:
        config.load(path)
    assert message in str(raised.value)


def test_yaml_file_by_path(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("layout: crops\nlod_limits: [null, 4, 2]\n", encoding="utf-8")
    loaded = config.load(str(path))
    assert loaded.layout is Layout.CROPS
    assert loaded.lod_limits == (None, 4, 2)


@pytest.mark.parametrize("missing", ["poster", "missing.yaml"])
def test_missing_preset_names_those_there_are(missing: str) -> None:
    with pytest.raises(ConfigError, match="auto, demo, gigapixel, photo, or a YAML file"):
        config.load(missing)


def test_config_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.build({}).budget = 1


def test_a_layout_prints_as_its_word() -> None:
    """On every Python: `enum.StrEnum` is of 3.11."""
    assert (str(Layout.REFINE), f"{Layout.REFINE:>7}") == ("refine", " refine")
    assert Layout("refine") is Layout.REFINE == "refine"
