"""Decoded pictures on disk: bounded, safe with several processes, and never wrong after a kill or a power cut."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.train.data import cache as module
from ki_edge.train.data.assembly import Assembler
from ki_edge.train.data.cache import FILE, HEAD, open_caches
from ki_edge.train.step.training_data import Share

SHAPE, FRAMES = (2, 4, 4, 3), 10
ROW = HEAD + 96


def pictures(frame):
    return np.random.default_rng(frame).integers(0, 256, SHAPE, np.uint8)


def cache_of(folder, gigabytes=1.0, facts=None, frames=FRAMES, shape=SHAPE):
    (found,), lines = open_caches(folder, gigabytes, [("set", facts or {"digest": "a"}, frames, shape)])
    return found, lines[0]


def test_what_was_put_is_found_by_another_process(tmp_path):
    first, line = cache_of(tmp_path / "kept")
    assert "set: all frames are kept decoded in " in line
    assert first.get(3) is None
    for frame in (3, 9, 0):
        first.put(frame, pictures(frame))
    second, _ = cache_of(tmp_path / "kept")
    for frame in range(FRAMES):
        kept = second.get(frame)
        assert (kept is None) == (frame not in (0, 3, 9))
        if kept is not None:
            np.testing.assert_array_equal(kept, pictures(frame))


@pytest.mark.parametrize("damage", ["zeros", "half", "shifted", "short", "head"])
def test_a_row_that_is_not_whole_is_decoded_again(tmp_path, damage):
    kept, _ = cache_of(tmp_path)
    for frame in range(FRAMES):
        kept.put(frame, pictures(frame))
    path = next(tmp_path.rglob(FILE))
    content = bytearray(path.read_bytes())
    at = 9 * ROW
    if damage == "zeros":
        content[at : at + ROW] = bytes(ROW)
    elif damage == "half":  # the end was not written
        content[at + ROW // 2 : at + ROW] = bytes(ROW - ROW // 2)
    elif damage == "shifted":  # another frame's row, whole
        content[at : at + ROW] = content[8 * ROW : at]
    elif damage == "short":
        del content[at + 20 :]
    else:
        content[at : at + HEAD] = b"\xff" * HEAD
    path.write_bytes(bytes(content))
    again, _ = cache_of(tmp_path)
    assert again.get(9) is None
    again.put(9, pictures(9))
    np.testing.assert_array_equal(again.get(9), pictures(9))
    np.testing.assert_array_equal(again.get(8), pictures(8))


def test_other_data_or_sizes_have_another_folder(tmp_path):
    places = {
        cache_of(tmp_path, facts=facts, shape=shape)[0]._path
        for facts, shape in (({"digest": "a"}, SHAPE), ({"digest": "b"}, SHAPE), ({"digest": "a"}, (2, 8, 8, 3)))
    }
    assert len(places) == 3


def test_a_bound_keeps_the_first_frames_of_each_dataset(tmp_path):
    wanted = [("a", {"d": 1}, 100, SHAPE), ("b", {"d": 2}, 300, SHAPE)]
    caches, lines = open_caches(tmp_path, 100 * ROW / 1e9, wanted)
    assert [cache._rows for cache in caches] == [25, 75]
    assert "a: 25 % of the frames, as --cache-gb allows are kept" in lines[0]
    for frame in range(100):
        caches[0].put(frame, pictures(frame))
    assert caches[0].get(24) is not None and caches[0].get(25) is None
    assert sum(path.stat().st_size for path in tmp_path.rglob(FILE)) <= 100 * ROW


def test_what_it_holds_of_other_data_counts(tmp_path):
    kept, _ = cache_of(tmp_path, facts={"digest": "old"}, frames=1000)
    for frame in range(1000):
        kept.put(frame, pictures(frame % 5))
    with pytest.raises(ArgumentError, match=r"holds 0\.0 GB of other datasets or sizes, --cache-gb allows 5e-05"):
        cache_of(tmp_path, 50_000 / 1e9)
    assert cache_of(tmp_path, 50_000 / 1e9, facts={"digest": "old"}, frames=1000)[0]._rows == 50_000 // ROW


def test_too_little_disk_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000_500))
    with pytest.raises(
        DatasetError, match=r"0\.0 GB more of decoded pictures would be kept, the disk has 1\.0 GB free"
    ):
        cache_of(tmp_path)
    with pytest.raises(ArgumentError, match="--cache-gb 0: expected more than 0"):
        cache_of(tmp_path, 0.0)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"--cache .*file cannot be written"):
        cache_of(tmp_path / "file")


def test_a_disk_that_is_full_in_spite_of_it_ends_the_keeping(tmp_path, monkeypatch):
    kept, _ = cache_of(tmp_path)
    kept.put(0, pictures(0))
    monkeypatch.setattr(module.os, "pwrite", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
    kept.put(1, pictures(1))
    monkeypatch.undo()
    kept.put(2, pictures(2))
    assert kept.get(0) is not None and kept.get(1) is None and kept.get(2) is None


WRITER = """
import sys, numpy as np
from pathlib import Path
from ki_edge.train.data.cache import FrameCache
cache = FrameCache(Path(sys.argv[1]), 200, (2, 4, 4, 3))
print("go", flush=True)
while True:
    for frame in range(200):
        cache.put(frame, np.random.default_rng(frame).integers(0, 256, (2, 4, 4, 3), np.uint8))
"""


def test_several_writers_one_of_which_is_killed(tmp_path):
    kept, _ = cache_of(tmp_path, frames=200)
    command = [sys.executable, "-c", WRITER, str(next(tmp_path.rglob(FILE)))]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "go\n"
        writers[0].kill()

        def check(frame):
            found = kept.get(frame)
            return found is None or (found == pictures(frame)).all()

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(check, [frame for _ in range(20) for frame in range(200)]))
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_run_takes_its_pictures_from_it(data, opened, tmp_path, monkeypatch):
    pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
    folder = data / "lerobot_dataset" / "many_av1"
    plain = opened(folder, settings={"batch": 25})
    wanted = next(plain.steps(0, Share()))[0].observation.images
    lines = []
    for _ in range(2):
        kept = opened(folder, settings={"batch": 25}, cache=tmp_path / "kept", say=lines.append)
        found = next(kept.steps(0, Share()))[0].observation.images
        assert (found == wanted).all()
        monkeypatch.setattr(Assembler, "_fit", None)  # nothing is decoded the second time
    assert sum("all frames are kept decoded" in line for line in lines) == 2
