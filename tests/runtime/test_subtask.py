"""A policy that writes its next subtask in spare time, and acts on it."""

import json
import threading

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.prompt import PromptTokenizer
from ki_runtime import Policy
from ki_runtime.control import cli
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.recorder import Recorder
from ki_runtime.control.reporting import Watcher
from ki_runtime.control.subtask import SubtasksTold, TwoLevels, Writing

from .fake_robot import Counting, Line


class Writer(Counting):
    """Acts as `Counting`, and writes what `texts` says of the step that it sees."""

    def __init__(self, tokenizer, texts=lambda step: f"step {step}", **given):
        super().__init__(**given)
        self.tokenizer, self.texts = tokenizer, texts
        self.prompts, self.questions, self.stopped = [], [], 0

    def check_text(self):
        pass

    def infer(self, observation, **more):
        self.prompts.append(observation["prompt"])
        return super().infer(observation, **more)

    def infer_text(self, observation, *, prompt, max_tokens, stop=None):
        self.questions.append(prompt)
        found = self.texts(int(observation["state"][0]) if "state" in observation else -1)
        if isinstance(found, BaseException):
            raise found
        return {"text": found, "finished": not (stop is not None and stop()) and "..." not in found}


@pytest.fixture
def tokenizer(tokenizer_model):
    return PromptTokenizer(tokenizer_model, "pi05", 60)


def run(policy, *watchers, robot=None, every=0.0, question="{task}", episodes=1, **options):
    said = []
    levels = TwoLevels(policy, Writing(every, question), said.append)
    given = {"mode": "async", "delay": 1, "episodes": episodes, **options}
    robot = robot or Line(steps=24)
    ControlLoop(levels, robot, LoopOptions(**given), list(watchers)).run()
    return levels.summary(), robot, said


def test_the_low_level_acts_on_the_last_subtask(tokenizer):
    """A chunk is asked for every 4 ticks; the text of the one before prompts it."""
    policy = Writer(tokenizer)
    found, robot, said = run(policy)
    assert policy.prompts == ["p", "step 0", "step 4", "step 8", "step 12", "step 16", "step 20"][: len(policy.prompts)]
    assert len(policy.prompts) >= 6
    assert set(policy.questions) == {"p"}  # the task, not the subtask before
    assert robot.sent == list(range(24)) and not said
    assert (found["written"], found["changed"], found["given_up"], found["unusable"]) == (len(policy.prompts),) * 2 + (
        0,
        0,
    )


def test_every_so_many_seconds_of_the_loops_clock(tokenizer):
    policy = Writer(tokenizer)
    run(policy, every=0.15, question="next for {task}?")  # a chunk every 0.08 s
    assert policy.prompts == ["p", "step 0", "step 0", "step 8", "step 8", "step 16", "step 16"][: len(policy.prompts)]
    assert set(policy.questions) == {"next for p?"}


def test_an_episode_begins_with_the_task(tokenizer):
    policy = Writer(tokenizer)
    run(policy, every=1000.0, episodes=2)
    assert policy.prompts.count("p") == 2
    assert policy.prompts[0] == "p" and "p" in policy.prompts[3:]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("far ...", "does not end"),
        ("a very " * 90, "tokens"),
        (BackendError("not finite"), "finite"),
    ],
)
def test_what_can_be_no_prompt_leaves_the_last_one(text, why, tokenizer):
    """The robot goes on, and the user hears of it once."""
    policy = Writer(tokenizer, lambda step: "lift the cup" if step == 0 else text)
    found, robot, said = run(policy)
    assert set(policy.prompts) == {"p", "lift the cup"}
    assert robot.sent == list(range(24))
    assert found["changed"] == 1 and found["unusable"] >= 4
    assert len(said) == 1 and why in said[0]


def test_writing_is_given_up_when_the_next_inference_is_wanted(tokenizer):
    """In real time: a text that would never end is stopped, and no chunk waits for it."""
    policy = Writer(tokenizer)

    def slow(observation, *, prompt, max_tokens, stop):
        while not stop():
            threading.Event().wait(0.001)
        return {"text": "too late", "finished": False}

    policy.infer_text = slow
    found, robot, _ = run(policy, delay=None, max_seconds=60)
    assert set(policy.prompts) == {"p"}
    assert found["given_up"] >= 3 and not found["written"]
    assert len(robot.sent) >= 24


def test_a_text_of_an_episode_that_is_over_is_dropped(tokenizer):
    policy = Writer(tokenizer)
    levels = TwoLevels(policy, Writing(0.0))
    request = type("Request", (), {"observation": {"prompt": "p", "state": [3.0]}, "observed": 1.0})()
    policy.texts = lambda step: levels.reset() or "of the last episode"
    levels.when_idle(request, {}, lambda: False)
    assert levels.subtask is None and levels.summary()["written"] == 0


def test_an_inference_that_outlives_its_episode_writes_nothing(tokenizer):
    """Its picture is of the episode before, also if that was over before the writing began."""
    policy = Writer(tokenizer)
    levels = TwoLevels(policy, Writing(0.0))
    observation = {"prompt": "p", "state": np.array([3.0])}
    request = type("Request", (), {"observation": observation, "observed": 1.0})()
    result = levels.infer(observation)
    levels.reset()
    levels.when_idle(request, result, lambda: False)
    assert levels.subtask is None and not policy.questions


def test_watchers_see_what_is_acted_on(tokenizer, tmp_path):
    seen, said = [], []

    class Sees(Watcher):
        def inferred(self, step, observation, result):
            seen.append((observation["prompt"], result["subtask"]))

    policy = Writer(tokenizer, lambda step: "lift" if step < 8 else "lower")
    run(policy, Sees(), SubtasksTold(said.append), Recorder(tmp_path / "run"))
    assert seen[0] == ("p", None) and seen[1] == ("p", "lift") and seen[-1] == ("p", "lower")
    assert [line.split(": ", 1)[1] for line in said] == ["subtask: lift", "subtask: lower"]
    events = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    recorded = [(event["prompt"], event.get("subtask")) for event in events if event["event"] == "inference"]
    assert recorded == seen


@pytest.mark.parametrize("every", [-1.0, float("nan"), True, "1"])
def test_wrong_seconds(every):
    with pytest.raises(ArgumentError, match="subtask every"):
        Writing(every)


def test_a_policy_without_words_is_refused(fetch_bundle):
    with pytest.raises(ArgumentError, match="does not answer in words"):
        TwoLevels(Counting(), Writing(1.0))
    with pytest.raises(ArgumentError, match="--full-vocabulary"):
        TwoLevels(Policy.load(fetch_bundle), Writing(1.0))


def test_ki_run_refuses_it_before_the_robot_is_opened(fetch_bundle, monkeypatch, capsys):
    monkeypatch.setattr(cli, "check_known", lambda *_: None)
    monkeypatch.setattr(cli, "open_robot", lambda *_, **__: pytest.fail("the robot was opened"))
    given = [str(fetch_bundle), "--robot", "gym:FetchReach-v4"]
    for more, message in (
        (["--subtask-every", "1"], "without the whole vocabulary"),
        (["--subtask-every", "-1"], "subtask every -1.0 seconds"),
        (["--subtask-every", "1", "--subtask-question", " "], "subtask question"),
        (["--subtask-question", "what?"], "say every how many seconds (--subtask-every)"),
    ):
        assert cli.main([*given, *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_ki_run_writes_subtasks(words_bundle, fetch_replay, tmp_path, capsys):
    given = [words_bundle, "--robot", f"replay:{fetch_replay}", "--mode", "async", "--delay", "1", "--max-steps", "24"]
    more = ["--subtask-every", "0", "--subtask-question", "point to the target", "--record", tmp_path / "run"]
    assert cli.main([*map(str, [*given, *more])]) == 0
    shown = capsys.readouterr()
    assert "subtasks " in shown.out
    events = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    subtasks = {event.get("subtask") for event in events if event["event"] == "inference"}
    told = [line for line in shown.err.splitlines() if "subtask:" in line]
    assert len(subtasks) > 1 and told
