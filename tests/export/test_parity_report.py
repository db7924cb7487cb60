"""The report of a proof: the actions first, measures by name, the robot's own units, and why a bundle failed."""

import json
import re
import shutil
from dataclasses import replace
from html import escape

import numpy as np
import pytest

from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.policy.contract import PolicyContract, aloha, droid, libero
from ki_export.parity import cli
from ki_export.parity.bars import bars_of, measure
from ki_export.parity.comparison import Comparison
from ki_export.parity.headline import actions_error, in_words
from ki_export.parity.parity import compare_with_checkpoint
from ki_export.parity.report import to_html
from ki_export.parity.traces import robot_traces

KEY = "action_in_proj.weight"
FACTS = {"provenance": {}, "sampling": {}, "tools": {}}


def damage(file):
    """Change one tensor of a safetensors file in place."""
    index = SafetensorsIndex(file)
    changed = -index.array(KEY) + np.float32(0.01)
    with file.open("r+b") as out:
        out.seek(index.entries[KEY].offset)
        out.write(changed.tobytes())


def test_report_of_an_export(bundle):
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["verified"] is True and bundle.manifest.parity["verified"] is True
    assert bundle.manifest.parity["worst"] == report["worst"]
    compared = {(m["graph"], m["tensor"]) for m in report["measurements"]}
    assert compared == {
        ("prefix", "prefix_mask"), ("prefix", "prefix_k"), ("prefix", "prefix_v"), ("denoise", "x_next"),
        ("fast_decode", "logits"), ("fast_decode", "new_k"), ("fast_decode", "new_v"), ("runtime", "modulation"),
        ("runtime", "prefix_mask"), ("runtime", "prefix_k"), ("runtime", "prefix_v"), ("runtime", "x"),
        ("runtime", "actions"), ("runtime", "greedy_ids"), ("denoise", "velocity"),
    }  # fmt: skip
    assert all(m["passed"] and m["error"] <= m["limit"] for m in report["measurements"])
    assert {case["batch"] for case in report["cases"]} == {1, 2}
    assert report["method"] == bundle.manifest.parity["method"] == "resident"
    assert bundle.manifest.parity["cases"] == report["cases"]
    page = (bundle.path / "parity.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "all bars held" in page and "May I deploy this bundle?</b> Yes: " in page
    assert escape(in_words(report["actions"])) in page and bundle.manifest.parity["actions"] == report["actions"]
    assert "Actions of the first case, in the robot&#x27;s own units" in page
    assert (
        "<td class=n>sha256, model.safetensors</td>" in page and "from contract.json" in page and "{&quot;" not in page
    )
    assert page.count("<table>") == page.count('<div class="wide"><table>')
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page)  # the letters of a picture may spell anything


def compared(precision, *given):
    """A comparison of tensors (name, ours, reference)."""
    result = Comparison("the reference", precision, "resident")
    result.measurements += [measure("case", "runtime", *rest, bars=bars_of(precision)) for rest in given]
    return result


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("float32", "actions: cosine 0.99999950, largest error 2.0e-03 (at most 2.0e-05)"),
        ("float16", "actions: cosine 0.99999950 (at least 0.99999), largest error 2.0e-03 (at most 5.0e-03)"),
        ("bfloat16", "actions: cosine 0.99999950 (at least 0.999), largest error 2.0e-03 (at most 5.0e-02)"),
        ("int8", "actions: cosine 0.99999950 (at least 0.99), largest error 2.0e-03"),
    ],
)
def test_the_headline_is_the_actions_in_every_precision(precision, said):
    names = [name for name in ("actions", "actions_direction") if name in bars_of(precision)]
    pairs = [(name, [1.0, 1.002], [1.0, 1.0]) for name in names]
    worse = compared(precision, ("modulation", [9.0], [1.0]), ("actions", [1.0], [1.0]), *pairs)
    assert in_words(actions_error(worse.measurements)) == said
    assert actions_error(compared(precision, ("modulation", [9.0], [1.0])).measurements) is None


def test_what_is_not_a_number_stays_in_the_headline():
    found = compared("float16", ("actions", [np.nan], [1.0]), ("actions", [1.0], [1.0])).measurements
    assert in_words(actions_error(found)).startswith("actions: cosine -inf, largest error nan")


def rows(page):
    table = page[page.index("<h2>Largest error") : page.index("<h2>Pictures")]
    return [re.sub("<[^>]+>", "|", line).replace("||", "|") for line in table.splitlines()[1:]]


def test_every_row_names_its_measure_and_equal_columns_are_one(bundle):
    ids = ("greedy_ids", [[5, 6]], [[5, 7]])
    page = to_html(compared("float32", ("prefix_k", [1.5], [1.0]), ids), FACTS, bundle)
    head, k, tokens = rows(page)
    assert "largest difference|error" not in head and "|measure|error|allowed|largest value|" in head
    assert "|prefix_k|largest difference|5.00e-01|2.00e-05|1|" in k
    assert "|greedy_ids|equality|differs|equal|" in tokens and "7" not in tokens
    page = to_html(compared("int8", ("prefix_k", [1.5], [1.0]), ids, ("changed_weights", 3, 0)), FACTS, bundle)
    head, k, tokens, weights = rows(page)
    assert "|allowed|largest difference|largest value|" in head
    assert "|prefix_k|1 - cosine|0.00e+00|2.00e-02|5.00e-01|1|" in k
    assert "|greedy_ids|share of tokens that differ|5.00e-01|1.00e+00|" in tokens
    assert "|changed_weights|number that differ|3|0|" in weights


def test_a_page_of_a_failed_bundle_tells_why(bundle):
    failed = compared("float32", ("actions", [1.5], [1.0]))
    failed.explanation = "cause: <b> & so on"
    page = to_html(failed, FACTS, bundle)
    assert "1 bars failed" in page and "No. cause: &lt;b&gt; &amp; so on" in page and "Yes: " not in page


def test_ki_parity_of_a_damaged_bundle_writes_the_report(checkpoint, bundle, tmp_path, capsys):
    packed = shutil.copytree(bundle.path, tmp_path / "packed")
    damage(packed / "weights.safetensors")
    status = cli.main([str(packed), "--checkpoint", str(checkpoint), "--report", str(tmp_path / "report")])
    assert status == 1
    output = capsys.readouterr()
    said = output.err.splitlines()[-1].removeprefix("ki-parity: error: ")
    assert "FAILED" in output.out and f"weight '{KEY}' differs from the checkpoint's: the bundle is damaged" in said
    assert output.out.splitlines()[-1].startswith("actions: cosine ")
    assert f"No. {escape(said)}" in (tmp_path / "report" / "parity.html").read_text()


def test_another_checkpoint_is_named(copied, bundle, data):
    damage(copied / "model.safetensors")
    comparison = compare_with_checkpoint(bundle, Checkpoint.open(copied), lambda line: None)
    assert comparison.explanation.endswith("cause: this bundle was exported from another checkpoint (checkpoint)")
    with pytest.raises(
        ArgumentError, match=r"exported from another checkpoint \(checkpoint\): .* has another geometry$"
    ):
        compare_with_checkpoint(bundle, Checkpoint.open(data / "openpi_a"), lambda line: None)


def test_actions_are_plotted_as_the_robot_gets_them(bundle):
    ours, theirs = np.full((5, 6), 0.5, np.float32), np.zeros((5, 6), np.float32)
    found = robot_traces(bundle, ours, theirs)
    assert (found.names, found.unit) == (("number 0", "number 1"), "the robot's own units")
    np.testing.assert_allclose(found.ours, np.tile([0.5, 2.25], (5, 1)), atol=1e-5)  # quantiles -1..1 and 0..3
    np.testing.assert_allclose(found.theirs, np.tile([0.0, 1.5], (5, 1)), atol=1e-5)
    assert robot_traces(bundle, ours, theirs[:4]) is None


@pytest.mark.parametrize(
    ("contract", "first", "last", "unit"),
    [
        (None, "number 0", "number 31", "normalised: a model alone knows no robot"),
        (droid(), "joint 1", "gripper", "the robot's own units"),
        (libero(), "x", "gripper", "the robot's own units"),
        (aloha(), "left joint 1", "right gripper", "joints in rad, grippers from 0 to 1"),
        (libero(action_names=tuple("abcdefg")), "a", "g", "the robot's own units"),
        (libero(action_dim=9, delta_mask=(True,) * 8), "x", "number 8", "the robot's own units"),
    ],
)
def test_numbers_have_names(bundle, contract, first, last, unit):
    if contract is not None:
        contract = PolicyContract.from_json({**contract.to_json(), "normalization": "none"}).to_json()
    own = Bundle(bundle.path, replace(bundle.manifest, contract=contract))
    found = robot_traces(own, np.zeros((5, 32), np.float32), np.zeros((5, 32), np.float32))
    assert (found.names[0], found.names[-1], found.unit) == (first, last, unit)
    assert found.ours.shape == (5, len(found.names))
