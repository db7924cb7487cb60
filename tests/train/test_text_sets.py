"""Folders of pictures with questions and answers: what is read, and how what is wrong is named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ki_edge.errors import DatasetError
from ki_edge.train.data.texts import TextSet


def written(folder, *lines, pictures=("a.png",)):
    folder.mkdir(exist_ok=True)
    for at, name in enumerate(pictures):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), 50 + at, np.uint8)).save(folder / name)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def line(image="a.png", question="what?", answer="that"):
    return {"image": image, "question": question, "answer": answer}


def test_samples_are_those_of_the_lines(small_texts):
    found, rows = TextSet.open(str(small_texts)), (small_texts / "samples.jsonl").read_text().splitlines()
    assert len(found) == len(rows) == 5 and found.names == ("hand", "top")
    for number, row in enumerate(map(json.loads, rows)):
        sample = found.sample(number)
        assert (sample.question, sample.answer) == (row["question"], row["answer"]) == found.texts()[number]
        for name, path in row["image"].items():
            np.testing.assert_array_equal(sample.pictures[name], np.asarray(Image.open(small_texts / path)))
    assert found.where(3) == f"{small_texts / 'samples.jsonl'}, line 4"


def test_one_picture_several_and_none_of_them_in_colour(tmp_path):
    folder = written(tmp_path / "set", line("sub/grey.png"), "", line(["a.jpg", "b.png"]), pictures=["a.jpg", "b.png"])
    (folder / "sub").mkdir()
    Image.fromarray(np.full((3, 3), 9, np.uint8)).save(folder / "sub" / "grey.png")
    found = TextSet.open(folder)
    (grey,) = found.sample(0).pictures.values()
    assert grey.shape == (3, 3, 3) and (grey == 9).all()
    assert list(found.sample(1).pictures) == ["0", "1"] and found.names == ("0", "1")
    assert found.where(1).endswith("line 3")


def test_its_digest_is_that_of_its_lines(tmp_path):
    one = TextSet.open(written(tmp_path / "set", line()))
    assert one.digest == TextSet.open(tmp_path / "set").digest
    assert one.digest != TextSet.open(written(tmp_path / "set", line(answer="this"))).digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"samples\.jsonl, line 2 is not valid JSON"),
        ("[]", "line 2: expected an object with image, question and answer"),
        (line(question=" "), "line 2: question is ' ': expected a text of 1 to 4096 characters"),
        (line(answer=3), "line 2: answer is 3: expected a text"),
        ({"image": "a.png", "question": "what?"}, "line 2: answer is None"),
        (line(answer="a" * 4097), "line 2: answer is"),
        (line(image=None), "line 2: image is None: expected a path"),
        (line(image=[]), r"line 2: image is \[\]"),
        (line(image={}), "line 2: image is {}"),
        (line(image=["a.png"] * 65), "line 2: image is"),
        (line(image="../a.png"), r"line 2: image '\.\./a\.png': expected a path inside the set's folder"),
        (line(image="/etc/a.png"), "line 2: image '/etc/a.png': expected a path inside"),
        (line(image="C:/a.png"), "line 2: image 'C:/a.png': expected a path inside"),
        (line(image="x/../../a.png"), "line 2: image .* expected a path inside"),
        (line(image={"top": 3}), "line 2: image 3: expected a path inside"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, message):
    with pytest.raises(DatasetError, match=message):
        TextSet.open(written(tmp_path / "set", line(), row))


def test_no_set_and_an_empty_one(tmp_path):
    with pytest.raises(DatasetError, match=r"is no text set: expected a folder with samples\.jsonl"):
        TextSet.open(tmp_path)
    with pytest.raises(DatasetError, match="holds no sample"):
        TextSet.open(written(tmp_path / "set", "", "  "))


def broken(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:50])
    elif kind == "a GIF":
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, "GIF")
    elif kind == "a FIFO":
        path.unlink()
        os.mkfifo(path)
    elif kind == "too wide":
        Image.new("1", (20_000, 1)).save(path)


@pytest.mark.parametrize("kind", ["missing", "text", "cut off", "a GIF", "a FIFO", "too wide"])
def test_a_broken_picture_is_named_with_its_line(tmp_path, kind):
    folder = written(tmp_path / "set", line(), line("b.png"), pictures=["a.png", "b.png"])
    broken(folder / "b.png", kind)
    found = TextSet.open(folder)
    assert found.sample(0).pictures["0"].shape == (4, 6, 3)
    with pytest.raises(DatasetError, match=r"samples\.jsonl, line 2: .*b\.png") as problem:
        found.sample(1)
    assert "\n" not in str(problem.value)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = written(tmp_path / "set", line("b.png"), pictures=["a.png"])
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "secret.png")
    Path(folder / "b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DatasetError, match=r"line 1: image 'b\.png' leads out of the set's folder"):
        TextSet.open(folder).sample(0)
