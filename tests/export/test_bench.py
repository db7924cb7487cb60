"""ki-bench: how it measures, what it tells, and how it refuses."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.model import load_model
from ki_export.bench import benchmark, cli, peaks, pytorch, rounds
from ki_export.bench.benchmark import bench
from ki_export.bench.machine import OtherLoad
from ki_export.bench.options import BenchOptions, Case, cases
from ki_export.bench.picture import draw
from ki_export.bench.report import FAST_FIRST, FAST_TOKEN, INFERENCE, PREFIX, STEP
from ki_export.bench.rounds import Spread, measure
from ki_export.bench.stages import room
from ki_export.bench.tables import lines

from .conftest import CONFIG

CASE = Case(cameras=2, tokens=7, steps=3)
QUICK = BenchOptions(rounds=2, warm_up_s=0.0, threads=1)


@pytest.fixture(scope="module", autouse=True)
def small_arrays():
    """The bandwidth of a 512 MB array is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "ARRAY_BYTES", 1 << 20)
        patch.setattr(rounds, "PAUSE_S", 0.0)
        yield


@pytest.fixture(scope="module")
def report(bundle, checkpoint):
    """Several cases, FAST, and PyTorch in both types."""
    options = replace(QUICK, cameras=(2, 1), prompts=(7, 12), steps=(3, 2), fast=True, others=(checkpoint,))
    return bench(bundle, options)


# ---------------------------------------------------------------------- measuring


def test_warm_up_ends_when_times_have_settled(monkeypatch):
    now = [0.0]  # a clock of the test's own: a loaded machine settles late
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def contender(durations):
        def run():
            now[0] += next(durations)
            return {"run": 1.0}

        return run

    steady = contender(itertools.chain([0.05, 0.01], itertools.repeat(0.01)))
    samples = measure({"a": steady}, 3, 20.0, lambda _: None)["a"]
    assert samples.warm_up.settled and 3 <= samples.warm_up.runs <= 7
    assert len(samples.times["run"]) == 3
    growing = contender(0.004 * 2**i for i in itertools.count())
    assert not measure({"a": growing}, 1, 0.05, lambda _: None)["a"].warm_up.settled


def test_contenders_take_turns():
    order = []
    measure({name: lambda name=name: order.append(name) or {"run": 1.0} for name in "ab"}, 3, 0.0, lambda _: None)
    assert order[-6:] == list("ababab")


def test_percentiles():
    assert Spread.of(range(1, 102)) == Spread(51.0, 91.0, 100.0, 101)
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_load_of_others_is_noticed():
    burn = "import time\nend = time.time() + 1.0\nwhile time.time() < end: pass"
    with OtherLoad() as load:
        subprocess.run([sys.executable, "-c", burn], check=True)
    assert load.share * (os.cpu_count() or 1) > 0.5


# ---------------------------------------------------------------------- the report


def test_every_combination_is_measured(report):
    names = [(stage.name, stage.case.cameras, stage.case.tokens, stage.case.steps) for stage in report.stages]
    sizes = [(2, 7), (2, 12), (1, 7), (1, 12)]
    expected = [(name, *size, steps) for size in sizes
                for name, steps in ((PREFIX, 3), (STEP, 3), (INFERENCE, 3), (INFERENCE, 2))]  # fmt: skip
    assert names == [*expected, (FAST_FIRST, 2, 7, 3), (FAST_TOKEN, 2, 7, 3)]
    assert [stage.name for stage in report.main] == [PREFIX, STEP, INFERENCE, FAST_FIRST, FAST_TOKEN]
    runs = {stage.name: stage.time.runs for stage in report.main}
    assert runs == {PREFIX: 4, STEP: 4, INFERENCE: 2, FAST_FIRST: 2, FAST_TOKEN: 2}  # 2 rounds, 2 step counts pooled
    assert [stage.tokens for stage in report.stages if stage.name == PREFIX] == [15, 20, 11, 16]


def test_an_inference_is_the_sum_of_its_graphs(report):
    prefix, step, inference = report.main[:3]
    total = {kind: prefix.flops[kind] + 3 * step.flops[kind] for kind in prefix.flops}
    assert inference.flops == total and inference.bytes == prefix.bytes + 3 * step.bytes
    assert inference.limit_ms == pytest.approx(prefix.limit_ms + 3 * step.limit_ms)
    assert inference.time.p50 > step.time.p50 > 0 and 0 < prefix.reached == prefix.limit_ms / prefix.time.p50


def test_pytorch_runs_beside_it(report):
    assert [(x.engine, x.precision) for x in report.others] == [("PyTorch", "float32"), ("PyTorch", "bfloat16")]
    exact, low = report.others
    assert exact.tokens == 2 * CONFIG.vision.patches + 20
    assert exact.max_abs_difference < 2e-5 < low.max_abs_difference < 0.2
    for x in report.others:
        assert 0 < x.ratio.least <= x.ratio.p50 <= x.ratio.most
        assert x.total.p50 >= x.prefix.p50


def test_json_holds_everything(report):
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["stages"][0]["reached"] > 0 and found["stages"][0]["flops"]["float32"] > 0
    assert found["memory"]["rss_peak"] > found["memory"]["anonymous"] > 0
    assert found["startup"]["load_s"] > 0 and found["peaks"]["bandwidth"] > 0
    assert set(found["warm_up"]) >= {
        "reading max",
        "reading product",
        "reading row",
        "FAST",
        "pictures",
        "cameras 2, prompt 7, steps 3",
    }
    assert [name[:3] for name in found["warm_up"] if name[0].isdigit()] == ["2: ", "3: "]


def test_the_report_for_people(report):
    text = "\n".join(lines(replace(report, other_load=0.01, warnings=("beware",))))
    for part in ("warm-up: each at least 2 runs", "denoise step", "FAST token", "reached", "GB/s", "prefix tokens",
                 "side by side", "bfloat16", "2 pictures of 480x640", "others used 1.0 %", "beware"):  # fmt: skip
        assert part in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("by", "why"), [("memory", "caches"), ("compute", "the products that"), ("both", "the products that")]
)
def test_why_a_stage_can_be_faster_than_its_limit(report, by, why):
    def told(factor, backend="ort"):
        stages = tuple(replace(stage, limit_ms=factor * stage.time.p50, limited_by=by) for stage in report.stages)
        return any(why in line for line in lines(replace(report, stages=stages, backend=backend)))

    assert told(1.5) and not told(1.004) and not told(0.5) and not told(1.5, "openvino")


def test_pictures(report, bundle):
    curves, bars = draw(report), draw(replace(report, stages=tuple(report.main), others=()))
    for picture in (curves, bars):
        assert picture.startswith(b"\x89PNG")
    width = [int.from_bytes(picture[16:20], "big") for picture in (curves, bars)]
    assert width[0] > 1.5 * width[1]  # one panel, or two


def test_other_load_is_a_warning(report, monkeypatch):
    busy = benchmark._warnings(replace(report, other_load=0.2), [])
    assert any("20 % of the CPU" in line for line in busy)
    calm = replace(report, other_load=0.01, warm_up={"a": rounds.WarmUp(2, True)})
    assert benchmark._warnings(calm, []) == []


# ---------------------------------------------------------------------- arguments


def test_cases():
    assert cases(BenchOptions(), slots=3, padded=200, steps=10) == [Case(2, 30, 10)]
    assert cases(BenchOptions(), slots=1, padded=200, steps=10) == [Case(1, 30, 10)]
    with pytest.raises(ArgumentError, match="cameras 4: this policy has 3"):
        cases(BenchOptions(cameras=(4,)), slots=3, padded=200, steps=10)
    with pytest.raises(ArgumentError, match=r"prompt 201 tokens: .* at most 200"):
        cases(BenchOptions(prompts=(201,)), slots=3, padded=200, steps=10)


def test_model_only_bundles_have_openpis_room(bundle):
    alone = Bundle(bundle.path, replace(bundle.manifest, contract=None))
    assert (room(alone).slots, room(alone).padded) == (3, 200)
    assert (room(bundle).slots, room(bundle).padded) == (2, 20)


BAD_ARGUMENTS = [
    (["--steps", "0"], "num_steps 0: expected an integer from 1"),
    (["--cameras", "9"], "cameras 9: this policy has 2"),
    (["--cameras", "0"], "cameras 0: expected positive"),
    (["--prompt", "21"], "prompt 21 tokens"),
    (["--rounds", "0"], "rounds 0"),
    (["--threads", "-1"], "threads -1"),
    (["--backend", "abacus"], "no backend 'abacus'"),
    (["--dtypes", "int4"], "expected some of float32, bfloat16"),
    (["--prompt", "5", "nowhere"], "nowhere: no such folder; expected a bundle or a checkpoint"),
    (["--picture-size", "0x640"], "picture size (0, 640): expected height and width from 1"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(bundle, capsys, arguments, expected, monkeypatch):
    monkeypatch.setattr(benchmark, "fresh_process", lambda _: (None, None))
    assert cli.main([str(bundle.path), *arguments]) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert error.startswith("ki-bench: error: ") and expected in error
    assert all(not line.startswith("ki-bench: error") for line in said)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--steps", "a"],
        ["x", "--colour"],
        ["x", "--rounds", "1.5"],
        ["x", "--picture-size", "480"],
        ["x", "--picture-size", "axb"],
    ],
)
def test_a_wrong_command_line_is_one_line_too(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_another_geometry_is_refused(bundle, checkpoint):
    model = load_model(Checkpoint.open(checkpoint))
    with pytest.raises(ArgumentError, match="another geometry"):
        pytorch.check_same_model(model, replace(CONFIG, action_horizon=9), checkpoint)


def test_a_process_that_fails_tells_why(bundle):
    with pytest.raises(BackendError, match=r"status 1: .*no backend 'abacus'"):
        benchmark.fresh_process(replace(benchmark.prepare(bundle, replace(QUICK, prompts=(5,))), backend="abacus"))


def test_command_line(bundle, tmp_path, capsys):
    arguments = [str(bundle.path), "--rounds", "1", "--warm-up", "0", "--threads", "1", "--prompt", "5", "--steps", "1"]
    assert cli.main([*arguments, "--json", "--output", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert printed["others"] == [] and (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_torch_is_imported_for_a_comparison_only(bundle):
    script = (
        "import sys; from ki_export.bench import cli, rounds, peaks; peaks.ARRAY_BYTES = 1 << 20; "
        f"status = cli.main([{str(bundle.path)!r}, *'--rounds 1 --warm-up 0 --prompt 5 --steps 1'.split()]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == 0
