"""Engines, really compiled by TensorRT-RTX without a GPU, and what a build refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ki_edge.bundle import Bundle, sha256
from ki_edge.errors import ArgumentError, BackendError, BundleError
from ki_edge.files.staging import staging
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_runtime.backends import trust
from ki_runtime.gpu.device import Device
from ki_runtime.trt import build as building
from ki_runtime.trt import compiling, memory, targets
from ki_runtime.trt.api import Api
from ki_runtime.trt.build import BuildOptions, build, build_bundle, ensure_engines, rebuild
from ki_runtime.trt.engines import ACTING, FAST, Engines
from ki_runtime.trt.requirements import GraphFacts, graph_facts
from ki_runtime.trt.selection import EngineSet, find, look

AHEAD = BuildOptions(capabilities=((8, 6), (12, 0)))
ALL = replace(AHEAD, graphs=(*ACTING, FAST))
AMPERE, ADA = Device("NVIDIA GeForce RTX 3090", (8, 6), 24 << 30), Device("NVIDIA L4", (8, 9), 24 << 30)
PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@pytest.fixture(scope="session")
def rtx():
    return Api.load("tensorrt_rtx")


@pytest.fixture(scope="session")
def compiled(bundle, checkpoint, rtx, tmp_path_factory):
    """compiled(precision) -> (bundle, engines, lines said), compiled once. Do not change them: copy them."""
    done = {}

    def compile_once(precision):
        if precision not in done:
            path, said = tmp_path_factory.mktemp(precision) / "bundle", []
            if precision == "float32":
                own = Bundle.open(shutil.copytree(bundle.path, path))
            else:
                options = ExportOptions(target="trt", precision=PRECISIONS[precision], verify=False)
                own = export(checkpoint, path, options)
            done[precision] = own, build(own, rtx, None, ALL, said.append), said
        return done[precision]

    return compile_once


@pytest.fixture
def own(bundle, tmp_path):
    """A bundle of one's own, without engines."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_graphs_compile_for_ampere_and_blackwell(precision, compiled) -> None:
    bundle, engines, said = compiled(precision)
    assert list(engines.of) == [*ACTING, FAST]
    for names in (ACTING, (FAST,)):
        found = engines.of[names[0]]
        assert found.folder == bundle.path / "engines" / found.identity.key
        assert {path.name for path in found.folder.iterdir()} == {
            "engine.json",
            *(f"{graph}.{kind}" for graph in names for kind in ("engine", "log")),
        }
        for graph, facts in found.files.items():
            path = engines.path(graph)
            assert (path.stat().st_size, sha256(path)) == (facts.size, facts.sha256)
            assert facts.size > facts.weights > 0
            assert f"{graph}.onnx" in (found.folder / f"{graph}.log").read_text()
        assert found.identity.precision == bundle.manifest.precision == precision
    assert [line.split(":")[0].split(" with ")[0] for line in said] == [
        "compiling prefix, denoise",
        "compiled prefix",
        "compiled denoise",
        "compiling fast_decode",
        "compiled fast_decode",
    ]
    assert "with TensorRT-RTX " in said[0] and "for compute capability 8.6, 12.0: less than a minute" in said[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_engines_are_found_on_their_gpus_only(precision, compiled, rtx) -> None:
    bundle, engines, _ = compiled(precision)
    assert find(bundle, rtx, AMPERE, list(engines.of), verify=True) == engines
    with pytest.raises(BackendError, match=r"compute capability 8\.6, 12\.0, this is NVIDIA L4 \(8\.9, 32 GB\)"):
        find(bundle, rtx, ADA)


def test_profiles_are_those_of_the_parsed_network(compiled, rtx) -> None:
    """Every dynamic input of the real network has a range, and its constants are the range's."""
    bundle, engines, _ = compiled("float32")
    logger = rtx.logger(lambda *_: None)
    builder = rtx.module.Builder(logger)
    for graph, (profile,) in {name: found.profiles[name] for name, found in engines.of.items()}.items():
        network = rtx.network(builder)
        parser = rtx.module.OnnxParser(network, logger)
        assert parser.parse_from_file(str(bundle.graph(graph)))
        inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
        assert set(profile) == {name for name, shape in inputs.items() if -1 in shape}
        for name in profile:
            for size, *ends in zip(inputs[name], *profile[name], strict=True):
                assert size == -1 or {size} == set(ends)


def test_what_is_there_is_not_built_again(compiled, rtx) -> None:
    bundle, engines, _ = compiled("float32")
    said = []
    assert build(bundle, rtx, None, ALL, said.append) == engines
    assert said == [f"{folder}: engines are there already" for folder in engines.folders]
    assert ensure_engines(bundle, rtx, AMPERE, said.append).folders == engines.folders[:1]
    assert len(said) == 2


def test_first_start_says_why_and_builds(compiled, rtx, tmp_path) -> None:
    bundle, engines, _ = compiled("float32")
    own = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (own.path / "engines" / engines.folders[0].name / "denoise.engine").write_bytes(b"cut")
    said = []
    made = ensure_engines(own, rtx, AMPERE, said.append)
    assert "denoise.engine has 3 bytes" in said[0] and any(line.startswith("compiled denoise: ") for line in said)
    identity = made.of["denoise"].identity
    assert identity.capabilities == ((8, 6),) and identity.device is identity.multiprocessors is None
    assert find(own, rtx, AMPERE).of["denoise"] == made.of["denoise"]


def test_a_damaged_engine_is_built_again(own, rtx) -> None:
    options = BuildOptions(capabilities=((8, 6),), graphs=("denoise",))
    first = build(own, rtx, None, options)
    first.path("denoise").write_bytes(b"cut")
    second = build(own, rtx, None, options)
    assert second.folders == first.folders and not second.of["denoise"].damage(verify=True)
    assert list((own.path / "engines").iterdir()) == [*first.folders]


def test_engines_that_have_changed_are_built_again_when_verified(own, rtx) -> None:
    options = BuildOptions(capabilities=((8, 6),), graphs=ACTING)
    path = build(own, rtx, None, options).path("denoise")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert ensure_engines(own, rtx, AMPERE).path("denoise") == path
    said = []
    ensure_engines(own, rtx, AMPERE, said.append, verify=True)
    assert "denoise.engine has changed since it was built" in said[0] and len(said) > 1


def test_a_damaged_record_is_built_again(own, rtx) -> None:
    options = BuildOptions(capabilities=((8, 6),), graphs=("denoise",))
    record = build(own, rtx, None, options).folders[0] / "engine.json"
    record.write_text("[" * 200_000)
    assert build(own, rtx, None, options).folders == (record.parent,) and not Engines.read(record.parent).damage()


def test_engines_that_do_not_load_are_replaced(own, rtx) -> None:
    options = BuildOptions(capabilities=((8, 6), (12, 0)), graphs=("denoise",), batch=2)
    made = build(own, rtx, None, options).of["denoise"]
    assert made.identity.batch == 2
    made.path("denoise").write_bytes(b"x" * made.files["denoise"].size)
    again = rebuild(own, rtx, AMPERE, made)
    assert again.identity == made.identity and not again.damage(verify=True)
    stale = replace(made, folder=made.folder.rename(made.folder.with_name("0123456789abcdef")))
    rebuild(own, rtx, AMPERE, stale)
    assert [path.name for path in (own.path / "engines").iterdir()] == [made.folder.name]


def test_the_command(own) -> None:
    engines = build_bundle(own.path, "trt-rtx", "8.6", BuildOptions(graphs=("denoise",)))
    assert engines.of["denoise"].identity.capabilities == ((8, 6),)
    with pytest.raises(ArgumentError, match="target 'ort': engines are built for trt and trt-rtx"):
        build_bundle(own.path, "ort")


class TestFast:
    """fast_decode, which doubles the weights, costs nobody the engines that act."""

    def test_it_is_built_on_request_only(self, own, rtx) -> None:
        own.manifest.contract["fast"] = None
        assert list(build(own, rtx, None, AHEAD).of) == [*ACTING]
        engines = build(own, rtx, None, replace(AHEAD, graphs=(FAST,)))
        assert list(engines.of) == [FAST]
        assert find(own, rtx, AMPERE, (FAST,)) == engines

    @pytest.mark.parametrize("asked", [False, True])
    def test_its_failure_leaves_the_others(self, asked, own, rtx, monkeypatch) -> None:
        def fail(api, graph, *rest):
            if graph.stem == FAST:
                raise BackendError("the builder has no memory")
            return compile_graph(api, graph, *rest)

        compile_graph, said = building.compile_graph, []
        monkeypatch.setattr(building, "compile_graph", fail)
        assert own.manifest.contract["fast"] is not None
        message = "the builder has no memory; the engines of prefix, denoise are built and act without it"
        if asked:
            with pytest.raises(BackendError, match=f"^{message}$"):
                build(own, rtx, None, ALL)
        else:
            assert list(build(own, rtx, None, AHEAD, said.append).of) == [*ACTING]
            assert said[-1] == f"no engine of fast_decode: {message}"
        assert isinstance(look(own, rtx, AMPERE), EngineSet)
        assert len(list((own.path / "engines").iterdir())) == 1
        monkeypatch.setattr(building, "compile_graph", compile_graph)
        assert list(build(own, rtx, None, AHEAD).of) == [*ACTING, FAST]  # nothing of the failure is remembered

    def test_its_unreadable_graph_leaves_the_others(self, own, rtx, monkeypatch) -> None:
        own.graph(FAST).write_bytes(b"not a graph")
        said = []
        assert list(build(own, rtx, None, AHEAD, said.append).of) == [*ACTING]
        assert "not a readable ONNX graph" in said[-1]


def test_what_the_compiler_raises_is_typed(own, rtx, monkeypatch) -> None:
    def fail(*_):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(Api, "network", fail)
    with pytest.raises(BackendError, match=r"cannot compile graph denoise: TypeError: pybind11"):
        build(own, rtx, None, replace(AHEAD, graphs=("denoise",)))
    assert list((own.path / "engines").iterdir()) == []


def test_engines_for_the_lean_runtime_are_remembered(own, rtx, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = Api.config
    monkeypatch.setattr(Api, "config", lambda self, *given, lean: config(self, *given))  # RTX has no such engines
    monkeypatch.setattr(building, "capabilities_of", lambda *_, **__: ((8, 6),))
    said = []
    options = BuildOptions(graphs=("denoise",), lean=True)
    made = build(own, rtx, AMPERE, options, said.append).of["denoise"]
    assert made.identity.lean and trust.built_here(made.files["denoise"].sha256) and len(said) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    build(own, rtx, AMPERE, replace(options, force=True), said.append)
    assert "it cannot be written down that these engines were built here" in said[-1]


class TestInterrupted:
    def test_nothing_is_left_of_it_and_the_old_engines_stay(self, compiled, rtx, monkeypatch, tmp_path) -> None:
        bundle, engines, _ = compiled("float32")
        own = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
        before = {path: sha256(path) for path in own.path.rglob("*") if path.is_file()}
        stepped, steps = compiling.Progress.stepped, []
        as_found = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in programs started by "&"

        def interrupt_at_20(progress, name, number):
            steps.append(name)
            if len(steps) == 20:
                os.kill(os.getpid(), signal.SIGINT)
                deadline = time.monotonic() + 30
                while not progress.cancelled and time.monotonic() < deadline:
                    time.sleep(0.01)
            return stepped(progress, name, number)

        monkeypatch.setattr(compiling.Progress, "stepped", interrupt_at_20)
        try:
            with pytest.raises(KeyboardInterrupt):
                build(own, rtx, None, replace(AHEAD, force=True))
        finally:
            signal.signal(signal.SIGINT, as_found)
        assert len(steps) < 100  # of several hundred
        assert {path: sha256(path) for path in own.path.rglob("*") if path.is_file()} == before
        assert {path.name for path in (own.path / "engines").iterdir()} == {path.name for path in engines.folders}

    def test_a_full_disk_is_the_backends_failure(self, own, rtx, monkeypatch) -> None:
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(compiling._Output, "write", full)
        with pytest.raises(BackendError, match=r"cannot write \S+/prefix\.engine: No space left on device"):
            build(own, rtx, None, AHEAD)
        assert list((own.path / "engines").iterdir()) == []

    def test_a_failed_build_leaves_nothing(self, own, rtx, monkeypatch) -> None:
        monkeypatch.setattr(Api, "serialize", lambda *_: False)
        with pytest.raises(BackendError, match=r"TensorRT-RTX \S+ cannot compile graph prefix: no reason given"):
            build(own, rtx, None, AHEAD)
        assert list((own.path / "engines").iterdir()) == []

    def test_what_a_killed_build_left_is_swept(self, own, rtx) -> None:
        """And nothing else: no folder without its lock file, and none whose process lives."""
        engines = own.path / "engines"
        engines.mkdir()
        foreign = engines / ".0123456789abcdef.partial-77"
        foreign.mkdir()
        (foreign / "prefix.engine").write_bytes(b"somebody's")
        script = "import os, signal, sys; from pathlib import Path; from ki_edge.files.staging import staging\n"
        script += "with staging(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
        subprocess.run([sys.executable, "-c", script, str(engines / "0123456789abcdef")], check=False)
        assert len(list(engines.iterdir())) == 3
        with staging(engines / "fedcba9876543210") as living:
            built = build(own, rtx, None, BuildOptions(capabilities=((8, 6),), graphs=("denoise",)))
            assert living.folder.is_dir()
        left = {path.name for path in engines.iterdir() if not path.name.endswith(".timings")}
        assert left == {foreign.name, built.folders[0].name}

    def test_a_foreign_folder_in_the_engines_place_is_not_replaced(self, own, rtx) -> None:
        options = BuildOptions(capabilities=((8, 6),), graphs=("denoise",))
        folder = build(own, rtx, None, options).folders[0]
        (folder / "engine.json").unlink()
        before = {path: sha256(path) for path in own.path.rglob("*") if path.is_file()}
        with pytest.raises(BackendError, match=r"exists and has no engine\.json, so it holds no engines"):
            build(own, rtx, None, options)
        assert {path: sha256(path) for path in own.path.rglob("*") if path.is_file()} == before


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "device", "message"),
        [
            (BuildOptions(), None, "no NVIDIA GPU or driver here: .* --compute-capability 8.6"),
            (BuildOptions(), Device("NVIDIA H200", (9, 0)), r"capability 9\.0, only for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"),
            (BuildOptions(capabilities=((8, 7),)), None, r"cannot compile for compute capability 8\.7, only for"),
            (BuildOptions(capabilities=((8, 6),), lean=True), None, "the lean runtime loads engines of TensorRT, not"),
        ],
    )
    def test_targets(self, options, device, message, own, rtx) -> None:
        with pytest.raises(BackendError, match=message):
            build(own, rtx, device, options)

    def test_tensorrt_does_not_compile_ahead_of_time(self, own) -> None:
        with pytest.raises(BackendError, match=r"TensorRT builds only on the GPU .* --target trt-rtx"):
            build(own, Api(None, "tensorrt", (10, 3), "10.3.0"), None, AHEAD)

    def test_the_lean_runtime_does_not_build(self, own) -> None:
        lean = Api.load("tensorrt_lean")
        with pytest.raises(BackendError, match=r"TensorRT lean runtime \S+ only runs engines"):
            build(own, lean, AMPERE)
        with pytest.raises(
            BackendError, match=r"and TensorRT lean runtime \S+ cannot build any: ki-build \S+ --lean \(run wh"
        ):
            ensure_engines(own, lean, AMPERE)

    @pytest.mark.parametrize(
        ("graphs", "message"), [(("suffix",), "no graph 'suffix' in .*, only prefix"), ((), "no gr")]
    )
    def test_graphs(self, graphs, message, own, rtx) -> None:
        with pytest.raises(ArgumentError, match=message):
            build(own, rtx, None, replace(AHEAD, graphs=graphs))

    def test_memory(self, own, rtx, monkeypatch) -> None:
        monkeypatch.setattr(memory, "with_swap", lambda meminfo: int(0.1e9))
        with pytest.raises(BackendError, match=r"compiling prefix .* needs about 0\.3 GB of memory, 0\.1 GB are free"):
            build(own, rtx, None, AHEAD)
        assert not (own.path / "engines").exists()
        only = BuildOptions(capabilities=((8, 6),), graphs=("denoise",), ignore_memory=True)
        assert build(own, rtx, None, only).path("denoise").is_file()

    def test_disk(self, own, rtx, monkeypatch) -> None:
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
        with pytest.raises(BackendError, match=r"0\.0 GB are free on this disk, the engines need 0\.1 GB"):
            build(own, rtx, None, AHEAD)

    def test_a_bundle_that_cannot_be_written_to(self, own, rtx) -> None:
        (own.path / "engines").write_bytes(b"")
        with pytest.raises(BackendError, match=r"could not be written: File exists \(\S+engines\)"):
            build(own, rtx, None, AHEAD)

    @pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
    def test_no_gpu_here(self, name, own, monkeypatch) -> None:
        def absent():
            raise BackendError("no NVIDIA driver")

        monkeypatch.setattr(targets, "import_module", lambda _: SimpleNamespace(current_device=absent))
        monkeypatch.setattr(Api, "load", lambda _: Api(None, name, (10, 3), "10.3.0"))
        with pytest.raises(BackendError, match="no NVIDIA driver; run ki-build BUNDLE on the robot") as error:
            build_bundle(own.path, "trt")
        assert ("--compute-capability" in str(error.value)) is (name == "tensorrt_rtx")

    def test_a_damaged_graph_is_refused(self, own) -> None:
        path = own.path / own.manifest.graphs["prefix"]["file"]
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(BundleError, match=r"prefix\.onnx"):
            graph_facts(own, "prefix")

    def test_a_graph_too_new_is_refused_before_building(self, own, rtx, monkeypatch) -> None:
        monkeypatch.setattr(building, "graph_facts", lambda *_: GraphFacts(20, ["DynamicQuantizeLinear"], 10))
        with pytest.raises(BackendError, match="graph prefix: no TensorRT imports DynamicQuantizeLinear"):
            build(own, rtx, None, AHEAD)
