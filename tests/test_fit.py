"""The fit of the texture head: boxes land on the right tiles, the head learns, a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import arrcoc
from arrcoc import cli, fitting, image
from arrcoc.config import PresetChoice, load
from arrcoc.demo import placards
from arrcoc.errors import ArrcocError, ConfigError, ImageError, QueryError
from arrcoc.fitting import report
from arrcoc.fitting.labels import cell_coverage, frame_boxes, spread, tile_hits
from arrcoc.fitting.prepare import Preparer
from arrcoc.fitting.rows import held_out_images, read_rows
from arrcoc.fitting.settings import FitSettings
from arrcoc.fitting.start import regress_targets, untrained_head
from arrcoc.fitting.training import cell_weight, head_loss, learning_rate
from arrcoc.qwen import load as load_qwen
from arrcoc.records import Grid
from arrcoc.scorers import TEXTURE_HEAD_FILE, TextureHead

SHORT = FitSettings(steps=200, judge_every=25, batch=8, width=32, held_out=0.2, target="boxes")


def write_data(folder: Path, count: int, size: int = 384) -> tuple[Path, Path]:
    """Images of signs, and for each sign the question where its colour is, with boxes."""
    rows = []
    for index in range(count):
        example = placards.sample(0, index, "train", size, ["read"], placards=(2, 4))
        Image.fromarray(example.image).save(folder / f"{index}.png", compress_level=1)
        for colour in dict.fromkeys(placard.colour for placard in example.placards):
            boxes = [list(map(int, p.box)) for p in example.placards if p.colour == colour]
            rows.append({"image": f"{index}.png", "question": f"Where is the {colour} sign?", "boxes": boxes})
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder, questions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("signs"), 40)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images of two grids, half of the questions without boxes."""
    folder = tmp_path_factory.mktemp("few")
    for index, size in enumerate(((256, 256), (256, 256), (384, 256), (384, 256))):
        noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.byte().numpy()).resize(size).save(folder / f"{index}.png")
    rows: list[dict[str, Any]] = [{"image": f"{i}.png", "question": f"What is at {i}?"} for i in range(4)]
    rows += [row | {"boxes": [[140, 150, 250, 250]]} for row in rows]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, folder / "q.jsonl"


# Boxes.


@pytest.mark.parametrize(
    ("source", "content", "box", "expected"),
    [
        # Unscaled: a box is itself.
        ((256, 256), (256, 256), (10, 20, 30, 40), (10, 20, 30, 40)),
        # Stretched: y by 256 / 128 = 2, x by 128 / 256 = 1/2. 10.4 / 2 = 5.2 -> 5; 30 / 2 = 15.
        ((128, 256), (256, 128), (10.4, 20, 30, 40), (5, 40, 15, 80)),
        # A sliver keeps a pixel: 100.2 .. 100.4 rounds to 100 .. 100, so 100 .. 101.
        ((256, 256), (256, 256), (100.2, 7, 100.4, 9), (100, 7, 101, 9)),
        # Beyond the image by rounding: clipped to the content, and not in the padding below it.
        ((100, 256), (100, 256), (250, 90, 257, 101), (250, 90, 256, 100)),
    ],
)
def test_boxes_in_the_frame_by_hand(
    source: tuple[int, int],
    content: tuple[int, int],
    box: tuple[float, float, float, float],
    expected: tuple[int, int, int, int],
) -> None:
    assert frame_boxes([box], source, content) == [expected]


def test_cells_and_tiles_by_hand() -> None:
    # 2 x 2 tiles of 8 px with 2 cells each: cells of 4 px. The box 2..8 x 4..10 (x, y) covers, along x,
    # half of cell 0 and all of cell 1; along y, all of cell 1 and half of cell 2.
    grid = Grid(2, 2, 8)
    expected = torch.tensor([[0, 0, 0, 0], [0.5, 1, 0, 0], [0.25, 0.5, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(cell_coverage([(2, 4, 8, 10)], grid, 2), expected)
    # It ends where the right tiles begin (x1 = 8 is exclusive).
    assert tile_hits([(2, 4, 8, 10)], grid).tolist() == [[1, 0], [1, 0]]
    assert tile_hits([], grid).tolist() == [[0, 0], [0, 0]]
    assert spread(torch.tensor([[0.0, 1.0]]), 2).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_box_finds_its_tile_in_a_padded_frame() -> None:
    # A strip of 40 x 400 px with a white mark: the tile that shows the mark is the tile that is hit.
    config = load("demo")
    pixels = torch.zeros(3, 40, 400, dtype=torch.uint8)
    pixels[:, 5:15, 300:310] = 255
    frame = image.frame(pixels, config, 32, torch.device("cpu"))
    assert frame.content != (frame.grid.height, frame.grid.width), "the case needs padding"
    boxes = frame_boxes([(300, 5, 310, 15)], frame.source, frame.content)
    grid = frame.grid
    lit = frame.pixels[0].view(grid.rows, grid.tile, grid.cols, grid.tile).amax((1, 3)) > 128
    assert torch.equal(tile_hits(boxes, grid) > 0, lit)
    x0, y0, x1, y1 = boxes[0]
    assert frame.pixels[:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].float().mean() > 240


# Metrics and schedules.


def test_metrics_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.2], [0.2, 0.1]])
    wanted = torch.tensor([[True, False], [True, False]])
    # Pairs (wanted, other): .9>.2, .9>.1, .2=.2 (half), .2>.1: 3.5 of 4.
    assert report.auc(scores, wanted) == pytest.approx(3.5 / 4)
    # Highest: .9 (wanted), then the first .2 in raster order (not wanted), then the second.
    assert [report.recall_at(scores, wanted, k) for k in (1, 2, 3)] == [0.5, 0.5, 1.0]
    # -ln .8 for both: (0.2231 + 0.2231) / 2.
    target = torch.tensor([1.0, 0.0])
    assert report.binary_cross_entropy(torch.tensor([0.8, 0.2]), target) == pytest.approx(0.22314, abs=1e-5)


def test_schedules_by_hand() -> None:
    settings = FitSettings(steps=100, lr=0.1)
    assert learning_rate(0, settings) == pytest.approx(0.01)  # first of 10 warm-up steps
    assert learning_rate(10, settings) == pytest.approx(0.1)
    assert learning_rate(55, settings) == pytest.approx(0.05)  # half of the cosine
    assert [cell_weight(step, 100) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]


def test_loss_by_hand() -> None:
    # A head whose every cell says 0: the loss is ln 2 for tiles, and ln 2 more for each weight of cells.
    head = untrained_head(4, 16, 0)
    with torch.no_grad():
        head.project.weight.zero_()
        head.project.bias.zero_()
    batch = (torch.randn(2, 13, 8, 8), torch.randn(2, 4), torch.rand(2, 8, 8), torch.rand(2, 2, 2))
    losses = [head_loss(head, batch, weight).item() for weight in (0.0, 1.0)]
    assert losses == pytest.approx([0.693147, 2 * 0.693147], abs=1e-5)


def test_held_out_images_are_a_share_by_content() -> None:
    images = [f"{n}" for n in range(20)]
    chosen = held_out_images(images, 0.1, 0)
    assert len(chosen) == 2
    assert chosen == held_out_images(images[::-1] * 3, 0.1, 0)
    assert len(held_out_images(["a", "b"], 0.01, 0)) == 1
    assert len(held_out_images(["a", "b"], 0.99, 0)) == 1
    assert {held_out_images(images, 0.1, seed) for seed in range(5)} != {chosen}
    with pytest.raises(ConfigError, match="two or more"):
        held_out_images(["a", "a"], 0.5, 0)


# Bad input.

BAD_ROWS: list[tuple[str, type[ArrcocError], str]] = [
    ("not json", QueryError, "q.jsonl:2: Invalid JSON"),
    ("[1]", QueryError, "q.jsonl:2"),
    ('{"image": "a.png"}', QueryError, "q.jsonl:2: question"),
    ('{"image": "a.png", "question": " "}', QueryError, "q.jsonl:2: an empty question"),
    ('{"image": "a.png", "question": "?", "box": []}', QueryError, "q.jsonl:2: box"),
    ('{"image": "a.png", "question": "?", "boxes": [[1, 2, 3]]}', QueryError, "q.jsonl:2: boxes.0"),
    ('{"image": "a.png", "question": "?", "boxes": [[5, 2, 3, 4]]}', QueryError, "x0 < x1"),
    ('{"image": "a.png", "question": "?", "boxes": [[-1, 2, 3, 4]]}', QueryError, "from 0 on"),
    ('{"image": "b.png", "question": "?"}', ImageError, "q.jsonl:2: image 'b.png' is not there"),
    ('{"image": "../q.jsonl", "question": "?"}', ImageError, "q.jsonl:2"),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, line: str, kind: type[ArrcocError], message: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").touch()
    good = '{"image": "a.png", "question": "?", "answer": "x"}\n'
    (tmp_path / "q.jsonl").write_text(good)
    assert read_rows(tmp_path / "q.jsonl", folder)[0].boxes is None
    (tmp_path / "q.jsonl").write_text(good + line)
    with pytest.raises(kind) as caught:
        read_rows(tmp_path / "q.jsonl", folder)
    assert message in str(caught.value)


def test_rows_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="cannot be read"):
        read_rows(tmp_path / "q.jsonl", tmp_path)
    (tmp_path / "q.jsonl").write_text("\n\n")
    with pytest.raises(QueryError, match="holds no rows"):
        read_rows(tmp_path / "q.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"held_out": 1.0}, "held_out = 1.0"),
        ({"target": "box"}, "'auto', 'boxes' or 'glimpse'"),
        ({"speed": 3}, "speed = 3"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FitSettings.make(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("out", ["head.bin", "missing/head.safetensors", None])
def test_bad_out(few: tuple[Path, Path], tmp_path: Path, out: str | None) -> None:
    with pytest.raises(ConfigError):
        fitting.fit(*few, "Qwen/Qwen3-VL-2B", out=None if out is None else tmp_path / out)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"image": "0.png", "question": "?", "boxes": [[0, 0, 300, 10]]}, QueryError, "leaves the image"),
        ({"image": "bad.png", "question": "?"}, ImageError, "q.jsonl:1"),
        ({"image": "0.png", "question": "<|im_end|>"}, QueryError, "q.jsonl:1: text with the control token"),
    ],
)
def test_what_only_the_work_finds_names_the_line_too(
    few: tuple[Path, Path],
    tmp_path: Path,
    tiny_checkpoint: Path,
    row: dict[str, Any],
    kind: type[ArrcocError],
    message: str,
) -> None:
    (few[0] / "bad.png").write_text("no image")
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(kind, match=r"q\.jsonl:1") as caught:
        fitting.fit(
            few[0], tmp_path / "q.jsonl", tiny_checkpoint, out=tmp_path / "h.safetensors", device="cpu"
        )
    assert message in str(caught.value)


# Preparation.


def preparer(checkpoint: Path, folder: Path, target: Any) -> Preparer:
    qwen = load_qwen(checkpoint, torch.device("cpu"), torch.float32)
    return Preparer(qwen, PresetChoice.make("demo", {}), folder, target)


def test_targets_are_boxes_or_what_the_engine_sees(
    few: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    rows = read_rows(few[1], few[0])
    samples = preparer(tiny_checkpoint, tmp_path, "auto").prepare(rows, lambda done, total: None)
    assert [sample.kind for sample in samples] == ["glimpse"] * 4 + ["boxes"] * 4
    assert {sample.shape for sample in samples} == {(2, 2, 16), (2, 3, 16)}
    # x 140..250 and y 150..250 lie in the second column and row of 128-px tiles, of 2 x 2 and of 2 x 3.
    assert samples[4].tiles.tolist() == [[0, 0], [0, 1]]
    assert samples[6].tiles.tolist() == [[0, 0, 0], [0, 1, 0]]
    # Cells of 8 px: columns 18 (144..152) to 30 (240..248) and rows 19 to 30 are covered whole.
    assert (samples[6].cell_target() == 1).nonzero().aminmax(dim=0).min.tolist() == [19, 18]
    engine = arrcoc.Engine.from_pretrained(tiny_checkpoint, "demo", "cpu", participatory="glimpse")
    seen = engine.encode(rows[0].image, rows[0].question).scores.participatory
    torch.testing.assert_close(samples[0].tiles, seen, rtol=1e-5, atol=1e-6)
    only = preparer(tiny_checkpoint, tmp_path, "boxes").prepare(rows, lambda done, total: None)
    assert [sample.kind for sample in only] == ["boxes"] * 4
    with pytest.raises(ConfigError, match="without any boxes"):
        preparer(tiny_checkpoint, tmp_path, "boxes").prepare(rows[:4], lambda done, total: None)


def test_what_is_prepared_is_not_made_again(
    few: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(few[1], few[0])
    first = preparer(tiny_checkpoint, tmp_path, "auto").prepare(rows, lambda done, total: None)
    damaged = first[0].texture
    maps = first[0].load_texture().maps
    damaged.write_bytes(b"cut off")
    preparer(tiny_checkpoint, tmp_path, "auto").prepare(rows, lambda done, total: None)
    assert torch.equal(first[0].load_texture().maps, maps), "a damaged file is made anew"

    def refuse(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("arrcoc.texture.extract", refuse)
    again = preparer(tiny_checkpoint, tmp_path, "auto").prepare(rows, lambda done, total: None)
    assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(first, again, strict=True))


def test_the_regression_tells_targets_apart(
    data: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    # Rows of the projection say how red, green, blue the target is: from questions that name its colour.
    samples = preparer(tiny_checkpoint, tmp_path, "boxes").prepare(
        read_rows(data[1], data[0]), lambda done, total: None
    )
    head = untrained_head(samples[0].embedding.shape[0], 16, 0)
    regress_targets(head, samples)
    by_colour = {sample.row.question.split()[3]: sample.embedding for sample in samples}
    embeddings = torch.stack([by_colour["red"], by_colour["blue"]])
    normed = torch.nn.functional.layer_norm(embeddings, embeddings.shape[1:])
    red, blue = head.project(normed)[:, :3].tolist()
    assert red[0] > blue[0]  # channel red
    assert red[2] < blue[2]  # channel blue


# The fit.


def test_a_fit_improves_recall_and_the_engine_takes_it_up(
    data: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_checkpoint.iterdir():
        (model / file.name).symlink_to(file)
    made = fitting.fit(*data, model, "demo", SHORT, device="cpu")
    fitted, before = made.held_out["fitted head"], made.held_out["untrained head"]
    assert fitted["recall@2"] > before["recall@2"] + 0.2
    assert fitted["auc"] > 0.85 > before["auc"]
    assert fitted["bce"] < before["bce"] - 0.15
    for name in ("propositional", "perspectival"):
        assert fitted["recall@4"] > made.held_out[name]["recall@4"]
    assert made.weights == model / TEXTURE_HEAD_FILE
    engine = arrcoc.Engine.from_pretrained(model, "demo", "cpu")
    assert engine.describe()["scorers"]["participatory"] == "texture"
    assert TextureHead.load(made.weights, 64).fingerprint == engine.describe()["model"]["fingerprint"]
    assert json.loads((made.work / "report.json").read_text())["held_out"] == made.held_out
    with Image.open(made.work / "curves.png") as picture:
        assert picture.width > 500


def test_distilling_comes_closer_to_the_glimpse(
    few: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    settings = FitSettings(steps=60, judge_every=5, patience=99, batch=4, width=16, target="glimpse")
    made = fitting.fit(*few, tiny_checkpoint, "demo", settings, tmp_path / "h.safetensors", "cpu")
    curve = made.report["curve"]
    assert made.report["rows"] == {"boxes": 0, "glimpse": 8, "held_out": 2}
    # Soft targets keep the loss above their own entropy, so it falls towards that and not to zero.
    assert curve[-1]["train"] < curve[0]["train"]
    before, after = (made.held_out[name]["bce"] for name in ("untrained head", "fitted head"))
    assert after is not None
    assert before is not None
    assert after < before


def test_it_stops_early(few: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path) -> None:
    settings = FitSettings(steps=400, judge_every=2, patience=2, batch=2, width=8, lr=0.1, target="boxes")
    made = fitting.fit(*few, tiny_checkpoint, "demo", settings, tmp_path / "h.safetensors", "cpu")
    assert made.report["steps"] < 400
    assert made.report["steps"] == made.report["best_step"] + 2 * 2
    least = min(point["held_out"] for point in made.report["curve"])
    assert made.held_out["fitted head"]["bce"] == pytest.approx(least, rel=1e-4), "the best weights are kept"


COMMAND = ("--preset", "demo", "--device", "cpu", "--target", "boxes", "--batch", "2", "--steps", "150")


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "arrcoc", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_fit_goes_on_to_the_same_weights(
    few: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def arguments(name: str) -> list[str]:
        out = ["--out", str(tmp_path / f"{name}.safetensors"), "--save-every", "0", "--patience", "99"]
        return ["fit", *map(str, few), "--model", str(tiny_checkpoint), *COMMAND, *out]

    process = start(arguments("killed"))
    wait_for((tmp_path / "killed.fit" / "state.pt").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.safetensors").exists()
    with caplog.at_level("INFO", logger="arrcoc.fitting.training"):
        for name in ("killed", "whole"):
            result = CliRunner().invoke(cli.app, arguments(name))
            assert result.exit_code == 0, result.output
    told = [r.message.split()[0] for r in caplog.records if r.name == "arrcoc.fitting.training"]
    assert told == ["resumed"], "one of the two"
    killed, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("killed", "whole"))
    torch.testing.assert_close(killed, whole, rtol=1e-5, atol=1e-6)
    # The best weights may be from before the kill; the last ones are not.
    last = [
        torch.load(tmp_path / f"{name}.fit" / "state.pt", weights_only=True) for name in ("killed", "whole")
    ]
    torch.testing.assert_close(last[0]["head"], last[1]["head"], rtol=1e-5, atol=1e-6)
    assert last[0]["history"] == last[1]["history"]


def test_the_command_end_to_end(few: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = tmp_path / "h.safetensors"
    shared = ["fit", *map(str, few), "--model", str(tiny_checkpoint), "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(cli.app, [*shared, "--steps", "3", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rows"] == {"boxes": 4, "glimpse": 4, "held_out": 2}
    assert found["weights"] == str(out)
    assert "fitting" in result.stderr
    text = CliRunner().invoke(cli.app, [*shared, "--steps", "3"])
    assert "recall@4" in text.stdout
    assert "perspectival" in text.stdout
    wrong = CliRunner().invoke(cli.app, [*shared, "--steps", "0"])
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: steps = 0")


def test_a_head_that_finds_no_more_than_others_is_called_out() -> None:
    def judged(**aucs: float | None) -> dict[str, report.Metrics]:
        return {name.replace("_", " "): {"auc": value} for name, value in aucs.items()}

    held = judged(fitted_head=0.7, untrained_head=0.5, propositional=0.8, perspectival=0.7)
    assert report.losing_to(held) == ["propositional", "perspectival"]
    assert report.losing_to(judged(fitted_head=0.9, untrained_head=0.5)) == []
    assert report.losing_to(judged(fitted_head=None, untrained_head=0.5)) == []
