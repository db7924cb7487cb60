"""Device and arithmetic in a backend's name, and what a bundle asks for; no engine is opened."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.errors import BackendError, BundleError
from ki_runtime.backends.backend import NotInstalled, SessionOptions, Setting
from ki_runtime.backends.registry import check_name, choose_backend, connect
from ki_runtime.backends.variant import Variant, read_variant
from ki_runtime.policy import proof
from ki_runtime.policy.rounding import BARS, widened

from .conftest import FakeEngine
from .witnesses import observations

ASKING = {"time_convention": "openpi", "num_steps": 10, "inference_precision": "bfloat16"}


@pytest.fixture
def only_openvino(monkeypatch):
    """The variants that were asked for, with an engine that takes all of them but those that `refused` names."""
    asked, refused = [], {}

    def engine_of(variant):
        asked.append(variant)
        return SimpleNamespace(
            obstacle=lambda bundle, package: refused.get(variant.rounding),
            connect=lambda bundle, package, options: FakeEngine(bundle.manifest.vocabulary.ids).open,
            setting=lambda bundle, package, names: Setting({}, bundle.path, variant.rounding),
        )

    monkeypatch.setattr(
        "ki_runtime.backends.backend.find_spec", lambda name: name if name in ("openvino", "onnxruntime") else None
    )
    plain = SimpleNamespace(obstacle=lambda *_: None, connect=lambda b, *_: FakeEngine(b.manifest.vocabulary.ids).open)
    absent = SimpleNamespace(obstacle=lambda *_: NotInstalled("no CUDA provider"))
    modules = {"ki_runtime.openvino.session": SimpleNamespace(engine_of=engine_of), "ki_runtime.gpu.ort_cuda": absent}
    monkeypatch.setattr("ki_runtime.backends.backend.import_module", lambda name: modules.get(name, plain))
    return SimpleNamespace(asked=asked, refused=refused)


@pytest.mark.parametrize(
    ("name", "device", "rounding"),
    [
        ("openvino", "CPU", "float32"),
        ("openvino:GPU", "GPU", "float32"),
        ("openvino:gpu.1", "GPU.1", "float32"),
        ("openvino:CPU:bf16", "CPU", "bfloat16"),
        ("openvino:bf16", "CPU", "bfloat16"),
        ("openvino:NPU:f16", "NPU", "float16"),
    ],
)
def test_names_carry_device_and_rounding(only_openvino, make_bundle, name, device, rounding):
    backend = choose_backend(name, make_bundle())
    assert (backend.variant.device, backend.variant.rounding) == (device, rounding)
    assert (backend.name, backend.family, backend.device) == (name, "openvino", device.partition(".")[0])
    assert backend.describe("float32") == f"backend: {name} ({device}, {rounding})"
    assert backend.setting(make_bundle("other"), ()).environment["backend"] == "openvino"


@pytest.mark.parametrize(
    "name",
    [
        "openvino:",
        "openvino:TPU",
        "openvino:CPU:int8",
        "openvino:bf16:f32",
        "openvino:bf16:CPU",
        "openvino:GPU.x",
        "openvino:CPU:",
    ],
)
def test_unknown_devices_and_roundings(name):
    with pytest.raises(
        BackendError, match=r"is not known; expected a device \(CPU, GPU, GPU.1, NPU\), then f32"
    ) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ort:GPU", "trt:0", "auto:CPU", "nothing:CPU", ":", "ort:"])
def test_other_backends_take_no_suffix(name):
    with pytest.raises(BackendError, match=r"no backend .*; there are: auto, trt"):
        check_name(name)


def test_a_bundle_that_asks_for_bfloat16(only_openvino, make_bundle):
    bundle = make_bundle(sampling=ASKING)
    assert choose_backend("openvino", bundle).variant == Variant("CPU", "bfloat16")
    assert choose_backend("openvino:CPU:f32", bundle).variant.rounding == "float32"
    taken = choose_backend("auto", bundle)
    assert (taken.name, taken.variant.rounding) == ("openvino", "bfloat16")  # it was exported for that
    only_openvino.refused["bfloat16"] = "no bfloat16 here"
    fallback = choose_backend("auto", bundle)
    assert fallback.name == "ort" and dict(fallback.passed)["openvino"] == "no bfloat16 here"
    assert fallback.surprising("float32")  # never in silence
    with pytest.raises(BackendError, match=r"^backend 'openvino': no bfloat16 here$"):
        connect(bundle, "openvino")


@pytest.mark.parametrize("wish", ["bf16", "float8", 3, ["bfloat16"]])
def test_a_wish_that_is_not_known(only_openvino, make_bundle, wish):
    bundle = make_bundle(sampling={**ASKING, "inference_precision": wish})
    for name in ("openvino", "auto"):
        with pytest.raises(BundleError, match=r"'sampling.inference_precision' .* expected one of float32, bfloat16"):
            choose_backend(name, bundle)


def test_without_a_measurement_onnxruntime_is_taken(only_openvino, make_bundle):
    backend = choose_backend("auto", make_bundle())
    assert backend.name == "ort" and "openvino" not in dict(backend.passed)
    assert not only_openvino.asked  # nor is OpenVINO imported


def test_coarser_rounding_has_its_own_bars():
    witness = observations()
    assert widened(witness, "float32") is witness
    for rounding, bars in BARS.items():
        wide = widened(witness, rounding)
        assert (wide.max_abs == bars.actions).all()
        assert (wide.cosine_distance, wide.apart) == (bars.direction, bars.apart)
        assert wide.fast.ties.dtype == np.float32
    lenient = replace(witness, max_abs=np.full(3, 1.0), cosine_distance=0.1, apart=0.1)
    assert (widened(lenient, "bfloat16").max_abs == 1.0).all()  # never stricter than its own
    assert (widened(lenient, "bfloat16").cosine_distance, widened(lenient, "bfloat16").apart) == (0.1, 0.1)


def test_the_proof_takes_the_bars_of_the_rounding(monkeypatch, make_bundle):
    seen = []
    monkeypatch.setattr(proof, "read_witness", lambda bundle: observations())
    monkeypatch.setattr(proof, "sha256", lambda path: "x")
    monkeypatch.setattr(proof, "examine", lambda sampler, witness, rounds: seen.append(witness.max_abs[0]) or [])
    bundle = make_bundle()
    bundle.manifest.files[proof.WITNESS] = {"sha256": "x"}
    monkeypatch.setattr(type(bundle), "file", lambda self, name: self.path / name)
    for rounding in ("float32", "bfloat16"):
        backend = replace(choose_backend("ort"), variant=None)
        prover = proof.Prover(bundle, backend, SessionOptions())
        prover._judge(proof.ACTIONS, None, {}, Setting({}, bundle.path, rounding))
    assert seen == [2e-4, 5e-2]


def test_variants_are_read_alone():
    assert str(read_variant("GPU.2:bf16", "x")) == "GPU.2, bfloat16"
