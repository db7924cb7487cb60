"""Every command of the pages is run, with stand-ins for the files that it names, or left out for a reason that is told.

An export that is not run to its end is run up to the tracing: its options, its checkpoint and its policy are examined.
"""

import contextlib
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ki_export.exporter
from ki_edge.model import Observation, load_model
from ki_runtime import Policy
from ki_runtime.robots import open_robot

from .documents import PAGES, ROOT, Block, Command, blocks, commands
from .test_documentation import SCRIPTS

# What pages call it -> what it is here: a file of the project, or one that a fixture makes ("fetch bundle", ...).
STAND_INS = {
    "my_checkpoint/": "examples/fetch/checkpoint",
    "CHECKPOINT": "examples/fetch/checkpoint",
    "build/fetch/run/last": "examples/fetch/checkpoint",
    "build/my_policy/best": "examples/fetch/checkpoint",
    "build/policy/last": "examples/fetch/checkpoint",
    "build/my_policy/bundle": "bundle",
    "build/d4": "tests/data/openpi_a",
    "pi05_droid/": "tests/data/policies/o14_droid_finetune",
    "lerobot/pi05_libero_finetuned": "tests/data/policies/h_a01_q_2cam_480x640",
    "my_adapter/": "tests/data/lora/lerobot",
    "lerobot/pi05_base": "tests/data/policies/h_a01_q_2cam_480x640",
    "tokenizer.model": "tests/data/policies/tokenizer.model",
    "outputs.npz": "tests/data/openpi_a/outputs.npz",
    "inputs.npz": "tests/data/openpi_a/inputs.npz",
    "BUNDLE": "bundle",
    "my_bundle": "bundle",
}
# Where a word alone does not tell what it stands for.
INSTEAD = (
    ("--backend NAME", "--backend ort"),
    (
        "--robot NAME --mode async --self-check",
        "--robot replay:recorded_episode.npz --self-check",
    ),  # it waits for its actions
    ("--robot NAME", "--robot replay:recorded_episode.npz"),
    ("replay:build/run", "replay:recorded_run"),
    ("--calibrate build/run", "--calibrate recorded_run"),
    ("build/requests/20261126-111520", "recorded_run"),
    ("--robot my_robot:MyArm", "--robot examples.my_robot:MyArm"),
    (" --episodes 3 ", " --episodes 1 "),  # one more tells nothing more
    (" --revision 3f1c2a9", ""),  # of a repository, which a folder stands in for
    ("ki-parity BUNDLE --outputs", "ki-parity build/openpi_a --outputs"),  # recorded of this model
)
# Commands that are not run, and why. Their flags, files, extras and targets are checked in test_documentation.py.
NOT_RUN = (
    (r"make ", "sets up an environment, and runs this very suite or trains for an hour"),
    (r"(\S*python -m )?pytest ", "is a part of this very suite"),
    (r"(pip|hf|git|lerobot-venv/bin/python -m pip) ", "needs the network"),
    (r"(scp|rsync|docker|sudo|\.|python3 -m venv) ?", "changes this machine or another one"),
    (r"python -m build", "builds the wheel: test_packaging.py does"),
    (r"python benchmarks/(?!boards|gpu\.py --(plan|floor))", "measures for minutes to hours"),
    (r"python (examples/fetch|tests/fuzz)", "takes minutes: test_fetch.py and test_fuzz.py run parts of it"),
    (r"python -m lerobot_policy_ki_edge", "needs LeRobot: tests/integrations"),
    (r"python examples/my_robot", "test_my_robot.py runs it"),
    (r"ki-train ", "trains for an hour: tests/train"),
    (r"ki-bench ", "measures for minutes: tests/export/test_bench.py"),
    (r"ki-build |.*--compute-capability", "compiles for minutes, or needs a GPU: tests/export/test_cli_engines.py"),
    (r".*--rerun", "needs rerun-sdk, 0.5 GB: tests/runtime/test_rerun.py, test_rerun_venv.py"),
    (r".*--robot lerobot:", "needs LeRobot: tests/integrations/test_lerobot_robot.py"),
    (r".*--robot openpi:", "needs an environment of openpi: tests/runtime/test_openpi_robot.py"),
    (r"python examples/grafana", "needs a Prometheus: tests/runtime/test_dashboard.py"),
    (r"ki-serve .*--ray", "needs Ray: tests/integrations/test_ray.py"),
    (r"ki-serve ", "serves until it is stopped: tests/runtime/test_monitoring_server.py"),
    (r".*--policy ws:", "needs a server: tests/runtime/test_ki_run_policy.py"),
    (r".*--self-check-(save|limit)", "needs a run of many checks: tests/runtime/test_self_check.py"),
    (r".*--backend trt", "needs a GPU: tests/runtime/test_on_gpu.py"),
    (r".*--backend openvino", "needs OpenVINO: tests/runtime/test_openvino.py"),
    (r".*--sequential", "loads its graphs for every inference: tests/runtime/test_sequential.py"),
    (r".*(\[| \.\.\.)", "is no command but its form"),
)
WHOLE = "ki-export tests/data/openpi_a -o build/openpi_a --target ort --model-only"  # an export that is run to its end
SEEN = {command.text: command for command in commands() if command.whole or not command.words[1].startswith("-")}


class Traced(BaseException):
    """An export has come to its tracing. No Exception, which the command would tell."""


def reason(command: Command) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for pattern, why in NOT_RUN if re.match(pattern, command.text)), None)


def substituted(command: Command) -> list[str]:
    """The command's words with what stands in for them."""
    text = command.text
    for name, other in INSTEAD:
        text = text.replace(name, other)
    return [STAND_INS.get(word, word) for word in Command(command.page, text, True).words]


RUN = list({tuple(substituted(command)): command for command in SEEN.values() if reason(command) is None}.values())


@pytest.fixture(scope="module")
def folder(
    fetch_bundle: Path, words_bundle: Path, fetch_replay: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where the commands are run: the project's own folders, and what the pages speak of."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("examples", "tests", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    for name in ("bundle", "my_bundle", "build/bundle"):
        shutil.copytree(fetch_bundle, place / name)
    shutil.copytree(words_bundle, place / "words")
    other = shutil.copytree(ROOT / "examples/fetch/checkpoint", place / "my_mixture/last") / "robots/other_arm"
    other.mkdir(parents=True)
    for name in ("contract.json", "assets/norm_stats.json"):
        shutil.copy(place / "my_mixture/last" / name, other)
    shutil.copy(fetch_replay, place / "recorded_episode.npz")
    robot = f"replay:{place / 'recorded_episode.npz'}"
    assert call(["ki-run", str(fetch_bundle), "--robot", robot, "--record", str(place / "recorded_run")]) == 0
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_what_is_not_run_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    left = [command for command in SEEN.values() if reason(command) is not None]
    sys.stdout.writelines(f"{command.text}: {reason(command)}\n" for command in left)
    used = {why for command in left if (why := reason(command))}
    assert used == {why for _, why in NOT_RUN}, "a reason that is no command's can go"
    assert len(RUN) > 25 and capsys.readouterr().out


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text)
def test_a_command_runs(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = substituted(command)
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=300)
        return
    if "build/openpi_a" in words:
        export_whole()
        if command.text == WHOLE:
            return
    if words[0] == "ki-export" and "-o" in words:
        words[words.index("-o") + 1] = str(tmp_path / "output")
        monkeypatch.setattr(ki_export.exporter, "trace_all", stop)
        with pytest.raises(Traced):
            call(words)
    else:
        assert call(words) == 0, words


def call(words: list[str]) -> int:
    """Run a command of this project here; its exit status."""
    module, _, function = SCRIPTS[words[0]].partition(":")
    main: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return main(words[1:])


def export_whole() -> None:
    """The one export that others go on with, whichever comes first."""
    if not Path("build/openpi_a").exists():
        assert call(WHOLE.split()) == 0


def stop(*arguments: object) -> None:
    raise Traced


PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
EXAMPLE = ROOT / "examples" / "my_robot.py"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_of_the_pages_runs(block: Block, names: dict[str, Any]) -> None:
    code = "\n".join(block.lines)
    if "class MyArm" in code:  # which test_my_robot.py runs
        assert code in EXAMPLE.read_text(encoding="utf-8"), "the README shows examples/my_robot.py as it is"
        return
    exec(compile(code, f"{block.page}:{block.line}", "exec"), names)
    assert np.isfinite(names["result"]["actions"]).all()


@pytest.fixture(scope="module")
def known(folder: Path, data: Path) -> Iterator[dict[str, Any]]:
    """What the pages' code speaks of without making it."""
    arm = open_robot("gym:FetchReach-v4")
    observation, policy = arm.observe(), Policy.load(folder / "bundle")
    yield {
        "contextlib": contextlib,
        "open_robot": open_robot,
        "robot": runpy.run_path(str(EXAMPLE))["MyArm"](),
        "bundles": [str(folder / "bundle")],
        "policy": policy,
        "observation": observation,
        "left": observation["images"]["front_left"],
        "right": observation["images"]["front_right"],
        "state": observation["state"],
        "result": policy.infer(observation),
        "training": training(data / "ki"),
    }
    arm.close()


@pytest.fixture
def names(known: dict[str, Any], block: Block) -> dict[str, Any]:
    """A namespace for one block; in knowledge-insulation.md an observation is a batch of tensors."""
    own = dict(known["training"]) if block.page == "docs/knowledge-insulation.md" else {}
    exec("from ki_runtime import ControlLoop, LoopOptions, Policy", own)
    return {**known, **own}


def training(folder: Path) -> dict[str, Any]:
    """A model of the recorded training step with its inputs."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items() if array.ndim}
    cameras = [name.partition("/")[2] for name in arrays if name.startswith("image/")]
    observation = Observation(
        images=torch.stack([arrays[f"image/{camera}"] for camera in cameras], dim=1),
        camera_mask=torch.stack([arrays[f"image_mask/{camera}"] for camera in cameras], dim=1),
        prompt_tokens=arrays["prompt_only_tokens"],
        prompt_mask=arrays["prompt_only_mask"],
        fast_tokens=arrays["tokenized_prompt"][:, -4:],
        fast_mask=torch.ones(len(arrays["actions"]), 4, dtype=torch.bool),
    )
    found = {name: arrays[name] for name in ("actions", "noise", "time")}
    return {"model": load_model(folder), "observation": observation, **found}
