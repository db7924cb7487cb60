"""The command ki-run, and what importing the runtime loads."""

import ast
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ki_edge.commands import tell
from ki_edge.errors import BackendError
from ki_runtime.backends import registry as backends
from ki_runtime.control import cli

from .fake_robot import CountingRobot, Failing, FormulaPolicy
from .recorded_runs import Filmed, Plan


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments, policy=, robot=) -> (exit status, stdout, stderr) of ki-run over the two above."""

    def run(*arguments, policy=None, robot=None):
        loaded = []

        def load(*positional, **options):
            loaded.append((*positional, options))
            return policy or FormulaPolicy()

        monkeypatch.setattr("ki_runtime.policy.policy.Policy.load", load)
        monkeypatch.setattr(cli, "check_known", lambda *_: None)
        monkeypatch.setattr(cli, "open_robot", lambda name: robot or CountingRobot())
        status = cli.main(["some/bundle", "--robot", "gym:FetchReach-v4", *arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, loaded=loaded)

    return run


def test_run_prints_a_report(run):
    robot = CountingRobot()
    result = run("--episodes", "4", "--backend", "ort", "--threads", "2", "--verify", robot=robot)
    assert result.status == 0 and robot.closed
    assert "50.0 % at the end" in result.out and "100.0 % at any step" in result.out
    assert "prefix" in result.out and "control rate" in result.out and "torch loaded" not in result.out
    assert "torch loaded" in run("--verbose").out
    given = {"threads": 2, "verify": True, "build": True, "trust_engines": False, "sequential": False, "say": tell}
    assert result.loaded == [("some/bundle", "ort", given)]


def test_run_warms_up_before_the_robot_moves(run):
    robot, policy = CountingRobot(), FormulaPolicy()

    def fail(**given):
        assert given == {"prompt": "fold", "num_steps": 3} and not robot.log
        raise BackendError("no room")

    policy.warm_up = fail
    result = run("--prompt", "fold", "--num-steps", "3", "--trust-engines", robot=robot, policy=policy)
    assert result.status == 2 and robot.closed and not [event for event, _ in robot.log if event == "act"]
    assert result.loaded[0][-1]["trust_engines"] is True


def test_run_prints_json(run, tmp_path):
    result = run("--episodes", "2", "--seed", "3", "--json", "--record", str(tmp_path))
    report = json.loads(result.out)
    assert report["seed"] == 3 and [episode["seed"] for episode in report["episodes"]] == [3, 4]
    assert report["success_rate"] == 0.5 and "denoise_ms" in report["latency_ms"] and "torch_loaded" in report
    assert (tmp_path / "steps.jsonl").exists()


def test_an_error_is_one_line(run):
    robot = CountingRobot()
    result = run("--episodes", "2", policy=Failing(), robot=robot)
    assert result.status == 2 and robot.closed
    assert result.err.splitlines()[-1] == "ki-run: error: broken" and "Traceback" not in result.err


def test_options_are_checked_before_anything_is_loaded(run):
    for option, name in (("--episodes", "episodes"), ("--num-steps", "num_steps")):
        result = run(option, "0")
        assert result.status == 2 and result.loaded == [] and f"error: {name} 0" in result.err
        assert len(result.err.splitlines()) == 1


def test_interrupt(run, tmp_path):
    class Interrupted(Failing):
        error = KeyboardInterrupt()

    robot = CountingRobot()
    result = run("--episodes", "5", "--record", str(tmp_path), policy=Interrupted(), robot=robot)
    assert result.status == 130 and robot.closed
    assert "episodes      1 (interrupted)" in result.out and "Traceback" not in result.err
    assert (tmp_path / "steps.jsonl").read_text().count('"end"') == 1


def test_interrupt_while_loading(monkeypatch, capsys):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ki_runtime.policy.policy.Policy.load", load)
    assert cli.main(["bundle", "--robot", "gym:FetchReach-v4"]) == 130
    assert capsys.readouterr().err == "ki-run: interrupted; nothing was run\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--robot", "gym:FetchReach-v4"], "no bundle at"),
        (["--robot", "gym:FetchReach-v4", "--backend", "abacus"], "no backend 'abacus'; there are: auto, trt"),
    ],
)
def test_missing_bundle_and_unknown_backend(capsys, tmp_path, arguments, message):
    assert cli.main([str(tmp_path / "none"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ki-run: error: ") and message in error and len(error.splitlines()) == 1


def test_unknown_robot(capsys, monkeypatch):
    monkeypatch.setattr("ki_runtime.policy.policy.Policy.load", lambda *_, **__: FormulaPolicy())
    assert cli.main(["bundle", "--robot", "gym:Unknown-v0"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("ki-run: error: robot 'gym:Unknown-v0' needs --robot-config FILE")
        and len(error.splitlines()) == 1
    )


def test_a_disk_that_fails_is_one_line(run):
    class Full(Failing):
        error = OSError(28, "No space left on device")

    robot = CountingRobot()
    result = run("--episodes", "2", policy=Full(), robot=robot)
    assert result.status == 2 and robot.closed
    assert result.err.splitlines()[-1] == "ki-run: error: [Errno 28] No space left on device"


def test_help_names_every_backend(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in backends.NAMES)


# ---------------------------------------------------------------- what is imported


def loaded_after(code):
    """Names of the top-level modules that a fresh interpreter has after running `code`."""
    script = f"{code}\nimport sys; print(sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_after("import ki_runtime") & {"numpy", "PIL", "onnxruntime", "torch"}


def test_the_runtime_never_needs_torch_or_the_exporter():
    heavy = {"torch", "onnx", "ki_export", "PIL", "matplotlib", "tokenizers", "sentencepiece", "imageio", "gymnasium"}
    heavy |= {"pyarrow", "av", "rich", "rerun"}
    modules = (
        "from ki_runtime.control import cli, loop, recorder\n"
        "from ki_runtime.recording import dataset, film, page, plots\n"
        "from ki_runtime.policy import decode, policy, sampler"
    )
    assert not loaded_after(modules) & {*heavy, "onnxruntime"}
    assert not loaded_after("import ki_runtime.backends.ort") & heavy


def test_every_public_name_is_there():
    import ki_runtime

    assert all(getattr(ki_runtime, name).__name__ == name for name in ki_runtime.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ki_runtime.nothing


def test_a_used_folder_is_told_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "steps.jsonl").write_text("{}\n")
    result = run("--record", str(tmp_path))
    assert result.status == 2 and result.loaded == [] and "holds a recording already" in result.err


def test_an_empty_digest_is_a_wrong_one(run):
    assert run("--digest", "").loaded[0][-1]["verify"] == ""


@pytest.mark.parametrize(
    ("waits", "flags", "fresh"),
    [(True, (), True), (False, (), False), (False, ("--record-every-tick",), True), (False, ("--unpaced",), True)],
)
def test_a_robot_is_observed_at_every_tick_where_nothing_is_late_for_it(run, tmp_path, waits, flags, fresh):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
    robot, policy = Filmed(), Plan()
    robot.real_time, robot.simulated, policy.warm_up = not waits, True, FormulaPolicy().warm_up
    assert run("--record", str(tmp_path / "run"), *flags, policy=policy, robot=robot).status == 0
    ages = parquet.read_table(tmp_path / "run/data/chunk-000/file-000.parquet")["ki.picture_age"].to_pylist()
    assert (max(ages) == 0) is fresh
    assert (tmp_path / "run" / "run.html").is_file()
