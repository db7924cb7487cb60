"""What a control loop needs from a robot."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_edge.errors import RobotError


@dataclass(frozen=True)
class EpisodeStatus:
    """Where an episode stands: over or not, reached its aim or not (None: unknown), control steps taken."""

    done: bool
    success: bool | None
    steps: int


class Robot(Protocol):
    """A robot, real or simulated. All calls come from the thread that opened it.

    A robot may also have, and a loop uses where it is there:

    action_names  what each number of an action commands; a policy whose contract names them otherwise is refused
    real_time     False for one that waits for its actions: nothing is paced then
    simulated     True for one that may be driven faster or slower than its rate (--unpaced)
    fit(contract)     told once which policy will drive it, before the first episode
    measure()         the state [s] as `observe` gives it, without pictures and at once: asked for at every tick
    timestamps()      {"front": seconds, ...} of `time.monotonic`: when the parts of the last observation were read
    limits            its own `Limits`; check(action, state)  why an action must not be sent, in one line, else None
    hold()            stand still for one control period, instead of getting the last action again
    safe_stop()       come to rest; called once before `close`, however a run ends
    """

    name: str
    control_hz: float

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode; where the start is drawn at random, the same seed gives the same one."""

    def observe(self) -> dict[str, Any]:
        """An observation in the form of the policy's contract, in robot units; of a generic one
        {"images": {camera: RGB u8 [h, w, 3]}, "state": f32 [s], "prompt": str}.
        """

    def act(self, action: NDArray[np.float32]) -> None:
        """Apply one action f32 [a], robot units, for one control period. RobotError if it is not finite."""

    def status(self) -> EpisodeStatus:
        """Where the episode stands."""

    def frame(self) -> NDArray[np.uint8] | None:
        """A picture for a film, RGB u8 [h, w, 3]; None where the robot has none."""

    def close(self) -> None:
        """Release the robot. A loop calls this once, however its run ends."""


def checked_action(action: ArrayLike, size: int, robot: str) -> NDArray[np.float32]:
    """`action` as f32 [size]; RobotError where its shape is another or a value is not finite in float32."""
    given = np.asarray(action)
    if given.shape != (size,):
        raise RobotError(f"{robot}: an action has the shape {given.shape}, expected ({size},)")
    if given.dtype.kind not in "fiu":
        raise RobotError(f"{robot}: an action is an array of {given.dtype}, expected numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        values = given.astype(np.float32)
    if not np.isfinite(values).all():
        raise RobotError(f"{robot}: the action {given.tolist()} is not finite in float32; it was not applied")
    return values
