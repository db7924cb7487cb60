"""An environment of openpi as a robot: `openpi:MODULE:CLASS`, any class of openpi-client's `Environment`.

It is told by what it has, so openpi-client is needed only where the environment's own module imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.errors import RobotError
from ki_edge.policy.contract import PolicyContract

from .base import EpisodeStatus, checked_action
from .classes import construct, load_class

METHODS = ("reset", "is_episode_complete", "get_observation", "apply_action")
WITHOUT_CLIENT = (
    "openpi-client 0.1.2 asks for numpy below 2: use an environment of its own with it and the ki-edge wheel, or "
    "pip install --no-deps openpi-client"
)


class OpenpiRobot:
    """Observations as the environment gives them; each action goes out as {"actions": f32 [a]}.

    openpi's environments name no rate (its Runtime has one) and no success: the rate is the policy's or the loop's.
    """

    control_hz: float | None = None

    def __init__(self, environment: Any, name: str) -> None:
        self.name = name
        self._environment = environment
        self._size: int | None = None
        self._steps = 0
        self._picture: NDArray[np.uint8] | None = None

    @classmethod
    def open(cls, spec: str, arguments: Mapping[str, Any]) -> OpenpiRobot:
        """The environment "MODULE:CLASS", made with these arguments. RobotError if it is none, or cannot be made."""
        name = f"openpi:{spec}"
        module, _, attribute = spec.partition(":")
        try:
            made = construct(load_class(module, attribute, f"robot {name!r:.80}"), (), arguments, f"robot {name!r:.80}")
        except RobotError as error:
            if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == "openpi_client":
                raise RobotError(f"{error}: {WITHOUT_CLIENT}") from error
            raise
        if missing := [method for method in METHODS if not callable(getattr(made, method, None))]:
            raise RobotError(
                f"robot {name!r:.80}: {type(made).__name__} is no openpi environment, it has no {', '.join(missing)}; "
                "for a robot of this project's own form leave openpi: away"
            )
        return cls(made, name)

    def fit(self, contract: PolicyContract) -> None:
        """How many numbers an action has from now on."""
        self._size = contract.action_dim

    def reset(self, seed: int | None = None) -> None:
        """Start an episode. An environment of openpi takes no seed."""
        self._environment.reset()
        self._steps = 0

    def observe(self) -> dict[str, Any]:
        """The environment's observation. RobotError if it is no dict."""
        observation = self._environment.get_observation()
        if not isinstance(observation, Mapping):
            raise RobotError(f"{self.name}: get_observation gave {type(observation).__name__}, expected a dict")
        self._picture = _first_picture(observation)
        return dict(observation)

    def act(self, action: NDArray[np.float32]) -> None:
        """Apply one action f32 [a]."""
        values = checked_action(action, self._size or np.size(action), self.name)
        self._environment.apply_action({"actions": values})
        self._steps += 1

    def status(self) -> EpisodeStatus:
        """Done where the environment says so."""
        return EpisodeStatus(bool(self._environment.is_episode_complete()), None, self._steps)

    def frame(self) -> NDArray[np.uint8] | None:
        """The first picture of the last observation, RGB u8 [h, w, 3]."""
        return self._picture

    def close(self) -> None:
        """Close the environment, if it can be closed."""
        close = getattr(self._environment, "close", None)
        if callable(close):
            close()


def _first_picture(observation: Mapping[str, Any]) -> NDArray[np.uint8] | None:
    images = observation.get("images")
    for value in (images if isinstance(images, Mapping) else observation).values():
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
            if value.shape[2] == 3:
                return value
            if value.shape[0] == 3:
                return value.transpose(1, 2, 0)
    return None
