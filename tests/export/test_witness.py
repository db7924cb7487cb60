"""Every verified bundle carries the reference's own answers; ki-parity repeats them on any backend, without torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ki_edge.bundle import Bundle, BundleWriter
from ki_edge.bundle.witness import WITNESS, read_witness
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import BackendError, BundleError
from ki_edge.model import Observation, load_model
from ki_export import cli
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity import bars, parity, witnessing
from ki_export.parity import cli as parity_cli
from ki_export.parity.cases import engine_cases, standard_cases
from ki_runtime import Sampler
from ki_runtime.doctor.checkup import examine

from .conftest import CONFIG, OPENPI_KEYS
from .test_parity import damage

WALL = """
import sys
BLOCKED = ("torch", "onnx", "onnxscript", "onnx_ir", "transformers", "safetensors")
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name.startswith(("ki_edge.model", "ki_edge.train")):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Wall())
from ki_export.parity.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(*arguments):
    """ki-parity in a process that has no torch."""
    command = [sys.executable, "-c", WALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ)


@pytest.fixture
def own(bundle, tmp_path):
    """own(proven_by=...) -> a copy of the bundle, said to be proven by something else."""

    def make(**parity):
        import shutil

        copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "own"))
        changed = replace(copy.manifest, parity={**copy.manifest.parity, **parity})
        return BundleWriter(copy.path).seal(changed)

    return make


def reference(checkpoint, bundle, row):
    """The PyTorch model's actions and greedy tokens, asked directly."""
    witness, model = read_witness(bundle), load_model(Checkpoint.open(checkpoint))
    inputs = [torch.from_numpy(array.copy()) for array in witness.inputs(row)]
    state = None if witness.state is None else torch.from_numpy(witness.state[row : row + 1].copy())
    observation = Observation(*inputs, state=state)
    noise = torch.from_numpy(witness.noise[row : row + 1].copy())
    actions = model.sample_actions(observation, noise=noise, num_steps=witness.num_steps)[0].numpy()
    model.decode_ids, fast = tuple(bundle.manifest.vocabulary.ids), witness.fast
    tokens = model.sample_fast_tokens(observation, max_tokens=fast.max_tokens, forced=fast.forced)
    return actions, tokens[0].numpy()


def test_an_export_carries_the_reference_s_answers(checkpoint, bundle):
    witness = read_witness(bundle)
    assert WITNESS in bundle.manifest.files and bundle.manifest.parity["proven_by"]["backend"] == "ort"
    assert [witness.describe(row) for row in range(len(witness))] == [
        "2 cameras, 9 tokens",
        "1 camera, 20 tokens",
        "1 camera, 1 token",
        "2 cameras, 9 tokens",
    ]
    assert not (witness.images[0] == witness.images[-1]).all() and not witness.prompt_mask[0].all()
    assert witness.num_steps == 4 and list(witness.max_abs) == [bars.WITNESS["float32"]["actions"].limit] * 4
    for row in range(len(witness)):
        actions, tokens = reference(checkpoint, bundle, row)
        np.testing.assert_allclose(witness.actions[row], actions, atol=2e-6, rtol=0)
        if row == witness.fast.row:
            np.testing.assert_array_equal(witness.fast.ids, tokens)
    assert "proven at its export" in Sampler.open(bundle, "ort").backend.proof


def test_a_streamed_proof_leaves_a_witness_too(checkpoint, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "choose_method", lambda config: "streamed")
    streamed = export(checkpoint, tmp_path / "bundle", ExportOptions())
    assert "onnxruntime" in streamed.manifest.parity["proven_by"]  # it ran the graphs whole, as on a robot
    witness = read_witness(streamed)
    assert [witness.describe(row) for row in range(len(witness))] == [
        "1 camera, 9 tokens",
        "1 camera, 9 tokens",
        "2 cameras, 20 tokens",
    ]
    for row in range(len(witness)):
        np.testing.assert_allclose(witness.actions[row], reference(checkpoint, streamed, row)[0], atol=2e-6, rtol=0)


def test_a_bundle_that_was_not_verified_has_none(checkpoint, tmp_path):
    plain = export(checkpoint, tmp_path / "bundle", ExportOptions(verify=False))
    assert WITNESS not in plain.manifest.files
    with pytest.raises(BundleError, match="--no-verify"):
        read_witness(plain)
    assert "no witness (exported with --no-verify)" in Sampler.open(plain, "ort").backend.proof


def test_a_witness_that_its_own_engine_misses_is_not_published(checkpoint, tmp_path, monkeypatch, capsys):
    answer = witnessing.denoise_trace
    monkeypatch.setattr(witnessing, "denoise_trace", lambda *a, **k: [x + 1e-3 for x in answer(*a, **k)])
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle")]) == 1
    assert "runtime: actions: error" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions_are_proven_where_they_run(checkpoint, tmp_path, precision):
    low = export(checkpoint, tmp_path / "bundle", ExportOptions(precision=precision))
    witness = read_witness(low)
    exact = reference(checkpoint, low, 0)[0]
    np.testing.assert_allclose(witness.actions[0], exact, atol=2e-6, rtol=0)  # the float32 reference's, not its own
    sampler = Sampler.open(low, "ort", say=lambda line: None)
    expected = "proven at its export" if precision == "int8" else "proven here on"
    assert expected in sampler.backend.proof and sampler.backend.proof.count("max abs") == (precision == "fp16")
    inputs = witness.inputs(witness.fast.row)
    fast = witness.fast
    sampler.sample_fast_tokens(*inputs, max_tokens=fast.max_tokens, forced=fast.forced)  # proven by this, or refused
    assert (fast.ties > 0).all() and len(fast.ties) == len(fast.ids)


def test_ki_parity_needs_neither_torch_nor_the_checkpoint(own):
    bundle = own()
    done = without_torch(bundle.path, "--backend", "ort")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("backend ort: precision float32, ki-edge ") and "processor" in lines[0]
    assert lines[1].split() == ["observation", "by", "steps", "recorded", "allowed", "cosine", "apart"]
    assert [line[:28].strip() for line in lines[2:]][:5] == [
        "2 cameras, 9 tokens",
        "1 camera, 20 tokens",
        "1 camera, 1 token",
        "2 cameras, 9 tokens",
        "FAST, 2 cameras, 9 tokens",
    ]
    assert lines[-1].startswith("proven on this machine, 20") and "FAILED" not in done.stdout
    found = json.loads(without_torch(bundle.path, "--backend", "ort", "--json").stdout)
    assert found["verified"] is True and [v["part"] for v in found["verdicts"]] == ["actions", "fast"]
    assert max(row["eager"] for row in found["verdicts"][0]["observations"]) < 2e-5


def test_an_engine_that_is_wrong_is_refused_on_real_graphs(own, capsys):
    bundle = own(proven_by={"backend": "ort", "processor": "another"})
    damage(bundle.path / "weights.safetensors", f"{OPENPI_KEYS.expert}layers.1.self_attn.v_proj.weight")
    with pytest.raises(BackendError, match="backend 'ort' is refused: it does not compute this model here"):
        Sampler.open(bundle, "ort")
    done = without_torch(bundle.path, "--backend", "ort")
    assert done.returncode == 1 and "FAILED" in done.stdout and "REFUSED on this machine" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "error" in line and line.startswith("ki-parity: error")]
    assert "is refused" in line and "Traceback" not in done.stderr
    findings = {f.text.split(":")[0]: f for f in examine(bundle.path).findings if f.name == "proof"}
    assert findings["ort"].level == "problem" and "refused here on 20" in findings["ort"].text
    assert not next(v for v in examine(bundle.path).verdicts if v.backend == "ort").runs


def test_the_doctor_tells_what_is_proven(own):
    bundle = own(proven_by={})

    def proof():
        return next(f for f in examine(bundle.path).findings if f.name == "proof" and f.text.startswith("ort: "))

    assert (proof().level, proof().text) == ("warning", "ort: not yet proven here")
    assert proof().fix.startswith(f"ki-parity {bundle.path} --backend ort")
    Sampler.open(bundle, "ort", say=lambda line: None)
    assert proof().level == "ok" and "proven here on 20" in proof().text and "max abs error" in proof().text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "name what to compare with: --backend NAME"),
        (("--backend", "nonsense"), "no backend 'nonsense'; there are: auto, trt"),
        (("--backend", "ort", "--report", "x"), "--report is of --checkpoint or --outputs"),
        (("--backend", "ort", "--inputs", "x.npz"), "--inputs was given without --outputs"),
    ],
)
def test_wrong_arguments(bundle, arguments, text, capsys):
    assert parity_cli.main([str(bundle.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_a_checkpoint_and_recordings_on_a_named_backend(checkpoint, own, capsys, tmp_path):
    bundle = own()
    assert parity_cli.main([str(bundle.path), "--checkpoint", str(checkpoint), "--backend", "ort"]) == 0
    assert "on backend ort" in capsys.readouterr().out
    witness = read_witness(bundle)
    arrays = {f"image/{name}": witness.images[:1, at] for at, name in enumerate(("left", "right"))}
    arrays |= {f"image_mask/{name}": witness.camera_mask[:1, at] for at, name in enumerate(("left", "right"))}
    arrays |= {"tokenized_prompt": witness.prompt_tokens[:1], "tokenized_prompt_mask": witness.prompt_mask[:1]}
    np.savez(tmp_path / "inputs.npz", noise=witness.noise[:1], num_steps=witness.num_steps, **arrays)
    np.savez(tmp_path / "outputs.npz", actions=witness.actions[:1])
    recorded = [str(bundle.path), "--outputs", str(tmp_path / "outputs.npz"), "--backend", "ort"]
    assert parity_cli.main(recorded) == 0
    assert parity_cli.main([*recorded, "--json"]) == 0
    damage(bundle.path / "weights.safetensors", "action_out_proj.bias")
    assert parity_cli.main([str(bundle.path), "--checkpoint", str(checkpoint), "--backend", "ort"]) == 1
    assert "backend 'ort' computes it differently" in capsys.readouterr().err
    assert parity_cli.main(recorded) == 1


def test_cases_are_cut_to_what_an_engine_takes():
    """One camera, 12 tokens, one observation; the second slot is only there so that a camera can be absent."""
    cases = standard_cases(CONFIG, cameras=1, max_prompt=12, num_steps=2, forced=())
    cut = engine_cases(cases, cameras=1, max_prompt=12)
    assert [case.images.shape[:2] for case in cut] == [(1, 1), (1, 1)]
    assert all(case.camera_mask.all() and case.prompt_tokens.shape[1] <= 12 for case in cut)
    whole = engine_cases(
        standard_cases(CONFIG, cameras=3, max_prompt=12, num_steps=2, forced=()), cameras=3, max_prompt=12
    )
    assert [case.images.shape[:2] for case in whole] == [(1, 3)] * 3 and not whole[1].camera_mask.all()


KEEP = """
import sys
from pathlib import Path
from ki_runtime.policy.verdict import Row, Verdict, find, keep
folder = Path(sys.argv[1])
for turn in range(100):
    row = Row("1 camera", 1e-4, 1e-4, 1e-3, 0.0, 1e-5, 0.0, 1e-5)
    keep(Verdict("actions", {"GPU": "x"}, "2026", (row,)), folder)
    assert find("actions", {"GPU": "x"}, folder).rows == (row,)
"""


def test_processes_that_write_one_verdict_at_once(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", KEEP, str(tmp_path / "engines")]) for _ in range(3)]
    assert [process.wait(300) for process in running] == [0, 0, 0]
    assert [path.name[:6] for path in Path(tmp_path / "engines").iterdir()] == [
        "proof-"
    ]  # nothing half-written is left


def test_two_bundles_of_one_model_have_the_same_bars():
    assert set(bars.WITNESS) == set(bars.BARS)
    for precision, found in bars.WITNESS.items():
        assert set(found) == {"actions", "actions_direction", "apart"}, precision
        assert found["apart"].limit < found["actions"].limit
