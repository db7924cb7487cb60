"""ki-doctor: what it finds on machines that are not this one, and on this one."""

import json
from math import prod
from types import SimpleNamespace

import onnx
import pytest

from ki_edge.bundle import Bundle
from ki_edge.config import PI05
from ki_runtime.doctor import bundle as bundle_checks
from ki_runtime.doctor import checkup, cli
from ki_runtime.doctor.checkup import examine
from ki_runtime.doctor.host import Host
from ki_runtime.doctor.memory import needs
from ki_runtime.gpu.device import Device
from ki_runtime.trt.api import Api
from ki_runtime.trt.engines import EngineFile, Engines, identify
from ki_runtime.trt.requirements import GraphFacts, graph_facts

ORIN, THOR, RTX_4090, RTX_2080, H200 = (8, 7), (11, 0), (8, 9), (7, 5), (9, 0)
MEMINFO = "MemTotal: {0} kB\nMemFree: 1 kB\nMemAvailable: {1} kB\nSwapTotal: {2} kB\nSwapFree: {2} kB\n"
TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
NVPMODEL = "< PARAM TYPE=FILE NAME=CPU >\n< POWER_MODEL ID=0 NAME=15W >\nx\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\nx\n"


class Driver:
    """libcuda with one GPU, or one that fails."""

    def __init__(
        self, name="NVIDIA GeForce RTX 4090", capability=RTX_4090, memory=24e9, shared=0, cuda=13000, status=0
    ):
        self.name, self.capability, self.memory = name.encode(), capability, int(memory)
        self.shared, self.cuda, self.status = shared, cuda, status

    def cuInit(self, _):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = 1

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDeviceGetName(self, name, size, device):
        name.value = self.name[: size - 1]

    def cuDeviceTotalMem_v2(self, size, device):
        size._obj.value = self.memory

    def cuDeviceGetAttribute(self, number, which, device):
        number._obj.value = {75: self.capability[0], 76: self.capability[1], 18: self.shared, 16: 8}[which]

    def cuDriverGetVersion(self, number):
        number._obj.value = self.cuda


class Machine(Host):
    """A machine that has what the test says and nothing else."""

    machine, system, python, in_virtual_environment = "x86_64", "Linux 6.8 glibc 2.39", (3, 12, 3), True

    def __init__(self, driver=None, modules=None, versions=None, files=None, commands=None, memory=(64e9, 60e9, 0)):
        self.library, self.modules, self.versions = driver, modules or {}, versions or {}
        self.files = {"/proc/meminfo": MEMINFO.format(*(int(x) // 1024 for x in memory)), **(files or {})}
        self.commands, self.paths, self.closed = commands or {}, [], set()
        self.variables, self.disk = {}, 500e9

    def driver(self):
        if self.library is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return self.library

    def load(self, module):
        if module not in self.modules:
            raise ModuleNotFoundError(f"No module named '{module}'")
        return self.modules[module]

    def version(self, distribution):
        return self.versions.get(distribution)

    def read(self, path):
        return self.files.get(path)

    def run(self, *command):
        return self.commands.get(command[0])

    def find(self, folder, pattern):
        first = pattern.split("*")[0].split("[")[0]
        return [path for path in self.paths if path.startswith(f"{folder}/{first}")]

    def usable(self, path):
        return path not in self.closed

    def environment(self, name):
        return self.variables.get(name)

    def free_bytes(self, path):
        return int(self.disk)

    def obstacle(self, backend, bundle):
        return None


def onnxruntime(*loading, offered=("CPUExecutionProvider",)):
    """The module, whose `loading` providers load and whose other ones fall back in silence."""

    class Session:
        def __init__(self, model, options, providers):
            onnx.checker.check_model(onnx.load_from_string(model))
            self.used = [name for name in providers if name in loading]

        def get_providers(self):
            return self.used

    return SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: list(offered),
        SessionOptions=SimpleNamespace,
        InferenceSession=Session,
        set_default_logger_severity=lambda level: None,
    )


CPU_ORT = onnxruntime("CPUExecutionProvider")
BOTH = ("CUDAExecutionProvider", "CPUExecutionProvider")
GPU_ORT = onnxruntime(*BOTH, offered=BOTH)


def tensorrt(version="10.3.0", builder=True, targets=("SM75", "SM86", "SM89")):
    """The module of TensorRT, of the lean runtime (no builder) or of RTX (targets)."""
    known = SimpleNamespace(__members__=dict.fromkeys(targets))
    return SimpleNamespace(__version__=version, ComputeCapability=known, **({"Builder": object} if builder else {}))


def orin(memory=(32e9, 28e9, 0), driver=None, **modules):
    """A Jetson Orin with JetPack 6.2 as it should be, power mode apart."""
    files = {
        "/etc/nv_tegra_release": TEGRA,
        "/proc/device-tree/model": "NVIDIA Jetson AGX Orin",
        "/etc/nvpmodel.conf": NVPMODEL,
    }
    machine = Machine(
        driver or Driver("Orin", ORIN, memory[0], shared=1, cuda=12060),
        {"onnxruntime": CPU_ORT, "tensorrt": tensorrt(), **modules},
        {"onnxruntime": "1.23.2", "cuda-bindings": "12.9.4"},
        files,
        {"nvpmodel": "NV Power Mode: MAXN_SUPER\n2", "dpkg-query": "6.2+b77"},
        memory,
    )
    machine.machine, machine.python = "aarch64", (3, 10, 12)
    return machine


def found(result, name, level=None):
    """The findings of a name (and a level)."""
    return [x for x in result.findings if x.name == name and level in (None, x.level)]


def runs(result):
    return {verdict.backend for verdict in result.verdicts if verdict.runs}


def why_not(result, backend):
    verdict = next(v for v in result.verdicts if v.backend == backend)
    assert not verdict.runs
    return verdict.detail


# ---------------------------------------------------------------------- machines


def test_a_processor_alone_runs_onnxruntime():
    result = examine(host=Machine(modules={"onnxruntime": CPU_ORT}))
    assert runs(result) == {"ort"} and result.runs
    assert [x.name for x in result.findings if x.level != "ok"] == ["GPU"]
    assert result.summary() == (
        "this machine can run: ort (CPU); not: trt (no GPU), trt-rtx (no GPU), ort-cuda (no GPU), "
        "openvino (not installed or does not load)"
    )


def test_nothing_runs_without_an_engine():
    result = examine(host=Machine())
    assert not result.runs and result.summary().startswith("this machine can run: nothing; not: ")
    assert found(result, "ONNX Runtime")[0].fix == "pip install 'ki-edge[ort]'"


def test_jetson_orin():
    result = examine(host=orin())
    assert {x.level for x in result.findings} == {"ok"}
    assert found(result, "JetPack")[0].text == "6.2 (L4T 36.4.3) on NVIDIA Jetson AGX Orin, made for TensorRT 10.3"
    assert found(result, "GPU")[0].text == "Orin, SM 8.7, 32.0 GB shared with the host, CUDA 12.6"
    assert "opsets to 20, without Attention" in found(result, "TensorRT")[0].text
    assert runs(result) == {"trt", "ort"}


def test_thor_without_its_package_list():
    host = orin(driver=Driver("NVIDIA Thor", THOR, 128e9, shared=1), tensorrt=tensorrt("10.16.1"))
    host.files["/etc/nv_tegra_release"] = TEGRA.replace("R36", "R38").replace("4.3", "2.0")
    del host.commands["dpkg-query"]
    result = examine(host=host)
    assert found(result, "JetPack", "warning")[0].text.startswith("7 (L4T 38.2.0)")
    assert found(result, "TensorRT")[0].text == "10.16.1, builds and runs engines; opsets to 24"
    assert "trt" in runs(result)


def test_slow_power_mode_names_the_fastest_of_this_board():
    host = orin()
    host.commands["nvpmodel"] = "NV Power Mode: 15W\n0"
    warning = found(examine(host=host), "power mode", "warning")[0]
    assert warning.text == "15W: slower than MAXN_SUPER"
    assert warning.fix == "sudo nvpmodel -m 2 && sudo jetson_clocks"


def test_old_jetpack():
    host = orin()
    host.files["/etc/nv_tegra_release"] = TEGRA.replace("R36", "R35")
    host.commands["dpkg-query"] = "5.1.2-b104"
    problem = found(examine(host=host), "JetPack", "problem")[0]
    assert "too old" in problem.text and "JetPack 6.2" in problem.fix


def test_environment_that_hides_jetpacks_tensorrt():
    host = orin()
    del host.modules["tensorrt"]
    host.paths = ["/usr/lib/python3.10/dist-packages/tensorrt"]
    host.find = lambda folder, pattern: host.paths if folder == "/usr/lib" else []
    result = examine(host=host)
    assert "--system-site-packages" in found(result, "TensorRT", "problem")[0].fix
    assert "not installed" in why_not(result, "trt")


def test_old_tensorrt():
    result = examine(host=orin(tensorrt=tensorrt("8.6.2")))
    assert "8.6.2: too old, 10.3" in found(result, "TensorRT", "problem")[0].text
    assert runs(result) == {"ort"}


def test_bindings_newer_than_the_driver():
    host = orin()
    host.versions["cuda-bindings"] = "13.4.4"
    result = examine(host=host)
    assert found(result, "cuda-python", "problem")[0].fix == "pip install 'cuda-python<13'"
    assert "cuda-python" in why_not(result, "trt")


def test_library_that_misses_its_shared_objects():
    host = orin()

    def load(module):
        if module == "tensorrt_rtx":
            raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")
        return Machine.load(host, module)

    host.load = load
    assert "libtensorrt_rtx.so.1" in found(examine(host=host), "TensorRT-RTX", "problem")[0].text


@pytest.mark.parametrize(("capability", "can"), [(RTX_4090, True), (H200, False)])
def test_rtx_builds_for_some_gpus(capability, can):
    modules = {"onnxruntime": GPU_ORT, "tensorrt_rtx": tensorrt("1.7.1")}
    result = examine(host=Machine(Driver("G", capability), modules, {"cuda-bindings": "13.0.0"}))
    assert ("trt-rtx" in runs(result)) == can
    assert "ort-cuda" in runs(result)
    if not can:
        assert why_not(result, "trt-rtx") == "TensorRT-RTX 1.7.1 does not compile for SM 9.0"


def test_provider_that_falls_back_in_silence():
    modules = {"onnxruntime": onnxruntime("CPUExecutionProvider", offered=BOTH)}
    versions = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    result = examine(host=Machine(Driver(), modules, versions))
    problems = found(result, "ONNX Runtime", "problem")
    assert "overwrite each other" in problems[0].text
    assert "CUDAExecutionProvider does not load" in problems[1].text
    assert "does not load" in why_not(result, "ort-cuda")


@pytest.mark.parametrize(("status", "text"), [(100, "sees no GPU"), (803, "differ"), (4711, "error 4711")])
def test_driver_that_fails(status, text):
    problem = found(examine(host=Machine(Driver(status=status))), "GPU", "problem")[0]
    assert text in problem.text and problem.fix


def test_hidden_gpu():
    host = Machine(Driver(status=100))
    host.variables["CUDA_VISIBLE_DEVICES"] = "-1"
    assert found(examine(host=host), "GPU", "problem")[0].fix == "unset CUDA_VISIBLE_DEVICES"


def test_driver_library_that_is_not_found():
    host = Machine(commands={"nvidia-smi": "NVIDIA L4\nNVIDIA L4"})
    assert "sees NVIDIA L4, but libcuda" in found(examine(host=host), "GPU", "problem")[0].text


def test_closed_device_files():
    host = orin()
    host.paths, host.closed = ["/dev/nvmap", "/dev/nvhost-gpu"], {"/dev/nvmap"}
    problem = found(examine(host=host), "permissions", "problem")[0]
    assert problem.text.startswith("/dev/nvmap cannot") and "usermod -aG video,render" in problem.fix


def test_wrong_python_platform_and_full_disk():
    host = Machine(modules={"onnxruntime": CPU_ORT})
    host.python, host.machine, host.disk = (3, 9, 1), "riscv64", 1e9
    result = examine(host=host)
    assert (
        found(result, "Python", "problem") and found(result, "platform", "warning") and found(result, "disk", "warning")
    )


# ---------------------------------------------------------------------- bundles


@pytest.fixture
def graphs(monkeypatch):
    """What the bundle's graphs are said to hold; the bundles of these tests have no real ones."""
    found = {name: GraphFacts(20, ["Gemm"], 1000) for name in ("prefix", "denoise", "fast_decode")}
    monkeypatch.setattr(bundle_checks, "graph_facts", lambda bundle, name: found[name])
    return found


def put_engines(bundle, version="10.3.0", device="Orin", capability=ORIN, size=4):
    """Engines that were built by a TensorRT of this version for this GPU."""
    identity = identify(bundle, Api(None, "tensorrt", (10, 3), version), Device(device, capability), [capability])
    folder = bundle.path / "engines" / identity.key
    folder.mkdir(parents=True)
    files = {name: EngineFile(f"{name}.engine", 4, "", 4, 1.0) for name in bundle.manifest.graphs}
    for name in files:
        (folder / f"{name}.engine").write_bytes(b"plan"[:size])
    Engines(folder, identity, files).write()


def on_orin(bundle, memory=(32e9, 28e9, 0), **modules):
    return examine(bundle.path, orin(memory, **modules))


def test_engines_that_fit(make_bundle, graphs):
    bundle = make_bundle(precision="float16")
    put_engines(bundle)
    result = on_orin(bundle)
    assert found(result, "engines", "ok")[0].text.startswith("TensorRT 10.3.0: ")
    assert next(v for v in result.verdicts if v.backend == "trt").detail == "Orin"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({}, None),
        ({"version": "10.7.0"}, "built by TensorRT 10.7.0, installed is TensorRT 10.3.0"),
        ({"device": "NVIDIA Thor", "capability": THOR}, "built for NVIDIA Thor, this is Orin"),
        ({"size": 3}, "it is truncated"),
    ],
)
def test_engines_that_must_be_built(make_bundle, graphs, made, reason):
    bundle = make_bundle(precision="float16")
    if made:
        put_engines(bundle, **made)
    result = on_orin(bundle)
    warning = found(result, "engines", "warning")[0]
    assert (reason or "has no TensorRT engines") in warning.text
    assert warning.fix == f"ki-build {bundle.path}"
    assert next(v for v in result.verdicts if v.backend == "trt").detail == "Orin, once its engines are built"


def test_runtime_without_a_builder(make_bundle, graphs):
    host = orin(tensorrt_lean=tensorrt("10.3.0", builder=False))
    del host.modules["tensorrt"]
    result = examine(make_bundle(precision="float16").path, host)
    assert why_not(result, "trt") == "TensorRT lean runtime 10.3.0 has no builder"


def test_graphs_that_are_too_new_for_the_parser(make_bundle, graphs):
    graphs["denoise"] = GraphFacts(23, ["Attention"], 1000)
    result = on_orin(make_bundle(precision="float16"))
    assert "Attention needs TensorRT 10.14" in why_not(result, "trt")


def test_full_size_on_small_boards(make_bundle, graphs, monkeypatch):
    """Eight gigabytes cannot hold a full-size policy in 16 bits; sixteen can, and need swap to build its engines."""
    full = needs(PI05, 2050, "float16")
    monkeypatch.setattr(bundle_checks, "needs", lambda *_: full)
    graphs["prefix"] = GraphFacts(20, [], full.graphs["prefix"].weights)
    bundle = make_bundle(precision="float16")
    small = on_orin(bundle, memory=(8e9, 5.5e9, 0))
    assert "too little" in found(small, "model memory", "problem")[0].text
    in_turn = on_orin(bundle, memory=(8e9, 6e9, 0))
    assert "run it with --sequential" in found(in_turn, "model memory", "warning")[0].fix
    medium = on_orin(bundle, memory=(16e9, 14e9, 0))
    assert found(medium, "model memory", "ok")
    problem = found(medium, "engines", "problem")[0]
    assert "compiling takes up to 24.5 GB of memory, 14.0 GB are free" in problem.text
    assert "fallocate -l 11G" in problem.fix and "compiling takes" in why_not(medium, "trt")
    assert "trt" in runs(on_orin(bundle, memory=(16e9, 14e9, 12e9)))
    host = orin((16e9, 14e9, 12e9))
    host.files["/proc/meminfo"] = host.files["/proc/meminfo"].replace("SwapFree: ", "SwapFree: 0 kB\nUnknown: ")
    assert "14.0 GB are free" in why_not(examine(bundle.path, host), "trt")  # its swap is full
    without_fast = on_orin(bundle, memory=(16e9, 10e9, 20e9))
    assert "FAST" in found(without_fast, "model memory", "warning")[0].fix


def test_no_room_for_engines(make_bundle, graphs):
    host, bundle = orin(), make_bundle(precision="float16")
    host.disk = 100
    assert "of disk" in why_not(examine(bundle.path, host), "trt")
    host.disk, host.closed = 1e9, {str(bundle.path)}
    assert "cannot be written" in why_not(examine(bundle.path, host), "trt")


def test_precisions(make_bundle, graphs):
    eight = on_orin(make_bundle("eight", precision="int8"))
    assert "int8 is for the CPU" in why_not(eight, "trt") and runs(eight) == {"ort"}
    low = make_bundle("low", precision="float8")
    assert why_not(on_orin(low), "ort") == "it does not compute float8 on the CPU"
    assert "8.9 or newer, not 8.7: export with --precision int8" in why_not(on_orin(low), "trt")
    assert "trt" in runs(on_orin(make_bundle("static", precision="int8_static")))
    sixteen = make_bundle("sixteen", precision="bfloat16")
    assert why_not(on_orin(sixteen), "ort") == "it does not compute bfloat16 on the CPU"
    modules = {"onnxruntime": GPU_ORT, "tensorrt": tensorrt("11.4.1")}
    turing = examine(sixteen.path, Machine(Driver("RTX 2080", RTX_2080), modules, {"cuda-bindings": "13.0.0"}))
    assert "8.0 or newer, not 7.5" in why_not(turing, "trt") and "not 7.5" in why_not(turing, "ort-cuda")
    assert not turing.runs


def test_what_the_runtime_says_counts(make_bundle, graphs):
    host = orin()
    host.obstacle = lambda backend, bundle: "the device is busy" if backend == "trt" else None
    assert why_not(examine(make_bundle(precision="float16").path, host), "trt") == "the device is busy"


def test_broken_and_foreign_bundles(make_bundle, graphs):
    bundle = make_bundle()
    (bundle.path / "denoise.onnx").write_bytes(b"short")
    result = examine(bundle.path, Machine(modules={"onnxruntime": CPU_ORT}))
    assert "denoise.onnx" in found(result, "bundle", "problem")[0].text
    assert not result.runs and why_not(result, "ort") == "the bundle cannot be opened"
    new = make_bundle("new").path
    manifest = (new / "manifest.json").read_text(encoding="utf-8").replace('"float32"', '"float4"', 1)
    (new / "manifest.json").write_text(manifest, encoding="utf-8")
    unknown = examine(new, Machine(modules={"onnxruntime": CPU_ORT}))
    assert "precision 'float4'" in found(unknown, "bundle", "problem")[0].text


def test_weights_are_those_of_the_graphs(fetch_bundle):
    """Estimated from shapes, against what the graphs of a real export refer to: matrices, norms and biases."""
    bundle = Bundle.open(fetch_bundle)
    estimate = needs(bundle.manifest.config, len(bundle.manifest.vocabulary.ids), "float32")
    for name, graph in estimate.graphs.items():
        model = onnx.load(bundle.graph(name), load_external_data=False)
        stored = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 0]
        assert graph.weights == pytest.approx(4 * sum(prod(tensor.dims) for tensor in stored), rel=0.01), name
        assert graph.weights == pytest.approx(graph_facts(bundle, name).weight_bytes, rel=0.05), name


def test_command_on_a_real_bundle(fetch_bundle, capsys):
    assert cli.main([str(fetch_bundle)]) == 0
    assert "float32" in capsys.readouterr().out


def test_full_size_by_hand():
    """Published sizes: SigLIP so400m 0.41 B, Gemma 2B's embedding 0.53 B and 1.87 B live, the expert 0.31 B."""
    graphs = needs(PI05, 2050, "float16").graphs
    assert graphs["prefix"].weights == pytest.approx(2 * (0.412e9 + 0.527e9 + 1.873e9), rel=0.01)
    assert graphs["denoise"].weights == pytest.approx(2 * 0.311e9, rel=0.01)
    assert graphs["prefix"].kv == 2 * 18 * 968 * 256 * 4


# ---------------------------------------------------------------------- the command


def test_command_on_this_machine(capsys):
    assert cli.main([]) == 0  # the tests themselves need onnxruntime
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok ") and lines[-1].startswith("this machine can run: ")
    checked = [line for line in lines[:-1] if line.startswith(("ok ", "warning ", "problem "))]
    fixes = [line for line in lines if line.lstrip().startswith("fix: ")]
    assert len(fixes) == sum(not line.startswith("ok ") for line in checked)
    assert len(checked) + len(fixes) + 1 == len(lines)


def test_json(make_bundle, graphs, capsys):
    assert cli.main([str(make_bundle().path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] is True and report["facts"]["bundle"]["precision"] == "float32"
    assert {check["level"] for check in report["checks"]} <= {"ok", "warning", "problem"}
    assert all(check["fix"] for check in report["checks"] if check["level"] != "ok")


def test_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(checkup, "Host", Machine)
    assert cli.main([]) == 1
    assert cli.main(["/nowhere"]) == 2
    assert (
        capsys.readouterr().err == "ki-doctor: error: no folder at /nowhere: expected a bundle written by ki-export\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--unknown"])
    assert stopped.value.code == 2


def test_host_answers(tmp_path):
    host = Host()
    assert host.read(str(tmp_path / "none")) is None and host.run("no-such-command-here") is None
    assert host.run("false") is None and host.run("echo", "a") == "a"
    (tmp_path / "model").write_bytes(b"Jetson\0")
    assert host.read(str(tmp_path / "model")) == "Jetson" and host.find(str(tmp_path), "mod*")
    (tmp_path / "broken_library_for_test.py").write_text("raise OSError('no libfoo.so')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ImportError, match=r"OSError: no libfoo\.so"):
            host.load("broken_library_for_test")
