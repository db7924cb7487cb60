"""ki-doctor --for: does a policy fit a board that is not here; and the engines that lie in a bundle."""

import json

import pytest

from ki_edge.config import PI05
from ki_runtime.doctor import cli
from ki_runtime.doctor.boards import BOARDS, find_board
from ki_runtime.doctor.checkup import examine
from ki_runtime.doctor.finding import in_bytes
from ki_runtime.doctor.memory import needs
from ki_runtime.doctor.plan import lines, plan
from ki_runtime.gpu.device import Device
from ki_runtime.trt.api import Api
from ki_runtime.trt.engines import EngineFile, Engines, identify

from .test_doctor import Machine, found, orin


FITS = {"orin-8gb": "no", "orin-16gb": "fits", "orin-32gb": "fits", "thor": "fits", "rtx-4090": "fits"}
AND_FAST = {**FITS}


@pytest.mark.parametrize(
    ("board", "fits", "said"),
    [
        ("orin-8gb", 0, "to act: 3.88 GB = vision and backbone 2.29 + table 1.05 + denoise 0.31 + activations 0.19"),
        ("orin-16gb", 0, "compiling takes 24.5 GB: 11.0 GB of swap while it builds"),
        ("ORIN-32GB", 0, "compiling takes 24.5 GB, which is there"),
        ("thor", 0, "JetPack 7.0 or newer (TensorRT 10.13"),
        ("rtx-4090", 0, "of the host's memory"),
    ],
)
def test_the_full_size_model_on_a_board(board, fits, said, capsys):
    """As docs/jetson.md has it: 16 bits take 6.5 GB, which 8 GB boards do not have to spare; 8 bits do."""
    assert cli.main(["--for", board]) == cli.main(["--board", board]) == fits
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith("  float16 "))
    assert said in out and row[1:7] == ["device", "6.5", FITS[board.lower()], "11.6", AND_FAST[board.lower()], "5.9"]
    assert "run on" in out and "yet" in out  # what has never been tried


@pytest.mark.parametrize(
    ("board", "low"), [("orin-16gb", {"int8_static"}), ("rtx-4090", {"int8_static", "float8"}), ("h200", {"float8"}),
                       ("thor", {"float8", "nvfp4"})],
)  # fmt: skip
def test_a_board_is_told_the_precisions_that_it_has(board, low):
    found = plan(find_board(board), None)["precisions"]
    assert low <= set(found) and ("nvfp4" in found) is ("nvfp4" in low) and ("float8" in found) is ("float8" in low)


def test_low_weights_by_hand():
    """A byte, and half a byte with a sixteenth of one for its block; the embedding table and FAST stay in 16 bits."""
    sixteen, eight, four = (needs(PI05, 2050, name).graphs for name in ("float16", "float8", "nvfp4"))
    table = 2 * 257152 * 2048
    for name, rest in (("prefix", table), ("denoise", 0)):
        assert eight[name].weights - rest == pytest.approx((sixteen[name].weights - rest) / 2, rel=0.01)
        assert four[name].weights - rest == pytest.approx((sixteen[name].weights - rest) * 0.5625 / 2, rel=0.01)
    assert eight["fast_decode"] == four["fast_decode"] == sixteen["fast_decode"]


def test_every_board_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(board.key in shown for board in BOARDS)


def test_a_board_that_is_not_known(capsys):
    assert cli.main(["--for", "orin16"]) == 2
    assert "'orin16' is not known, expected one of orin-8gb, orin-16gb" in capsys.readouterr().err


def test_a_bundle_on_a_board(make_bundle, capsys):
    path = str(make_bundle(precision="bfloat16").path)
    assert cli.main([path, "--for", "orin-8gb"]) == 0
    out = capsys.readouterr().out
    assert f"{path} fits there: " in out and "to act" not in out
    assert cli.main([path, "--for", "orin-8gb", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "bfloat16" and report["precisions"]["bfloat16"]["fits"] is True


def test_bundles_that_no_board_runs(make_bundle, tmp_path, capsys):
    eight = make_bundle(precision="int8").path
    report = plan(find_board("thor"), eight)
    assert report["fits"] is False
    assert "cannot run there: precision int8 is for the CPU" in list(lines(find_board("thor"), report))[-1]
    assert cli.main([str(tmp_path), "--for", "thor"]) == 2
    assert "not a bundle" in capsys.readouterr().err


def test_too_large_in_one_precision_only(make_bundle, monkeypatch):
    """The cure names the precision that fits."""
    from ki_edge.config import PI05

    bundle, board = make_bundle(model=PI05.to_dict()), find_board("orin-16gb")
    report = plan(board, bundle.path)
    assert report["fits"] is True
    monkeypatch.setattr("ki_runtime.doctor.boards.RESERVED", 4e9)
    said = list(lines(board, plan(board, bundle.path)))
    assert any(line.endswith("fits there with --sequential alone: 11.6 GB at a time") for line in said)
    monkeypatch.setattr("ki_runtime.doctor.boards.RESERVED", 8e9)
    report = plan(board, bundle.path)
    assert report["fits"] is False
    said = "\n".join(lines(board, report))
    assert "does not fit: 12.81 GB = vision and backbone 9.15 + table 2.11 + denoise 1.25 + " in said
    assert "    ki-export CHECKPOINT -o BUNDLE --target trt --precision fp16 --no-fast-head\n" in said


def test_sizes():
    sizes = [in_bytes(count) for count in (0, 999, 12_345, 3_140_000, 6_510_000_000)]
    assert sizes == ["0 bytes", "999 bytes", "12 kB", "3.1 MB", "6.5 GB"]


def put_ahead(bundle, version="1.7.1"):
    """Engines compiled ahead of time by TensorRT-RTX."""
    api = Api(None, "tensorrt_rtx", (1, 7, 1), version)
    identity = identify(bundle, api, None, [(8, 6), (12, 0)])
    folder = bundle.path / "engines" / identity.key
    folder.mkdir(parents=True)
    files = {name: EngineFile(f"{name}.engine", 4, "", 4, 1.0) for name in bundle.manifest.graphs}
    for name in files:
        (folder / f"{name}.engine").write_bytes(b"plan")
    Engines(folder, identity, files).write()
    return folder


def test_engines_compiled_ahead_of_time_are_listed(make_bundle):
    bundle = make_bundle(precision="float16")
    folder = put_ahead(bundle)
    text = found(examine(bundle.path, Machine()), "engine files", "ok")[0].text
    assert text.startswith(f"{folder.name}: prefix, denoise, fast_decode, 12 bytes, TensorRT-RTX 1.7.1 for ")
    assert text.endswith("compute capability 8.6, 12.0 (ahead of time): not usable here, there is no GPU")
    other = found(examine(bundle.path, orin()), "engine files", "ok")[0].text
    assert other.endswith("not usable here, TensorRT-RTX is not installed")


def test_engines_that_are_usable_or_damaged(make_bundle):
    bundle = make_bundle(precision="float16")
    identity = identify(bundle, Api(None, "tensorrt", (10, 3), "10.3.0"), Device("Orin", (8, 7)), [(8, 7)])
    folder = bundle.path / "engines" / identity.key
    folder.mkdir(parents=True)
    Engines(folder, identity, {n: EngineFile(f"{n}.engine", 4, "", 4, 1.0) for n in bundle.manifest.graphs}).write()
    assert "not usable here, prefix.engine is missing" in examined(bundle)
    for name in bundle.manifest.graphs:
        (folder / f"{name}.engine").write_bytes(b"plan")
    assert examined(bundle).endswith("for Orin: usable here")
    (folder / "engine.json").write_text("{")
    assert (
        found(examine(bundle.path, orin()), "engine files", "warning")[0].fix == f"rm -r {folder}, and build them again"
    )


def examined(bundle):
    return found(examine(bundle.path, orin()), "engine files", "ok")[0].text
