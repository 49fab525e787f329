"""Encodings on disk: bit-equal round trip, whole files or none, and damage named as such."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from arrcoc import encoding as encodings
from arrcoc.encoding import Encoding, thumbnail
from arrcoc.errors import ConfigError, EncodingError
from arrcoc.records import Layout, Scores, Segment, Tensions


def example(dtype: torch.dtype = torch.float32) -> Encoding:
    """2 x 3 tiles, 7 tokens of width 5, 2 planes; no two values alike."""
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return Encoding(
        tokens=noise(7, 5).to(dtype),
        deepstack=noise(2, 7, 5).to(dtype),
        positions=noise(3, 7),
        segments=(Segment(0, 6, 12.0, ""), Segment(6, 7, 1.0, "Detail at [0, 0, 333, 500]:")),
        lod=torch.tensor([[0, 1, 2], [3, 0, 0]]),
        relevance=noise(2, 3),
        scores=Scores(noise(2, 3), noise(2, 3), noise(2, 3)),
        tensions=Tensions(0.1, -0.25, 1 / 3),
        sides=(1, 2, 3, 4),
        layout=Layout.CROPS,
        overview_stride=1,
        question='Wo?\n"\u20ac\U0001f600\x00',
        budget=40,
        full_tokens=96,
        source_size=(200, 300),
        frame_size=(256, 384),
        distortion=0.01,
        picture=torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6),
        fingerprint="ab12",
        timings={"encode": 1.5, "total": 2.0},
    )


def parts(made: Encoding) -> dict[str, object]:
    """Every field by name, the scores one by one."""
    flat = {field.name: getattr(made, field.name) for field in dataclasses.fields(Encoding)}
    scores = flat.pop("scores")
    return flat | {name: getattr(scores, name) for name in Scores.__slots__}


def assert_equal(one: Encoding, other: Encoding) -> None:
    theirs = parts(other)
    for name, mine in parts(one).items():
        other_part = theirs[name]
        assert type(mine) is type(other_part), name
        if isinstance(mine, torch.Tensor) and isinstance(other_part, torch.Tensor):
            assert mine.dtype == other_part.dtype, name
            assert torch.equal(mine, other_part), name
        else:
            assert mine == other_part, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    made = example(dtype)
    made.save(tmp_path / "e.safetensors")
    assert_equal(Encoding.load(tmp_path / "e.safetensors"), made)
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


def test_views_of_shared_memory_can_be_saved(tmp_path: Path) -> None:
    whole = torch.randn(7, 10)
    made = dataclasses.replace(example(), tokens=whole[:, ::2], positions=whole.T[:3])
    made.save(tmp_path / "e.safetensors")
    assert_equal(Encoding.load(tmp_path / "e.safetensors"), made)


def test_counts_by_hand() -> None:
    made = example()
    assert made.n_tokens == 7
    assert made.share == 7 / 96
    assert made.lod_counts == {"background": 3, "low": 1, "medium": 1, "high": 1}
    assert made.sequence.segments == made.segments


def test_a_failing_write_leaves_an_old_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.safetensors"
    example().save(path)
    before = path.read_bytes()

    def half_written(tensors: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encodings, "save_file", half_written)
    with pytest.raises(EncodingError, match="No space left"):
        dataclasses.replace(example(), question="Other?").save(path)
    assert path.read_bytes() == before
    with pytest.raises(EncodingError):
        example().save(tmp_path / "new.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "e.safetensors", tmp_path / "folder"):
        with pytest.raises(EncodingError, match="cannot be written"):
            example().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("not an encoding")
    (tmp_path / "empty").touch()
    for name in ("model.safetensors", "text", "empty", "missing", "."):
        with pytest.raises(EncodingError, match="not a readable encoding"):
            Encoding.load(tmp_path / name)


def test_loading_to_a_device_that_is_not_there(tmp_path: Path) -> None:
    example().save(tmp_path / "e.safetensors")
    with pytest.raises(ConfigError, match="device"):
        Encoding.load(tmp_path / "e.safetensors", device="cuda:99")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3000), at=st.integers(0, 2500), byte=st.integers(0, 255), shorten=st.booleans())
def test_damage_is_an_encoding_error_or_harmless(
    tmp_path: Path, cut: int, at: int, byte: int, shorten: bool
) -> None:
    example().save(tmp_path / "e.safetensors")
    raw = bytearray((tmp_path / "e.safetensors").read_bytes())
    if shorten:
        raw = raw[:cut]
    elif at < len(raw):
        raw[at] = byte
    (tmp_path / "damaged").write_bytes(raw)
    try:
        found = Encoding.load(tmp_path / "damaged")
    except EncodingError:
        return
    assert found.positions.shape == (3, found.n_tokens)


def _rewritten(path: Path, monkeypatch: pytest.MonkeyPatch, **facts: object) -> Path:
    real = json.loads(json.dumps(example()._facts()))
    monkeypatch.setattr(Encoding, "_facts", lambda self: real | facts)
    example().save(path)
    return path


@pytest.mark.parametrize(
    "facts",
    [
        {"segments": []},
        {"segments": [{"start": 0, "stop": 6, "extent": 12.0, "caption": ""}]},
        {"segments": [{"start": 1, "stop": 7, "extent": 12.0, "caption": ""}]},
        {"segments": [{"begin": 0}]},
        {"segments": 5},
        {"sides": [1, 2, 3]},
        {"overview_stride": -1},
        {"overview_stride": "one"},
        {"overview_stride": 1, "sides": [2, 3, 4, 5]},  # 24 tokens of overview, 7 in all
        {"layout": "spiral"},
        {"tensions": [0.0]},
        {"tensions": ["x", 0, 0]},
        {"timings": [1]},
        {"budget": "many"},
        {"source_size": 5},
    ],
)
def test_records_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, object]
) -> None:
    with pytest.raises(EncodingError):
        Encoding.load(_rewritten(tmp_path / "e.safetensors", monkeypatch, **facts))


@pytest.mark.parametrize(
    ("stride", "tokens"),
    # 2 x 3 tiles of side 1: 2 x 3 tokens, 1 x 2, 1 x 1.
    [(0, 0), (1, 6), (2, 2), (3, 1), (8, 1)],
)
def test_tokens_of_the_overview(stride: int, tokens: int) -> None:
    assert dataclasses.replace(example(), overview_stride=stride).overview_tokens == tokens


@pytest.mark.parametrize(
    ("layout", "lod", "stride"),
    [("crops", 1, 1), ("refine", 2, 1), ("replace", 1, 0), ("refine", 3, 0)],
)
def test_files_from_before_there_were_overviews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, lod: int, stride: int
) -> None:
    made = dataclasses.replace(example(), layout=Layout(layout), lod=torch.full((2, 3), lod))
    facts = made._facts()
    del facts["overview_stride"]
    monkeypatch.setattr(Encoding, "_facts", lambda self: facts)
    made.save(tmp_path / "e.safetensors")
    assert Encoding.load(tmp_path / "e.safetensors").overview_stride == stride


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good = example()
    for name, tensor in (
        ("deepstack", good.deepstack[:, :6]),
        ("positions", good.positions[:, :6]),
        ("tokens", good.tokens[:6]),
        ("relevance", good.relevance[:1]),
        ("lod", good.lod.flatten()),
    ):
        dataclasses.replace(good, **{name: tensor}).save(tmp_path / "e.safetensors")
        with pytest.raises(EncodingError, match="do not fit together"):
            Encoding.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((3, 4, 6), (3, 4, 6)),
        ((3, 10, 40), (3, 5, 20)),
        ((3, 1, 100), (3, 1, 20)),
        ((3, 200, 100), (3, 20, 10)),
    ],
)
def test_thumbnails_fit_and_keep_their_mean(size: tuple[int, ...], expected: tuple[int, ...]) -> None:
    pixels = torch.full(size, 77, dtype=torch.uint8)
    small = thumbnail(pixels, longest=20)
    assert small.shape == expected
    assert bool((small == 77).all())
    assert small.data_ptr() != pixels.data_ptr()
