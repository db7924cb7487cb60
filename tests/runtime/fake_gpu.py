"""A GPU without a GPU: TensorRT's runtime over the fake engine, on the fake CUDA of `fake_cuda`."""

import enum
import weakref
from types import SimpleNamespace

import numpy as np

from ki_edge import graphs
from ki_runtime.trt.api import Api

from .conftest import CONFIG
from .fake_cuda import FakeCuda, array_at, real

__all__ = ["FakeCuda", "FakeTensorRT", "real"]


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class FakeTensorRT:
    """The module `tensorrt` as a robot has it. Engine files hold the name of their graph and nothing else.

    `quirks` {what: value}: "outputs" {tensor: shape} that the engine gives instead, "execute" None or False in turn,
    "memory" bytes of scratch, "capturable", "drop" a tensor that the engines lack, "dtype" {tensor: name}, "rtx",
    "context" False: none is made, "persistent" bytes that each context takes of its own. "late": plans keep their
    addresses in host memory that recorded nodes read, so a replay uses those that its context has at that time.

    In every mode a context that was recorded must never be touched again.
    """

    __version__ = "10.3.0"
    ExecutionContextAllocationStrategy = enum.Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
    ILogger = type("ILogger", (), {"Severity": Severity, "__init__": lambda self: None})

    def __init__(self, cuda, engine, profiles):
        self.cuda, self.engine, self.profiles = cuda, engine, profiles
        self.quirks, self.contexts, self.loaded = {}, [], []

    DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", "LAZY EAGER NONE")
    CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")

    def api(self):
        if self.quirks.get("rtx"):
            return Api(self, "tensorrt_rtx", (1, 7, 1), "1.7.1")
        return Api(self, "tensorrt", (10, 3, 0), self.__version__)

    def Runtime(self, logger):
        self.runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: self.load(logger, bytes(content[:])))
        return self.runtime

    def load(self, logger, content):
        spec = next((s for s in (*graphs.GRAPHS, graphs.DENOISE_WITH_STATE) if s.name.encode() == content), None)
        if spec is None:
            logger.log(Severity.ERROR, "Magic tag\n does not match")
            return None
        self.loaded.append(spec.name)
        return FakeTrtEngine(self, logger, spec)


class FakeTrtEngine:
    def __init__(self, module, logger, spec):
        self.module, self.logger, self.spec = module, logger, spec
        self.tensors = {t.name: t for t in (*spec.inputs, *spec.outputs) if t.name != module.quirks.get("drop")}
        self.sizes = graphs.sizes(CONFIG, len(module.engine.column_ids))
        self.ranges = module.profiles[spec.name]
        self.device_memory_size_v2 = module.quirks.get("memory", 1000)
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.ranges)

    def get_tensor_name(self, index):
        return sorted(self.tensors)[index]

    def get_tensor_mode(self, name):
        return SimpleNamespace(name="INPUT" if self.tensors[name] in self.spec.inputs else "OUTPUT")

    def get_tensor_dtype(self, name):
        found = {"uint8": "UINT8", "bool": "BOOL", "int32": "INT32", "float32": "FLOAT"}[self.tensors[name].dtype]
        return SimpleNamespace(name=self.module.quirks.get("dtype", {}).get(name, found))

    def get_tensor_location(self, name):
        return SimpleNamespace(name="DEVICE")

    def get_tensor_shape(self, name):
        dims = self.tensors[name].resolve({**self.sizes, **dict.fromkeys(graphs.DYNAMIC, -1)})
        return self.module.quirks.get("dims", {}).get(name, dims)

    def get_tensor_profile_shape(self, name, index):
        return [list(shape) for shape in self.ranges[index][name]]

    def create_runtime_config(self):
        config = SimpleNamespace(engine=self)
        config.create_runtime_cache = lambda: FakeKernels()
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, choice):
        if self.module.quirks.get("context") is False:
            return None
        strategy = choice
        if self.module.quirks.get("rtx"):
            strategy = choice.strategy
            assert choice.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
            assert choice.cuda_graph_strategy.name == "DISABLED"
            choice.cache.content += b"k"  # compiled for this context
        assert strategy is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.module.cuda.free < self.module.quirks.get("persistent", 0):
            return None
        context = FakeContext(self)
        if "persistent" not in self.module.quirks:  # else it must be able to go
            self.module.contexts.append((self.spec.name, context))
        return context


class FakeKernels:
    def __init__(self):
        self.content = b""

    def deserialize(self, content):
        self.content = content
        return True

    def serialize(self):
        return self.content


class FakeContext:
    def __init__(self, engine):
        self.engine, self.module, self.cuda = engine, engine.module, engine.module.cuda
        self.shapes, self.addresses, self.scratch, self.profile = {}, {}, None, None
        self.settled = False  # an enqueue after the last change of a shape
        self.recorded = 0  # enqueues within a stream capture
        own = self.module.quirks.get("persistent", 0)
        if own:
            _, address = self.cuda.cudaMalloc(own)
            weakref.finalize(self, self.cuda.blocks.pop, address)
        if "capturable" in self.module.quirks:
            self.is_stream_capturable = lambda stream: self.module.quirks["capturable"]

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_device_memory(self, address, size):
        assert size >= self.engine.device_memory_size_v2 and address in self.cuda.blocks
        self.scratch = address

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.ranges[self.profile][name]
        self.shapes[name], self.settled = tuple(shape), False
        return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

    def infer_shapes(self):
        dynamic = [t.name for t in self.engine.spec.inputs if -1 in self.engine.get_tensor_shape(t.name)]
        return [name for name in dynamic if name not in self.shapes]

    def symbols(self):
        found = dict(self.engine.sizes)
        for tensor in self.engine.spec.inputs:
            found.update(zip(tensor.dims, self.shapes.get(tensor.name, ()), strict=False))
        if "N" in found:
            found["S"] = found["N"] * found["P"] + found["T"]
        return found

    def get_tensor_shape(self, name):
        shape = tuple(self.engine.tensors[name].resolve(self.symbols()))
        return self.module.quirks.get("outputs", {}).get(name, shape)

    def set_tensor_address(self, name, address):
        assert self.module.quirks.get("late") or not self.recorded, "another address in a recorded context"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 77 and self.scratch is not None and set(self.addresses) == set(self.engine.tensors)
        if self.module.quirks.get("execute") is False or (self.cuda.capturing is not None and not self.settled):
            self.engine.logger.log(Severity.ERROR, "enqueueV3: something\n is wrong")
            return False
        late = self.module.quirks.get("late")
        assert late or not self.recorded, "a recorded context is used again"
        self.settled = True
        self.recorded += self.cuda.capturing is not None
        spec, symbols, addresses = self.engine.spec, self.symbols(), dict(self.addresses)
        if late and self.cuda.capturing is not None:
            addresses = self.addresses  # as they are when the replay runs
        self.cuda.enqueue(lambda: compute(self.module.engine, spec, symbols, addresses))
        return True


def compute(engine, spec, symbols, addresses):
    def tensor(t):
        return array_at(addresses[t.name], t.resolve(symbols), t.dtype)

    feeds = {t.name: tensor(t).copy() for t in spec.inputs}
    engine.calls.append((spec.name, feeds))
    for name, value in getattr(engine, spec.name)(**feeds).items():
        out = tensor(spec.tensor(name))
        out[...] = np.nan if spec.name == engine.poison and out.dtype == np.float32 else value
