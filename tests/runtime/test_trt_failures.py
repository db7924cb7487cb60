"""What a GPU and TensorRT refuse: each a typed error, after which the sampler works again."""

import gc
import re

import numpy as np
import pytest

from ki_edge import graphs
from ki_edge.errors import BackendError, DeviceError, DeviceMemoryError
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.session import HostBuffer
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.trt.session import Connection

from .fake_gpu import FakeContext
from .gpu_machine import CLOSE, Machine, noise


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
        sampler._prefix._session.contexts._create(0)


def test_only_engines_for_the_lean_runtime_are_trusted_with_code(make_bundle):
    for name, quirks in {"plain": {}, "lean": {"lean": True}}.items():
        machine = Machine(make_bundle(name), quirks)
        machine.sampler()
        assert getattr(machine.trt.runtime, "engine_host_code_allowed", False) is (name == "lean")


def test_whatever_tensorrt_raises_is_typed(make_bundle, batch):
    """Its bindings raise where no object can be made, or a text or a number is none."""

    def fail(*_):
        raise TypeError("factory function returned nullptr\nand a signature")

    bundle, inputs = make_bundle(), batch([[True]], [[3, 4]])
    machine = Machine(bundle)
    machine.trt.Runtime = fail
    with pytest.raises(BackendError, match=r"^TensorRT 10\.3\.0: no runtime: factory function returned nullptr$"):
        machine.sampler()
    machine = Machine(bundle)
    machine.trt.load = fail
    with pytest.raises(BackendError, match=r"cannot load .*prefix\.engine; build it again: factory function"):
        machine.sampler()
    for name in ("create_execution_context", "get_tensor_profile_shape"):
        machine = Machine(bundle)
        sampler = machine.sampler()
        setattr(sampler._prefix._session.contexts._engine, name, fail)
        with pytest.raises(
            BackendError, match=r"graph prefix: no execution context: factory function returned nullptr$"
        ):
            sampler.sample_actions(*inputs, noise=noise())
    for name, what in {
        "infer_shapes": "its shapes are not known",
        "set_input_shape": "no execution context",
        "set_tensor_address": "running it",
        "execute_async_v3": "running it",
    }.items():
        machine = Machine(bundle)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeContext, name, fail)
            with pytest.raises(BackendError, match=f"graph prefix: {what}: factory function returned nullptr$"):
                machine.sampler().sample_actions(*inputs, noise=noise())


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
