"""Any Gymnasium environment as a robot: `gym:ID`, described by a mapping (`ki_runtime.robots.gym_mapping`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.arguments import array_of, numbers
from ki_edge.errors import RobotError
from ki_edge.policy.contract import PolicyContract

from .base import EpisodeStatus, checked_action
from .forms import ObservationForm
from .gym_mapping import GymMapping, Numbers, Success, View
from .rendering import Renderer, import_mujoco
from .simulation import import_gymnasium, make_environment


class EnvironmentRobot:
    """A simulated robot. Use it from the thread that opened it (its GL context may live there).

    Its observation and its action are checked against the mapping when it is opened, and `fit` checks both against the
    policy's contract: RobotError then, before anything moves.
    """

    simulated = True

    def __init__(self, environment: str, mapping: GymMapping, *, prompt: str | None = None) -> None:
        self.name = f"gym:{environment}"
        self.action_names = mapping.action_names
        self._mapping, self._prompt = mapping, mapping.prompt if prompt is None else prompt
        views = [*mapping.cameras.values(), *([mapping.film] if mapping.film else [])]
        if any(view.camera is not None for view in views):
            import_mujoco()  # before the environment does: GL is its own choice then
        options = dict(mapping.make)
        if any(view.rendered for view in views):
            options.setdefault("render_mode", "rgb_array")
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self._env: Any = make_environment(environment, options)
        try:
            self._space = _action_space(self._env.action_space, mapping, self.name)
            self._form = ObservationForm(mapping.cameras)
            self.control_hz = mapping.control_hz or self._own_rate()
            self.reset(mapping.seed or 0)
            for view in views:
                self._picture(view)
        except BaseException:
            self.close()
            raise

    def fit(self, contract: PolicyContract) -> None:
        """Give observations in the form of this contract from now on. RobotError if the mapping lacks a part of it."""
        self._form.fit(contract, self.name, len(self._state), len(self.action_names))

    def reset(self, seed: int | None = None) -> None:
        """Start an episode; the same seed, or that of the mapping, gives the same one."""
        seed = seed if self._mapping.seed is None else self._mapping.seed
        observation, info = self._env.reset(seed=seed)
        self._steps, self._over = 0, False
        self._take(observation, 0.0, False, info)

    def observe(self) -> dict[str, Any]:
        """The pictures of the policy's cameras, the state and the sentence, in the form of its contract."""
        pictures = {name: self._picture(self._mapping.cameras[name]) for name in self._form.cameras}
        return self._form.observation(pictures, self.measure(), self._prompt)

    def measure(self) -> NDArray[np.float32]:
        """The state f32 [s], without pictures."""
        return self._state.copy()

    def act(self, action: NDArray[np.float32]) -> None:
        """Take one step with an action f32 [a] of the policy, as the mapping turns it into one of the environment."""
        values = checked_action(action, len(self.action_names), self.name).astype(np.float64)
        reference = self._reference()
        values[: len(reference)] -= reference
        given = np.array(self._mapping.scale) * values + np.array(self._mapping.offset)
        observation, reward, terminated, truncated, info = self._env.step(self._within(given))
        self._steps += 1
        self._over = bool(terminated or truncated)
        self._take(observation, float(reward), bool(terminated), info)

    def status(self) -> EpisodeStatus:
        """Done where the environment or the mapping's number of steps says so."""
        most = self._mapping.max_steps
        return EpisodeStatus(self._over or (most is not None and self._steps >= most), self._success, self._steps)

    def frame(self) -> NDArray[np.uint8] | None:
        """A film frame, RGB u8 [h, w, 3]: of the mapping's film, or of its first camera."""
        view = self._mapping.film or next(iter(self._mapping.cameras.values()), None)
        picture = None if view is None else self._picture(view)
        return None if picture is None else picture if picture.shape[2] == 3 else picture.transpose(1, 2, 0)

    def close(self) -> None:
        """Free the simulation; a second time does nothing."""
        for renderer in self._renderers.values():
            renderer.close()
        env, self._env = self._env, None
        if env is not None:
            env.close()

    # ------------------------------------------------------------------ what the environment gives

    def _take(self, observation: Any, reward: float, terminated: bool, info: Mapping[str, Any]) -> None:
        self._observation = observation
        parts = [self._numbers(part, "state") for part in self._mapping.state]
        self._state = np.concatenate(parts).astype(np.float32)
        self._success = _succeeded(self._mapping.success, reward, terminated, info, before=self._steps == 0)

    def _numbers(self, wanted: Numbers, what: str) -> NDArray[np.float64]:
        found = self._found(wanted.key, what)
        values = numbers(found, f"{self.name}: {what}: {wanted.key or 'the observation'}", RobotError).reshape(-1)
        if wanted.indices is None:
            return values
        if max(wanted.indices) >= len(values):
            raise RobotError(
                f"{self.name}: {what}: {wanted.key or 'the observation'} has {len(values)} numbers, and the mapping "
                f"wants number {max(wanted.indices)} (counted from 0)"
            )
        return values[list(wanted.indices)]

    def _reference(self) -> NDArray[np.float64]:
        wanted = self._mapping.reference
        found = np.zeros(0) if wanted is None else self._numbers(wanted, "relative_to")
        if len(found) > len(self.action_names):
            raise RobotError(
                f"{self.name}: relative_to has {len(found)} numbers, and the action {len(self.action_names)}"
            )
        return found

    def _found(self, key: str, what: str) -> Any:
        """A part of the observation, by its path."""
        found: Any = self._observation
        for name in filter(None, key.split("/")):
            if not isinstance(found, Mapping) or name not in found:
                raise RobotError(
                    f"{self.name}: {what}: the observation has no {key!r:.80}; it has {_paths(self._observation)}"
                )
            found = found[name]
        return found

    def _picture(self, view: View) -> NDArray[np.uint8]:
        if view.camera is not None:
            return self._drawn(view)
        found = self._env.render() if view.key is None else self._found(view.key, "camera")
        picture = array_of(found, f"{self.name}: camera {view.key or 'render'}", RobotError)
        if picture.dtype != np.uint8 or picture.ndim != 3 or 3 not in (picture.shape[0], picture.shape[2]):
            raise RobotError(
                f"{self.name}: camera {view.key or 'render'} is {picture.dtype} {list(picture.shape)}, expected a "
                "picture uint8 [h, w, 3]"
            )
        return picture

    def _drawn(self, view: View) -> NDArray[np.uint8]:
        plain = self._env.unwrapped
        model, data = getattr(plain, "model", None), getattr(plain, "data", None)
        if model is None or data is None:
            raise RobotError(f"{self.name} is no MuJoCo environment: take its pictures by key or render, not by mujoco")
        prepare = getattr(plain, "_render_callback", None)
        if callable(prepare):  # of Gymnasium-Robotics, before each picture: it puts the target where it is
            prepare()
        if view.size not in self._renderers:
            self._renderers[view.size] = Renderer(model, *view.size)
        assert view.camera is not None
        try:
            return self._renderers[view.size].picture(data, view.camera)
        except ValueError:
            known = ", ".join(model.camera(at).name for at in range(model.ncam))
            raise RobotError(f"{self.name}: the model has no camera {view.camera!r:.60}; it has {known}") from None

    def _own_rate(self) -> float | None:
        """Steps a second, where the environment tells."""
        period, rate = getattr(self._env.unwrapped, "dt", None), self._env.metadata.get("render_fps")
        if isinstance(period, float) and period > 0:
            return float(round(1.0 / period, 6))
        return float(rate) if isinstance(rate, int | float) and rate > 0 else None

    def _within(self, values: NDArray[np.float64]) -> Any:
        """An action of the environment's space."""
        space = self._space
        if hasattr(space, "n"):
            return int(space.start + np.clip(np.rint(values[0]) - space.start, 0, space.n - 1))
        rounded = np.rint(values) if space.dtype.kind in "iu" else values
        return np.clip(rounded, space.low, space.high).astype(space.dtype)


def _action_space(space: Any, mapping: GymMapping, name: str) -> Any:
    """RobotError for a space that a list of numbers does not fill."""
    kinds = import_gymnasium().spaces
    if isinstance(space, kinds.Discrete):
        size = 1
    elif isinstance(space, kinds.Box) and len(space.shape) == 1:
        size = int(space.shape[0])
    else:
        raise RobotError(f"{name} takes actions of {space!s:.120}, expected a Box of one axis or a Discrete space")
    if len(mapping.action_names) != size:
        raise RobotError(
            f"{name} takes {size} numbers as an action ({space!s:.80}), and the mapping names "
            f"{len(mapping.action_names)}: {', '.join(mapping.action_names)}"
        )
    return space


def _succeeded(
    success: Success | None, reward: float, terminated: bool, info: Mapping[str, Any], *, before: bool
) -> bool | None:
    if success is None:
        return None
    if success.info is not None:
        found = info.get(success.info)
        if found is None and not before:
            have = ", ".join(map(str, info))[:200] or "nothing"
            raise RobotError(f"success: the environment's info has no {success.info!r:.60}; it has {have}")
        return bool(found)
    if before:
        return False
    return terminated if success.reward is None else reward >= success.reward


def _paths(observation: Any, prefix: str = "") -> str:
    """Every key of an observation with its shape, for messages."""
    if not isinstance(observation, Mapping):
        return f"{prefix or 'one array'} {list(np.shape(observation))}"
    return ", ".join(_paths(value, f"{prefix}/{key}".lstrip("/")) for key, value in list(observation.items())[:20])
