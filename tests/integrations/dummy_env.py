"""An environment of LeRobot whose state is the last action: --env.type=dummy, as the distribution lerobot_env_dummy."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

STATE, ACTIONS, STEPS = 8, 7, 12
HEIGHT, WIDTH = 96, 128
CAMERAS = ("front", "wrist")


class DummyEnv(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode = "rgb_array"
    task = task_description = "pick up the red cube"
    _max_episode_steps = STEPS

    def __init__(self, **_: Any) -> None:
        picture = gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(CAMERAS, picture)),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (ACTIONS,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.steps = np.zeros(STATE, np.float32), 0
        return self._seen(), {"is_success": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.state[:ACTIONS] = action
        self.steps += 1
        over = self.steps >= STEPS
        return self._seen(), 1.0, over, False, {"is_success": over}

    def render(self) -> Any:
        return np.full((HEIGHT, WIDTH, 3), 10 * self.steps, np.uint8)

    def _seen(self) -> dict[str, Any]:
        pictures = {name: np.full((HEIGHT, WIDTH, 3), 90 + 40 * at, np.uint8) for at, name in enumerate(CAMERAS)}
        return {"pixels": pictures, "agent_pos": self.state.copy()}


gym.register("gym_dummy/reach-v0", DummyEnv, max_episode_steps=STEPS)


def _features() -> dict[str, PolicyFeature]:
    pictures = {f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, (HEIGHT, WIDTH, 3)) for name in CAMERAS}
    state = {"agent_pos": PolicyFeature(FeatureType.STATE, (STATE,))}
    return {**pictures, **state, "action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))}


def _keys() -> dict[str, str]:
    pictures = {f"pixels/{name}": f"observation.images.{name}" for name in CAMERAS}
    return {**pictures, "agent_pos": "observation.state", "action": "action"}


@EnvConfig.register_subclass("dummy")
@dataclass
class DummyEnvConfig(EnvConfig):
    task: str | None = "reach-v0"
    fps: int = 10
    features: dict[str, PolicyFeature] = field(default_factory=_features)
    features_map: dict[str, str] = field(default_factory=_keys)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}
