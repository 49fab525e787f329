"""The binding of libnvjpeg: how it is found, what its errors say, when its pointers are given back."""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from typing import Any

import pytest
import torch

from arrcoc import nvjpeg


@pytest.fixture(autouse=True)
def _forget() -> Any:
    nvjpeg.library.cache_clear()
    yield
    nvjpeg.library.cache_clear()


def test_nothing_found_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "_names", lambda: iter(()))
    with pytest.raises(RuntimeError, match=r"no libnvjpeg from 12.1 on \(none found\)"):
        nvjpeg.version()


def test_what_is_no_library_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "libnvjpeg.so.13").write_bytes(b"not a library")
    names = [str(tmp_path / "libnvjpeg.so.13"), ctypes.util.find_library("c")]
    monkeypatch.setattr(nvjpeg, "_names", lambda: iter(names))
    with pytest.raises(RuntimeError, match=r"libnvjpeg.so.13: .*; libc.so.6: .*nvjpegGetProperty"):
        nvjpeg.library()


def test_an_old_library_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "_names", lambda: iter(["libnvjpeg.so.11"]))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(version=(11, 9, 0)))
    with pytest.raises(RuntimeError, match=r"is of version 11\.9\.0"):
        nvjpeg.library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(version=(12, 1, 0)))
    nvjpeg.library.cache_clear()
    assert nvjpeg.version() == "12.1.0"


@pytest.mark.skipif(not any(nvjpeg._names()), reason="no libnvjpeg here")
def test_the_library_here_has_all_that_is_called() -> None:
    assert tuple(map(int, nvjpeg.version().split("."))) >= nvjpeg.OLDEST
    # Without a driver it refuses politely; with one it makes a handle.
    pointer = ctypes.c_void_p()
    status = nvjpeg.library().nvjpegCreateEx(0, None, None, 32, ctypes.byref(pointer))
    assert (status == 0) == bool(pointer.value)


def test_errors_have_words() -> None:
    nvjpeg._check(0, "nvjpegDecode")
    with pytest.raises(RuntimeError, match=r"nvjpegDecode: bad JPEG \(status 3\)"):
        nvjpeg._check(3, "nvjpegDecode")
    with pytest.raises(RuntimeError, match=r"unknown \(status 99\)"):
        nvjpeg._check(99, "nvjpegDecode")


class Call:
    """One function of a library that a test makes up."""

    def __init__(self, work: Any) -> None:
        self.work, self.argtypes = work, ()

    def __call__(self, *arguments: Any) -> int:
        return self.work(*arguments) or 0


class Library:
    """A stand-in that counts what is made and given back."""

    def __init__(self, version: tuple[int, ...] = (13, 0, 1), size: tuple[int, int] = (40, 24)) -> None:
        self.log: list[str] = []
        self.numbers, self.size = version, size
        for name in nvjpeg._FUNCTIONS:
            setattr(self, name, Call(getattr(self, f"_{name[6:].lower()}", partial(self._note, name))))

    def _note(self, name: str, *arguments: Any) -> None:
        self.log.append(name)

    def _getproperty(self, which: int, number: Any) -> None:
        number._obj.value = self.numbers[which]

    def _getimageinfo(self, handle: Any, data: Any, length: int, *out: Any) -> None:
        out[2][0], out[3][0] = self.size


def test_a_size_other_than_what_is_allocated_is_refused() -> None:
    library = Library(size=(41, 24))
    decoder = nvjpeg._Decoder(library)
    with pytest.raises(RuntimeError, match="nvJPEG reads 41 x 24 pixels, not 40 x 24"):
        decoder.decode(b"", 24, 40)
    assert library.log == ["nvjpegCreateEx"]


def test_pointers_are_given_back_once_dependents_first() -> None:
    log: list[str] = []
    make, release = (lambda pointer: 0), (lambda name, pointer: log.append(name))
    handle = nvjpeg._Owned(make, partial(release, "handle"))
    state = nvjpeg._Owned(make, partial(release, "state"), handle)
    del handle
    gc.collect()
    assert log == []
    del state
    gc.collect()
    assert log == ["state", "handle"]


def test_a_pointer_that_was_not_made_is_not_given_back() -> None:
    log: list[str] = []
    with pytest.raises(RuntimeError, match="allocator failure"):
        nvjpeg._Owned(lambda pointer: 5, lambda pointer: log.append("released"))
    gc.collect()
    assert log == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_refused_and_harms_nothing() -> None:
    cuda = torch.device("cuda")
    with pytest.raises(RuntimeError, match="header"):
        nvjpeg.decode(b"\xff\xd8\xff" + bytes(100), 24, 40, cuda)
    assert int(torch.ones(3, device=cuda).sum()) == 3
