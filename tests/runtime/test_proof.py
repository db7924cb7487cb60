"""An engine answers the witness before its first action: right ones are taken, wrong ones refused with figures."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from ki_edge.bundle.witness import WITNESS
from ki_edge.errors import BackendError, BundleError, DeviceMemoryError
from ki_runtime.control.cli import main
from ki_runtime.policy import verdict as verdicts
from ki_runtime.policy.proof import examine, own_version, standing
from ki_runtime.policy.proving import repeat_proof
from ki_runtime.policy.sampler import Sampler

from .witnesses import Backends, Wrong, observations, packed, proven_bundle, witness_of

WRONG = {  # a fault of the engine, and what a message about it says
    "one layer's K": ({"off": {"prefix": 0.02}}, "not recorded, since it is wrong step by step"),
    "x after a step": ({"off": {"denoise": 1e-4}}, "not recorded"),
    "no numbers": ({"off": {"denoise": np.nan}}, "step by step inf"),
    "noise of an older run": ({"stale": {"inputs": "x_t"}}, "recorded "),
    "pictures of an older run": ({"stale": {"inputs": "images"}}, "recorded "),
    "K/V of an older run": ({"stale": {"outputs": "prefix"}}, "recorded "),
    "a replay that computes nothing": ({"stale": {"outputs": "denoise"}}, "recorded "),
    "present addresses, prefix": ({"stale": {"present": "prefix"}}, "recorded "),
    "present addresses, denoise": ({"stale": {"present": "denoise"}}, "recorded "),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_unwritten", {})
    return tmp_path / "cache"


@pytest.fixture
def engine(make_bundle):
    """engine(fault...) -> one of the fake model."""
    ids = make_bundle("ids").manifest.vocabulary.ids
    return lambda **fault: Wrong(ids, **fault)


def records(bundle):
    return sorted((bundle.path / "engines").glob("*/proof-*.json"))


def test_a_right_engine_is_taken_and_its_verdict_written(monkeypatch, make_bundle, engine):
    bundle, right, said = proven_bundle(make_bundle), engine(), []
    Backends(monkeypatch, {"trt": right})
    sampler = Sampler.open(bundle, say=said.append)
    assert sampler.backend.name == "trt"
    assert said[0] == "trt: runs the bundle's witness, once, before its first action"
    assert said[1].startswith("backend: trt (GPU); proven here on 20") and len(said) == 2
    assert {*right.replays} == {"prefix", "denoise"}  # the recorded sequences were really replayed
    (path,) = records(bundle)
    found = json.loads(path.read_text())
    assert found["passed"] is True and found["part"] == "actions" and found["date"].endswith("+00:00")
    assert (
        found["environment"]["driver"] == "560"
        and found["environment"]["backend"] == "trt"
        and "ki-edge" in found["environment"]
    )
    assert [row["what"] for row in found["observations"]] == [
        "2 cameras, 5 tokens",
        "1 camera, 9 tokens",
        "2 cameras, 5 tokens",
    ]
    assert {row["eager"] for row in found["observations"]} == {0.0} == {r["apart"] for r in found["observations"]}
    assert standing(bundle, "trt").proven is True


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_engine_is_refused_with_its_figures(case, monkeypatch, make_bundle, engine, capsys):
    fault, text = WRONG[case]
    bundle, wrong = proven_bundle(make_bundle), engine(**fault)
    Backends(monkeypatch, {"trt": wrong})
    with pytest.raises(BackendError, match=r"^backend 'trt' is refused: .*max abs error step by step") as caught:
        Sampler.open(bundle, "trt")
    assert text in str(caught.value) and f"ki-parity {bundle.path} --backend trt" in str(caught.value)
    assert json.loads(records(bundle)[0].read_text())["passed"] is False
    assert standing(bundle, "trt").proven is False
    assert main([str(bundle.path), "--robot", "gym:FetchReach-v4", "--backend", "trt"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ki-run: error: backend 'trt' is refused")


@pytest.mark.parametrize("case", WRONG)
def test_auto_takes_the_next_backend_and_says_why(case, monkeypatch, make_bundle, engine, capsys):
    bundle = proven_bundle(make_bundle)
    Backends(monkeypatch, {"trt": engine(**WRONG[case][0]), "ort-cuda": engine()})
    sampler = Sampler.open(bundle)
    assert sampler.backend.name == "ort-cuda"
    assert "is refused: it does not compute this model here" in dict(sampler.backend.passed)["trt"]
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == sampler.backend.describe("float32") and "backend 'trt' is refused" in told
    np.testing.assert_array_equal(
        sampler.sample_actions(*observations().inputs(0), **observations().more(0)),
        witness_of(bundle).actions[:1],
    )


def test_where_every_backend_is_wrong_nothing_runs(monkeypatch, make_bundle, engine):
    Backends(monkeypatch, {"trt": engine(off={"prefix": 1.0}), "ort": engine(off={"denoise": 1.0})})
    with pytest.raises(BackendError, match=r"no backend can run this: trt: .*refused.*; ort: .*refused"):
        Sampler.open(proven_bundle(make_bundle))


@pytest.mark.parametrize("fault", [{}, {"off": {"prefix": 1.0}}])
def test_a_verdict_is_not_taken_twice(fault, monkeypatch, make_bundle, engine):
    bundle, first, second = proven_bundle(make_bundle), engine(**fault), engine(**fault)
    machine = Backends(monkeypatch, {"ort-cuda": first, "ort": engine()})
    assert Sampler.open(bundle).backend.name == ("ort" if fault else "ort-cuda")
    assert first.calls
    machine.engines["ort-cuda"] = second
    assert Sampler.open(bundle).backend.name == ("ort" if fault else "ort-cuda")
    assert not second.calls


@pytest.mark.parametrize("what", ["driver", "engine", "witness", "version", "weights"])
def test_another_engine_driver_or_witness_is_proven_again(what, monkeypatch, make_bundle, engine):
    bundle, again = proven_bundle(make_bundle), engine()
    machine = Backends(monkeypatch, {"trt": engine()})
    Sampler.open(bundle)
    machine.engines["trt"] = again
    if what in ("driver", "engine"):
        machine.environment["trt"][what] = "another"
    elif what == "version":
        monkeypatch.setattr("ki_runtime.policy.proof.version", lambda name: "9.9")
    elif what == "weights":
        bundle.manifest.files["weights.safetensors"]["sha256"] = "another"
    else:
        (bundle.path / WITNESS).write_bytes(packed(witness_of(bundle, seed=1)))
        with pytest.raises(BundleError, match=r"truncated|recorded"):
            Sampler.open(bundle.path)
        bundle = proven_bundle(make_bundle, "other", packed(witness_of(bundle, seed=1)))
    Sampler.open(bundle)
    assert again.calls
    assert len(records(bundle)) == (1 if what == "witness" else 2)


def test_a_witness_whose_hash_differs_is_refused(monkeypatch, make_bundle, engine):
    bundle = proven_bundle(make_bundle)
    content = bytearray((bundle.path / WITNESS).read_bytes())
    content[10] ^= 1  # the time of a file in the archive, which nothing else reads
    (bundle.path / WITNESS).write_bytes(content)
    Backends(monkeypatch, {"trt": engine()})
    with pytest.raises(BundleError, match=r"'witness\.npz' has changed since the export"):
        Sampler.open(bundle)


def test_the_backend_that_proved_the_bundle_needs_no_proof(monkeypatch, make_bundle, engine):
    used = engine()
    Backends(monkeypatch, {"ort": used})
    environment = {"ki-edge": own_version(), "backend": "ort", "driver": "560", "engines": "prefix,denoise"}
    bundle = proven_bundle(make_bundle, parity={"verified": True, "proven_by": environment})
    assert "proven at its export" in Sampler.open(bundle).backend.proof
    assert not used.calls and records(bundle) == []
    other = proven_bundle(
        make_bundle, "other", parity={"verified": True, "proven_by": {**environment, "driver": "550"}}
    )
    assert "proven here on" in Sampler.open(other).backend.proof
    assert used.calls


def test_a_later_refusal_outweighs_the_proof_at_the_export(monkeypatch, make_bundle, engine):
    machine = Backends(monkeypatch, {"ort": engine(off={"denoise": 1.0})})
    environment = {"ki-edge": own_version(), "backend": "ort", "driver": "560", "engines": "prefix,denoise"}
    bundle = proven_bundle(make_bundle, parity={"verified": True, "proven_by": environment})
    Sampler.open(bundle)
    assert not repeat_proof(bundle, "ort", lambda line: None)[0].passed
    machine.engines["ort"] = engine()
    with pytest.raises(BackendError, match="is refused"):
        Sampler.open(bundle)
    assert repeat_proof(bundle, "ort", lambda line: None)[0].passed  # and the repetition holds from then on
    Sampler.open(bundle)


@pytest.mark.parametrize("verified", [True, False])
def test_a_bundle_without_a_witness_runs_and_says_so(verified, monkeypatch, make_bundle, engine, capsys):
    bundle = make_bundle("plain", parity={"verified": verified})
    Backends(monkeypatch, {"trt": engine()})
    Sampler.open(bundle)
    why = "exported by an older version" if verified else "exported with --no-verify"
    assert capsys.readouterr().err == f"backend: trt (GPU); not proven here: the bundle has no witness ({why})\n"
    with pytest.raises(BundleError, match=r"carries no witness\.npz"):
        repeat_proof(bundle, "trt", print)


@pytest.mark.parametrize("error", [DeviceMemoryError("no room"), BackendError("enqueue failed")])
def test_what_stops_the_proof_is_no_verdict(error, monkeypatch, make_bundle, engine):
    bundle = proven_bundle(make_bundle)
    machine = Backends(monkeypatch, {"trt": engine(failure=error), "ort": engine()})
    assert dict(Sampler.open(bundle).backend.passed)["trt"] == str(error)
    with pytest.raises(type(error), match=str(error)):
        Sampler.open(bundle, "trt")
    machine.engines["trt"] = engine()
    assert Sampler.open(bundle).backend.name == "trt"


def test_fast_tokens_are_proven_when_they_are_first_wanted(monkeypatch, make_bundle, engine):
    bundle, right = proven_bundle(make_bundle), engine()
    machine = Backends(monkeypatch, {"trt": right})
    sampler, asked = Sampler.open(bundle, say=lambda line: None), observations()
    sampler.sample_actions(*asked.inputs(0), **asked.more(0))
    assert right.opened == ["prefix", "denoise"]
    expected = witness_of(bundle).fast.ids
    for _ in range(2):
        np.testing.assert_array_equal(
            sampler.sample_fast_tokens(*asked.inputs(0), max_tokens=4, forced=(3,)), expected[None]
        )
    assert len(records(bundle)) == 2 and standing(bundle, "trt").text.endswith("FAST tokens too")

    machine.environment["trt"]["driver"] = "570"
    machine.engines["trt"] = engine(off={"fast_decode": 1})
    sampler = Sampler.open(bundle, say=lambda line: None)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"is refused: .*FAST tokens of 2 cameras, 5 tokens: \d differ"):
            sampler.sample_fast_tokens(*asked.inputs(0), max_tokens=4, forced=(3,))
    sampler.sample_actions(*asked.inputs(0), **asked.more(0))  # the acting engines are not at fault
    assert standing(bundle, "trt").proven is False


def test_threads_that_want_fast_tokens_wait_for_the_proof(monkeypatch, make_bundle, engine):
    Backends(monkeypatch, {"trt": engine(off={"fast_decode": 1})})
    sampler, refused = Sampler.open(proven_bundle(make_bundle), say=lambda line: None), []

    def decode():
        try:
            sampler.sample_fast_tokens(*observations().inputs(0), max_tokens=2)
        except BackendError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4


def test_a_tie_of_the_reference_may_fall_either_way(make_bundle):
    fast = witness_of(make_bundle()).fast
    other = fast.ids.copy()
    other[1] += 1
    assert fast.matches(fast.ids) and not fast.matches(other) and not fast.matches(fast.ids[:-1])
    fast.margins[1] = 5e-4  # below its tie, 1e-3
    assert fast.matches(other)
    other[0] += 1
    assert not fast.matches(other)


def test_where_the_bundle_cannot_be_written_the_cache_keeps_the_verdict(monkeypatch, make_bundle, engine, cache):
    bundle, first, second = proven_bundle(make_bundle), engine(), engine()
    (bundle.path / "engines").write_bytes(b"")  # a file in the place of the folder, which root cannot overcome either
    machine = Backends(monkeypatch, {"trt": first})
    Sampler.open(bundle)
    assert len(list(cache.glob("ki-edge/proofs/proof-*.json"))) == 1
    machine.engines["trt"] = second
    Sampler.open(bundle)
    assert first.calls and not second.calls


def test_where_nothing_can_be_written_the_process_keeps_it(monkeypatch, make_bundle, engine, cache):
    bundle, said, second = proven_bundle(make_bundle), [], engine()
    (bundle.path / "engines").write_bytes(b"")
    cache.write_bytes(b"")
    machine = Backends(monkeypatch, {"trt": engine()})
    Sampler.open(bundle, say=said.append)
    assert "cannot be written" in said[1]
    machine.engines["trt"] = second
    Sampler.open(bundle)
    assert not second.calls


def test_a_damaged_verdict_is_taken_again(monkeypatch, make_bundle, engine):
    bundle = proven_bundle(make_bundle)
    machine = Backends(monkeypatch, {"trt": engine()})
    Sampler.open(bundle)
    (path,) = records(bundle)
    whole = path.read_text()
    other = json.loads(whole)
    other["observations"][0]["eager"] = 1.0  # figures that do not give the verdict
    for text in ("", whole[:50], "[]", json.dumps(other), whole.replace("560", "561"), '{"schema": 1}'):
        path.write_text(text)
        machine.engines["trt"] = again = engine()
        Sampler.open(bundle)
        assert again.calls and json.loads(path.read_text())["passed"] is True


def test_infinite_figures_are_kept(tmp_path):
    row = verdicts.Row("1 camera", float("inf"), None, 1e-3, float("inf"), 1e-5, None, 1e-5)
    found = verdicts.Verdict("actions", {"GPU": "x"}, "2026-11-25T00:00:00+00:00", (row,))
    assert verdicts.keep(found, tmp_path) == tmp_path / f"proof-{found.key}.json"
    assert verdicts.find("actions", {"GPU": "x"}, tmp_path) == found and not found.passed
    assert verdicts.find("fast", {"GPU": "x"}, tmp_path) is None
    assert "inf" in found.figures() and "\n" not in found.figures()


def test_the_witness_needs_a_replay_of_every_observation(make_bundle, engine):
    bundle = proven_bundle(make_bundle)
    used = engine()
    rows = examine(Sampler(bundle, used.open), witness_of(bundle))
    assert all(row.passed for row in rows)
    assert used.replays.count("denoise") >= 2 * len(rows) - 1 and Path(bundle.path).is_dir()
