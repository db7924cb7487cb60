"""One code path for three modules: the names it uses exist in those installed, and what differs is done for each."""

import importlib
import sys
from hashlib import sha256
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest

from ki_edge.errors import ArgumentError, BackendError
from ki_runtime.trt.api import Api
from ki_runtime.trt.compiling import Settings, compile_graph
from ki_runtime.trt.profiles import Profile

BUILDER_NAMES = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "IBuilderConfig": (
        "clear_flag",
        "set_flag",
        "set_memory_pool_limit",
        "add_optimization_profile",
        "progress_monitor",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
    ),
    "IOptimizationProfile": ("set_shape",),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
}
SHARED_NAMES = {
    "BuilderFlag": ("TF32", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"),
    "MemoryPoolType": ("WORKSPACE",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    "ILogger": ("log", "Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
    "ITimingCache": ("serialize",),
    "IStreamWriter": ("write",),
    "Runtime": ("deserialize_cuda_engine",),
}
RTX_NAMES = {
    "Builder": ("build_serialized_network_to_stream",),
    "BuilderFlag": ("REQUIRE_USER_ALLOCATION",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": ("SM75", "SM80", "SM86", "SM89", "SM120"),
}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("tensorrt_rtx", BUILDER_NAMES),
        ("tensorrt_rtx", SHARED_NAMES),
        ("tensorrt_rtx", RTX_NAMES),
        ("tensorrt_lean", SHARED_NAMES),
    ],
)
def test_every_name_that_is_used_exists(module, names) -> None:
    found = importlib.import_module(module)
    missing = [f"{kind}.{name}" for kind in names for name in names[kind] if not hasattr(getattr(found, kind), name)]
    assert not missing, f"{module} {found.__version__} has no {', '.join(missing)}"


def test_installed_modules() -> None:
    rtx, lean = Api.load("tensorrt_rtx"), Api.load("tensorrt_lean")
    assert (rtx.is_rtx, rtx.can_build, rtx.keeps_timings, rtx.streams) == (True, True, False, True)
    assert (lean.is_rtx, lean.can_build, lean.keeps_timings, lean.streams) == (False, False, True, False)
    assert rtx.version >= (1, 7) and lean.version >= (11, 4)
    assert {(8, 0), (8, 6), (12, 0)} < set(rtx.capabilities) and lean.capabilities == ()
    assert lean.logger(lambda *_: None) is not None


@pytest.mark.parametrize(
    ("name", "cure"), [("tensorrt", "JetPack 6.2"), ("tensorrt_rtx", "pip install tensorrt-rtx-cu13")]
)
def test_a_missing_package_says_how_to_get_it(name, cure, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=rf"^TensorRT\S* cannot be imported .*{cure}"):
        Api.load(name)


def test_a_package_without_its_libraries(monkeypatch) -> None:
    def broken(_):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("ki_runtime.trt.api.import_module", broken)
    with pytest.raises(BackendError, match=r"cannot be imported \(libnvinfer\.so\.10: cannot open"):
        Api.load("tensorrt")


def test_unknown_module() -> None:
    with pytest.raises(ArgumentError, match="TensorRT module 'torch': expected one of tensorrt, tensorrt_rtx"):
        Api.load("torch")


def test_an_rtx_older_than_the_one_that_is_installed_for_us(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.6.0"))
    with pytest.raises(BackendError, match=r"TensorRT-RTX 1\.6\.0 is too old: at least 1\.7 is needed"):
        Api.load("tensorrt_rtx")


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0.19", "9.0"])
def test_too_old(version, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(BackendError, match=rf"TensorRT {version} is too old: at least 10\.3 is needed; on Jetson"):
        Api.load("tensorrt")


class FakeTensorRT(ModuleType):
    """TensorRT with a GPU, as far as the builder's calls go: records what it is told."""

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    class IProgressMonitor:
        pass

    BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VC", EXCLUDE_LEAN_RUNTIME="XLR")
    MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def __init__(self, version) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.told, self.timings = [], b""
        self.Builder = lambda logger: FakeBuilder(self, logger)
        self.OnnxParser = lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True)


class FakeBuilder:
    def __init__(self, module, logger) -> None:
        self.module, self.logger = module, logger
        self.flags = {"TF32"}

    def create_network(self, flags):
        self.module.told.append(("network", flags))
        return object()

    def create_optimization_profile(self):
        return SimpleNamespace(set_shape=lambda *shape: self.module.told.append(("shape", *shape)))

    def create_builder_config(self):
        module = self.module

        def keep(cache, ignore_mismatch):
            module.told.append(("timings", cache, ignore_mismatch))

        return SimpleNamespace(
            clear_flag=self.flags.discard,
            set_flag=self.flags.add,
            set_memory_pool_limit=lambda pool, size: module.told.append((pool, size)),
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=lambda data: data,
            set_timing_cache=keep,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )

    def build_serialized_network(self, network, config):
        self.module.told.append(("flags", tuple(sorted(self.flags))))
        self.logger.log(3, "timing kernels")
        self.logger.log(4, "much detail")
        config.progress_monitor.phase_start("all", None, 2)
        assert config.progress_monitor.step_complete("all", 0)
        config.progress_monitor.phase_finish("all")
        return b"an engine"


@pytest.mark.parametrize(
    ("version", "network", "lean"), [("10.3.0", 1 << 1, False), ("10.16.1", 1 << 1, True), ("11.4.1.2", 0, False)]
)
def test_tensorrt_is_driven_strongly_typed_in_true_float32(version, network, lean, monkeypatch, tmp_path) -> None:
    fake = FakeTensorRT(version)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    api = Api.load("tensorrt")
    profile = Profile({"x": ((1,), (2,), (3,))})
    settings = Settings(1 << 20, ((8, 7),), lean, tmp_path / "timings")
    engine, log = tmp_path / "x.engine", tmp_path / "x.log"
    made = compile_graph(api, tmp_path / "x.onnx", [profile], engine, log, settings)
    assert fake.told == [
        ("network", network),
        ("WORKSPACE", 1 << 20),
        ("shape", "x", (1,), (2,), (3,)),
        ("timings", b"", False),
        ("flags", ("VC", "XLR") if lean else ()),
    ]
    assert engine.read_bytes() == b"an engine"
    assert (made.size, made.sha256) == (9, sha256(b"an engine").hexdigest())
    assert log.read_text() == "[info] timing kernels\n"
    assert (tmp_path / "timings").read_bytes() == b"timings"
    compile_graph(api, tmp_path / "x.onnx", [profile], engine, log, settings)
    assert fake.told[-2] == ("timings", b"timings", False)


class FullLog(StringIO):
    """A file on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


class TestCallbacks:
    """The builder is C++: what is called from it must not raise, and what failed is told after it."""

    def test_writing_the_engine(self) -> None:
        told = []

        class Builder:
            def build_serialized_network_to_stream(self, network, config, writer):
                told.extend(writer.write(piece) for piece in (b"one", b"two", b"three"))
                return True

        def write(piece):
            if piece == b"two":
                raise OSError(28, "No space left on device")

        module = SimpleNamespace(IStreamWriter=object, Builder=Builder)
        with pytest.raises(OSError, match="No space left"):
            Api(module, "tensorrt", (10, 14), "10.14.0").serialize(Builder(), None, None, write)
        assert told == [3, 0, 0]

    def test_writing_the_log(self, monkeypatch, tmp_path) -> None:
        fake = FakeTensorRT("10.3.0")
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        build, ended = FakeBuilder.build_serialized_network, []

        def watched(*arguments):
            plan = build(*arguments)
            ended.append(True)
            return plan

        monkeypatch.setattr(FakeBuilder, "build_serialized_network", watched)
        log = SimpleNamespace(open=lambda *_, **__: FullLog())
        settings = Settings(1 << 20, ())
        with pytest.raises(BackendError, match="No space left"):
            compile_graph(Api.load("tensorrt"), tmp_path / "x.onnx", [], tmp_path / "x.engine", log, settings)
        assert ended == [True]
