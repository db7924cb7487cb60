"""A run that is killed again and again ends as if nothing had happened: log and weights bit for bit."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

STEPS, KILLS = 24, 10

# Imports once, then forks a process for each start, before torch has made a thread: only the killed run is new.
RUNNER = """
import json, os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from ki_edge.config import Pi05Config
from ki_edge.train.record import Origin
from ki_edge.train.run import Request, open_run
request = json.loads(sys.argv[1])
config = Pi05Config.from_dict(request["config"])

def start(out, resume):
    origin = Origin(datasets=(request["dataset"],), horizon=4)
    given = {} if resume else request["settings"]
    trainer = open_run(Request(Path(out), origin, given, config=config, resume=resume, workers=0))
    print("step", trainer.step, flush=True)
    for row in trainer.run():
        print("step", row["step"], flush=True)
    trainer.close()

for line in sys.stdin:
    out, resume = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            start(out, resume)
            os._exit(0)
        except BaseException as error:
            print("failed", repr(error), flush=True)
            os._exit(1)
    print("pid", child, flush=True)
    _, status = os.waitpid(child, 0)
    print("ended", status, flush=True)
"""


def test_ten_kills_change_nothing(record_dataset, small_config, tmp_path):
    record_dataset(tmp_path / "dataset", size=8)
    settings = {
        "steps": STEPS,
        "batch": 4,
        "warmup": 2,
        "save_every": 2,
        "log_every": 1,
        "flow_draws": 1,
        "bfloat16": False,
        "held_out": 0.3,
        "eval_every": 6,
    }
    request = {"config": small_config.to_dict(), "dataset": str(tmp_path / "dataset"), "settings": settings}
    random = np.random.default_rng()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNNER, json.dumps(request)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as runner:

        def run(out, resume, kill_at=None, delay=0.0):
            """Start a run; kill it `delay` seconds after it told of a step from `kill_at` on. Returns the last step."""
            runner.stdin.write(json.dumps([str(out), resume]) + "\n")
            runner.stdin.flush()
            pid, last = None, 0
            for line in runner.stdout:
                kind, _, value = line.partition(" ")
                assert kind != "failed", line
                if kind == "pid":
                    pid = int(value)
                elif kind == "step":
                    last = int(value)
                    if kill_at is not None and last >= kill_at:
                        if delay:
                            signal.sigtimedwait([], delay)
                        os.kill(pid, signal.SIGKILL)
                        kill_at = None
                elif kind == "ended":
                    return last
            raise AssertionError("the runner is gone")

        run(tmp_path / "whole", False)
        out, step, resumed = tmp_path / "cut", 0, 0
        for _ in range(KILLS):
            resume = (out / "last").exists()
            resumed += resume
            step = run(
                out, resume, kill_at=min(step + int(random.integers(0, 4)), STEPS), delay=float(random.uniform(0, 0.02))
            )
        assert resumed >= 3
        run(out, (out / "last").exists())
        runner.stdin.close()
    rows = [
        [json.loads(line) for line in (tmp_path / name / "training" / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    kept = ("step", "flow", "fast", "grad_norm", "rate", "total")
    whole, cut = ([{name: row[name] for name in kept} for row in part] for part in rows)
    assert [row["step"] for row in cut] == list(range(1, STEPS + 1))
    assert cut == whole
    found = [
        [json.loads(line) for line in (tmp_path / name / "training" / "evaluation.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert [row["step"] for row in found[1]] == [6, 12, 18, 24] and found[1] == found[0]
    first, second = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    leftover = [path.name for path in out.iterdir() if path.name.startswith(".") and path.is_dir()]
    assert not leftover  # what killed processes left of unfinished checkpoints
