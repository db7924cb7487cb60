"""run.html: one file that holds the run, taken apart by an HTML parser."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from ki_edge.errors import DatasetError
from ki_runtime.recording import page
from ki_runtime.recording.page import to_html, write_page
from ki_runtime.recording.run_log import RunLog
from ki_runtime.robots.replay import ReplayRobot, record_episode

from .recorded_runs import STEPS, Filmed, Plan, record


class Parts(HTMLParser):
    """Elements with their attributes and text; wrong nesting fails."""

    def __init__(self, content):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def words(self):
        return " ".join("".join(f"{part} " for part in self.text).split())


def read(folder):
    return Parts((folder / "run.html").read_text(encoding="utf-8"))


class Pictured(Filmed):
    """With a film."""

    def frame(self):
        return np.full((32, 32, 3), 20 * self.steps, np.uint8)


def test_the_page_holds_the_run(tmp_path):
    record(tmp_path, Pictured(), episodes=3, seed=4)
    found = read(tmp_path)
    assert "3 episodes, 2 of 3 successful at their end; 27 commands at 20 a second." in found.words
    assert "by rule: position 6" in found.words and f"at seams {3 * 2}" in found.words
    assert len(found.all("details")) == 3 and len(found.all("svg")) == 3 * (2 + 3)
    assert len(found.all("circle")) == 3 * 2  # two commands of each episode, in the panel of the number they changed
    assert "command 8: position" in found.words and " grip " in found.words
    sources = [one["src"] for one in (*found.all("video"), *found.all("img"))]
    assert len(sources) == 3 and all(source.startswith("data:") for source in sources)
    for _, attributes in found.found:  # nothing comes from elsewhere
        for name, value in attributes.items():
            assert name == "xmlns" or (name != "href" and not re.match(r"(https?:)?//", value or ""))
    assert not found.all("script") and not found.all("link")


def test_films_beyond_the_room_are_shown_from_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "EMBEDDED", 0)
    record(tmp_path, Pictured())
    found = read(tmp_path)
    (source,) = [one["src"] for one in (*found.all("video"), *found.all("img"))]
    assert (tmp_path / source).is_file() and source.startswith("episode_000.")


def test_a_replay_is_drawn_over_what_was_recorded(tmp_path):
    actions = np.zeros((STEPS, 2), np.float32)
    images = {"front": np.zeros((STEPS, 32, 48, 3), np.uint8), "wrist.left": np.zeros((STEPS, 16, 32, 3), np.uint8)}
    state = np.zeros((STEPS, 3), np.float32)
    record_episode(tmp_path / "one.npz", images=images, state=state, actions=actions, prompt="p")
    record(tmp_path / "run", ReplayRobot(tmp_path / "one.npz"))
    assert "recorded" in read(tmp_path / "run").words


def test_names_from_outside_are_text(tmp_path):
    robot = Filmed()
    robot.name = "<script>alert(1)</script>"
    record(tmp_path, robot)
    found = read(tmp_path)
    assert not found.all("script") and "Run of <script>alert(1)</script>" in found.words


def test_a_killed_run_gets_its_page_afterwards(tmp_path):
    record(tmp_path, episodes=2)
    log = (tmp_path / "steps.jsonl").read_bytes()
    (tmp_path / "run.html").unlink()
    (tmp_path / "steps.jsonl").write_bytes(log[: len(log) * 3 // 4])  # in the middle of a line
    command = [sys.executable, "-m", "ki_runtime.recording.page", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "1 stopped before its end" in read(tmp_path).words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{}\n", "is no log of a run: KeyError in an event"),
        ("[]\n", "a line is no object"),
        ("no\n", "is not valid JSON"),
        (
            json.dumps({"event": "episode"}) + "\n" + json.dumps({"event": "step", "action": "x"}) + "\n",
            "ValueError in",
        ),
    ],
)
def test_what_is_no_log(tmp_path, content, message):
    if content is not None:
        (tmp_path / "steps.jsonl").write_text(content)
    with pytest.raises(DatasetError, match=message):
        write_page(tmp_path)
    assert not (tmp_path / "run.html").exists()


def test_runs_without_a_command_have_a_page_too(tmp_path):
    (tmp_path / "steps.jsonl").write_text("")
    assert "0 episodes; 0 commands." in Parts(to_html(RunLog.read(tmp_path), tmp_path)).words
    (tmp_path / "steps.jsonl").write_text(json.dumps({"event": "episode", "index": 0, "seed": 1, "robot": "r"}) + "\n")
    assert "no command was sent" in Parts(to_html(RunLog.read(tmp_path), tmp_path)).words


def test_curves_stay_within_their_panels(tmp_path):
    """Also chunks that reach beyond the episode, and those for which the robot waited."""
    record(tmp_path, policy=Plan(), delay=2, mode="async", episodes=2)
    for path in read(tmp_path).all("path"):
        numbers = [float(text) for text in re.findall(r"[ML](-?[\d.]+) ", path["d"])]
        assert all(60 <= number <= 820 for number in numbers)


class Feeling(Pictured):
    """With a sensor that says NaN now and then."""

    def observe(self):
        return {**super().observe(), "force": np.array([1.0, np.nan]), "torque": np.float32("inf")}


def test_a_sensor_that_says_nan_costs_no_page(tmp_path):
    record(tmp_path / "run", robot=Feeling())
    assert (tmp_path / "run" / "run.html").is_file()
    events = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    seen = next(event for event in events if event["event"] == "inference")
    assert seen["force"] == [1.0, None] and "torque" not in seen


def test_dots_stand_where_the_guards_changed_a_number():
    from ki_runtime.recording.page import _changed

    assert _changed({"action": [1.0, 2.0, 3.0], "planned": [1.0, 2.5, 3.000001]}) == {1}
    assert _changed({"action": [1.0, 2.0], "planned": [1.0, 2.0]}) == {0, 1}  # a rule was broken, nothing was clamped
    assert _changed({"action": [1.0, 2.0], "planned": None}) == {0, 1}
