"""Bundles whose witness the fake engine gave, and backends that open fake engines: what proofs are tested with."""

import io
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np

from ki_edge.bundle.witness import Continuation, Witness
from ki_runtime.backends import registry as backends
from ki_runtime.backends.backend import Setting
from ki_runtime.backends.registry import BACKENDS
from ki_runtime.policy.sampler import Sampler

from .conftest import CONFIG, FakeEngine, FakeSession

PRESENT = [[True, True], [True, False], [True, True]]  # the first and the last have one shape
LENGTHS = [5, 9, 5]


def observations(seed=0):
    """Inputs of a witness of the fake model, and its answers still missing."""
    random, width = np.random.default_rng(seed), 12
    mask = np.arange(width) < np.array(LENGTHS)[:, None]
    shape = (len(LENGTHS), CONFIG.action_horizon, CONFIG.action_dim)
    return Witness(
        images=random.integers(0, 256, (len(LENGTHS), 2, 4, 4, 3), dtype=np.uint8),
        camera_mask=np.array(PRESENT),
        prompt_tokens=np.where(mask, random.integers(2, 90, mask.shape), 0).astype(np.int32),
        prompt_mask=mask,
        noise=random.standard_normal(shape, np.float32),
        state=None,
        num_steps=4,
        actions=np.zeros(shape, np.float32),
        max_abs=np.full(len(LENGTHS), 2e-4),
        cosine_distance=1e-6,
        apart=2e-5,
        fast=Continuation(0, (3,), 4, True, np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32)),
    )


def witness_of(bundle, seed=0):
    """Observations with what the fake engine answers to them."""
    engine = FakeEngine(bundle.manifest.vocabulary.ids)
    sampler, found = Sampler(bundle, engine.open), observations(seed)
    actions = [sampler.sample_actions(*found.inputs(row), **found.more(row))[0] for row in range(len(found))]
    fast = found.fast
    ids = sampler.sample_fast_tokens(*found.inputs(0), max_tokens=fast.max_tokens, forced=fast.forced)[0]
    margins, ties = np.ones(len(ids), np.float32), np.full(len(ids), 1e-3, np.float32)
    return replace(found, actions=np.stack(actions), fast=replace(fast, ids=ids, margins=margins, ties=ties))


def packed(witness):
    """The file's bytes."""
    out = io.BytesIO()
    witness.write(out)
    return out.getvalue()


def proven_bundle(make_bundle, name="proven", content=None, **changes):
    """A bundle with the fake engine's witness, or with other content in its place."""
    plain = make_bundle(name + "-plain")
    content = packed(witness_of(plain)) if content is None else content
    parity = {"verified": True, "proven_by": {"backend": "none of these"}}
    return make_bundle(name, assets={"witness.npz": content}, **{"parity": parity, **changes})


class ReplaySession(FakeSession):
    """Records a sequence at its first run and replays it; `engine.stale` says what a replay does wrong.

    "inputs": it computes with what the tensors of that name held when it was recorded; "outputs": it writes nothing;
    "present": it reads the memory of the last run that was not a replay, as one execution context for several does.
    """

    def sequence(self, bindings):
        return Replay(self, bindings)

    def _bind(self, buffers):
        return Bound(self, super()._bind(buffers))


class Bound:
    def __init__(self, session, binding):
        self.session, self.binding = session, binding

    def run(self):
        self.session.last = self.binding
        self.binding.run()


class Replay:
    def __init__(self, session, bindings):
        self.session, self.bindings, self.kept = session, bindings, None

    def run(self):
        engine, stale = self.session.engine, self.session.engine.stale
        name = self.session.inputs[0].name
        first = self.bindings[0].binding.buffers[name]
        if self.kept is None:
            self.kept = first.read()
            for binding in self.bindings:
                binding.run()
            return
        engine.replays.append(self.session.spec.name)
        if stale.get("inputs") == name:
            first.write(self.kept)
        for binding in self.bindings if stale.get("outputs") != self.session.spec.name else ():
            (self.session.last if stale.get("present") == self.session.spec.name else binding.binding).run()


@dataclass
class Wrong(FakeEngine):
    """The fake engine with a fault: `off` {graph: what is added to its first output}; `stale`: see ReplaySession."""

    off: dict = field(default_factory=dict)
    stale: dict = field(default_factory=dict)
    replays: list = field(default_factory=list)
    failure: Exception | None = None
    opened: list = field(default_factory=list)

    def open(self, spec):
        self.opened.append(spec.name)
        return ReplaySession(self, spec)

    def _off(self, name, found):
        if self.failure is not None:
            raise self.failure
        first = next(iter(found))
        return {**found, first: found[first] + np.float32(self.off.get(name, 0.0))}

    def prefix(self, **feeds):
        return self._off("prefix", super().prefix(**feeds))

    def denoise(self, **feeds):
        return self._off("denoise", super().denoise(**feeds))

    def fast_decode(self, **feeds):
        found = super().fast_decode(**feeds)
        return {**found, "logits": np.roll(found["logits"], 1, axis=1)} if "fast_decode" in self.off else found


class Backends:
    """A machine with the backends of these names, which open {name: engine}. `environment`: {name: its setting's}."""

    def __init__(self, monkeypatch, engines):
        self.engines, self.environment = engines, {name: {"driver": "560"} for name in engines}
        chosen = tuple(backend for backend in BACKENDS if backend.name in engines)
        monkeypatch.setattr(backends, "BACKENDS", tuple(replace(b, module=b.name) for b in chosen))
        monkeypatch.setattr("ki_runtime.backends.backend.find_spec", lambda name: name)
        monkeypatch.setattr("ki_runtime.backends.backend.import_module", self.module)

    def module(self, name):
        def setting(bundle, package, names):
            return Setting({**self.environment[name], "engines": ",".join(names)}, bundle.path / "engines" / name)

        return SimpleNamespace(
            obstacle=lambda bundle, package: None,
            connect=lambda bundle, package, options: self.engines[name].open,
            setting=setting,
        )
