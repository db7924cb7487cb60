"""ki-export, ki-build and TensorRT: engines ahead of time, and one line for what cannot be done here."""

import json
import shutil
from pathlib import Path

import pytest

from ki_edge.bundle import Bundle
from ki_export.cli import main
from ki_runtime.trt import cli as build_cli

CAPABILITIES = "8.6,12.0"


def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err.strip().splitlines()


def build(capsys, *arguments):
    status = build_cli.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err.strip().splitlines()


def has_gpu():
    return Path("/dev/nvidia0").exists()


no_gpu = pytest.mark.skipif(has_gpu(), reason="this machine has a GPU: engines are built at once")


@pytest.mark.parametrize("attention", ["decomposed", "fused"])
def test_engines_are_compiled_ahead_of_time(checkpoint, tmp_path, capsys, attention):
    rtx()
    out = tmp_path / "bundle"
    flags = ["--target", "trt-rtx", "--compute-capability", CAPABILITIES, "--attention", attention]
    status, lines = run(capsys, checkpoint, "-o", out, *flags)
    if attention == "fused":  # its heads of 4 and 8 numbers are too small for a fused kernel: told, the bundle stays
        assert status == 2 and "Attention" in lines[-1] and lines[-1].startswith("ki-export: error: ")
        assert "--attention decomposed" in lines[-1]
        assert Bundle.open(out).manifest.parity["verified"]
        return
    assert status == 0, lines
    folders = {path: {engine.stem for engine in path.glob("*.engine")} for path in (out / "engines").iterdir()}
    folder, fast = sorted(folders, key=lambda path: -len(folders[path]))  # its contract has FAST
    assert (folders[folder], folders[fast]) == ({"prefix", "denoise"}, {"fast_decode"})
    assert all({path.stem for path in each.glob("*.log")} == names for each, names in folders.items())
    facts = json.loads((folder / "engine.json").read_text())
    assert facts["identity"]["precision"] == "float16"
    assert lines[-4:] == [
        f"ki-export: engines in {folder}, {fast}",
        f"ki-export: next: copy the bundle to the robot (rsync -a {out} ROBOT:), and there:",
        "ki-export:   ki-doctor bundle",
        "ki-export:   ki-run bundle --robot NAME",
    ]
    Bundle.open(out, verify=True)  # engines lie beside what the manifest lists


def test_graphs_are_built_by_name(bundle, tmp_path, capsys):
    rtx()
    own = shutil.copytree(bundle.path, tmp_path / "bundle")
    flags = ["--target", "trt-rtx", "--compute-capability", "8.6"]
    status, lines = build(capsys, own, *flags, "--graphs", "fast_decode")
    assert status == 0, lines
    status, lines = build(capsys, own, *flags, "--graphs", "denoise, fast_decode")
    assert status == 0, lines
    folders = {path.name: {engine.stem for engine in path.glob("*.engine")} for path in (own / "engines").iterdir()}
    assert sorted(map(sorted, folders.values())) == [["denoise"], ["fast_decode"]]
    assert lines[-1].count(str(own / "engines")) == 2 and any("engines are there already" in line for line in lines)


@no_gpu
def test_without_a_gpu_the_bundle_is_complete_and_engines_are_left_to_the_robot(checkpoint, tmp_path, capsys):
    status, lines = run(capsys, checkpoint, "-o", tmp_path / "b", "--target", "trt", "--no-verify")
    assert status == 0
    assert lines[-4:] == [
        f"ki-export: next: copy the bundle to the robot (rsync -a {tmp_path}/b ROBOT:), and there:",
        "ki-export:   ki-doctor b",
        "ki-export:   ki-build b    (or let the first ki-run do it)",
        "ki-export:   ki-run b --robot NAME",
    ]
    assert not (tmp_path / "b" / "engines").exists()


@no_gpu
@pytest.mark.parametrize(("target", "word"), [("trt", "tensorrt"), ("trt-rtx", "GPU")])
def test_building_where_nothing_can_be_built_is_one_line(bundle, capsys, target, word):
    status, lines = build(capsys, bundle.path, "--target", target)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("ki-build: error: ")
    assert word.lower() in lines[0].lower()
    assert not (bundle.path / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "no output: give -o BUNDLE; ki-inspect x tells"),
        (
            ["x", "-o", "b", "--target", "trt", "--compute-capability", "8.6"],
            "--compute-capability is for --target trt-rtx",
        ),
        (["x", "-o", "b", "--target", "trt-rtx", "--compute-capability", "8.7"], "8.7"),
        (["x", "-o", "b", "--target", "trt-rtx", "--compute-capability", "many"], "many"),
        (
            ["x", "-o", "b", "--target", "trt-rtx", "--compute-capability", "7.5", "--precision", "bf16"],
            "bfloat16 needs compute capability 8.0 or newer, not 7.5",
        ),
        (["x", "-o", "b", "--attention", "flash"], "attention 'flash': expected decomposed or fused"),
    ],
)
def test_wrong_requests_are_one_line_before_anything_is_done(tmp_path, monkeypatch, capsys, arguments, message):
    rtx()
    monkeypatch.chdir(tmp_path)
    status, lines = run(capsys, *arguments)
    assert status == 2 and message in lines[-1] and lines[:-1] in ([], ["ki-export: exporting x"]), lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--target", "trt-rtx"], "no bundle at nowhere"),
        (["nowhere", "--graphs", "prefix,suffix"], "'prefix,suffix': expected some of prefix,denoise,fast_decode"),
        (["b", "--target", "jetson"], "engines are built for trt and trt-rtx; for a Jetson or a data-centre GPU use"),
        (["b", "--target", "ort"], "for ONNX Runtime, on a CPU or through CUDA, use --target ort"),
    ],
)
def test_wrong_builds_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, lines = build(capsys, *arguments)
    assert status == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize(
    "arguments", [["b", "-o", "z"], ["b", "--precision", "bf16"], ["b", "--calibrate", "x"], ["b", "--model-only"], []]
)
def test_ki_build_knows_no_flag_of_an_export(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        build(capsys, *arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("ki-build: error: ")
