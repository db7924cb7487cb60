"""A bundle, its engines, a GPU and TensorRT, all but the bundle fake, and what the tests over them share."""

from types import SimpleNamespace

import numpy as np

from ki_edge import graphs
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.policy.sampler import Sampler
from ki_runtime.trt.profiles import profiles
from ki_runtime.trt.session import Connection

from .conftest import CONFIG, FakeEngine
from .fake_cuda import FakeCuda
from .fake_gpu import FakeTensorRT

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a padded sum is summed in another order
CASES = [  # cameras present, prompts
    ([[True, False]], [[2, 30, 40]]),
    ([[True, True]], [[2] * 16]),  # exactly one bucket
    ([[False, True]], [list(range(2, 19))]),  # one more
    ([[True, False], [False, True]], [[2, 30], [2, 30, 40, 50]]),
]


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
            path=lambda name: bundle.path / f"{name}.engine",
            folder=bundle.path,
            identity=SimpleNamespace(lean="lean" in quirks),
            files={spec.name: SimpleNamespace(sha256=f"hash of {spec.name}") for spec in graphs.GRAPHS},
        )
        self.gpu = Gpu(Cuda(self.cuda))
        self.connection = Connection(
            self.trt.api(),
            self.gpu,
            lambda graph: files,
            bundle,
            SessionOptions(say=self.lines.append, **options),
            rebuild,
        )

    def sampler(self):
        return Sampler(self.bundle, self.connection.open)

    def contexts(self, name):
        return [context for graph, context in self.trt.contexts if graph == name]


def noise(rows=1, seed=0):
    shape = (rows, CONFIG.action_horizon, CONFIG.action_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
