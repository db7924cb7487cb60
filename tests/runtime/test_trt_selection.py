"""Which engines are taken: each graph's alone, the right board's, and whose code is trusted."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest

from ki_edge.errors import BackendError
from ki_edge.policy.contract import FastContract, generic
from ki_runtime.backends import trust
from ki_runtime.gpu.device import Device
from ki_runtime.trt.engines import ACTING, FAST, default_graphs
from ki_runtime.trt.selection import EngineSet, build_command, find, look

from .published import ADA, ORIN, api, publish

GIB = 1 << 30


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where what was built here is remembered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


# ---------------------------------------------------------------- each graph alone


def test_each_graph_may_lie_in_another_folder(make_bundle) -> None:
    bundle = make_bundle()
    publish(bundle, device=ADA)
    first = publish(bundle, graphs=("prefix",))
    second = publish(bundle, graphs=("denoise",))
    fast = publish(bundle, graphs=(FAST,))
    assert find(bundle, api(), ORIN) == EngineSet({"prefix": first, "denoise": second})
    assert find(bundle, api(), ORIN, (FAST,)).path(FAST) == fast.folder / "fast_decode.engine"
    both = publish(bundle, graphs=ACTING)
    assert find(bundle, api(), ORIN).folders == (both.folder,)  # rather together
    both.path("prefix").unlink()  # what is wrong with one engine says nothing of the others
    assert find(bundle, api(), ORIN) == EngineSet({"prefix": first, "denoise": both})


def test_fast_that_is_damaged_or_missing_costs_nobody_the_others(make_bundle) -> None:
    bundle = make_bundle()
    publish(bundle, graphs=ACTING)
    with pytest.raises(BackendError) as error:
        find(bundle, api(), ORIN, (FAST,))
    assert str(error.value) == (
        f"{bundle.path} has no TensorRT engine of fast_decode; build them here: ki-build {bundle.path} "
        "--graphs fast_decode"
    )
    publish(bundle, graphs=(FAST,)).path(FAST).write_bytes(b"cut")
    assert isinstance(look(bundle, api(), ORIN), EngineSet)
    assert "no engine of fast_decode" in look(bundle, api(), ORIN, (FAST,))


def test_what_is_built_unless_somebody_says_more(make_bundle) -> None:
    fields = {"state_dim": 2, "action_dim": 2, "action_horizon": 5, "model_action_dim": 6}
    plain = make_bundle("plain", contract=generic(["a"], **fields).to_json())
    fast = make_bundle("fast", contract=generic(["a"], fast=FastContract(), **fields).to_json())
    assert default_graphs(plain) == default_graphs(make_bundle("model")) == ACTING
    assert default_graphs(fast) == (*ACTING, FAST)
    assert build_command(plain, api(), (FAST,)).endswith(" --graphs fast_decode")
    assert build_command(fast, api(), (FAST,)).endswith("/fast")


# ---------------------------------------------------------------- boards of one name


BOARDS = {  # multiprocessors, GB of memory, GB reported at two boots
    "AGX 64": (16, 64, 61.4, 62.8),
    "AGX 32": (14, 32, 29.9, 30.7),
    "NX 16": (8, 16, 15.2, 15.6),
    "NX 8": (8, 8, 7.2, 7.6),
    "Nano 4": (4, 4, 3.3, 3.7),
}


def board(name, boot=2):
    return Device("Orin", (8, 7), int(BOARDS[name][boot] * GIB), True, BOARDS[name][0])


@pytest.mark.parametrize("built", BOARDS)
@pytest.mark.parametrize("here", BOARDS)
def test_boards_of_one_name_are_told_apart(built, here, make_bundle) -> None:
    bundle = make_bundle()
    made = publish(bundle, device=board(built))
    found = look(bundle, api(), board(here, boot=3))
    if built == here:  # whatever firmware takes at this boot
        assert found == EngineSet(dict.fromkeys(ACTING, made))
        assert board(here, 3).memory_class == BOARDS[here][1]
    else:
        assert "built for another board or power mode, Orin with" in found and f"{BOARDS[here][1]} GB)" in found


@pytest.mark.parametrize("memory", [23.6, 24.0, 31.9, 32.0])
def test_memory_is_rounded_up(memory) -> None:
    assert Device("GPU", (8, 9), int(memory * GIB)).memory_class == 32
    assert Device("GPU", (8, 9)).memory_class is None


def test_what_is_not_known_is_no_difference(make_bundle) -> None:
    bundle = make_bundle()
    made = publish(bundle, device=Device("Orin", (8, 7)))
    assert look(bundle, api(), ORIN) == EngineSet(dict.fromkeys(ACTING, made))


def test_records_from_before_boards_were_told_apart(make_bundle) -> None:
    bundle = make_bundle()
    record = publish(bundle).folder / "engine.json"
    content = json.loads(record.read_text())
    for name in ("multiprocessors", "memory"):
        del content["identity"][name]
    record.write_text(json.dumps({**content, "schema": 1}))
    assert "has schema 1, this version reads 2: another version of ki-edge built them" in look(bundle, api(), ORIN)
    with pytest.raises(BackendError, match=r"build them here: ki-build"):
        find(bundle, api(), ORIN)


# ---------------------------------------------------------------- the lean runtime, and code of the host's


@pytest.mark.parametrize(
    ("lean", "version", "fits"),
    [(True, "10.3.0", True), (True, "10.9.1", True), (True, "11.4.0", False), (False, "10.3.0", False)],
)
def test_the_lean_runtime_needs_engines_made_for_it(lean, version, fits, make_bundle) -> None:
    bundle = make_bundle()
    publish(bundle, lean=lean)
    found = look(bundle, api("tensorrt_lean", version), ORIN, trust=True)
    assert isinstance(found, EngineSet) is fits
    why = r"of 11\.x" if lean else "without --lean"
    assert fits or re.search(why, found)
    with nullcontext() if fits else pytest.raises(BackendError, match=r"build them: ki-build \S+ --lean \(run"):
        find(bundle, api("tensorrt_lean", version), ORIN, trust=True)


def test_engines_for_the_lean_runtime_are_always_verified(make_bundle) -> None:
    bundle = make_bundle()
    path = publish(bundle, lean=True).path("prefix")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for used in (api(), api("tensorrt_lean")):
        assert "prefix.engine has changed" in look(bundle, used, ORIN)


def test_each_runtime_takes_the_engines_made_for_it(make_bundle) -> None:
    bundle, later = make_bundle(), set()
    for name in ("Orin", "Thor", "A", "B", "C", "D", "E", "F"):
        device = Device(name, (8, 7))
        made = {lean: publish(bundle, device=device, lean=lean) for lean in (False, True)}
        for used, lean in ((api(), False), (api("tensorrt_lean"), True)):
            assert look(bundle, used, device, trust=True) == EngineSet(dict.fromkeys(ACTING, made[lean]))
        later.add(made[True].folder.name > made[False].folder.name)
    assert later == {False, True}  # not by the order of their names


def test_code_of_the_hosts_must_have_been_built_here(make_bundle, home) -> None:
    bundle = make_bundle()
    made = publish(bundle, lean=True)
    for used in (api(), api("tensorrt_lean")):
        reason = look(bundle, used, ORIN)
        assert "not by this user on this machine: loading them runs code that they bring; --trust-engines" in reason
        assert isinstance(look(bundle, used, ORIN, trust=True), EngineSet)
    trust.remember(made.files["prefix"].sha256)
    assert "no engine of denoise" in look(bundle, api(), ORIN)  # each by its content
    trust.remember(made.files["denoise"].sha256)
    assert look(bundle, api(), ORIN) == EngineSet(dict.fromkeys(ACTING, made))
    made.path("prefix").write_bytes(made.path("prefix").read_bytes()[:-1] + b"x")
    assert "prefix.engine has changed" in look(bundle, api(), ORIN)
    assert {path.name for path in (home / "ki-edge" / "built-here").iterdir()} == {
        made.files[name].sha256 for name in ACTING
    }


def test_a_bundle_cannot_say_that_it_was_built_here(make_bundle, home) -> None:
    bundle = make_bundle()
    made = publish(bundle, lean=True)
    trust.remember("0" * 64)
    for digest in ("0" * 64, "..", "../..", "", "0" * 63, "\0"):
        facts = {name: replace(file, sha256=digest) for name, file in made.files.items()}
        replace(made, files=facts).write()
        assert isinstance(look(bundle, api(), ORIN), str)
    assert not trust.built_here("..") and trust.built_here("0" * 64)


def test_what_is_remembered_is_bounded(home, monkeypatch) -> None:
    monkeypatch.setattr(trust, "MOST", 3)
    for digit in "12345":
        trust.remember(digit * 64)
    assert len(list((home / "ki-edge" / "built-here").iterdir())) == 3


def test_a_home_that_cannot_be_written_is_no_trust(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert not trust.built_here("0" * 64)
    with pytest.raises(OSError, match="file"):
        trust.remember("0" * 64)
