"""TensorRT behind the session seam: the sampler over a fake TensorRT on a fake GPU, held to the fake engine alone."""

import gc
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge import graphs
from ki_edge.contract import FastContract, generic
from ki_edge.errors import BackendError, DeviceError, DeviceMemoryError
from ki_runtime.backends import SessionOptions
from ki_runtime.denoise import MAX_TABLES
from ki_runtime.sampler import Sampler
from ki_runtime.session import HostBuffer
from ki_runtime.trt import contexts, session
from ki_runtime.trt.buffers import Gpu
from ki_runtime.trt.cuda import Cuda
from ki_runtime.trt.profiles import profiles
from ki_runtime.trt.session import CACHE_BUCKET, Connection, TensorRTSession, obstacle

from .conftest import CONFIG, FakeEngine
from .fake_gpu import FakeCuda, FakeTensorRT

P = CONFIG.vision.patches
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a padded sum is summed in another order


class Machine:
    """A bundle, engines of it on disk, a GPU and TensorRT, all but the bundle fake."""

    def __init__(self, bundle, quirks=(), rebuild=None, **options):
        self.bundle, self.cuda, self.lines = bundle, FakeCuda(), []
        self.engine = FakeEngine(bundle.manifest.vocabulary.ids)
        self.trt = FakeTensorRT(self.cuda, self.engine, profiles(bundle, batch=2))
        self.trt.quirks.update(quirks)
        for spec in graphs.GRAPHS:
            (bundle.path / f"{spec.name}.engine").write_text(spec.name)
        files = SimpleNamespace(
            path=lambda name: bundle.path / f"{name}.engine", identity=SimpleNamespace(lean="lean" in quirks)
        )
        self.gpu = Gpu(Cuda(self.cuda))
        self.connection = Connection(
            self.trt.api(), self.gpu, files, bundle, SessionOptions(say=self.lines.append, **options), rebuild
        )

    def sampler(self):
        return Sampler(self.bundle, self.connection.open)

    def contexts(self, name):
        return [context for graph, context in self.trt.contexts if graph == name]


@pytest.fixture
def machine(make_bundle):
    return Machine(make_bundle())


def noise(rows=1, seed=0):
    shape = (rows, CONFIG.action_horizon, CONFIG.action_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ---------------------------------------------------------------- the same results


CASES = [  # cameras present, prompts
    ([[True, False]], [[2, 30, 40]]),
    ([[True, True]], [[2] * 16]),  # exactly one bucket
    ([[False, True]], [list(range(2, 19))]),  # one more
    ([[True, False], [False, True]], [[2, 30], [2, 30, 40, 50]]),
]


@pytest.mark.parametrize(("cameras", "prompts"), CASES)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_actions_equal_the_engine_alone(machine, fake_sampler, batch, cameras, prompts, num_steps):
    inputs, x = batch(cameras, prompts, length=20), noise(len(prompts))
    plain, _ = fake_sampler(machine.bundle)
    sampler = machine.sampler()
    expected = plain.sample_actions(*inputs, noise=x, num_steps=num_steps)
    for _ in range(3):  # one by one, recorded, replayed
        np.testing.assert_allclose(sampler.sample_actions(*inputs, noise=x, num_steps=num_steps), expected, **CLOSE)


@pytest.mark.parametrize(("cameras", "prompts"), CASES)
@pytest.mark.parametrize("forced", [(), (50, 51)])
def test_tokens_equal_the_engine_alone(machine, fake_sampler, batch, cameras, prompts, forced):
    inputs = batch(cameras, prompts, length=20)
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    for count in (1, 9, 9):
        expected = plain.sample_fast_tokens(*inputs, max_tokens=count, forced=forced)
        np.testing.assert_array_equal(sampler.sample_fast_tokens(*inputs, max_tokens=count, forced=forced), expected)


@pytest.mark.parametrize(("cameras", "prompts"), CASES)
def test_a_trace_has_no_padding(machine, fake_sampler, batch, cameras, prompts):
    inputs, x = batch(cameras, prompts, length=20), noise(len(prompts))
    ours = machine.sampler().trace(*inputs, noise=x, num_steps=3)
    theirs = fake_sampler(machine.bundle)[0].trace(*inputs, noise=x, num_steps=3)
    for name in ("prefix_k", "prefix_v", "prefix_mask", "columns"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.x, theirs.x, **CLOSE)


def test_changing_shapes_and_step_counts(machine, fake_sampler, batch):
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    random = np.random.default_rng(0)
    for call in range(40):
        rows = int(random.integers(1, 3))
        cameras = [[True, bool(random.integers(2))] for _ in range(rows)]
        prompts = [random.integers(2, 50, random.integers(1, 60)).tolist() for _ in range(rows)]
        inputs, x = batch(cameras, prompts, length=60), noise(rows, seed=call)
        steps = int(random.integers(1, 7))
        ours, theirs = (s.sample_actions(*inputs, noise=x, num_steps=steps) for s in (sampler, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        if call % 5 == 0:
            ours, theirs = (s.sample_fast_tokens(*inputs, max_tokens=6, forced=(9,)) for s in (sampler, plain))
            np.testing.assert_array_equal(ours, theirs)
    assert not machine.lines


# ---------------------------------------------------------------- buckets


def test_prompts_are_padded_to_buckets(machine, batch):
    sampler = machine.sampler()
    for length in (1, 5, 16, 17, 30):
        sampler.sample_actions(*batch([[True]], [[3] * length], length=40), noise=noise())
    fed = machine.engine.of("prefix")
    assert [call["prompt_tokens"].shape[1] for call in fed] == [16, 16, 16, 32, 32]
    assert [int(call["prompt_mask"].sum()) for call in fed] == [1, 5, 16, 17, 30]
    assert all((call["prompt_tokens"][~call["prompt_mask"]] == 0).all() for call in fed)
    assert len(machine.contexts("prefix")) == 2  # one for each shape


def test_a_prompt_is_not_padded_beyond_the_engine(make_bundle, batch):
    machine = Machine(make_bundle())
    least, best, most = machine.trt.profiles["prefix"][0]["prompt_tokens"]
    for name in ("prompt_tokens", "prompt_mask"):
        shapes = machine.trt.profiles["prefix"][0].shapes
        shapes[name] = (least, best, (most[0], 20))
    machine.sampler().sample_actions(*batch([[True]], [[3] * 18], length=40), noise=noise())
    assert machine.engine.of("prefix")[0]["prompt_tokens"].shape == (1, 20)


def test_caches_are_padded_to_buckets(machine, batch):
    sampler = machine.sampler()
    for count in (3, 9, 20):
        sampler.sample_fast_tokens(*batch([[True]], [[3, 4]]), max_tokens=count, forced=(5,))
    assert {call["cache_k"].shape[3] for call in machine.engine.of("fast_decode")} == {CACHE_BUCKET}
    assert len(machine.contexts("fast_decode")) == 2  # the opening and the tokens after it


def test_the_engine_s_ranges_are_told(machine, batch):
    sampler = machine.sampler()
    with pytest.raises(
        BackendError, match=r"graph prefix: outside .*'images' is \[1, 4, 4, 4, 3\], built for \[1, 1, "
    ):
        sampler.sample_actions(*batch([[True] * 4], [[3]]), noise=noise())
    with pytest.raises(BackendError, match=r"'cache_mask' is \[1, \d+\], built for"):
        sampler.sample_fast_tokens(*batch([[True]], [[3]]), max_tokens=100_000)
    sampler.sample_actions(*batch([[True] * 3], [[3]]), noise=noise())


# ---------------------------------------------------------------- recording


def test_a_loop_is_one_launch(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    sampler.sample_actions(*inputs, noise=noise(), num_steps=10)
    assert machine.cuda.launches == 0 and machine.cuda.execs == 2  # prefix and loop, recorded after their first run
    made = len(machine.trt.contexts), machine.cuda.calls.count("cudaMalloc")
    machine.cuda.calls.clear()
    sampler.sample_actions(*inputs, noise=noise(), num_steps=10)
    assert machine.cuda.launches == 2
    copies = machine.cuda.calls.count("cudaMemcpyAsync")
    assert copies == 4 + 1 + 1  # images, their mask, prompt, its mask and x up; actions down
    assert machine.cuda.calls.count("cudaStreamSynchronize") == 1
    assert (len(machine.trt.contexts), made[1] + machine.cuda.calls.count("cudaMalloc")) == made


def test_each_step_count_and_shape_has_its_recording(machine, batch):
    sampler = machine.sampler()
    short, long = batch([[True]], [[3, 4]]), batch([[True]], [[3] * 20], length=20)
    for _ in range(2):
        for inputs in (long, short):
            for steps in (2, 3):
                sampler.sample_actions(*inputs, noise=noise(), num_steps=steps)
    assert machine.cuda.execs == 2 + 4  # two prefixes, two loops for each
    assert len(machine.contexts("denoise")) == 2


def test_few_recordings_are_kept(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    for steps in range(1, 10):
        sampler.sample_actions(*inputs, noise=noise(), num_steps=steps)
    gc.collect()
    assert machine.cuda.execs == 1 + MAX_TABLES


def test_decoding_replays_and_fetches_only_logits(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    for _ in range(2):
        machine.cuda.calls.clear()
        sampler.sample_fast_tokens(*inputs, max_tokens=8)
    fed = sum(graph == "fast_decode" for graph, _ in machine.engine.calls) // 2
    assert machine.cuda.calls.count("cudaStreamSynchronize") == fed  # one wait a token, for its logits
    assert machine.cuda.calls.count("cudaMemcpy2DAsync") == 2 + 2 * fed  # K and V, on the device
    assert machine.cuda.calls.count("cudaMalloc") == 0
    assert machine.cuda.calls.count("cudaGraphLaunch") == 1 + fed


def test_addresses_are_set_where_runs_are_not_recorded(make_bundle, fake_sampler, batch):
    machine = Machine(make_bundle(), record=False)
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    plain, _ = fake_sampler(machine.bundle)
    for seed in range(3):
        x = noise(seed=seed)
        np.testing.assert_allclose(
            sampler.sample_actions(*inputs, noise=x), plain.sample_actions(*inputs, noise=x), **CLOSE
        )
    assert machine.cuda.launches == 0 and "cudaStreamBeginCapture" not in machine.cuda.calls and not machine.lines


@pytest.mark.parametrize("what", ["capturable", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_without_recording_it_says_so_once_and_runs(make_bundle, fake_sampler, batch, what):
    machine = Machine(make_bundle(), {"capturable": False} if what == "capturable" else {})
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    plain, _ = fake_sampler(machine.bundle)
    for seed in range(3):
        if what != "capturable":
            machine.cuda.fail[what] = 901
        x = noise(seed=seed)
        np.testing.assert_allclose(
            sampler.sample_actions(*inputs, noise=x), plain.sample_actions(*inputs, noise=x), **CLOSE
        )
    said = [line for line in machine.lines if "without CUDA graphs" in line]
    assert len({line.split()[1] for line in said}) == len(said) and "prefix" in {line.split()[1] for line in said}


def test_scratch_memory_is_shared(machine, batch):
    sampler = machine.sampler()
    for length in (3, 20, 40):
        sampler.sample_actions(*batch([[True]], [[3] * length], length=40), noise=noise())
    assert len(machine.trt.contexts) == 6
    assert len({context.scratch for _, context in machine.trt.contexts}) == 1


def test_nothing_stays_behind(make_bundle, batch):
    machine = Machine(make_bundle())
    free = machine.cuda.free
    sampler = machine.sampler()
    sampler.sample_actions(*batch([[True]], [[3, 4]]), noise=noise())
    sampler.sample_fast_tokens(*batch([[True]], [[3, 4]]), max_tokens=3)
    assert machine.cuda.execs > 0
    del sampler
    machine.connection.scratch._memory = None
    machine.trt.contexts.clear()
    gc.collect()
    assert machine.cuda.execs == machine.cuda.graphs == 0 and machine.cuda.free == free


def test_rtx_keeps_the_kernels_that_it_compiled_here(make_bundle, fake_sampler, batch):
    bundle, quirks = make_bundle(), {"rtx": True, "capturable": True}
    inputs = batch([[True]], [[3, 4]])
    expected = fake_sampler(bundle)[0].sample_actions(*inputs, noise=noise())
    for start in (1, 2):
        machine = Machine(bundle, quirks)
        sampler = machine.sampler()
        assert machine.connection.api.is_rtx
        for _ in range(3):
            ours = sampler.sample_actions(*inputs, noise=noise())
            np.testing.assert_allclose(ours, expected, **CLOSE)
        assert (bundle.path / "denoise.kernels").read_bytes() == b"k" * start
    assert not list(bundle.path.glob("*.partial*"))
    bundle.path.joinpath("denoise.kernels").unlink()
    bundle.path.joinpath("denoise.kernels").mkdir()  # cannot be written: no harm
    Machine(bundle, quirks).sampler().sample_actions(*inputs, noise=noise())


def test_rtx_keeps_kernels_where_runs_are_not_recorded(make_bundle, batch):
    bundle = make_bundle()
    sampler = Machine(bundle, {"rtx": True, "capturable": True}, record=False).sampler()
    for _ in range(2):
        sampler.sample_actions(*batch([[True]], [[3, 4]]), noise=noise())
    assert {path.name: path.read_bytes() for path in bundle.path.glob("*.kernels")} == {
        "prefix.kernels": b"k",
        "denoise.kernels": b"k",
    }


def test_two_processes_do_not_share_a_partial_file(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: written.append(path.name))
    cache = SimpleNamespace(serialize=lambda: b"k")
    engine = SimpleNamespace(create_runtime_config=lambda: SimpleNamespace(create_runtime_cache=lambda: cache))
    for pid in (11, 12):
        monkeypatch.setattr(contexts.os, "getpid", lambda pid=pid: pid)
        contexts._Kernels(engine, tmp_path / "x.kernels").write()
    assert len(set(written)) == 2


# ---------------------------------------------------------------- failures


def test_a_run_that_fails_tells_what_tensorrt_logged(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    machine.trt.quirks["execute"] = False
    with pytest.raises(
        BackendError, match=r"TensorRT 10\.3\.0: graph prefix: running it: enqueueV3: something is wrong$"
    ):
        sampler.sample_actions(*inputs, noise=noise())
    machine.trt.quirks.clear()
    assert np.isfinite(sampler.sample_actions(*inputs, noise=noise())).all()


def test_a_lost_device_is_a_device_error_from_then_on(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    sampler.sample_actions(*inputs, noise=noise())
    machine.cuda.fail["cudaStreamSynchronize"] = 719
    for _ in range(2):
        with pytest.raises(DeviceError, match="start this process again"):
            sampler.sample_actions(*inputs, noise=noise())
    with pytest.raises(DeviceError):
        sampler.sample_fast_tokens(*inputs, max_tokens=2)


def test_a_lost_device_is_found_behind_a_failed_run(machine, batch):
    sampler = machine.sampler()
    machine.trt.quirks["execute"] = False
    machine.cuda.fail["cudaGetLastError"] = 700
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress"):
        sampler.sample_actions(*batch([[True]], [[3, 4]]), noise=noise())


def test_out_of_memory_leaves_a_sampler_that_works(machine, fake_sampler, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3] * 30], length=30)
    small = batch([[True]], [[3, 4]])
    sampler.sample_actions(*small, noise=noise())
    room, machine.cuda.memory = machine.cuda.memory, machine.cuda.memory - machine.cuda.free + 100
    with pytest.raises(DeviceMemoryError, match="no room for"):
        sampler.sample_actions(*inputs, noise=noise())
    gc.collect()
    assert machine.cuda.execs == 0  # all that the failed run held is given back
    machine.cuda.memory = room
    plain, _ = fake_sampler(machine.bundle)
    for case in (inputs, small):
        expected = plain.sample_actions(*case, noise=noise())
        np.testing.assert_allclose(sampler.sample_actions(*case, noise=noise()), expected, **CLOSE)


def test_nan_is_refused_and_does_not_reach_later_calls(machine, fake_sampler, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    plain, _ = fake_sampler(machine.bundle)
    for graph in ("prefix", "denoise"):
        machine.engine.poison = graph
        with pytest.raises(BackendError, match=r"denoise graph in float32 gave 30 of 30 .* NaN or infinite"):
            sampler.sample_actions(*inputs, noise=noise())
        machine.engine.poison = None
        expected = plain.sample_actions(*inputs, noise=noise())
        np.testing.assert_allclose(sampler.sample_actions(*inputs, noise=noise()), expected, **CLOSE)
    machine.engine.poison = "fast_decode"
    with pytest.raises(BackendError, match="not finite"):
        sampler.sample_fast_tokens(*inputs, max_tokens=4)
    machine.engine.poison = None
    expected = plain.sample_fast_tokens(*inputs, max_tokens=4)
    np.testing.assert_array_equal(sampler.sample_fast_tokens(*inputs, max_tokens=4), expected)


def test_an_engine_that_does_not_load(machine):
    path = machine.bundle.path / "prefix.engine"
    path.write_text("something else")
    with pytest.raises(BackendError, match=r"cannot load .*prefix\.engine; build it again: Magic tag does not match$"):
        machine.sampler()
    machine.cuda.memory = machine.cuda.memory - machine.cuda.free
    with pytest.raises(DeviceMemoryError, match="no room"):
        machine.sampler()


def test_an_engine_that_does_not_load_is_built_again_once(make_bundle, fake_sampler, batch):
    asked = []

    def rebuild(broken):
        asked.append(broken)
        broken.path("prefix").write_text("prefix")
        return broken

    machine = Machine(make_bundle(), rebuild=rebuild)
    path, inputs = machine.bundle.path / "prefix.engine", batch([[True]], [[3, 4]])
    path.write_text("something else")
    ours = machine.sampler().sample_actions(*inputs, noise=noise())
    np.testing.assert_allclose(ours, fake_sampler(machine.bundle)[0].sample_actions(*inputs, noise=noise()), **CLOSE)
    (line,) = machine.lines
    assert re.search(r"cannot load .*prefix\.engine: Magic tag does not match; building it again$", line)
    path.write_text("broken again")
    with pytest.raises(BackendError, match=r"cannot load .*prefix\.engine; build it again"):
        machine.sampler()
    assert len(asked) == 1


def test_an_engine_that_cannot_be_read(machine):
    path = machine.bundle.path / "prefix.engine"
    for spoil in (lambda: path.write_bytes(b""), path.unlink):
        spoil()
        with pytest.raises(BackendError, match=r"cannot read .*prefix\.engine .*; build it again"):
            machine.sampler()


def test_no_room_for_a_context(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    machine.trt.quirks.update({"context": False})
    with pytest.raises(BackendError, match="graph prefix: no execution context"):
        sampler.sample_actions(*inputs, noise=noise())
    machine.cuda.memory -= machine.cuda.free - 999  # the engines want 1000
    with pytest.raises(DeviceMemoryError, match="no room for"):
        sampler._prefix._session._contexts._create(0)


def test_only_engines_for_the_lean_runtime_are_trusted_with_code(make_bundle):
    assert not hasattr(Machine(make_bundle()).trt.runtime, "engine_host_code_allowed")
    assert Machine(make_bundle("lean"), {"lean": True}).trt.runtime.engine_host_code_allowed is True


@pytest.mark.parametrize(
    ("quirk", "message"),
    [
        ({"drop": "dt"}, r"denoise\.engine: tensors \['modulation', .* where \['dt', .*: build it again"),
        ({"dtype": {"x_t": "HALF"}}, r"'x_t' is INPUT HALF\[-1, 5, 6\], expected INPUT FLOAT\['B', 5, 6\]"),
        ({"dims": {"x_t": (-1, 5, 7)}}, r"'x_t' is INPUT FLOAT\[-1, 5, 7\]"),
        ({"dims": {"dt": (1,)}}, r"'dt' is INPUT FLOAT\[1\], expected INPUT FLOAT\[\]"),
    ],
)
def test_a_foreign_engine_is_refused(machine, quirk, message):
    machine.trt.quirks.update(quirk)
    with pytest.raises(BackendError, match=message):
        machine.connection.open(graphs.DENOISE)


def test_an_engine_whose_outputs_have_another_shape(machine, batch):
    machine.trt.quirks["outputs"] = {"prefix_k": (2, 1, 1, 9, 4)}
    with pytest.raises(BackendError, match=r"gives 'prefix_k' as \[2, 1, 1, 9, 4\], expected \[2, 1, 1, 20, 4\]"):
        machine.sampler().sample_actions(*batch([[True]], [[3, 4]]), noise=noise())


def test_buffers_of_another_connection_are_refused(machine):
    opened = machine.connection.open(graphs.DENOISE)
    other = Connection(
        machine.connection.api, Gpu(machine.gpu.cuda), machine.connection._engines, machine.bundle, SessionOptions()
    )
    shapes = {
        t.name: [{"B": 1, "S": 5, **opened.sizes}.get(d, d) for d in t.dims] for t in (*opened.inputs, *opened.outputs)
    }
    ours = {t.name: opened.allocate(shapes[t.name], t.dtype) for t in (*opened.inputs, *opened.outputs)}
    with pytest.raises(BackendError, match="another connection"):
        other.open(graphs.DENOISE).bind(ours)
    host = HostBuffer(np.zeros(shapes["x_t"], np.float32))
    with pytest.raises(BackendError, match="cannot use a HostBuffer"):
        opened.bind({**ours, "x_t": host})


def test_run_once(machine):
    opened = machine.connection.open(graphs.DENOISE)
    assert isinstance(opened, TensorRTSession)
    random = np.random.default_rng(0)
    sizes = {**opened.sizes, "B": 2, "S": 6}
    feeds = {t.name: np.ones([sizes.get(d, d) for d in t.dims], t.dtype) for t in opened.inputs}
    feeds["x_t"] = random.standard_normal(feeds["x_t"].shape).astype(np.float32)
    np.testing.assert_allclose(opened.run(feeds)["x_next"], machine.engine.denoise(**feeds)["x_next"], **CLOSE)


# ---------------------------------------------------------------- whether it can run


@pytest.fixture
def here(monkeypatch):
    """A machine with a GPU; here(can_build, capability)."""
    cuda = FakeCuda()

    def make(capability=(8, 7), **changes):
        cuda.capability = capability
        api = SimpleNamespace(can_build=changes.pop("can_build", True), **changes)
        monkeypatch.setattr(session.Cuda, "load", classmethod(lambda cls: Cuda(cuda)))
        monkeypatch.setattr(session.Api, "load", classmethod(lambda cls, name: api))
        return cuda

    return make


def test_engines_that_can_be_built_are_no_obstacle(here, make_bundle):
    here()
    assert obstacle(make_bundle(), "tensorrt") is None


def test_the_lean_runtime_needs_engines(here, make_bundle, monkeypatch):
    here(can_build=False, name="tensorrt_lean", version_text="10.3.0", is_rtx=False, is_lean=True, version=(10, 3))
    assert re.search("has no TensorRT engines.*ki-export --build", obstacle(make_bundle(), "tensorrt_lean"))
    assert "--lean (run where tensorrt is installed)" in obstacle(make_bundle("other"), "tensorrt_lean")
    assert obstacle(None, "tensorrt_lean") is None


@pytest.mark.parametrize("verify", [False, True])
def test_verifying_reaches_the_engines(here, make_bundle, monkeypatch, verify):
    asked = []

    def ensure(*arguments, verify):
        asked.append(verify)
        raise BackendError("enough")

    here()
    monkeypatch.setattr(session, "ensure_engines", ensure)
    with pytest.raises(BackendError, match="enough"):
        session.connect(make_bundle(), "tensorrt", SessionOptions(verify=verify))
    assert asked == [verify]


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [("int8", (8, 7), "int8 is for the CPU"), ("bfloat16", (7, 5), r"bfloat16 needs compute capability 8\.0")],
)
def test_precisions_that_cannot_run(here, make_bundle, precision, capability, message):
    here(capability)
    assert re.search(message, obstacle(make_bundle(precision=precision), "tensorrt"))


def test_no_gpu_is_told_before_tensorrt_is_imported(here, monkeypatch):
    cuda = here()
    cuda.fail["cudaGetDeviceCount"] = 100
    monkeypatch.setattr(session.Api, "load", None)
    assert obstacle(None, "tensorrt").startswith("no usable GPU")


# ---------------------------------------------------------------- TensorRT's own names


CLASSES = {"context": "IExecutionContext", "engine": "ICudaEngine", "runtime": "Runtime", "config": "IRuntimeConfig"}
RTX_ONLY = {"create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy", "is_stream_capturable"}
RTX_ONLY |= {"dynamic_shapes_kernel_specialization_strategy"}


def used_names():
    """{class: names} of TensorRT that the session's source uses."""
    source = "".join(Path(module.__file__).read_text() for module in (session, contexts))
    found = {kind: set(re.findall(rf"\b_?{kind}\.(\w+)", source)) for kind in CLASSES}
    found["context"] = {name for name in found["context"] if name not in {"enqueue", "recordable"}} | {
        "is_stream_capturable"
    }
    found["config"] |= {"create_runtime_cache"}
    return {CLASSES[kind]: names for kind, names in found.items()}


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt_lean"])
def test_every_name_exists_in_tensorrt(package):
    module = importlib.import_module(package)
    names = used_names()
    assert {"execute_async_v3", "set_tensor_address", "infer_shapes"} < names["IExecutionContext"]
    assert {"get_tensor_profile_shape", "create_execution_context", "device_memory_size_v2"} < names["ICudaEngine"]
    for owner, members in names.items():
        known = set(dir(getattr(module, owner)))
        assert members - known <= (RTX_ONLY if package == "tensorrt_lean" else set()), owner
    assert module.ExecutionContextAllocationStrategy.USER_MANAGED.name == "USER_MANAGED"
    assert {"FLOAT", "INT32", "UINT8", "BOOL"} <= set(module.DataType.__members__)
    assert {"INPUT", "OUTPUT"} <= set(module.TensorIOMode.__members__)
    assert "DEVICE" in module.TensorLocation.__members__
    if package == "tensorrt_rtx":
        assert {"serialize", "deserialize"} <= set(dir(module.IRuntimeCache))
        assert "EAGER" in module.DynamicShapesKernelSpecializationStrategy.__members__
        assert "DISABLED" in module.CudaGraphStrategy.__members__


def test_profiles_hold_what_the_runtime_asks_for(make_bundle, batch, tokenizer_model):
    """A policy's longest prompt with all cameras, and its longest decoding, padded as the runtime pads them."""
    fast = FastContract(id_offset=900, size=20, max_tokens=60)
    contract = generic(["a", "b"], state_dim=2, action_dim=2, action_horizon=5, fast=fast)
    machine = Machine(make_bundle(assets={"assets/tokenizer.model": tokenizer_model}, contract=contract.to_json()))
    sampler = machine.sampler()
    inputs = batch([[True, True]], [[3] * contract.max_token_len], length=contract.max_token_len)
    sampler.sample_actions(*inputs, noise=noise())
    sampler.sample_fast_tokens(*inputs, max_tokens=60 - 2, forced=(5, 6))
    assert machine.engine.of("prefix")[0]["prompt_tokens"].shape[1] % 16 == 0
    assert machine.engine.of("fast_decode")[0]["cache_mask"].shape[1] >= 2 * P + contract.max_token_len + 60
