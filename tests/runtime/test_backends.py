"""Which backend is taken, and what is said about those that are not."""

from types import SimpleNamespace

import onnxruntime
import pytest

from ki_edge import graphs
from ki_edge.errors import BackendError, DeviceMemoryError
from ki_runtime.backends import registry as backends
from ki_runtime.backends.backend import NotInstalled, SessionOptions, Setting
from ki_runtime.backends.registry import BACKENDS, NAMES, choose_backend, connect, open_session
from ki_runtime.control.cli import main
from ki_runtime.gpu import ort_cuda
from ki_runtime.policy import sampler as sampler_module
from ki_runtime.policy.policy import Policy
from ki_runtime.policy.proof import own_version
from ki_runtime.policy.sampler import Sampler

from .conftest import FakeEngine


@pytest.fixture
def machine(monkeypatch):
    """machine(packages, {module: obstacle or None}, {module: connect's error}) -> modules that were imported, in order.

    Every backend opens fake sessions.
    """

    def make(packages, obstacles=None, failures=None):
        used = []

        def module(name):
            short = name.removeprefix("ki_runtime.")

            def connect(bundle, package, options):
                used.append(f"connect {short} {package}")
                if failures and short in failures:
                    raise failures[short]
                return FakeEngine(bundle.manifest.vocabulary.ids).open

            def obstacle(bundle, package):
                used.append(f"ask {short} {package}")
                return (obstacles or {}).get(short)

            def setting(bundle, package, names):
                return Setting({}, bundle.path / "engines")

            return SimpleNamespace(connect=connect, obstacle=obstacle, setting=setting)

        monkeypatch.setattr("ki_runtime.backends.backend.find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr("ki_runtime.backends.backend.import_module", module)
        return used

    return make


EVERY = {"tensorrt", "tensorrt_lean", "tensorrt_rtx", "onnxruntime"}


def test_tensorrt_comes_first(machine, make_bundle):
    used = machine(EVERY)
    assert connect(make_bundle()).backend.describe("float16") == "backend: trt (GPU)"
    assert used == ["ask trt.session tensorrt", "connect trt.session tensorrt"]


def test_the_lean_runtime_stands_in(machine, make_bundle):
    used = machine(EVERY - {"tensorrt"})
    assert connect(make_bundle()).backend.name == "trt"
    assert used[-1] == "connect trt.session tensorrt_lean"


def test_every_backend_passed_over_has_its_reason(machine, make_bundle):
    machine({"onnxruntime"}, {"gpu.ort_cuda": "no CUDA provider"})
    backend = connect(make_bundle()).backend
    assert backend.describe("float32") == (
        "backend: ort (CPU): trt: no tensorrt or tensorrt_lean package; trt-rtx: no tensorrt_rtx package; "
        "ort-cuda: no CUDA provider"
    )
    assert [name for name, _ in backend.passed] == ["trt", "trt-rtx", "ort-cuda"]
    assert choose_backend("auto", None).passed == backend.passed


def test_float16_on_a_cpu_is_told_loudly(machine, make_bundle):
    machine({"onnxruntime"}, {"gpu.ort_cuda": "no GPU"})
    assert ". SLOW: a float16 bundle is made for a GPU" in connect(make_bundle()).backend.describe("float16")
    assert "SLOW" not in connect(make_bundle("other")).backend.describe("int8")


def test_a_backend_that_cannot_start_is_passed_over(machine, make_bundle):
    failures = {"trt.session": DeviceMemoryError("no room to build"), "gpu.ort_cuda": BackendError("no cuDNN")}
    machine(EVERY, failures=failures)
    passed = dict(connect(make_bundle()).backend.passed)
    assert passed == {"trt": "no room to build", "trt-rtx": "no room to build", "ort-cuda": "no cuDNN"}


@pytest.mark.parametrize("name", ["trt", "trt-rtx", "ort-cuda"])
def test_a_named_backend_is_never_replaced(machine, make_bundle, name):
    failures = {"trt.session": DeviceMemoryError("no room"), "gpu.ort_cuda": DeviceMemoryError("no room")}
    machine(EVERY, failures=failures)
    with pytest.raises(DeviceMemoryError, match=r"^no room$"):
        connect(make_bundle(), name)
    machine(EVERY, {"trt.session": "no driver", "gpu.ort_cuda": "no driver"})
    with pytest.raises(BackendError, match=f"^backend '{name}': no driver$"):
        connect(make_bundle("second"), name)
    machine(set())
    with pytest.raises(BackendError, match=f"^backend '{name}': no .* package; pip install .*cuda-python"):
        choose_backend(name)


def test_a_module_that_cannot_be_imported(monkeypatch, make_bundle):
    def broken(name):
        raise ImportError("libcublas.so.12")

    monkeypatch.setattr("ki_runtime.backends.backend.import_module", broken)
    with pytest.raises(BackendError, match=r"backend 'ort': cannot be imported \(libcublas\.so\.12\)"):
        choose_backend("ort")
    with pytest.raises(BackendError, match=r"'ort' cannot be imported: libcublas.*; pip install 'ki-edge"):
        open_session(make_bundle(), graphs.DENOISE, BACKENDS[-1], SessionOptions())


@pytest.mark.parametrize("error", [RuntimeError("Failed to dlopen x\nand more"), OSError("libx"), AttributeError("y")])
@pytest.mark.parametrize("where", ["obstacle", "connect", "open"])
def test_whatever_an_engine_raises_passes_it_over(monkeypatch, make_bundle, error, where):
    def fail(*_):
        raise error

    engine = FakeEngine(make_bundle().manifest.vocabulary.ids)
    parts = {"obstacle": lambda *_: None, "connect": lambda *_: fail if where == "open" else engine.open}
    if where in parts:
        parts[where] = fail
    modules = {"ki_runtime.trt.session": SimpleNamespace(**parts)}
    working = SimpleNamespace(obstacle=lambda *_: None, connect=lambda *_: engine.open)
    monkeypatch.setattr("ki_runtime.backends.backend.find_spec", lambda name: name)
    monkeypatch.setattr("ki_runtime.backends.backend.import_module", lambda name: modules.get(name, working))
    monkeypatch.setattr(backends, "BACKENDS", (BACKENDS[0], BACKENDS[-1]))
    sampler = Sampler.open(make_bundle("other"), say=lambda line: None)
    why = dict(sampler.backend.passed)["trt"]
    assert sampler.backend.name == "ort" and type(error).__name__ in why and "\n" not in why and "more" not in why
    with pytest.raises(BackendError, match=type(error).__name__):
        Sampler.open(make_bundle("named"), "trt")


def test_a_module_without_a_spec_is_not_installed(monkeypatch):
    def fail(name):
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr("ki_runtime.backends.backend.find_spec", fail)
    assert all(isinstance(backend.obstacle(None), NotInstalled) for backend in BACKENDS)


@pytest.mark.parametrize("where", ["connect", "open"])
def test_an_engine_that_cannot_be_imported_when_it_is_opened(monkeypatch, make_bundle, where):
    def fail(*_):
        raise ImportError("libfoo")

    connected = fail if where == "connect" else lambda *_: fail
    module = SimpleNamespace(connect=connected, obstacle=lambda *_: None)
    monkeypatch.setattr("ki_runtime.backends.backend.import_module", lambda name: module)
    with pytest.raises(BackendError, match="'ort' cannot be imported: libfoo"):
        connect(make_bundle(), "ort").open(graphs.DENOISE)


def test_bfloat16_does_not_run_on_a_cpu(make_bundle):
    with pytest.raises(BackendError, match=r"no bfloat16 products on a CPU: run the bundle on a GPU, or export with"):
        connect(make_bundle(precision="bfloat16"), "ort")
    assert connect(make_bundle("half", precision="float16"), "ort").backend.name == "ort"
    assert choose_backend("ort").name == "ort"  # without a bundle: any


@pytest.mark.parametrize("name", ["trt", "trt-rtx"])
def test_int8_is_for_the_cpu(machine, make_bundle, name, monkeypatch):
    from ki_runtime.gpu import cuda

    from .fake_gpu import FakeCuda

    monkeypatch.setattr(cuda, "import_module", lambda module: FakeCuda())
    backend = next(b for b in BACKENDS if b.name == name)
    if backend.package is None:
        pytest.skip(f"{backend.packages} not installed")
    assert "int8 is for the CPU" in backend.obstacle(make_bundle(precision="int8"))


def test_a_sampler_and_a_policy_know_their_backend(machine, make_bundle):
    machine({"onnxruntime"}, {"gpu.ort_cuda": "no GPU"})
    lines = []
    sampler = Sampler.open(make_bundle(), say=lines.append)
    assert sampler.backend.name == "ort" and dict(sampler.backend.passed)["ort-cuda"] == "no GPU"
    assert lines == [sampler.backend.describe("float32")]
    assert Sampler(sampler.bundle, FakeEngine(sampler.bundle.manifest.vocabulary.ids).open).backend is None


@pytest.mark.parametrize("failing", ["prefix", "denoise"])
def test_a_backend_whose_engines_do_not_load_is_passed_over(monkeypatch, make_bundle, failing):
    machine_of = {"trt.session": failing, "backends.ort": None}
    opened = []

    def module(name):
        short = name.removeprefix("ki_runtime.")

        def connect(bundle, package, options):
            engine = FakeEngine(bundle.manifest.vocabulary.ids)

            def open_graph(spec):
                opened.append((short, spec.name))
                if spec.name == machine_of.get(short):
                    raise BackendError("cannot load")
                return engine.open(spec)

            return open_graph

        return SimpleNamespace(connect=connect, obstacle=lambda *_: None)

    monkeypatch.setattr(
        "ki_runtime.backends.backend.find_spec", lambda name: name in ("tensorrt", "onnxruntime") or None
    )
    monkeypatch.setattr("ki_runtime.backends.backend.import_module", module)
    monkeypatch.setattr(backends, "BACKENDS", (BACKENDS[0], BACKENDS[-1]))
    sampler = Sampler.open(make_bundle())
    assert (sampler.backend.name, dict(sampler.backend.passed)) == ("ort", {"trt": "cannot load"})
    assert opened[-2:] == [("backends.ort", "prefix"), ("backends.ort", "denoise")]
    with pytest.raises(BackendError, match=r"^cannot load$"):
        Sampler.open(make_bundle("named"), "trt")


TOLD = {  # packages, obstacle of ort-cuda, precision, what proved the bundle at its export, whether a line is said
    "nothing else installed": ({"onnxruntime"}, NotInstalled("no CUDA provider"), "float32", "ort", False),
    "a GPU's package without a GPU": ({"onnxruntime"}, "no NVIDIA driver", "float32", "ort", True),
    "half precision": ({"onnxruntime"}, NotInstalled("no CUDA provider"), "float16", "ort", True),
    "TensorRT": (EVERY, None, "float16", "trt", False),
    "nothing proves it": (EVERY, None, "float16", None, True),
}


@pytest.mark.parametrize("case", TOLD)
def test_from_python_only_surprises_are_told(case, machine, make_bundle, capsys):
    packages, obstacle, precision, prover, told = TOLD[case]
    machine(packages, {"gpu.ort_cuda": obstacle})
    parity = {"verified": True, "proven_by": {"ki-edge": own_version(), "backend": prover}}
    proof = {"assets": {"witness.npz": b"not read"}, "parity": parity}
    sampler = Sampler.open(make_bundle(precision=precision, **(proof if prover else {})))
    assert capsys.readouterr().err == (sampler.backend.describe(precision) + "\n" if told else "")


def test_what_is_not_installed_is_known_as_such(machine):
    machine(set())
    assert all(isinstance(backend.obstacle(None), NotInstalled) for backend in BACKENDS)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert isinstance(ort_cuda.obstacle(None, "onnxruntime"), NotInstalled)


def test_verifying_reaches_the_backend(monkeypatch, make_bundle):
    asked = []

    def connect(bundle, name, options, first):
        asked.append(options.verify)
        raise BackendError("enough")

    monkeypatch.setattr(sampler_module, "connect", connect)
    for verify in (False, True):
        with pytest.raises(BackendError, match="enough"):
            Sampler.open(make_bundle(str(verify)), verify=verify)
    assert asked == [False, True]


def test_ki_run_tells_its_backend(monkeypatch, capsys):
    def load(bundle, backend, *, say, **_):
        say(f"backend: {backend}")
        raise BackendError("enough")

    monkeypatch.setattr(Policy, "load", load)
    assert main(["bundle", "--robot", "gym:FetchReach-v4", "--backend", "trt"]) == 2
    assert capsys.readouterr().err.splitlines() == ["backend: trt", "ki-run: error: enough"]


def test_names():
    assert NAMES == ("auto", "trt", "trt-rtx", "ort-cuda", "openvino", "ort")
