"""Engines on disk: the key, and the reason for everything that must not be loaded."""

import json
from dataclasses import replace

import pytest

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.policy.contract import generic
from ki_runtime.gpu.device import Device
from ki_runtime.trt.engines import ACTING, Engines, Identity, identify
from ki_runtime.trt.profiles import Profile, profiles
from ki_runtime.trt.selection import EngineSet, find, look

from .published import ADA, ORIN, api, publish


def test_engines_that_fit_are_found(make_bundle) -> None:
    bundle = make_bundle()
    made = publish(bundle)
    found = find(bundle, api(), ORIN, verify=True)
    assert found == EngineSet(dict.fromkeys(ACTING, made)) and found.folders == (made.folder,)
    assert found.path("denoise").read_bytes() == f"engine of denoise in {made.identity.key}".encode()
    assert made.profiles == profiles(bundle)
    assert Bundle.open(bundle.path, verify=True).path == bundle.path  # engines are no part of the sealed bundle


def test_the_key_depends_on_every_fact(make_bundle) -> None:
    identity = identify(make_bundle(), api(), ORIN, [(8, 7)])
    other = {**identity.profiles, "denoise": (Profile({"x_t": ((1, 5, 6), (1, 5, 6), (2, 5, 6))}),)}
    changes = {
        "weights": "0" * 64,
        "graphs": {**identity.graphs, "denoise": "0" * 64},
        "precision": "float16",
        "profiles": other,
        "device": "Thor",
        "capabilities": ((8, 7), (8, 9)),
        "flavour": "tensorrt_rtx",
        "version": "10.3.1",
        "lean": True,
        "multiprocessors": 14,
        "memory": 32,
    }
    assert set(changes) == set(Identity.__dataclass_fields__)
    keys = [replace(identity, **{name: value}).key for name, value in changes.items()]
    assert len({identity.key, *keys}) == len(changes) + 1
    assert Identity.from_json(json.loads(json.dumps(identity.to_json()))) == identity


REFUSED = {
    "other GPU": ({}, api(), ADA, r"built for Orin, this is NVIDIA GeForce RTX 4090 \(8\.9\)"),
    "same name, other capability": (
        {},
        api(),
        Device("Orin", (9, 9)),
        r"compute capability 8\.7, this is Orin \(9\.9\)",
    ),
    "newer TensorRT": (
        {},
        api(version="10.13.2"),
        ORIN,
        r"built by TensorRT 10\.3\.0, installed is TensorRT 10\.13\.2",
    ),
    "RTX": ({}, api("tensorrt_rtx", "1.7.1"), ORIN, r"built by TensorRT 10\.3\.0, installed is TensorRT-RTX 1\.7\.1"),
    "weights": ({"weights": "0" * 64}, api(), ORIN, "the bundle's weights have changed since"),
    "precision": ({"precision": "float16"}, api(), ORIN, "built in float16, the bundle is float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_foreign_and_stale_engines_are_refused_with_the_reason(case, make_bundle) -> None:
    changes, installed, device, reason = REFUSED[case]
    bundle = make_bundle()
    publish(bundle, **changes)
    with pytest.raises(BackendError, match=reason) as error:
        find(bundle, installed, device)
    target = " --target trt-rtx" if installed.is_rtx else ""
    assert str(error.value).endswith(f"; build them here: ki-build {bundle.path}{target}")


def test_a_changed_graph_is_named(make_bundle) -> None:
    bundle = make_bundle()
    digest = bundle.manifest.files["denoise.onnx"]["sha256"]
    publish(bundle, graphs=("denoise",))
    assert find(bundle, api(), ORIN, ("denoise",)).of["denoise"].identity.graphs == {"denoise": digest}
    bundle.manifest.files["denoise.onnx"]["sha256"] = "1" * 64
    with pytest.raises(BackendError, match="graph denoise has changed since"):
        find(bundle, api(), ORIN, ("denoise",))


def test_a_contract_with_more_cameras_needs_other_engines(make_bundle) -> None:
    fields = {"state_dim": 2, "action_dim": 2, "action_horizon": 5, "model_action_dim": 6}
    one, two = (generic(names, **fields).to_json() for names in (["a"], ["a", "b"]))
    narrow, wide = make_bundle("narrow", contract=one), make_bundle("wide", contract=two)
    publish(narrow)
    publish(wide)
    swapped = narrow.path / "swapped"
    (narrow.path / "engines").rename(swapped)
    (wide.path / "engines").rename(narrow.path / "engines")
    swapped.rename(wide.path / "engines")
    assert isinstance(look(narrow, api(), ORIN), EngineSet)  # two cameras allowed, one needed
    with pytest.raises(BackendError, match="graph prefix was built for other shapes than the contract has"):
        find(wide, api(), ORIN)


def test_rtx_engines_fit_any_gpu_of_their_capabilities(make_bundle) -> None:
    bundle, rtx = make_bundle(), api("tensorrt_rtx", "1.7.1")
    publish(bundle, rtx, ADA, [(8, 6), (12, 0)])
    assert find(bundle, rtx, Device("NVIDIA GeForce RTX 3090", (8, 6))).of["prefix"].identity.device is None
    with pytest.raises(BackendError, match=r"compute capability 8\.6, 12\.0, this is NVIDIA GeForce RTX 4090 \(8\.9\)"):
        find(bundle, rtx, ADA)


def test_no_engines(make_bundle) -> None:
    bundle = make_bundle()
    with pytest.raises(BackendError, match=r"bundle has no TensorRT engines; build them here: ki-build"):
        find(bundle, api(), ORIN)


def test_truncated_missing_and_changed_engines(make_bundle) -> None:
    bundle = make_bundle()
    path = publish(bundle).path("prefix")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        BackendError, match=rf"prefix\.engine has {len(whole) - 1} bytes, recorded {len(whole)}: it is tru"
    ):
        find(bundle, api(), ORIN)
    path.write_bytes(whole[:-1] + b"x")
    find(bundle, api(), ORIN)
    with pytest.raises(BackendError, match=r"prefix\.engine has changed since it was built"):
        find(bundle, api(), ORIN, verify=True)
    path.unlink()
    with pytest.raises(BackendError, match=r"prefix\.engine is missing"):
        find(bundle, api(), ORIN)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"schema": 2}', b'{"schema": 7}', b'{"schema": 2, "graphs": {"prefix": {}}, "identity": {}}'],
)
def test_a_damaged_record_is_refused(content, make_bundle) -> None:
    bundle = make_bundle()
    (publish(bundle).folder / "engine.json").write_bytes(content)
    with pytest.raises(BackendError, match=r"engine\.json (is damaged and cannot be read|has schema 7)"):
        find(bundle, api(), ORIN)


MALFORMED = {
    "deep": lambda c: "[" * 200_000,
    "large": lambda c: {**c, "more": "x" * (1 << 20)},
    "long schema": lambda c: {**c, "schema": "7" * 100_000},
    "infinite shape": lambda c: c["identity"]["profiles"]["prefix"][0].update(images=[[float("inf")]] * 3),
    "file is a number": lambda c: c["graphs"]["prefix"].update(file=5),
    "file is a folder": lambda c: c["graphs"]["prefix"].update(file=".."),
    "file with NUL": lambda c: c["graphs"]["prefix"].update(file="a\0"),
    "long file": lambda c: c["graphs"]["prefix"].update(file="a" * 300),
    "size is text": lambda c: c["graphs"]["prefix"].update(size="4"),
    "size is a truth": lambda c: c["graphs"]["prefix"].update(size=True),
    "flavour is a list": lambda c: c["identity"].update(flavour=["x"]),
    "device is a number": lambda c: c["identity"].update(device=3),
    "lean is a number": lambda c: c["identity"].update(lean=1),
    "graphs are a list": lambda c: c["identity"].update(graphs=[]),
    "hash is a number": lambda c: c["identity"]["graphs"].update(prefix=1),
    "another identity": lambda c: c["identity"].update(version="10.3.1"),
    "another key": lambda c: c.update(key="0" * 16),
    "without key": lambda c: c.pop("key") and None,
    "a graph without file": lambda c: c["graphs"].pop("prefix") and None,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_record_is_damaged(case, make_bundle) -> None:
    bundle = make_bundle()
    record = publish(bundle).folder / "engine.json"
    content = json.loads(record.read_text())
    changed = MALFORMED[case](content)
    record.write_text(changed if isinstance(changed, str) else json.dumps(changed or content))
    reason = look(bundle, api(), ORIN)
    assert isinstance(reason, str) and len(reason) < 800
    assert "is damaged and cannot be read" in reason or "not a profile" in reason or "has schema" in reason
    with pytest.raises(BackendError):
        Engines.read(record.parent)


def test_a_folder_under_another_name_is_refused(make_bundle) -> None:
    bundle = make_bundle()
    folder = publish(bundle).folder
    folder.rename(folder.with_name("0123456789abcdef"))
    assert "its key is another" in look(bundle, api(), ORIN)


def test_a_record_cannot_point_outside(make_bundle) -> None:
    bundle = make_bundle()
    record = publish(bundle).folder / "engine.json"
    content = json.loads(record.read_text())
    content["graphs"]["prefix"]["file"] = "../../prefix.onnx"
    record.write_text(json.dumps(content))
    with pytest.raises(BackendError, match="names a file outside of its folder"):
        find(bundle, api(), ORIN)


def test_a_build_that_is_under_way_is_not_seen(make_bundle) -> None:
    bundle = make_bundle()
    folder = publish(bundle).folder
    folder.rename(folder.with_name(f".{folder.name}.partial-1"))
    assert "has no TensorRT engines" in look(bundle, api(), ORIN)


def test_the_nearest_of_several_refused_is_explained(make_bundle) -> None:
    bundle = make_bundle()
    publish(bundle, device=ADA, weights="0" * 64, precision="float16")
    publish(bundle, api(version="10.4.0"))
    with pytest.raises(BackendError, match=r"built by TensorRT 10\.4\.0, .* \(1 more do not fit either\)"):
        find(bundle, api(), ORIN)
