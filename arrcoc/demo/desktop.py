"""A desktop session, drawn: windows that scroll, fill and overlap, a person who types, a cursor that blinks.

The screenshots that an agent sends while it works look like this: hardly anything changes between two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from arrcoc.demo.placards import sample
from arrcoc.errors import ConfigError

WIDTH, HEIGHT = 1536, 1152
ACTIONS = {"type": 0.4, "blink": 0.2, "scroll": 0.15, "terminal": 0.12, "picture": 0.06, "raise": 0.07}
"""What happens between two screenshots, and how often."""

_BAR, _TITLE, _LINE = 40, 30, 22
_INK, _PAPER, _DARK, _ACCENT = (32, 34, 38), (252, 252, 250), (24, 26, 31), (38, 110, 190)
_PICTURE = 512
_VIEWS = 6  # placard canvases that the picture window goes through


@dataclass(frozen=True, slots=True, eq=False)
class Screenshot:
    """One moment of the session.

    Attributes:
        image: uint8 [HEIGHT, WIDTH, 3], sRGB.
        action: what has happened since the one before, a key of `ACTIONS`; "start" for the first.
        question: about the signs in the picture window.
    """

    image: NDArray[np.uint8]
    action: str
    question: str


@dataclass(slots=True)
class _Window:
    name: str
    title: str
    box: tuple[int, int, int, int]  # x, y, width, height, title bar included


@dataclass(slots=True)
class _Session:
    """Everything that can change."""

    windows: list[_Window]  # the last one is in front
    typed: int = 200  # characters of the corpus in the editor
    scrolled: int = 0  # lines
    output: int = 9  # lines in the terminal
    view: int = 0
    minute: int = 0
    cursor: bool = True


def session(frames: int = 60, seed: int = 0) -> Iterator[Screenshot]:
    """Screenshots of one session: the same for the same arguments (and fonts) in every process.

    Args:
        frames: how many, at least 1.
        seed: of what happens, and of the pictures.

    Raises:
        ConfigError: `frames` or `seed` outside these bounds.
    """
    if frames < 1 or seed < 0:
        raise ConfigError(f"frames {frames}, seed {seed}", "at least 1 and 0", "Raise them")
    rng = np.random.default_rng(seed)
    state = _Session(_windows(rng))
    for number in range(frames):
        action = "start" if number == 0 else str(rng.choice(list(ACTIONS), p=list(ACTIONS.values())))
        _act(state, action, rng)
        state.minute = number // 12
        yield Screenshot(_draw(state, seed), action, _picture(seed, state.view)[1])


def _windows(rng: np.random.Generator) -> list[_Window]:
    def at(x: int, y: int) -> tuple[int, int]:
        return x + int(rng.integers(-20, 21)), y + int(rng.integers(-12, 13))

    return [
        _Window("terminal", "Terminal - build", (*at(60, 690), 700, 380)),
        _Window("reader", "Handbook - Reader", (*at(700, 60), 760, 620)),
        _Window("picture", "signs.png - Pictures", (*at(930, 520), _PICTURE, _PICTURE + _TITLE)),
        _Window("editor", "notes.txt - Editor", (*at(90, 70), 640, 560)),
    ]


def _act(state: _Session, action: str, rng: np.random.Generator) -> None:
    state.cursor = not state.cursor
    if action == "type":
        state.typed += int(rng.integers(2, 12))
    elif action == "scroll":
        state.scrolled += int(rng.integers(1, 6))
    elif action == "terminal":
        state.output += int(rng.integers(1, 4))
    elif action == "picture":
        state.view = (state.view + 1) % _VIEWS
    elif action == "raise":
        state.windows.append(state.windows.pop(int(rng.integers(0, len(state.windows) - 1))))


def _draw(state: _Session, seed: int) -> NDArray[np.uint8]:
    screen = _wallpaper().copy()
    for window in state.windows:
        x, y, width, height = window.box
        body = _BODIES[window.name](state, width, height - _TITLE, seed)
        pen = ImageDraw.Draw(screen)
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=(120, 124, 130))
        front = window is state.windows[-1]
        pen.rectangle((x, y, x + width - 1, y + _TITLE - 1), fill=_ACCENT if front else (205, 208, 213))
        pen.text((x + 12, y + 7), window.title, font=_font("DejaVuSans", 14), fill=_PAPER if front else _INK)
        for place, colour in enumerate(((214, 82, 72), (230, 178, 60), (96, 176, 92)), 1):
            pen.ellipse((x + width - 22 * place, y + 9, x + width - 22 * place + 12, y + 21), fill=colour)
        screen.paste(body, (x, y + _TITLE))
    pen = ImageDraw.Draw(screen)
    pen.rectangle((0, HEIGHT - _BAR, WIDTH, HEIGHT), fill=_DARK)
    for place, window in enumerate(sorted(state.windows, key=lambda window: window.name)):
        label = (24 + 240 * place, HEIGHT - 28)
        pen.text(label, window.title, font=_font("DejaVuSans", 14), fill=(200, 204, 210))
    clock = f"{9 + state.minute // 60:02}:{state.minute % 60:02}"
    pen.text((WIDTH - 90, HEIGHT - 30), clock, font=_font("DejaVuSans", 18), fill=_PAPER)
    return np.asarray(screen)


def _editor(state: _Session, width: int, height: int, seed: int) -> Image.Image:
    page, font = Image.new("RGB", (width, height), _PAPER), _font("DejaVuSansMono", 15)
    pen = ImageDraw.Draw(page)
    lines = _wrapped(_corpus()[: state.typed], (width - 70) // 9)[-(height // _LINE - 1) :]
    for row, line in enumerate(lines):
        pen.text((12, 8 + row * _LINE), f"{row + 1:3}", font=font, fill=(150, 154, 160))
        pen.text((56, 8 + row * _LINE), line, font=font, fill=_INK)
    if state.cursor:
        x = 56 + int(pen.textlength(lines[-1], font=font)) + 1
        y = 8 + (len(lines) - 1) * _LINE
        pen.rectangle((x, y, x + 2, y + _LINE - 4), fill=_INK)
    return page


def _reader(state: _Session, width: int, height: int, seed: int) -> Image.Image:
    page, font = Image.new("RGB", (width, height), (255, 255, 255)), _font("DejaVuSans", 15)
    pen = ImageDraw.Draw(page)
    lines = _wrapped(_corpus()[1200:] + " " + _corpus(), (width - 60) // 9)
    shown = height // _LINE
    first = state.scrolled % max(1, len(lines) - shown)
    for row, line in enumerate(lines[first : first + shown]):
        pen.text((20, 6 + row * _LINE), line, font=font, fill=_INK)
    top = int((height - 60) * first / len(lines))
    pen.rectangle((width - 12, 0, width, height), fill=(232, 233, 236))
    pen.rectangle((width - 10, top, width - 3, top + 60), fill=(160, 164, 170))
    return page


def _terminal(state: _Session, width: int, height: int, seed: int) -> Image.Image:
    page, font = Image.new("RGB", (width, height), _DARK), _font("DejaVuSansMono", 14)
    pen = ImageDraw.Draw(page)
    words = _corpus().split()
    shown = height // _LINE - 1
    for row, number in enumerate(range(max(0, state.output - shown), state.output)):
        name = words[37 * number % len(words)].strip(".,;:!?").lower()
        pen.text((10, 6 + row * _LINE), f"[{number:4}] built {name}.o", font=font, fill=(150, 210, 150))
    return page


def _pictures(state: _Session, width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(_picture(seed, state.view)[0])


_BODIES = {"editor": _editor, "reader": _reader, "terminal": _terminal, "picture": _pictures}


@cache
def _picture(seed: int, view: int) -> tuple[NDArray[np.uint8], str]:
    """A canvas of signs, and a question about it."""
    drawn = sample(seed, view, "test", _PICTURE)
    return drawn.image, drawn.question


@cache
def _wallpaper() -> Image.Image:
    """A gradient, smooth down the screen, so that most of its tiles differ from one another."""
    down, right = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    shade = (down / HEIGHT + right / WIDTH) / 2
    low, high = np.array([28, 58, 94]), np.array([142, 178, 196])
    return Image.fromarray((low + (high - low) * shade[..., None]).round().astype(np.uint8))


def _wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` characters, broken at blanks; at least one."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > columns:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


@cache
def _corpus() -> str:
    text = (resources.files("arrcoc") / "demo" / "corpus.txt").read_text("utf-8")
    return " ".join(text.split())


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)
