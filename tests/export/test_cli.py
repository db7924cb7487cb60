"""ki-export's command line: bad input is one line on stderr, status 2, and nothing is left behind."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ki_edge.bundle import Bundle
from ki_edge.errors import ExportError
from ki_export import cli
from ki_export.graphs import tracing
from ki_export.source import cli as inspect_cli

from .conftest import OPENPI_KEYS


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def foreign(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a zip archive, not tensors" * 9)


def not_pi05(folder):
    save_file({"some.weight": torch.zeros(3)}, folder / "model.safetensors")


def drop_key(folder):
    rewrite(folder, lambda state: state.pop(f"{OPENPI_KEYS.expert}layers.0.mlp.up_proj.weight"))


def add_key(folder):
    rewrite(folder, lambda state: state.update({"value_head.weight": torch.zeros(2, 2)}))


def reshape_key(folder):
    rewrite(folder, lambda state: state.update({"action_out_proj.bias": torch.zeros(9)}))


def integer_key(folder):
    rewrite(folder, lambda state: state.update({"action_out_proj.bias": torch.zeros(6, dtype=torch.int32)}))


def edit_contract(folder, **changes):
    file = folder / "contract.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BAD_CHECKPOINTS = [
    (lambda folder: (folder / "model.safetensors").unlink(), ["holds no checkpoint", "expected model.safetensors"]),
    (lambda folder: shutil.rmtree(folder), ["no checkpoint at", "expected a folder, or a Hub id"]),
    (truncate, ["truncated", "copy it again"]),
    (foreign, ["not a safetensors file"]),
    (not_pi05, ["neither 'time_mlp_in.weight' (π0.5)", "some.weight"]),
    (drop_key, ["expert.model.layers.0.mlp.up_proj.weight' is missing"]),
    (add_key, ["unexpected key 'value_head.weight'"]),
    (reshape_key, ["'action_out_proj.bias' has shape [9], expected [6]"]),
    (integer_key, ["'action_out_proj.bias' has dtype I32"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    (lambda folder: shutil.rmtree(folder / "assets"), ["assets/tokenizer.model", "assets/norm_stats.json",
                                                       "assets/fast/tokenizer.json", "--model-only"]),
    (lambda folder: (folder / "contract.json").unlink(), ["no contract.json", "--model-only"]),
    (lambda folder: (folder / "assets" / "norm_stats.json").unlink(), ["no assets/norm_stats.json"]),
    (lambda folder: (folder / "assets" / "norm_stats.json").write_text("[]"), ["norm_stats.json"]),
    (lambda folder: (folder / "assets" / "tokenizer.model").write_bytes(b"x"), ["SentencePiece"]),
    (lambda folder: edit_contract(folder, action_horizon=9), ["action_horizon is 9, the model's is 5"]),
    (lambda folder: edit_contract(folder, image_size=[28, 28]), ["image_size is (28, 28)"]),
    (lambda folder: edit_contract(folder, colour="red"), ["unknown key colour"]),
    (lambda folder: edit_contract(folder, fast={"id_offset": 9000, "size": 40, "max_tokens": 9, "folder": "fast"}),
     ["ids up to 9000", "640 rows"]),
]  # fmt: skip


def errors(capsys):
    """What an export said after its first line, which comes before anything is read."""
    first, *more = capsys.readouterr().err.splitlines()
    assert first.startswith("ki-export: exporting ")
    return more


@pytest.mark.parametrize(("spoil", "expected"), BAD_CHECKPOINTS)
def test_bad_checkpoints(copied, tmp_path, capsys, spoil, expected):
    spoil(copied)
    assert cli.main([str(copied), "-o", str(tmp_path / "out" / "bundle")]) == 2
    said = errors(capsys)
    assert said[0].startswith("ki-export: error: ")
    assert len(said) == 1 or (said[0].endswith("missing:") and said[-1].startswith("ki-export:   ki-export "))
    assert all(part in " ".join(said) for part in expected)
    assert not (tmp_path / "out").exists()


BAD_ARGUMENTS = [
    (["--target", "tensorflow"], ["'tensorflow'", "expected one of ort, openvino, trt, trt-rtx"]),
    (["--target", "openvino", "--precision", "int8"], ["target openvino takes fp32 or bf16"]),
    (["--precision", "fp8"], ["for engines: give --target trt or trt-rtx", "target ort takes fp32 or int8"]),
    (["--precision", "int8", "--keep", "vision.*"], ["--keep and --budget-cosine are for", "not for int8 of ort"]),
    (["--target", "trt", "--precision", "int8", "--budget-cosine", "1"], ["--budget-cosine 1.0", "between 0 and 1"]),
    *(
        (["--target", name], ["for a Jetson", "--target trt, and ki-build there"])
        for name in ("jetson", "Orin", "h100", "B200")
    ),
    *((["--target", name], ["use --target trt-rtx"]) for name in ("rtx", "RTX 4090", "geforce")),
    *((["--target", name], ["use --target ort"]) for name in ("cpu", "onnx", "onnxruntime", "ort-cuda")),
    (["--stored-types", "--target", "trt"], ["--stored-types keeps the checkpoint's types", "leave one out"]),
    (["--opset", "17"], ["opset 17", "18 to"]),
    (["--opset", "99"], ["opset 99", "18 to"]),
    (["--num-steps", "0"], ["num_steps 0", "from 1 to 1000"]),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_ARGUMENTS)
def test_bad_arguments(checkpoint, tmp_path, capsys, arguments, expected):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle"), *arguments]) == 2
    (line,) = errors(capsys)
    assert all(part in line for part in expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["x", "-o"], ["x", "-o", "y", "--colour"], ["x", "--opset", "twenty"]])
def test_a_wrong_command_line_is_one_line_too(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_existing_bundle_needs_force(checkpoint, bundle, tmp_path, capsys):
    target = tmp_path / "bundle"
    assert cli.main([str(checkpoint), "-o", str(target), "--no-verify"]) == 0
    manifest = (target / "manifest.json").read_bytes()
    capsys.readouterr()
    assert cli.main([str(checkpoint), "-o", str(target)]) == 2
    (error,) = errors(capsys)
    assert "exists" in error and "--force" in error
    assert (target / "manifest.json").read_bytes() == manifest
    assert cli.main([str(checkpoint), "-o", str(target), "--force", "--num-steps", "7"]) == 0
    replaced = Bundle.open(target, verify=True).manifest
    assert replaced.sampling["num_steps"] == 7 and replaced.parity["verified"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(checkpoint, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "precious"), "--force"]) == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_unverified_bundles_say_so(checkpoint, tmp_path, capsys):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--no-verify"]) == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.parity == {"verified": False, "reason": "exported with --no-verify"}
    assert "not verified" in capsys.readouterr().err.splitlines()[-2]
    assert not (tmp_path / "bundle" / "parity.json").exists()


def test_progress_and_summary(checkpoint, tmp_path, capsys):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--model-only"]) == 0
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == "" and all(line.startswith("ki-export: ") for line in lines)
    bundle = re.escape(str(tmp_path / "bundle"))
    expected = [
        rf"exporting {re.escape(str(checkpoint))}",
        "tracing prefix, denoise, fast_decode$",
        *(rf"traced {name} \(" for name in ("prefix", "denoise", "fast_decode")),
        r"traced the graphs \(",
        r"wrote graphs and weights \(",
        *[r"compared seed \d: .*: actions error \d\.\de-\d\d, allowed 2\.0e-05$"] * 4,
        r"proven equal to the PyTorch model of checkpoint \(\d+\.\d s",
        rf"{bundle}: \d+\.\d MB \(weights (copied|reflinked)\), \d+ s, digest [0-9a-f]{{64}}$",
        r"actions: cosine (1\.0{8}|0\.9{7}\d), largest error \d\.\de-\d\d \(at most 2\.0e-05\)$",
        rf"report: {bundle}/parity\.html$",
        rf"next: ki_runtime\.Sampler\.open\('{bundle}'\) in Python",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(f"ki-export: {pattern}", line), (line, pattern)


def test_a_model_without_a_policy_keeps_its_whole_vocabulary(checkpoint, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(checkpoint / name, tmp_path / "model" / name)
    assert cli.main([str(tmp_path / "model"), "-o", str(tmp_path / "bundle"), "--model-only"]) == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.contract is None
    assert manifest.decode_vocabulary == {"first": 0, "count": 640, "extra": []}
    assert not (tmp_path / "bundle" / "assets").exists()


def test_a_wish_for_bfloat16_stands_in_the_bundle(checkpoint, tmp_path, capsys):
    out = str(tmp_path / "bundle")
    assert cli.main([str(checkpoint), "-o", out, "--target", "openvino", "--precision", "bf16", "--no-verify"]) == 0
    manifest = Bundle.open(out).manifest
    assert (manifest.precision, manifest.sampling["inference_precision"]) == ("float32", "bfloat16")


def test_a_policy_with_its_assets(bundle, checkpoint):
    manifest = bundle.manifest
    assert manifest.contract == json.loads((checkpoint / "contract.json").read_text())
    assert {name for name in manifest.files if name.startswith("assets/")} >= {
        "assets/tokenizer.model", "assets/norm_stats.json", "assets/fast/tokenizer.json"
    }  # fmt: skip
    assert manifest.tools["opset"] == "20" and "torch" in manifest.tools
    assert manifest.provenance["checkpoint"] == "checkpoint"
    assert len(manifest.provenance["sha256"]["model.safetensors"]) == 64
    assert str(checkpoint.parent) not in (bundle.path / "manifest.json").read_text()


def test_full_vocabulary_of_a_policy(checkpoint, tmp_path):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--full-vocabulary"]) == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.vocabulary.count == 640 and manifest.parity["verified"]


def test_a_graph_that_cannot_be_traced(checkpoint, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise ExportError("graph prefix cannot be traced at opset 20: no such operator; try --opset 20")

    monkeypatch.setattr(tracing, "trace", fail)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle")]) == 2
    assert "cannot be traced" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "file" / "bundle")]) == 2
    assert len(errors(capsys)) == 1


@pytest.mark.parametrize(("flag", "command"), [("--inspect", "ki-inspect CHECKPOINT"), ("--build", "ki-build BUNDLE")])
def test_flags_that_became_commands(capsys, flag, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([flag, "x", "--json"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"ki-export: error: {flag} is a command of its own: {command}; see ki-export --help\n"
    )


def test_everything_that_is_missing_is_one_list_with_the_command_to_paste(data, tmp_path, capsys):
    given = data / "openpi_a"
    assert cli.main([str(given), "-o", str(tmp_path / "bundle")]) == 2
    head, *missing, paste, command = errors(capsys)
    assert head == f"ki-export: error: {given} is not a complete policy, missing:"
    assert [line[:16] for line in missing] == ["ki-export:   - n"] * 3
    assert paste.startswith("ki-export: then paste")
    asked = "--contract NAME --norm-stats NORM_STATS_JSON --tokenizer TOKENIZER_MODEL"
    assert command == f"ki-export:   ki-export {given} -o BUNDLE {asked}"
    assert inspect_cli.main([str(given)]) == 0
    assert [f"ki-export: {line}" for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")] == missing


def test_help_does_not_load_torch():
    """Nor does anything before the first line."""
    modules = "ki_export.cli, ki_export.source.cli, ki_export.parity.cli, ki_runtime.trt.cli"
    script = f"import sys; import {modules}; sys.exit(bool({{'torch', 'onnx', 'PIL'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
