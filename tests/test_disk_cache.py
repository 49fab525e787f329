"""The tier on disk: what it holds survives the process, damage is noticed, and nothing waits for it."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from arrcoc.cache import DiskTier, TileCache, TileKey, files
from arrcoc.cache.folder import SharedFolder
from arrcoc.cache.worker import Worker
from arrcoc.errors import ConfigError
from arrcoc.records import Features

PLANES = (3, 4, 8)  # 1 + L, m, D: 384 bytes in fp32
TILE_BYTES = 3 * 4 * 8 * 4


def key(number: int, engine: str = "e") -> TileKey:
    return TileKey((number, 1, 2, 3), 2, engine)


def planes(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(PLANES, number + 0.5).add(torch.arange(96).view(PLANES)).to(dtype)


def tier(folder: Path, max_bytes: int = 100_000, ttl: float = 1000.0) -> DiskTier:
    return DiskTier(folder, max_bytes, 1e9, ttl)


FILE_BYTES = len(files.dump(key(1), planes(1), -1.0))


def tile_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*" + files.SUFFIX))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read_by_the_next_process(tmp_path: Path, dtype: torch.dtype) -> None:
    first = tier(tmp_path / "new" / "folder")
    assert first.offer(key(1), -1.5, 1, lambda: planes(1, dtype))
    first.close()
    second = tier(tmp_path / "new" / "folder")
    assert key(1) in second
    loaded = second.load(key(1), 0.0)
    assert loaded is not None
    assert torch.equal(loaded[0], planes(1, dtype))
    assert loaded[0].dtype == dtype
    assert loaded[1] == pytest.approx(-1.5)
    assert second.load(key(2), 0.0) is None
    assert second.load(key(1, engine="other weights"), 0.0) is None
    assert second.load(key(1)._replace(lod=3), 0.0) is None


def test_the_bound_holds_for_the_files_and_the_lowest_score_leaves(tmp_path: Path) -> None:
    disk = tier(tmp_path, 3 * FILE_BYTES + 50)
    for number, level in [(1, -1.0), (2, -3.0), (3, -2.0), (4, 0.0), (5, -9.0)]:
        disk.store(key(number), planes(number), level)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * FILE_BYTES + 50
    assert [key(n) in disk for n in range(1, 6)] == [True, False, True, True, False]
    again = tier(tmp_path, 2 * FILE_BYTES + 50)  # a smaller bound, and the scores that the files carry
    assert [key(n) in again for n in (1, 3, 4)] == [True, False, True]
    assert len(tile_files(tmp_path)) == 2
    stats = again.stats()
    assert (stats.entries, stats.state) == (2, "on")
    assert stats.bytes == sum(path.stat().st_size for path in tile_files(tmp_path))


def test_files_leave_when_their_time_is_over(tmp_path: Path) -> None:
    disk = tier(tmp_path, ttl=100.0)
    for number in (1, 2):
        disk.store(key(number), planes(number), 0.0)
    old = tile_files(tmp_path)
    for path in old[:1]:
        os.utime(path, (time.time() - 101, time.time() - 101))
    second = tier(tmp_path, ttl=100.0)
    assert (second.stats().entries, tile_files(tmp_path)) == (1, old[1:])
    second._written = dict.fromkeys(second._written, time.time() - 101)  # it grows old while it is known
    assert [second.load(key(n), 1.0) for n in (1, 2)] == [None, None]
    assert tile_files(tmp_path) == []


def test_old_files_make_room_when_one_is_written(tmp_path: Path) -> None:
    disk = tier(tmp_path, ttl=100.0)
    disk.store(key(1), planes(1), 5.0)
    disk._written = dict.fromkeys(disk._written, time.time() - 101)
    disk.store(key(2), planes(2), 0.0)
    assert [path.name for path in tile_files(tmp_path)] == [files.file_name(key(2))]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    files.write_whole(path, b"first")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        files.write_whole(path, b"second")
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"first"


def test_only_one_holds_the_folder(tmp_path: Path) -> None:
    one, other, entered = SharedFolder(tmp_path), SharedFolder(tmp_path), threading.Event()

    def enter() -> None:
        with other.locked():
            entered.set()

    waiting = threading.Thread(target=enter)
    with one.locked():
        waiting.start()
        assert not entered.wait(0.1)
        one.mark()
    assert entered.wait(10)
    waiting.join()
    assert other.changed_by_others()
    other.accept()
    assert not other.changed_by_others()
    assert not one.changed_by_others()


DAMAGES = {
    "a flipped bit": lambda data: data[:-5] + bytes([data[-5] ^ 4]) + data[-4:],
    "cut short": lambda data: data[:-40],
    "another dtype": lambda data: data.replace(b'"F32"', b'"I32"'),
    "another shape": lambda data: data.replace(b"[3,4,8]", b"[3,8,4]"),
    "another key": lambda data: data.replace(b"engine=e", b"engine=f"),
    "header of nothing": lambda data: b"\0" * len(data),
    "huge header": lambda data: b"\xff" * 8 + data[8:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_dropped_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tier(tmp_path)
    disk.store(key(1), planes(1), 0.0)
    (path,) = tile_files(tmp_path)
    changed = DAMAGES[damage](path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with caplog.at_level(logging.WARNING):
        assert disk.load(key(1), 1.0) is None
    assert "is damaged" in caplog.text
    assert tile_files(tmp_path) == []
    assert disk.stats().entries == 0
    disk.store(key(1), planes(1), 0.0)
    assert disk.load(key(1), 1.0) is not None
    path.write_bytes(changed)  # a process that starts with it neither fails nor returns it
    assert tier(tmp_path).load(key(1), 1.0) is None


def test_a_file_of_another_key_under_this_ones_name_is_not_taken(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    disk.store(key(1), planes(1), 0.0)
    disk.store(key(2), planes(2), 0.0)
    folder = tmp_path
    (folder / files.file_name(key(2))).replace(folder / files.file_name(key(1)))
    assert disk.load(key(1), 1.0) is None
    assert disk.load(key(2), 1.0) is None


def test_a_full_disk_switches_the_tier_off_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TileCache(TILE_BYTES, 8, disk=tier(tmp_path))

    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put(cache, 1)
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        for number in range(2, 6):
            put(cache, number)
            assert cache._disk is not None
            cache._disk.flush()
    assert caplog.text.count("No space left on device") == 1
    assert cache.stats().tiers["disk"].state == "off: No space left on device"
    assert list(tmp_path.glob("*.partial")) == []
    found = cache.get([key(5), key(4)], [1.0, 1.0])  # memory goes on
    assert found.places == [0]
    cache.close()


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cache_disk_path"):
        tier(tmp_path / "file" / "below")


# With memory above it.


def put(cache: TileCache, number: int, relevance: float = 0.5) -> None:
    made = planes(number)[:, None]
    cache.put([key(number)], Features(made[0], made[1:]), [relevance])


def check(cache: TileCache, number: int) -> bool:
    found = cache.get([key(number)], [0.1])
    if found.features is None:
        return False
    assert torch.equal(torch.cat([found.features.tokens, found.features.deepstack[:, 0]]), planes(number))
    return True


@pytest.mark.parametrize("host", [0, 2])
def test_what_memory_evicts_is_found_on_disk_and_moves_up(tmp_path: Path, host: int) -> None:
    cache = TileCache(2 * TILE_BYTES, 100, host_bytes=host * TILE_BYTES, disk=tier(tmp_path))
    for number in range(9):
        put(cache, number, 0.1 * (number + 1))
    assert cache._disk is not None
    assert cache._disk.flush(10)
    held = 2 + host
    stats = cache.stats()
    assert (stats.entries, stats.evictions, stats.tiers["disk"].entries) == (held, 9 - held, 9 - held)
    assert stats.bytes <= stats.max_bytes
    assert all(check(cache, number) for number in range(9))
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (9, 0)
    assert stats.tiers["disk"].hits >= 9 - held
    cache._disk.flush(10)
    loaded = cache._disk.stats().hits
    assert check(cache, 8)
    assert check(cache, 8)
    assert cache._disk.stats().hits <= loaded + 1, "the second time from memory"


def test_closing_writes_what_memory_holds_and_the_next_process_finds_it(tmp_path: Path) -> None:
    cache = TileCache(4 * TILE_BYTES, 100, host_bytes=4 * TILE_BYTES, disk=tier(tmp_path))
    for number in range(6):
        put(cache, number)
    cache.close()
    cache.close()
    assert cache.stats().entries == 6
    assert all(check(cache, number) for number in range(6)), "a closed cache goes on in memory"
    fresh = TileCache(8 * TILE_BYTES, 100, disk=tier(tmp_path))
    assert all(check(fresh, number) for number in range(6))
    assert fresh.stats().tiers["disk"].hits == 6


def test_a_score_goes_with_its_tile_to_disk_and_back(tmp_path: Path) -> None:
    cache = TileCache(2 * TILE_BYTES, 1e9, disk=tier(tmp_path))
    put(cache, 1, 0.9)
    put(cache, 2, 0.2)
    for number in (3, 4):
        put(cache, number, 1.5)
    assert cache._disk is not None
    cache._disk.flush(10)
    assert check(cache, 1)  # 0.9 and 0.1 of this use; pushes one of the two at 1.5 out
    assert cache.evict_low_relevance(0.99) == 0
    assert cache.evict_low_relevance(1.01) == 1


def test_answering_never_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a write hangs: what does not fit the queue is dropped, and every call returns."""
    monkeypatch.setattr("arrcoc.cache.disk.QUEUE_BYTES", 4 * TILE_BYTES)
    monkeypatch.setattr("arrcoc.cache.tiered_memory.QUEUE_BYTES", 4 * TILE_BYTES)
    going_on, real = threading.Event(), files.write_whole

    def slow(path: Path, data: bytes) -> None:
        assert going_on.wait(20)
        real(path, data)

    monkeypatch.setattr(files, "write_whole", slow)
    cache = TileCache(2 * TILE_BYTES, 100, disk=tier(tmp_path))
    begin = time.perf_counter()
    for number in range(50):
        put(cache, number)
        check(cache, number)
    assert time.perf_counter() - begin < 5
    arena = cache._memory._device.arena
    assert arena is not None
    assert arena.reserved <= (2 + 4) * TILE_BYTES
    going_on.set()
    cache.close()
    assert 2 <= len(tile_files(tmp_path)) <= 8


def test_threads_share_three_tiny_tiers(tmp_path: Path) -> None:
    """Every hit is the tile of its key, whichever tier it came from and whatever was moving meanwhile."""
    cache = TileCache(3 * TILE_BYTES, 16, host_bytes=3 * TILE_BYTES, disk=tier(tmp_path, 12 * FILE_BYTES))
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        draw = random.Random(thread)
        try:
            for _ in range(250):
                number = draw.randrange(20)
                if not check(cache, number):
                    put(cache, number, draw.random())
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache.close()
    stats = cache.stats()
    assert stats.tiers["disk"].hits > 0
    assert sum(path.stat().st_size for path in tile_files(tmp_path)) <= 12 * FILE_BYTES
    assert stats.tiers["disk"].bytes == sum(path.stat().st_size for path in tile_files(tmp_path))


def test_a_worker_goes_on_after_a_job_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    worker, done = Worker("test", 10), []

    def fail() -> None:
        raise RuntimeError("no")

    assert worker.offer(fail, 5)
    assert worker.offer(lambda: done.append(1), 5)
    worker.close(10)
    assert done == [1]
    assert not worker.offer(fail, 1)
    assert "a job failed" in caplog.text


# Several processes.

WRITER = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_disk_cache import key, planes, tier
disk = tier(Path(sys.argv[1]), int(sys.argv[4]))
print("ready", flush=True)
for number in range(int(sys.argv[3]), int(sys.argv[3]) + int(sys.argv[5])):
    disk.store(key(number), planes(number), -(number % 7))
    loaded = disk.load(key(number - 1), 0.5)
    assert loaded is None or torch.equal(loaded[0], planes(number - 1))
assert disk.stats().state == "on"
"""


def writer(folder: Path, start: int, max_bytes: int, count: int) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", WRITER, str(folder), here, str(start), str(max_bytes), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_at_any_moment_leaves_a_folder_that_loads(tmp_path: Path) -> None:
    bound = 20 * FILE_BYTES
    for attempt, delay in enumerate((0.0, 0.05)):
        with writer(tmp_path, 1000 * attempt, bound, 10**6) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        disk = tier(tmp_path, bound)
        assert delay == 0 or disk.stats().entries > 0
        assert sum(path.stat().st_size for path in tile_files(tmp_path)) <= bound
        names = {path.name: path for path in tile_files(tmp_path)}
        known = [n for n in range(-1, 1000 * attempt + 100_000) if files.file_name(key(n)) in names]
        assert len(known) == len(names)
        for number in known:
            loaded = disk.load(key(number), 0.0)
            assert loaded is not None
            assert torch.equal(loaded[0], planes(number))
        assert disk.store(key(-1), planes(-1), 5.0), "no lock is left behind"


def test_an_unfinished_file_is_swept_when_it_is_old(tmp_path: Path) -> None:
    fresh, old = tmp_path / ".a.1.partial", tmp_path / ".a.2.partial"
    fresh.touch()
    old.touch()
    os.utime(old, (time.time() - 10_000,) * 2)
    tier(tmp_path)
    assert (fresh.exists(), old.exists()) == (True, False)


def test_two_processes_share_a_folder_and_its_bound(tmp_path: Path) -> None:
    bound = 12 * FILE_BYTES
    mine = tier(tmp_path, bound)
    with writer(tmp_path, 0, bound, 150) as process:
        for number in range(1000, 1150):
            mine.store(key(number), planes(number), -(number % 5))
            held = sum(path.stat().st_size for path in present(tile_files(tmp_path)))
            assert held <= bound + FILE_BYTES  # a file that is being replaced may be counted with its heir
        assert process.wait(60) == 0
    mine.store(key(5000), planes(5000), 9.0)
    stats = mine.stats()
    assert stats.state == "on"
    assert {path.name for path in tile_files(tmp_path)} == set(mine._written)
    assert stats.bytes == sum(path.stat().st_size for path in tile_files(tmp_path)) <= bound


def test_a_file_that_vanishes_while_the_folder_is_read_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        tier(tmp_path).store(key(number), planes(number), 0.0)
    read, gone = files.read_level, tmp_path / files.file_name(key(1))

    def read_level(path: Path) -> float:
        gone.unlink(missing_ok=True)  # by another process, which found it damaged
        return read(path)

    monkeypatch.setattr(files, "read_level", read_level)
    opened = tier(tmp_path)
    assert (opened.stats().state, key(2) in opened) == ("on", True)


def present(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def test_what_another_process_writes_is_found_after_a_look(tmp_path: Path) -> None:
    mine, other = tier(tmp_path), tier(tmp_path)
    other.store(key(1), planes(1), 0.0)
    assert mine.load(key(1), 0.0) is None
    mine.refresh()
    mine.flush(10)
    assert mine.load(key(1), 0.0) is not None
    other.clear()
    assert mine.load(key(1), 0.0) is None, "and what it removes is gone"
    assert mine.stats().entries == 0
