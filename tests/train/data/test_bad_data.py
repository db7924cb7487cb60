"""Data that cannot be trained on: one line each, which names the place, before anything is computed."""

import json
import shutil

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.train.step.training_data import Share

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_column(path, name, make):
    """Give a column of a parquet file what make(list of its values) returns."""
    import pyarrow as pa

    table = pq.read_table(path)
    values = make(table[name].to_pylist())
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, name, pa.array(values, table.schema.field(name).type)), path)


def numbers(folder):
    return sorted((folder / "data").rglob("*.parquet"))


def films(folder):
    return sorted((folder / "videos").rglob("*.mp4"))


def set_value(row, column, value):
    def make(values):
        values[row] = value if column is None else [*values[row][:column], value, *values[row][column + 1 :]]
        return values

    return make


def cut_film(folder):
    for film in films(folder):
        film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])


def spoil(film):
    """Leave a film its parts and their sizes, and nothing that can be decoded."""
    content = bytearray(film.read_bytes())
    at = content.index(b"mdat") + 4
    content[at:] = bytes(len(content) - at)
    film.write_bytes(content)


def spoil_film(folder):
    spoil(films(folder)[0])


def swap_film(folder):
    """A film of another size under a camera's name."""
    wide, square = (next(f for f in films(folder) if name in str(f)) for name in ("top", "left_wrist"))
    shutil.copy(square, wide)


def cut_parquet(folder):
    path = numbers(folder)[0]
    path.write_bytes(path.read_bytes()[:-200])


def corrupt_page(folder):
    """Bytes of a page in the midst of the file, whose end is right."""
    path = numbers(folder)[0]
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[middle : middle + 120] = b"\xff" * 120
    path.write_bytes(bytes(content))


def damage(column, row, at, value):
    return lambda folder: change_column(numbers(folder)[0], column, set_value(row, at, value))


def shift_times(folder):
    change_column(numbers(folder)[0], "timestamp", lambda values: [1.25 * one for one in values])


def drop_frame(folder):
    path = numbers(folder)[0]
    table = pq.read_table(path)
    pq.write_table(table.filter(np.arange(len(table)) != 8), path)


def remove(pick):
    return lambda folder: pick(folder)[0].unlink()


CASES = {
    "version": (lambda f: change(f / "meta/info.json", codebase_version="v1.6"), r"of version 'v1.6'; v3\.0 and v2\.1"),
    "no film": (remove(films), r"file-000\.mp4 cannot be read: No such file"),
    "half a film": (cut_film, r"\.mp4 is cut off: its part 'mdat' ends at byte \d+, the file at \d+"),
    "no video": (lambda f: films(f)[0].write_bytes(b"RIFF, or what else it is"), r"\.mp4 is no mp4 video: at byte 0"),
    "no frames": (spoil_film, r"\.mp4 cannot be read at 0\.000 s: .*\(episode 0, frame 0\)"),
    "another size": (swap_film, r"pictures of 64 x 64, meta/info\.json says 48 x 64 \(episode 0, frame 0\)"),
    "no parquet": (remove(numbers), r"file-000\.parquet cannot be read: No such file"),
    "half a parquet": (cut_parquet, r"file-000\.parquet cannot be read from row 0 on: "),
    "a page": (corrupt_page, r"file-000\.parquet cannot be read from row \d+ on: "),
    "action NaN": (damage("action", 7, 2, float("nan")), r"episode 1, frame 1: action\[2\] is nan: expected a finite"),
    "state inf": (damage("observation.joints", 0, 1, np.inf), r"episode 0, frame 0: observation\.joints\[1\] is inf"),
    "times": (shift_times, r"episode 0, frame 2: timestamp 0\.25 s, at 10 frames a second it is 0\.2 s: .*the fps"),
    "fps": (lambda f: change(f / "meta/info.json", fps=30), r"episode 0, frame 1: timestamp 0\.1 s, at 30 frames"),
    "frame": (drop_frame, r"episode 1, frame 2 is missing in .*file-000\.parquet"),
    "twice": (damage("frame_index", 8, None, 1), r"a frame of episode \d is there twice"),
    "beyond": (damage("frame_index", 8, None, 77), r"row 8: frame 77 of episode 1, which has 4 frames"),
    "task": (damage("task_index", 3, None, 9), r"frames of task 9, which the table of tasks does not have"),
    "feature": (lambda f: drop_feature(f, "observation.gripper"), r"--map takes state from observation\.gripper"),
}  # fmt: skip


def drop_feature(folder, name):
    info = json.loads((folder / "meta/info.json").read_text())
    del info["features"][name]
    (folder / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_place(copy, opened, name):
    damaged, line = CASES[name]
    folder = copy()
    damaged(folder)
    with pytest.raises(DatasetError, match=line) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_version_2_1(copy, opened):
    folder = copy("many_v21")
    films(folder)[3].write_bytes(b"no film")
    (folder / "meta/episodes.jsonl").write_text('{"episode_index": 0, "tasks": ["a"], "length": 0}\n')
    with pytest.raises(DatasetError, match="an episode number 0 of 0 frames"):
        opened(folder)
    (folder / "meta/episodes.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"episodes\.jsonl cannot be read"):
        opened(folder)


def test_a_film_that_is_broken_later_on_is_told_when_it_is_reached(copy, opened):
    folder = copy()
    film = films(folder)[-1]  # of the last episodes: what is looked at in advance is the first frame
    spoil(film)
    for workers in (0, 1):
        data = opened(folder, settings={"batch": 25}, workers=workers)
        with pytest.raises(DatasetError, match=r"file-001\.mp4 cannot be read at .*\(episode \d, frame \d\)$"):
            list(data.steps(0, Share()))


def test_an_empty_task(copy, opened):
    folder = copy("many_v21")
    tasks = folder / "meta/tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("go home", " "))
    with pytest.raises(DatasetError, match=r'episode 0: no task says what is done .* "prompt" in --map FILE'):
        opened(folder)
    told = {"state": "observation.joints", "prompt": "stack"}
    assert opened(folder, told=told).tasks == ["stack"]


def test_an_action_that_the_model_has_no_room_for(data, opened):
    told = {"state": "observation.joints", "action": ["action", "observation.joints"]}
    folder = data / "lerobot_dataset" / "many_av1"
    with pytest.raises(
        DatasetError, match=r"an action has 7 numbers \(action \+ observation\.joints\), the model has .* 4"
    ):
        opened(folder, told=told)


def test_numbers_that_do_not_move_are_told(copy, opened):
    folder = copy()
    for path in numbers(folder):
        change_column(path, "observation.gripper", lambda values: [0.5] * len(values))
        change_column(path, "action", lambda values: [[*one[:3], 1.0] for one in values])
    lines = []
    data = opened(folder, say=lines.append)
    text = "\n".join(lines)
    assert "many_av1: state[3] (grip) is 0.5 in every frame: its range is zero, so nothing is learnt about it" in text
    assert "many_av1: action[3] (grip) is 1 in every frame" in text
    batch = next(data.steps(0, Share()))[0]
    assert np.abs(batch.actions.numpy()).max() < 100  # nothing is divided by nearly nothing


@pytest.mark.parametrize(
    ("datasets", "options", "line"),
    [
        ([], {}, "no dataset"),
        (["{}:0"], {}, "the weight behind the colon is '0', expected a number above 0"),
        (["{}:many"], {}, "the weight behind the colon is 'many'"),
        (["{}:1", "{}"], {}, "no weight, but .* has one: give all of them a weight, or none"),
        (["{}"], {"horizon": 0}, "--horizon 0: expected 1 to 4096"),
        (["{}"], {"workers": -1}, "--workers -1: expected 0 to 1024"),
        (["{}"], {"settings": {"held_out": 1.0}}, "held.out 1.*: expected"),
    ],
)
def test_arguments(data, opened, datasets, options, line):
    folder = data / "lerobot_dataset" / "many_av1"
    told = {"datasets": {}}
    with pytest.raises(ArgumentError, match=line):
        opened(*[one.format(folder) for one in datasets], told=told, **options)


def test_nothing_there(tmp_path, opened):
    (tmp_path / "empty").mkdir()
    for name, line in (("nothing", "no such file or folder"), ("empty", "neither meta/info.json nor an .npz file")):
        with pytest.raises(DatasetError, match=line):
            opened(tmp_path / name, told={})
