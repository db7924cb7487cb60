"""fast_decode is exported where the contract has FAST: it costs a graph, its proof, and on a board weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.bundle import Bundle
from ki_edge.bundle.witness import WITNESS, read_witness
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, BundleError
from ki_edge.policy.contract import PolicyContract
from ki_export import cli
from ki_export.exporter import export
from ki_export.graphs import tracing
from ki_export.options import ExportOptions
from ki_export.parity import cli as parity_cli
from ki_export.parity.parity import compare_with_checkpoint
from ki_runtime import Policy, Sampler
from ki_runtime.doctor.bundle import check_room, read_contents
from ki_runtime.doctor.memory import needs
from ki_runtime.doctor.system import Memory
from ki_runtime.trt.engines import default_graphs
from ki_runtime.trt.profiles import profiles

ACTING = ["prefix", "denoise"]
OBSERVATION = {
    "images": {name: np.full((20, 30, 3), 90, np.uint8) for name in ("left", "right")},
    "state": [0.3, 1.7],
    "prompt": "pick up the red cube",
}


def plain(checkpoint, folder):
    """The same policy, fine-tuned with flow alone: its contract has no FAST."""
    shutil.copytree(checkpoint, folder)
    shutil.rmtree(folder / "assets" / "fast")
    replace(PolicyContract.load(folder / "contract.json"), fast=None, max_token_len=60).save(folder / "contract.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_token_len": 60}))
    return folder


@pytest.fixture(scope="module")
def flow_only(checkpoint, tmp_path_factory):
    return plain(checkpoint, tmp_path_factory.mktemp("flow") / "checkpoint")


@pytest.fixture(scope="module")
def exported(flow_only, tmp_path_factory):
    """Its bundle, the graphs that were traced for it, and what was said."""
    names, said, trace = [], [], tracing.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "trace", lambda t, *rest: names.append(t.spec.name) or trace(t, *rest))
        bundle = export(flow_only, tmp_path_factory.mktemp("flow") / "bundle", ExportOptions(), said.append)
    return bundle, names, said


def test_only_what_the_policy_has_is_traced_written_and_proven(exported):
    bundle, traced, _ = exported
    assert traced == ACTING
    assert list(bundle.manifest.graphs) == ACTING and not bundle.manifest.has_fast
    assert not (bundle.path / "fast_decode.onnx").exists() and not (bundle.path / "assets" / "fast").exists()
    assert bundle.manifest.decode_vocabulary == {"first": 0, "count": 0, "extra": []}
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["verified"] is True
    assert {m["graph"] for m in report["measurements"]} == {*ACTING, "runtime"}
    assert "greedy_ids" not in {m["tensor"] for m in report["measurements"]}
    assert {case["fast_tokens"] for case in report["cases"]} == {0}
    assert read_witness(bundle).fast is None
    with np.load(bundle.path / WITNESS) as arrays:
        assert not [name for name in arrays if name.startswith("fast")]


def test_it_acts_and_says_that_it_has_no_fast_head(exported):
    policy = Policy.load(exported[0], threads=1)
    assert policy.infer(OBSERVATION, seed=0)["actions"].shape == (5, 2)
    for call in (lambda: policy.infer_fast(OBSERVATION), lambda: policy.warm_up(fast=True)):
        with pytest.raises(ArgumentError, match=r"no FAST head: .*\. Use infer, or, .*--fast-codec DIR"):
            call()
    inputs = read_witness(exported[0]).inputs(0)
    for call in (
        policy.sampler.prepare_fast,
        lambda: policy.sampler.sample_fast_tokens(*inputs, max_tokens=2),
        lambda: policy.sampler.sample_fast_tokens(*inputs, max_tokens=2, constrained=False),
    ):
        with pytest.raises(ArgumentError, match=r"bundle was exported without the FAST head: .* with --fast-head$"):
            call()


def test_its_proof_is_repeated(exported, flow_only, capsys):
    assert parity_cli.main([str(exported[0].path), "--backend", "ort"]) == 0
    assert "FAST" not in capsys.readouterr().out
    for method in ("resident", "streamed"):
        found = compare_with_checkpoint(exported[0], Checkpoint.open(flow_only), lambda _: None, method=method)
        assert not found.failures and {m.graph for m in found.measurements} == {*ACTING, "runtime"}


def test_engines_and_memory_are_those_of_two_graphs(exported):
    bundle = exported[0]
    assert list(profiles(bundle)) == ACTING and list(default_graphs(bundle)) == ACTING
    need = read_contents(bundle.path).needs
    assert need.with_fast == need.acting == needs(bundle.manifest.config, 40, "float32").acting
    assert list(need.graphs) == ACTING
    said = check_room(need, None, Memory(10**10, 10**10, 0, None))
    assert said.level == "ok" and "FAST" not in said.text


@pytest.mark.parametrize("flags", [["--precision", "int8"], ["--precision", "fp16"], ["--precision", "bf16"]])
def test_other_precisions(flow_only, tmp_path, flags):
    assert cli.main([str(flow_only), "-o", str(tmp_path / "bundle"), *flags]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert list(bundle.manifest.graphs) == ACTING and bundle.manifest.parity["verified"]
    assert read_witness(bundle).fast is None


def test_asked_for_all_the_same(flow_only, tmp_path):
    """The graph alone: nobody knows FAST ids, so every token can be chosen."""
    assert cli.main([str(flow_only), "-o", str(tmp_path / "bundle"), "--fast-head"]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert list(bundle.manifest.graphs) == [*ACTING, "fast_decode"]
    sampler, witness = Sampler.open(bundle, threads=1), read_witness(bundle)
    fast = witness.fast
    ids = sampler.sample_fast_tokens(
        *witness.inputs(fast.row), max_tokens=fast.max_tokens, forced=fast.forced, constrained=False
    )
    assert fast.matches(ids[0])


def test_left_away_by_who_decodes_no_tokens(checkpoint, tmp_path):
    """The contract in the bundle says what the bundle can do."""
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--no-fast-head", "--no-verify"]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert list(bundle.manifest.graphs) == ACTING and bundle.manifest.contract["fast"] is None
    assert not [name for name in bundle.manifest.files if name.startswith("assets/fast")]
    with pytest.raises(ArgumentError, match="no FAST head"):
        Policy.load(bundle, threads=1).infer_fast(OBSERVATION)


@pytest.mark.parametrize(
    ("flags", "graphs"),
    [
        (["--model-only"], [*ACTING, "fast_decode"]),
        (["--model-only", "--no-fast-head"], ACTING),
        (["--full-vocabulary"], [*ACTING, "fast_decode"]),  # of logits that were asked for
    ],
)
def test_what_has_no_contract_and_what_was_asked_for(flow_only, tmp_path, flags, graphs):
    assert cli.main([str(flow_only), "-o", str(tmp_path / "bundle"), "--no-verify", *flags]) == 0
    assert list(Bundle.open(tmp_path / "bundle").manifest.graphs) == graphs


def test_contradiction():
    with pytest.raises(ArgumentError, match="--full-vocabulary is of the FAST head's logits, and --no-fast-head"):
        ExportOptions(full_vocabulary=True, fast_head=False)


def test_a_witness_of_another_kind_of_bundle(exported, bundle, tmp_path):
    for source, target in ((exported[0], bundle), (bundle, exported[0])):
        copy = shutil.copytree(target.path, tmp_path / source.path.parent.name)
        shutil.copy(source.path / WITNESS, copy / WITNESS)
        opened = replace(target, path=copy, identity=None)
        with pytest.raises(BundleError, match="a FAST continuation belongs to a bundle with fast_decode"):
            read_witness(opened)
