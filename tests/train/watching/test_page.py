"""train.html: whole whatever is there, no network, nothing of a file's text becomes HTML, bounded for a long run."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from ki_edge.errors import CheckpointError
from ki_edge.train.watching import curves
from ki_edge.train.watching.curves import Curve, chart
from ki_edge.train.watching.evaluation import Prediction
from ki_edge.train.watching.log import LOG, RunLog
from ki_edge.train.watching.page import PAGE, to_html, write_page
from ki_edge.train.watching.predictions import PREDICTIONS, save_predictions

EVIL = '<script>alert("x")</script>&"\''
VOID = {"meta", "br", "img"}
DAMAGE = (
    b"", b"{", b"[1, 2]", b'{"predictions": [1, {"recorded": 5}, {"recorded": [[1], [2, 3]]}]}',
    b'{"settings": 5, "lengths": ["a"], "predictions": {"a": 1}}', b'{"lengths": [], "step": "<b>"}',
)  # fmt: skip


class Reader(HTMLParser):
    """Which tags there are, with their attributes; fails where they do not close."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def log_run(folder, rows=60, extra=None):
    log = RunLog(folder)
    for step in range(20, 20 * rows + 1, 20):
        log.append({
            "step": step, "flow": 1 / step, "fast": 5.0, "samples_per_s": 40.0, "loader_samples_per_s": 300.0,
            "grad_norm": 1.0, "rate": 1e-3, "memory": 2e9, f"flow/{EVIL}": 0.5, "flow/b": 0.25, f"task/{EVIL}": 0.5,
            **(extra or {}),
        })  # fmt: skip
    log.append_evaluation({"step": 500, "held_out_flow": 0.5, "held_out_fast_accuracy": 0.75, "robot_success": 0.9})
    log.append_evaluation({"step": 1000, "held_out_flow": 0.4, "robot_error": f"it broke {EVIL}"})
    return folder


def predictions():
    recorded = np.linspace(-1, 1, 8).reshape(4, 2)
    return [
        Prediction(f"data episode 1 {EVIL}", EVIL, (EVIL, "b"), recorded, recorded * 1.1, recorded * 0.9),
        Prediction("data episode 2", "lift", ("a", "b"), recorded[:1], recorded[:1], None),
    ]


@pytest.fixture
def folder(tmp_path):
    place = log_run(tmp_path / EVIL.replace("/", "_") / "training")
    save_predictions(place, 1000, predictions())
    run = {"settings": {"steps": 1200, "freeze": ["vision"], EVIL: EVIL}, "facts": {"data": {"rows": 5, "none": None}}}
    (place / "run.json").write_text(json.dumps(run))
    report = {EVIL: 5, "dimensions": [{"name": EVIL, "error": 0.5}], "lengths": [1, 5, 2], "by": {"x": 1}}
    (place / "fast.json").write_text(json.dumps(report))
    return place


def test_a_whole_run(folder):
    page = write_page(folder)
    assert page == folder / PAGE and [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    reader = read(page.read_text(encoding="utf-8"))
    text = " ".join(reader.text)
    for word in (
        "Step 1,200 of 1,200, logged 2", "flow matching", "Losses by dataset", "Success on the robot", "Predictions",
        "Learning rate", "Throughput", "FAST", "Its likeliest tokens spell no actions", "90 %", "freeze",
    ):  # fmt: skip
        assert word in text, word
    assert reader.tags.count("svg") >= 12


def test_nothing_of_a_file_becomes_html_and_nothing_is_loaded(folder):
    html = to_html(folder)
    reader = read(html)
    assert "script" not in reader.tags and "link" not in reader.tags and "iframe" not in reader.tags
    assert " ".join(reader.text).count('alert("x")') >= 8  # it is there, as text
    outside = {name for name, value in reader.attributes if name != "href" or not value.startswith("#")}
    assert not outside & {"src", "href", "onclick", "onload", "action"}
    assert "http" not in html and "@import" not in html and "url(" not in html


def test_light_and_dark_have_the_same_colours(folder):
    html = to_html(folder)
    names = ["ground", "paper", "ink", "soft", "line", "bad", *(f"c{colour}" for colour in range(curves.COLOURS))]
    assert all(html.count(f"--{name}:") == 2 for name in names) and html.count("prefers-color-scheme: dark") == 2
    assert "color-scheme: light dark" in html


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_left_out(tmp_path, damage):
    folder = log_run(tmp_path / "run" / "training", rows=2)
    for name in ("run.json", "fast.json", PREDICTIONS):
        (folder / name).write_bytes(damage)
    assert "flow matching" in " ".join(read(to_html(folder)).text)


def test_an_empty_run(tmp_path):
    assert "Nothing was logged yet." in " ".join(read(to_html(tmp_path)).text)


def test_values_that_are_not_finite_are_gaps(tmp_path):
    folder = log_run(tmp_path / "run" / "training", rows=4, extra={"flow": math.nan, "fast": math.inf})
    html = to_html(folder)
    read(html)
    assert "flow matching" not in html and "nan" not in html and "inf" not in html.replace("info", "")


def test_a_long_run_is_a_small_page(tmp_path):
    folder = tmp_path / "run" / "training"
    folder.mkdir(parents=True)
    row = {"flow": 0.5, "fast": 1.5, "samples_per_s": 40.0, "grad_norm": 1.0, "rate": 1e-3}
    lines = (json.dumps({"step": step, **row, **{f"flow/data{i}": 0.5 for i in range(30)}}) for step in range(20_000))
    (folder / LOG).write_text("\n".join(lines) + "\n")
    assert len(to_html(folder)) < 600_000


def test_the_page_is_not_half_written(tmp_path, largest_file):
    folder = log_run(tmp_path / "run" / "training")
    before = write_page(folder).read_bytes()
    with largest_file(1000), pytest.raises(CheckpointError, match=r"cannot write .*train\.html"):
        write_page(folder)
    assert (folder / PAGE).read_bytes() == before


@pytest.mark.parametrize(
    "y", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1e-12, 1e12], [1e-300, 1.0], [np.nan, 3.0], [1e6, 1e6 + 1]]
)
@pytest.mark.parametrize("options", [{}, {"log": True}, {"zero": True}])
def test_charts_of_all_sizes(y, options):
    svg = chart([Curve("a", np.arange(len(y), dtype=np.float64), np.array(y))], **options)
    read(svg)
    numbers = [
        part for part in svg.replace("M", " ").replace("L", " ").replace('"', " ").split() if part.startswith("nan")
    ]
    assert "<svg" in svg and not numbers and svg.count("<text") < 25


def test_a_chart_of_nothing_is_none():
    assert chart([]) == "" and chart([Curve("a", np.zeros(2), np.full(2, np.nan))]) == ""


def test_curves_lie_where_their_values_are():
    svg = chart([Curve("a", np.array([0.0, 10.0]), np.array([0.0, 1.0]))], height=100, width=400, zero=True)
    low, high = svg.split('d="M')[-1].split('"')[0].split("L")
    (x0, y0), (x1, y1) = ([float(n) for n in point.split()] for point in (low, high))
    assert x0 == curves.LEFT and x1 == 400 - curves.RIGHT and y0 == 100 - curves.BOTTOM and curves.TOP < y1 < 20
