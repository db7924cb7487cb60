"""From noise to actions: the Euler loop over the denoise graph.

Everything a step needs is bound before the loop starts: x_t and x_next swap between two buffers, K/V are the prefix
graph's own outputs, and each step has its row of the modulation table. The loop itself only runs bindings, and all of
them as one sequence, which a backend may record and replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ki_edge import flow
from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.dtypes import FLOATS
from ki_edge.errors import BackendError, BundleError
from ki_edge.overlap import Overlap, guidance_weights
from ki_runtime.backends.session import Array, Binding, Buffer, Session, Storage

from .prefix import Prefix
from .room import clean

F32 = npt.NDArray[np.float32]
MAX_TABLES = 4
TensorReader = Callable[[str], npt.NDArray[np.floating[Any]]]


@dataclass(eq=False)
class Clock:
    """What depends on the number of steps alone, on the device: modulation f32 [M, R] of each step, dt f32 [].

    With real-time chunking also the time and the guidance f32 [] of each step; the guidance is written anew where a
    call wants another `maximum`.
    """

    times: F32
    rows: tuple[Buffer, ...]
    dt: Buffer
    marks: tuple[Buffer, ...] = ()  # the times
    pulls: tuple[Buffer, ...] = ()
    maximum: float = 0.0

    def guide(self, maximum: float | None) -> None:
        """Let no step pull more than `maximum`; None: than the number of steps."""
        wanted = float(len(self.times) if maximum is None else maximum)
        if self.pulls and wanted != self.maximum:
            for buffer, pull in zip(self.pulls, guidance_weights(self.times, wanted), strict=True):
                buffer.write(np.asarray(pull))
            self.maximum = wanted

    def step(self, index: int) -> dict[str, Buffer]:
        """The denoise graph's inputs that are a step's own."""
        guided = {"time": self.marks[index], "guidance": self.pulls[index]} if self.marks else {}
        return {"modulation": self.rows[index], **guided}


@dataclass(frozen=True, eq=False)
class _Loop:
    clock: Clock
    steps: tuple[Binding, ...]
    whole: Binding  # all steps
    places: tuple[Buffer, Buffer]  # x before even steps, x before odd steps
    once: dict[str, Buffer]  # inputs that are written once for all steps: π0's state, the chunk before

    def x(self, step: int) -> Buffer:
        """Where x lies before this step."""
        return self.places[step % 2]

    def start(self, noise: F32, once: Mapping[str, Array], overlap: Overlap | None) -> None:
        """Write everything that the first step needs. Without an overlap, zeros: what the run before had is gone."""
        self.x(0).write(noise)
        given = {**once, **_before(overlap)}
        for name, buffer in self.once.items():
            buffer.write(given[name] if name in given else np.zeros(buffer.shape, buffer.dtype))
        if overlap is not None:
            self.clock.guide(overlap.maximum)


def _before(overlap: Overlap | None) -> dict[str, Array]:
    """The denoise graph's inputs that hold the chunk before."""
    if overlap is None:
        return {}
    return {"previous": overlap.actions, "previous_weights": overlap.weights, "committed": overlap.committed}


class DenoiseStage:
    """The denoise graph with its memory. `tensor(name)` reads a checkpoint tensor for the modulation table.

    `once` holds what an observation gives to the graph by name, the same for all steps: {"state": f32 [B, Z]} for a π0,
    else nothing. `overlap`: the chunks before, for a graph that takes them; it is checked already. `tables`: where
    modulation tables are kept, by their times; they outlive the stage.
    """

    def __init__(
        self,
        session: Session,
        tensor: TensorReader,
        config: Pi05Config,
        convention: str,
        tables: dict[bytes, F32] | None = None,
    ) -> None:
        self._session = session
        self._tables = {} if tables is None else tables
        self._tensor, self._config, self._convention = tensor, config, convention
        self.forget()

    def run(
        self, prefix: Prefix, noise: F32, num_steps: int, once: Mapping[str, F32], overlap: Overlap | None = None
    ) -> F32:
        """Actions f32 [B, H, A], in the model's space, from noise of that shape."""
        with clean(self):
            loop = self._loop(prefix, num_steps)  # binds what is new: nothing allocates after this line
            loop.start(noise, once, overlap)  # anew for every run: the steps overwrite the noise
            loop.whole.run()  # on a GPU only queued: from here on the host writes to no buffer of the loop
            return loop.x(num_steps).read()  # waits for the device; it is where a further step would have read x

    def drop_oldest(self) -> bool:
        """Let go of the step count that was not used for longest, and of the loops with it."""
        if len(self._clocks) < 2:
            return False
        stale, _ = self._clocks.popitem(last=False)
        for loops in self._loops.values():
            loops.pop(stale, None)
        return True

    def states(
        self, prefix: Prefix, noise: F32, num_steps: int, once: Mapping[str, F32], overlap: Overlap | None = None
    ) -> F32:
        """x before every step and after the last, f32 [steps + 1, B, H, A]."""
        with clean(self):
            loop = self._loop(prefix, num_steps)
            loop.start(noise, once, overlap)
            states = [loop.x(0).read()]
            for i, step in enumerate(loop.steps):
                step.run()
                states.append(loop.x(i + 1).read())
            return np.stack(states)

    def forget(self) -> None:
        """Let go of all memory: nothing of a failed run is left for later ones."""
        self._storage = Storage(self._session)
        self._clocks: OrderedDict[int, Clock] = OrderedDict()
        self._loops: WeakKeyDictionary[Prefix, dict[int, _Loop]] = WeakKeyDictionary()  # by number of steps
        self._settled: Buffer | None = None  # the modulation of committed actions

    def _loop(self, prefix: Prefix, num_steps: int) -> _Loop:
        clock = self.clock(num_steps)  # first: it may drop an old clock, whose loops go below
        loops = self._loops.setdefault(prefix, {})
        if num_steps not in loops or loops[num_steps].clock is not clock:
            loops[num_steps] = self._bind(prefix, clock)
            for stale in set(loops) - set(self._clocks):
                del loops[stale]
        return loops[num_steps]

    def _bind(self, prefix: Prefix, clock: Clock) -> _Loop:
        symbols = {**self._session.sizes, "B": prefix.batch}
        spec = self._session.spec
        even = self._storage.take(spec.tensor("x_t"), symbols)
        odd = self._storage.take(spec.tensor("x_next"), symbols)
        common = {"dt": clock.dt, "prefix_k": prefix.k, "prefix_v": prefix.v, "prefix_mask": prefix.mask}
        if self._config.rtc == "trained":
            common["committed_modulation"] = self._settled_modulation()
        others = [tensor for tensor in spec.inputs if tensor.name not in (*common, "x_t", *clock.step(0))]
        once = {tensor.name: self._storage.take(tensor, symbols) for tensor in others}
        common.update(once)
        swap = ({"x_t": even, "x_next": odd}, {"x_t": odd, "x_next": even})
        steps = [self._session.bind({**common, **swap[i % 2], **clock.step(i)}) for i in range(len(clock.rows))]
        return _Loop(clock, tuple(steps), self._session.sequence(steps), (even, odd), once)

    def clock(self, num_steps: int) -> Clock:
        """The modulation rows of one step count, computed at its first use. ArgumentError for a bad count."""
        flow.check_steps(num_steps)
        if num_steps not in self._clocks:
            self._clocks[num_steps] = self._wind(num_steps)
        self._clocks.move_to_end(num_steps)
        if len(self._clocks) > MAX_TABLES:
            self._clocks.popitem(last=False)
        return self._clocks[num_steps]

    def _wind(self, num_steps: int) -> Clock:
        times = flow.denoise_times(num_steps, self._convention)
        rows = [self._placed(row) for row in self._modulation(times)]
        clock = Clock(times, tuple(rows), self._placed(np.asarray(flow.step_size(num_steps))))
        if self._config.rtc != "none":
            clock.marks = tuple(self._placed(np.asarray(time)) for time in times)
            clock.pulls = tuple(self._session.allocate((), "float32") for _ in times)
            clock.guide(None)
        return clock

    def _settled_modulation(self) -> Buffer:
        if self._settled is None:
            self._settled = self._placed(self._modulation(np.zeros(1, np.float32))[0])
        return self._settled

    def _placed(self, array: F32) -> Buffer:
        """A buffer with these values."""
        buffer = self._session.allocate(array.shape, "float32")
        buffer.write(array)
        return buffer

    def _modulation(self, times: F32) -> F32:
        """What a step is told of each time, f32 [times, M, R]; BackendError if it is not finite."""
        key = times.tobytes()
        if key not in self._tables:
            for stale in list(self._tables)[: len(self._tables) - MAX_TABLES]:  # and that of committed actions
                del self._tables[stale]
            self._tables[key] = self._computed(times)
        return self._tables[key]

    def _computed(self, times: F32) -> F32:
        with np.errstate(all="ignore"):  # of weights that are not finite, which is told below
            table = flow.modulation_table(self._tensor, times, self._config)
        if not np.isfinite(table).all():
            raise BackendError(
                "the time modulation is not finite: the weights of time_mlp or of the expert's norms hold NaN or huge "
                "values; export the checkpoint again"
            )
        return table


def runtime_weights(bundle: Bundle) -> TensorReader:
    """Reader of the checkpoint tensors that the runtime itself computes with, by their checkpoint names.

    BundleError if the manifest does not say where one of them lies, or what lies there is of another shape or type.
    """
    recorded = bundle.manifest.weights.get("runtime")
    names = recorded if isinstance(recorded, dict) else {}
    weights = bundle.weights()
    missing = [name for name in flow.modulation_weights(bundle.manifest.config) if str(names.get(name)) not in weights]
    if missing:
        raise BundleError(
            f"{bundle.path}: the manifest or the weights file lacks '{missing[0]}' ({len(missing)} such), which the "
            "time modulation needs: export the checkpoint again"
        )
    expected = flow.modulation_weights(bundle.manifest.config)
    for name, shape in expected.items():
        stored = str(names[name])
        swapped = [other for other in expected if other != name and f".{stored}".endswith(f".{other}")]
        if swapped:
            raise BundleError(
                f"{bundle.path}: the manifest gives '{stored}' as '{name}': they are swapped; export it again"
            )
        entry = weights.entries[stored]
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise BundleError(
                f"{weights.path}: '{stored}', which the manifest gives as '{name}', is {entry.dtype} "
                f"{list(entry.shape)}, expected {list(shape)} in {', '.join(FLOATS)}: export the checkpoint again"
            )
    return lambda name: weights.array(str(names[name]))
