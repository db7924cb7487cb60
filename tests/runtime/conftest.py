"""A fake engine at the session seam, and a small bundle for it to open: pipeline tests without any inference engine."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from safetensors.numpy import save_file

from ki_edge import flow, graphs
from ki_edge.bundle import Bundle, Manifest, write_bundle
from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_runtime.backends.session import HostBuffer, Session
from ki_runtime.policy.sampler import Sampler

CONFIG = Pi05Config(
    vision=VisionConfig(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=2, image_size=4),
    backbone=GemmaConfig(width=8, depth=2, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=4),
    expert=GemmaConfig(width=8, depth=2, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=4),
    vocab_size=1000,
    action_dim=6,
    action_horizon=5,
)
FAST_FIRST, FAST_COUNT, BAR, EOS = 600, 40, 7, 1


@dataclass
class FakeEngine:
    """Computes each graph with a formula simple enough to repeat in a test, and keeps what it was fed."""

    column_ids: list
    calls: list = field(default_factory=list)  # (graph, inputs) of every run
    bindings: list = field(default_factory=list)  # (graph, buffers) of every binding
    poison: str | None = None  # a graph whose outputs become NaN

    def open(self, spec):
        return FakeSession(self, spec)

    def of(self, name):
        return [inputs for graph, inputs in self.calls if graph == name]

    def prefix(self, images, camera_mask, prompt_tokens, prompt_mask):
        pixels = images.astype(np.float32).mean(axis=(2, 3, 4)).repeat(CONFIG.vision.patches, axis=1)
        values = np.concatenate([pixels, prompt_tokens.astype(np.float32)], axis=1)
        mask = np.concatenate([camera_mask.repeat(CONFIG.vision.patches, axis=1), prompt_mask], axis=1)
        k = np.broadcast_to(values[None, :, None, :, None], (2, len(values), 1, values.shape[1], 4))
        return {"prefix_k": k, "prefix_v": k + 0.5, "prefix_mask": mask}

    def denoise(self, x_t, modulation, dt, prefix_k, prefix_v, prefix_mask, *, previous=None, **steering):
        seen = (prefix_k[0, :, 0, :, 0] * prefix_mask).sum(axis=1)[:, None, None]
        v_t = modulation[1, 2] + np.float32(1e-3) * seen
        if previous is None:
            return {"x_next": x_t + dt * v_t}
        error = (previous - (x_t - steering["time"] * v_t)) * steering["previous_weights"][..., None]
        x_next = x_t + dt * (v_t - steering["guidance"] * error)
        if "committed" in steering:
            settled = previous + np.float32(1e-3) * steering["committed_modulation"][1, 2]
            x_next = np.where(steering["committed"][..., None], settled, x_next)
        return {"x_next": x_next}

    def fast_decode(self, tokens, positions, cache_k, cache_v, cache_mask):
        seen = (cache_k[0, :, 0, :, 0] * cache_mask).sum(axis=1) + tokens.sum(axis=1)
        np.testing.assert_array_equal((cache_v - cache_k)[0, :, 0, :, 0][cache_mask], 0.5)
        np.testing.assert_array_equal(positions, cache_mask.sum(axis=1)[:, None] + np.arange(tokens.shape[1]))
        ids = np.array(self.column_ids)
        logits = -np.abs(ids[None, :] - (600 + np.round(seen)[:, None] % 43)).astype(np.float32)
        k = np.broadcast_to(
            tokens.astype(np.float32)[None, :, None, :, None], (2, *tokens.shape[:1], 1, tokens.shape[1], 4)
        )
        return {"logits": logits, "new_k": k, "new_v": k + 0.5}


class FakeSession(Session):
    def __init__(self, engine, spec):
        super().__init__(spec, graphs.sizes(CONFIG, len(engine.column_ids)))
        self.engine = engine

    def allocate(self, shape, dtype):
        return HostBuffer(np.zeros(shape, dtype))

    def _bind(self, buffers):
        self.engine.bindings.append((self.spec.name, buffers))
        return FakeBinding(self, buffers)


class FakeBinding:
    def __init__(self, session, buffers):
        self.session, self.buffers = session, buffers

    def run(self):
        engine, name = self.session.engine, self.session.spec.name
        feeds = {tensor.name: self.buffers[tensor.name].read() for tensor in self.session.inputs}
        engine.calls.append((name, feeds))
        for output, value in getattr(engine, name)(**feeds).items():
            value = np.full_like(value, np.nan) if name == engine.poison and value.dtype == np.float32 else value
            self.buffers[output].write(np.ascontiguousarray(value, self.buffers[output].dtype))


def graph_entry(name, opset=20, ops=("Gemm",), weight_bytes=1000):
    """What a manifest says of a graph."""
    return {"file": f"{name}.onnx", "opset": opset, "ops": list(ops), "weight_bytes": weight_bytes}


@pytest.fixture
def make_bundle(tmp_path):
    """make_bundle(name="bundle", assets={path: bytes}, **manifest fields) -> Bundle with random runtime weights."""

    def make(name="bundle", assets=None, **changes):
        weights = runtime_weights(np.random.default_rng(0))
        fields = {
            "model": CONFIG.to_dict(),
            "contract": None,
            "sampling": {"time_convention": "openpi", "num_steps": 10},
            "precision": "float32",
            "graphs": {spec.name: graph_entry(spec.name) for spec in graphs.GRAPHS},
            "weights": {"file": "weights.safetensors", "runtime": {key: f"model.{key}" for key in weights}},
            "decode_vocabulary": {"first": FAST_FIRST, "count": FAST_COUNT, "extra": [BAR, EOS]},
            "tools": {},
            "provenance": {},
            "parity": {"verified": False},
        }
        with write_bundle(tmp_path / name) as writer:
            save_file({f"model.{key}": value for key, value in weights.items()}, writer.folder / "weights.safetensors")
            for spec in graphs.GRAPHS:
                (writer.folder / f"{spec.name}.onnx").write_bytes(b"\x08\x0a")  # a model of IR version 10, empty
            for path, content in (assets or {}).items():
                (writer.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (writer.folder / path).write_bytes(content)
            writer.seal(Manifest(**{**fields, **changes}))
        return Bundle.open(tmp_path / name)

    return make


def runtime_weights(random):
    width = CONFIG.expert.width
    shapes = {}
    for name in flow.modulation_weights(CONFIG):
        rows = width if name.startswith("time_mlp") else 3 * width
        shapes[name] = (rows, width) if name.endswith("weight") else (rows,)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def fake_sampler(make_bundle):
    """fake_sampler(bundle=None) -> (Sampler over the fake engine, the engine)."""

    def make(bundle=None):
        bundle = bundle or make_bundle()
        engine = FakeEngine(bundle.manifest.vocabulary.ids)
        return Sampler(bundle, engine.open), engine

    return make


@pytest.fixture
def machine(make_bundle):
    """A GPU and TensorRT, both fake, with a bundle and its engines."""
    from .gpu_machine import Machine

    return Machine(make_bundle())


@pytest.fixture
def batch():
    """batch(cameras=[[True, ...], ...], prompts=[[ids], ...], length) -> a sampler's four inputs, random pixels."""

    def make(cameras, prompts, length=12):
        random = np.random.default_rng(len(prompts))
        mask = np.array([np.arange(length) < len(ids) for ids in prompts])
        tokens = np.where(mask, [ids + [0] * (length - len(ids)) for ids in prompts], 0).astype(np.int32)
        images = random.integers(0, 256, (*np.shape(cameras), 4, 4, 3), dtype=np.uint8)
        return images, np.array(cameras), tokens, mask

    return make
