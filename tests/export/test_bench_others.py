"""ki-bench: bundles side by side, and a policy's own work before the model."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError
from ki_edge.policy.contract import PolicyContract
from ki_export.bench import cli, peaks, rounds, stages
from ki_export.bench.benchmark import bench
from ki_export.bench.options import BenchOptions
from ki_export.bench.picture import draw
from ki_export.bench.setting import prepare
from ki_export.bench.tables import lines
from ki_export.exporter import export
from ki_export.options import ExportOptions

from .conftest import CONFIG, random_model
from .test_fast_head import plain

QUICK = BenchOptions(rounds=3, warm_up_s=0.0, threads=1, prompts=(7,), steps=(2,))


@pytest.fixture(scope="module", autouse=True)
def small_arrays():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "ARRAY_BYTES", 1 << 20)
        patch.setattr(rounds, "PAUSE_S", 0.0)
        yield


@pytest.fixture(scope="module")
def int8(checkpoint, tmp_path_factory):
    """The same policy with 8-bit weights, and without the FAST head."""
    folder = tmp_path_factory.mktemp("bench")
    options = ExportOptions(precision="int8", verify=False)
    return export(plain(checkpoint, folder / "checkpoint"), folder / "int8", options)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    from ki_edge.model import save_checkpoint

    folder = tmp_path_factory.mktemp("bench")
    save_checkpoint(random_model(config=replace(CONFIG, action_horizon=3)), folder / "checkpoint", max_token_len=20)
    options = ExportOptions(model_only=True, verify=False, fast_head=False)
    return export(folder / "checkpoint", folder / "horizon3", options)


@pytest.fixture(scope="module")
def report(bundle, int8, other_model):
    said = []
    found = bench(bundle, replace(QUICK, others=(int8.path, other_model.path, bundle.path)), said.append)
    return found, said


def test_bundles_side_by_side(report, bundle, int8, other_model):
    found, said = report
    low, other, again = found.others
    assert [(x.name, x.engine, x.precision) for x in found.others] == [
        (str(int8.path), "ort", "int8"), (str(other_model.path), "ort", "float32"), (str(bundle.path), "ort", "float32")
    ]  # fmt: skip
    for x in found.others:
        assert x.total.runs == 3 and 0 < x.ratio.least <= x.ratio.p50 <= x.ratio.most
        assert x.prefix.p50 + x.denoise.p50 == pytest.approx(x.total.p50, rel=0.5)
        assert x.tokens == 2 * CONFIG.vision.patches + 7
    assert again.max_abs_difference == 0 < low.max_abs_difference < 0.5 and other.max_abs_difference is None
    assert f"opening {int8.path}" in said


def test_they_take_turns(bundle, int8, monkeypatch):
    """Every round runs each of them, so a machine that slows down slows all of them down."""
    order, real = [], rounds.measure

    def watched(contenders, *rest):
        runs = {name: (lambda n=name, run=run: order.append(n) or run()) for name, run in contenders.items()}
        return real(runs, *rest)

    monkeypatch.setattr("ki_export.bench.benchmark.measure", watched)
    bench(bundle, replace(QUICK, rounds=2, others=(int8.path,)))
    names = list(dict.fromkeys(order))
    assert order[-2 * len(names) :] == 2 * names
    assert sum(name.startswith("2: ") and name.endswith("int8") for name in names) == 1


def test_they_run_in_turn_too(bundle, int8):
    said = []
    found = bench(bundle, replace(QUICK, rounds=1, others=(int8.path,), sequential=True), said.append)
    assert len(found.others) == 1 and sum("one graph in memory" in line for line in said) == 2, said


def test_the_table_and_the_picture(report, int8):
    text = list(lines(report[0]))
    start = next(at for at, line in enumerate(text) if line.startswith("side by side, in the same rounds: cameras 2"))
    head, own, low, other, again = text[start + 1 : start + 6]
    assert "times the first's" in head and "in single rounds" in head
    assert own.startswith(f"{report[0].bundle} ") and low.startswith(str(int8.path)) and " to " in low
    assert "other model" in other and "0.0e+00" in again
    assert all(line == line.rstrip() for line in text)
    alone, beside = (Image.open(io.BytesIO(draw(each))).size for each in (replace(report[0], others=()), report[0]))
    assert beside[0] > 1.5 * alone[0]


def test_json(report, int8):
    found = json.loads(json.dumps(report[0].to_json(), allow_nan=False))
    assert [x["precision"] for x in found["others"]] == ["int8", "float32", "float32"]
    assert found["others"][0]["ratio"]["p50"] > 0 and found["others"][0]["memory"]["rss_peak"] > 0
    assert found["pictures"]["size"] == [480, 640] and found["pictures"]["cameras"] == 2


def test_a_checkpoint_and_a_bundle_and_flags_between_them(bundle, int8, checkpoint, capsys):
    arguments = [bundle.path, "--rounds", "1", int8.path, "--warm-up", "0", "--prompt", "5", "--steps", "1", checkpoint]
    assert cli.main([*map(str, arguments), "--threads", "1", "--dtypes", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["others"]
    assert [(x["engine"], x["precision"]) for x in found] == [("ort", "int8"), ("PyTorch", "bfloat16")]
    assert found[1]["memory"] is None


def test_a_checkpoint_of_another_model_is_refused(bundle, tmp_path, capsys):
    from ki_edge.model import save_checkpoint

    save_checkpoint(random_model(config=replace(CONFIG, action_horizon=3)), tmp_path / "other", max_token_len=20)
    assert cli.main([str(bundle.path), str(tmp_path / "other"), "--prompt", "5", "--threads", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"ki-bench: error: {tmp_path / 'other'}: its model has")


# ---------------------------------------------------------------------- before the model


@pytest.fixture
def contract(checkpoint):
    return PolicyContract.load(checkpoint / "contract.json")


def test_pictures_are_given_in_the_cameras_size(contract, monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "read_images", lambda *given: seen.append(given))
    assert stages.resizing(contract, (30, 50))()["total"] > 0
    ((of, observation),) = seen
    assert of is contract and {p.shape for p in observation["images"].values()} == {(30, 50, 3)}


def test_larger_pictures_take_longer(contract):
    """Ten thousand times the pixels: no timing luck."""
    small, large = (stages.resizing(contract, size) for size in ((14, 14), (1400, 1400)))
    assert np.median([large()["total"] for _ in range(5)]) > 3 * np.median([small()["total"] for _ in range(5)])


def test_its_size_can_be_said_and_a_model_alone_has_none(bundle):
    found = bench(bundle, replace(QUICK, rounds=1, picture_size=(20, 30)))
    assert (found.pictures.size, found.pictures.cameras) == ((20, 30), 2)
    assert any("2 pictures of 20x30 resized" in line for line in lines(found))
    alone = Bundle(bundle.path, replace(bundle.manifest, contract=None))
    assert prepare(alone, QUICK).contract is None
    with pytest.raises(ArgumentError, match="holds a model, not a policy: it resizes no pictures"):
        prepare(alone, replace(QUICK, picture_size=(20, 30)))


def test_fast_of_a_bundle_without_the_head(int8):
    with pytest.raises(ArgumentError, match="int8 was exported without the FAST head, so it decodes no tokens"):
        prepare(int8, replace(QUICK, fast=True))
