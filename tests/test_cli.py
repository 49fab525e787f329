from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import arrcoc
from arrcoc import cli, plot
from arrcoc.console import error_line
from arrcoc.records import Layout

QUESTION = "What is on her chest?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    path = tmp_path_factory.mktemp("picture") / "photo.png"
    photo.resize((256, 256)).save(path)
    return path


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> list[str]:
    return ["--model", str(tiny_checkpoint), "--device", "cpu"]


def call(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


# A process started in a shell's background ignores SIGINT, and so would its children.
HEEDING_SIGINT = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import runpy; runpy.run_module('arrcoc', run_name='__main__')"
)


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HEEDING_SIGINT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes, **more)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.1", 0.1),
        ("300", 300),
        ("10%", 0.1),
        ("100%", 1.0),
        ("1", 1),  # one token
        ("1.0", 1.0),  # everything
        (" 50 ", 50),
        ("-5", -5),  # a number; the engine refuses it
    ],
)
def test_budget_is_a_share_or_tokens(text: str, budget: int | float) -> None:
    parsed = cli.parse_budget(text)
    assert parsed == pytest.approx(budget)
    assert type(parsed) is type(budget)


@pytest.mark.parametrize("text", ["", "%", "many", "3 tokens", "1/4", "10%%"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        cli.parse_budget(text)


def test_choices_are_those_of_the_modules_that_own_them() -> None:
    assert cli.PLOT_SUFFIXES == plot.FORMATS
    assert tuple(Layout) == cli.LAYOUTS


def test_help_and_version_import_no_torch() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom arrcoc.cli import app\n"
        "for arguments in (['--help'], ['ask', '--help'], ['--version']):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0 and result.output, result\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'PIL', 'skimage'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_version() -> None:
    assert call("--version").stdout == f"arrcoc {arrcoc.__version__}\n"


def test_ask_prints_the_answer_and_nothing_else_on_stdout(picture: Path, tiny: list[str]) -> None:
    result = call("ask", picture, QUESTION, *tiny, "--max-new-tokens", 4, "--budget", "50%")
    engine = arrcoc.Engine.from_pretrained(tiny[1], device="cpu")
    expected = engine.ask(picture, QUESTION, 0.5, max_new_tokens=4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected.text + "\n"
    assert expected.encoding is not None
    assert f"{expected.encoding.n_tokens} of {expected.encoding.full_tokens} tokens" in result.stderr


@pytest.mark.parametrize("conversation", [False, True])
def test_several_questions_are_answered_in_one_session(
    picture: Path, tiny: list[str], conversation: bool
) -> None:
    questions, options = (QUESTION, "Is she smiling?"), ("--max-new-tokens", 4, "--budget", "50%")
    more = ["--conversation"] if conversation else []
    result = call("ask", picture, *questions, *tiny, *options, *more)
    engine = arrcoc.Engine.from_pretrained(tiny[1], device="cpu")
    with engine.open(picture, 0.5, conversation=conversation) as session:
        expected = [session.ask(question, max_new_tokens=4).text for question in questions]
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert result.stderr.count("tokens (") == 2
    told = json.loads(call("ask", picture, *questions, *tiny, *options, *more, "--json").stdout)
    assert [answer["answer"] for answer in told["answers"]] == expected
    assert [answer["question"] for answer in told["answers"]] == list(questions)
    assert told["engine"]["device"].startswith("cpu")


def test_streamed_answer_is_the_same(picture: Path, tiny: list[str]) -> None:
    options = (*tiny, "--max-new-tokens", 6)
    whole, pieces = (call("ask", picture, QUESTION, *options, *more) for more in ((), ("--stream",)))
    assert whole.exit_code == pieces.exit_code == 0
    assert whole.stdout == pieces.stdout != "\n"


def test_sampling_options_reach_the_decoder(picture: Path, tiny: list[str]) -> None:
    def sampled(seed: int) -> str:
        options = ("--max-new-tokens", 8, "--temperature", 1.5, "--seed", seed)
        return call("ask", picture, QUESTION, *tiny, *options).stdout

    assert sampled(1) == sampled(1) != sampled(2)


def test_json_of_a_real_process_is_all_there_is_on_stdout(
    picture: Path, tiny: list[str], tmp_path: Path
) -> None:
    options = ("--json", "--budget", "12", "--max-new-tokens", 3, "--layout", "replace")
    drawing = tmp_path / "new" / "seen.png"
    process = start("ask", "-", QUESTION, *tiny, *options, "--plot", drawing, stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(picture.read_bytes(), timeout=60)
    assert process.returncode == 0, stderr.decode()
    facts = json.loads(stdout)
    # 256 x 256 px are 2 x 2 tiles of 128 px, 4 * 4 tokens each at LOD high.
    assert facts["full_tokens"] == 64
    assert facts["tokens"] <= facts["budget"] == 12
    assert facts["layout"] == "replace"
    assert facts["new_tokens"] <= 3
    assert facts["tokens"] == sum(facts["sides"][lod] ** 2 for row in facts["lod"] for lod in row)
    assert sum(facts["lod_counts"].values()) == 4
    assert {"prefill", "generate", "total"} <= facts["timings_ms"].keys()
    assert facts["plot"] == str(drawing)
    with Image.open(drawing) as image:
        assert image.width > 1000
    assert facts["engine"]["model"]["name"] == tiny[1]


def test_encode_writes_what_load_reads(picture: Path, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    out.write_text("an older file")
    result = call("encode", picture, QUESTION, "--out", out, *tiny, "--budget", 20, "--json")
    assert result.exit_code == 0, result.stderr
    facts, encoding = json.loads(result.stdout), arrcoc.Encoding.load(out)
    assert facts["out"] == str(out)
    assert facts["tokens"] == encoding.n_tokens <= 20
    assert facts["lod"] == encoding.lod.tolist()
    assert encoding.question == QUESTION
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_describe(tiny: list[str]) -> None:
    described = json.loads(call("describe", *tiny, "--json").stdout)
    assert described["model"]["name"] == tiny[1]
    lines = call("describe", *tiny).stdout.splitlines()
    assert any(line.startswith("cache.hits ") for line in lines)
    assert any(line.split()[:2] == ["layout", described["layout"]] for line in lines)


def refuse_work(*_: object, **__: object) -> None:
    raise AssertionError("no model may be loaded for this")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "IMAGE", "q", "--budget", "many"], "'many' is not a share"),
        (["ask", "IMAGE", "q", "--plot", "seen.jpg"], "'seen.jpg' does not end in .png"),
        (["ask", "IMAGE", "q", "--layout", "spiral"], "'spiral' is not one of replace"),
        (["ask", "IMAGE", "q", "--json", "--stream"], "exclude one another"),
        (["ask", "IMAGE", "q", "r", "--plot", "seen.png"], "--plot draws one question"),
        (["ask", "IMAGE", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ask", "IMAGE"], "QUESTION"),
        (["encode", "IMAGE", "q"], "--out"),
        (["encode", "IMAGE", "q", "--out", "missing/f"], "folder that does not exist"),
        (["encode", "IMAGE", "q", "--out", "."], "is a folder"),
        (["paint"], "paint"),
    ],
)
def test_misuse_is_2_before_any_work(
    arguments: list[str], message: str, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arrcoc.engine.Engine.from_pretrained", refuse_work)
    result = call(*(picture if argument == "IMAGE" else argument for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr


def test_missing_image_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arrcoc.engine.Engine.from_pretrained", refuse_work)
    result = call("ask", "nowhere.png", "q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: nowhere.png does not exist. Allowed: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"QUESTION": " "}, "an empty question"),
        ({"BUDGET": "0"}, "budget 0"),
        ({"BUDGET": "9999"}, "budget 9999"),
        ({"BUDGET": "nan"}, "budget nan"),
        ({"IMAGE": "-"}, "0 bytes"),  # stdin is empty
        ({"MODEL": "no/such/folder"}, "no/such/folder"),
        ({"PRESET": "grand"}, "preset 'grand'"),
        ({"DEVICE": "tpu"}, "device 'tpu'"),
        ({"DTYPE": "int8"}, "dtype 'int8'"),
    ],
)
def test_bad_input_is_1_and_one_line(
    change: dict[str, str], message: str, picture: Path, tiny_checkpoint: Path
) -> None:
    given = {"IMAGE": str(picture), "QUESTION": "q", "BUDGET": "0.5", "MODEL": str(tiny_checkpoint)}
    given |= {"PRESET": "auto", "DEVICE": "cpu", "DTYPE": "auto"} | change
    options = [part for name in ("BUDGET", "MODEL", "PRESET", "DEVICE", "DTYPE")
               for part in (f"--{name.lower()}", given[name])]  # fmt: skip
    result = call("ask", given["IMAGE"], given["QUESTION"], *options, "--json")
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [["--debug", "ask"], ["ask", "--debug"]])
def test_debug_shows_the_trace(arguments: list[str]) -> None:
    result = call(*arguments, "nowhere.png", "q")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_failures_that_are_not_about_the_input_show_their_type() -> None:
    assert (
        error_line(RuntimeError("out of\n memory")) == "RuntimeError: out of memory (--debug shows the trace)"
    )
    assert error_line(arrcoc.ImageError("a", "b", "c")) == "a. Allowed: b. c."


def test_ctrl_c_is_130_and_quiet() -> None:
    process = start("ask", "-", "q", stdin=subprocess.PIPE)
    assert process.stdin is not None
    # More than a pipe holds: once it is written, the command is reading it.
    process.stdin.write(bytes(1 << 20))
    process.stdin.flush()
    time.sleep(0.5)  # a signal that comes between two reads is seen after the second only
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    stdout, stderr = process.communicate()
    assert (stdout, stderr) == (b"", b"")


@pytest.mark.parametrize("at", ["from_pretrained", "stream"])
def test_ctrl_c_at_work_is_130_too(
    at: str, picture: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"arrcoc.engine.Engine.{at}", interrupt)
    result = call("ask", picture, "q", *tiny)
    assert (result.exit_code, result.output) == (130, "")
