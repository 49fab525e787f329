"""Placards, JSONL and Parquet as data sets; bad rows are named by file and line."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arrcoc.errors import ArrcocError, ConfigError, ImageError
from arrcoc.evaluation import datasets
from arrcoc.evaluation.methods import check_methods

GOOD = {"image": "a.png", "question": "What?", "answer": "this"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, *rows: Any, name: str = "set.jsonl") -> str:
    (folder / "a.png").write_bytes(png())
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def load(dataset: str) -> Any:
    return datasets.load(dataset, 256, 3, 5)


def test_placards_are_the_test_split_and_their_number_changes_none() -> None:
    few, many = load("placards"), datasets.load("placards", 256, 9, 5)
    assert (len(few), len(many)) == (3, 9)
    assert few.identity == many.identity
    assert few.identity != datasets.load("placards", 256, 3, 6).identity
    one, again = few[2], many[2]
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image))
    assert (one.question, one.answers, one.targets) == (again.question, again.answers, again.targets)
    assert one.targets
    with pytest.raises(ConfigError, match="canvas"):
        datasets.load("placards", 100, 3, 5)


def test_rows_of_a_jsonl_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        GOOD,
        "",
        {**GOOD, "id": 7, "family": "odd", "answers": ["x\u2028y", "z"], "answer": None, "extra": 1},
        {**GOOD, "answer": 3, "targets": [[0, 0, 4, 4]]},
    )
    cases = load(path)
    assert [case.id for case in (cases[i] for i in range(3))] == ["1", "7", "4"]
    assert [cases[i].answers for i in range(3)] == [("this",), ("x\u2028y", "z"), ("3",)]
    assert [cases[i].family for i in range(3)] == ["all", "odd", "all"]
    assert cases[2].targets == ((0, 0, 4, 4),)
    assert Path(str(cases[0].image)).read_bytes() == png()
    assert not cases.has_targets
    with pytest.raises(ConfigError, match="oracle"):
        check_methods(["oracle"], cases)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{torn", r"set\.jsonl:2: "),
        ({**GOOD, "question": ""}, r"set\.jsonl:2: question"),
        ({"image": "a.png", "question": "What?"}, r"set\.jsonl:2: give answer, or answers"),
        ({**GOOD, "answers": ["also"]}, r"set\.jsonl:2: give answer, or answers"),
        ({**GOOD, "answer": None, "answers": []}, r"set\.jsonl:2: give answer, or answers"),
        ({**GOOD, "targets": [[1, 2, 3]]}, r"set\.jsonl:2: targets"),
        ([1], r"set\.jsonl:2: "),
        ({**GOOD, "id": "1"}, r"set\.jsonl:2: id '1' for the second time"),
        ({**GOOD, "image": {"path": None}}, r"set\.jsonl:2: image"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, GOOD, row))


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"set\.jsonl:1: image 'b\.png'"):
        load(write(tmp_path, {**GOOD, "image": "b.png"}))


@pytest.mark.parametrize("name", ["nothing", "gone.jsonl", "gone.parquet", "set.csv"])
def test_no_such_data_set(name: str) -> None:
    with pytest.raises(ConfigError, match="placards"):
        load(name)


def test_a_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a row"):
        load(write(tmp_path, ""))


def test_rows_of_a_parquet_file_hold_bytes_or_paths(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.png").write_bytes(png())
    for number, images in enumerate(([png()] * 2, ["a.png"] * 2, [{"bytes": png(), "path": None}] * 2)):
        path = tmp_path / f"set{number}.parquet"
        columns = {"image": images, "question": ["q", "r"], "answers": [["a"], ["b", "c"]]}
        parquet.write_table(pyarrow.table(columns), path)
        cases = load(str(path))
        assert [cases[i].answers for i in range(2)] == [("a",), ("b", "c")]
        held = cases[1].image
        assert (held if isinstance(held, bytes) else Path(str(held)).read_bytes()) == png()
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(ArrcocError, match=r"bad\.parquet"):
        load(str(tmp_path / "bad.parquet"))


def test_unknown_and_repeated_methods() -> None:
    cases = load("placards")
    check_methods(["oracle", "fastv"], cases)
    for names in (["clip"], [], ["fastv", "fastv"]):
        with pytest.raises(ConfigError):
            check_methods(names, cases)


def test_families_of_placards_can_be_chosen() -> None:
    chosen = datasets.load("placards", 512, 6, 0, ["count", "where"])
    assert {chosen[index].family for index in range(6)} == {"count", "where"}
    everything = datasets.load("placards", 512, 6, 0)
    assert chosen.identity == everything.identity | {"families": ["count", "where"]}
    with pytest.raises(ConfigError, match="families"):
        datasets.load("placards", 512, 6, 0, ["riddle"])
    with pytest.raises(ConfigError, match="of placards alone"):
        datasets.load("some.jsonl", 512, 6, 0, ["count"])
