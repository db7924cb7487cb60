"""`auto` on a CPU where two engines are installed: each runs the bundle once, and the faster one is remembered.

One after the other, so that two never hold the model at once. An engine that does not reproduce the witness is out of
the race. From the second start on only the record is read. Where one cannot run the bundle anyway, or has no room for
its copy of the weights just now, nothing is measured and nothing is remembered.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.policy.contract import PolicyContract
from ki_edge.proc import available_memory
from ki_runtime.backends.backend import Backend
from ki_runtime.backends.choice import Choice, find_choice, keep_choice
from ki_runtime.backends.registry import BACKENDS, on_cpu
from ki_runtime.backends.variant import wished

from .opening import detached

if TYPE_CHECKING:
    from .sampler import Sampler

WARM, TIMED = 1, 3  # inferences
CAMERAS, TOKENS = 2, 30  # of a bundle without a contract
COPIES = {"openvino": 1.2}  # of the acting graphs' weights, that an engine makes in memory which cannot be taken back


def measure_once(bundle: Bundle, opened: Callable[[str], Sampler], say: Callable[[str], object]) -> None:
    """See to it that it is known which engine for a CPU is the fastest, where one of them is what will be taken.

    `opened(name)`: a proven sampler on that backend, or BackendError.
    """
    rivals = on_cpu()
    if len(rivals) < 2 or wished(bundle) is not None or find_choice(bundle, rivals) is not None:
        return
    if any(backend.device != "CPU" and backend.obstacle(bundle) is None for backend in BACKENDS):
        return  # a GPU's comes first
    if any(backend.obstacle(bundle) is not None for backend in rivals):
        return
    for backend in rivals:
        if (why := _no_room(bundle, backend)) is not None:
            say(f"{backend.name} is left out: {why}")
            return  # there may be room at another start
    say(f"measuring once which is faster here, {' or '.join(backend.name for backend in rivals)}")
    took = {backend.name: _time(backend, opened, say) for backend in rivals}
    if any(math.isfinite(each) for each in took.values()):
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        keep_choice(bundle, rivals, Choice(took, date))


def _time(backend: Backend, opened: Callable[[str], Sampler], say: Callable[[str], object]) -> float:
    """Milliseconds of an inference; infinite if the backend cannot."""
    try:
        with _alone():
            sampler = opened(backend.name)
            found = min(_inferences(sampler)[WARM:])  # the others met what else runs here
            del sampler
    except BackendError as error:
        say(f"{backend.name} is left out: {detached(error)}")
        return math.inf
    say(f"{backend.name}: {found:.0f} ms an inference")
    return found


def _inferences(sampler: Sampler) -> list[float]:
    """Milliseconds of each, all of one usual size."""
    inputs, state = grey_inputs(sampler.bundle)
    found = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        sampler.sample_actions(*inputs, state=state, seed=0)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def grey_inputs(bundle: Bundle) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """A sampler's four inputs and the state: every camera of the contract, a prompt of a usual length."""
    config = bundle.manifest.config
    contract = None if bundle.manifest.contract is None else PolicyContract.from_json(bundle.manifest.contract)
    cameras, tokens = CAMERAS, TOKENS
    if contract is not None:
        cameras = max(1, sum(camera.key is not None for camera in contract.cameras))
        tokens = min(TOKENS, contract.max_token_len)
    size = config.vision.image_size
    pixel = np.dtype(graphs.specs(config)[0].tensor("images").dtype)
    images = np.full((1, cameras, size, size, 3), 128 if pixel == np.uint8 else 0, pixel)
    prompt = np.arange(tokens, dtype=np.int32)[None] % config.vocab_size
    state = np.zeros((1, config.state_size), np.float32) if config.has_state else None
    return (images, np.ones((1, cameras), np.bool_), prompt, np.ones((1, tokens), np.bool_)), state


def _no_room(bundle: Bundle, backend: Backend) -> str | None:
    """Why there is no room for the engine's own copy of the weights; None where there is, or nobody knows."""
    free, acting = available_memory(), [graphs.PREFIX.name, graphs.DENOISE.name]
    sizes = [bundle.manifest.graphs.get(name, {}).get("weight_bytes") for name in acting]
    if free is None or backend.name not in COPIES or not all(isinstance(size, int) for size in sizes):
        return None
    need = COPIES[backend.name] * sum(sizes)  # type: ignore[arg-type]
    return None if need < free else f"its copy of the weights takes {need / 1e9:.1f} GB, {free / 1e9:.1f} are free"


@contextmanager
def _alone() -> Iterator[None]:
    """What is opened within is gone afterwards."""
    try:
        yield
    finally:
        gc.collect()
