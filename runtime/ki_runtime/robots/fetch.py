"""The Fetch arm of Gymnasium-Robotics: a scene with two cameras, and the robot `gym:FetchReach-v4`.

`FetchScene` is the one place where the simulation is stepped and rendered. The demonstrations and the runtime robot
both use it, so a policy sees at run time exactly the kind of pictures it was trained on. MuJoCo and Gymnasium are
imported when a scene is opened, not with this module.
"""

import contextlib
import io
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.errors import RobotError

from .base import EpisodeStatus, checked_action

STATE_NAMES = ("gripper_x", "gripper_y", "gripper_z", "left_finger", "right_finger")
ACTION_NAMES = ("x", "y", "z", "gripper")
PICTURE_SIZE = 96  # pixels, width and height of what the policy sees
FILM_SIZE = 320  # pixels, width and height of a film frame
FIELD_OF_VIEW = 45.0  # degrees, vertical
TRACKING_GAIN = 10.0  # environment action per metre of distance; an action of 1 asks for 5 cm
PLAN_STEP = 0.1  # m, how far the expert's set-point moves along each axis in one control period


@dataclass(frozen=True)
class Camera:
    """A free camera: it looks at `look_at` (m, world) from `distance` m; azimuth and elevation in degrees."""

    name: str
    azimuth: float
    elevation: float = -22.0
    distance: float = 0.95
    look_at: tuple[float, float, float] = (1.33, 0.75, 0.56)

    def project(self, point: NDArray[np.float64]) -> NDArray[np.float32]:
        """Where a world point [3] (m) appears in a square picture.

        Returns f32 [2]: x to the right and y down, as fractions of the picture in [0, 1]; NaN where it is not in view.
        """
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        forward = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        right = np.array([math.sin(a), -math.cos(a), 0.0])
        up = np.cross(right, forward)
        offset = point - np.array(self.look_at) + self.distance * forward
        depth = float(offset @ forward)
        if depth <= 0.0:
            return np.full(2, np.nan, np.float32)
        half = depth * math.tan(math.radians(FIELD_OF_VIEW) / 2)
        xy = np.array([0.5 + 0.5 * (offset @ right) / half, 0.5 - 0.5 * (offset @ up) / half], np.float32)
        return xy if bool(np.all((xy >= 0) & (xy <= 1))) else np.full(2, np.nan, np.float32)


CAMERAS = (Camera("front_left", azimuth=145.0), Camera("front_right", azimuth=215.0))
FILM_CAMERA = Camera("film", azimuth=165.0, elevation=-20.0, distance=1.25)


class FetchScene:
    """FetchReach-v4 without its time limit: move the target, step, render. Use it from the thread that opened it.

    The arm is commanded by set-points f32 [4]: where the gripper shall be, xyz (m, world), and its opening in [-1, 1]
    (blocked in this task). `track` turns a set-point into the environment's bounded displacement, so no command moves
    the arm faster than the environment allows. The state is f32 [5], proprioception only: position of the gripper
    xyz (m), and of the left and right finger (m).
    """

    def __init__(self) -> None:
        self._mujoco, self._env, self.step_limit = _open_env()
        self._renderer = self._open_renderer(PICTURE_SIZE)
        self._film: Any = None
        self._closed = False
        self._target_site = self._model.site("target0").id
        self.control_hz = float(round(1.0 / self._env.dt))
        self.home = np.array(self._env.initial_gripper_xpos, np.float64)
        self.reach = float(self._env.target_range)
        self.reset(seed=None)

    def reset(self, seed: int | None = None) -> None:
        """Put the gripper at its initial pose and draw a new target; the same seed draws the same target."""
        self._read(self._env.reset(seed=seed)[0])
        self.move_target(self.target)

    @property
    def target(self) -> NDArray[np.float64]:
        """Position of the target [3], m, world."""
        return np.array(self._env.goal, np.float64)

    @property
    def gripper(self) -> NDArray[np.float64]:
        """Position of the gripper [3], m, world."""
        return self._gripper.copy()

    @property
    def state(self) -> NDArray[np.float32]:
        """Proprioception f32 [5], see STATE_NAMES."""
        return self._state.copy()

    @property
    def distance(self) -> float:
        """Distance from gripper to target, m."""
        return float(np.linalg.norm(self.target - self._gripper))

    @property
    def success(self) -> bool:
        """The environment's own criterion at the present step: the gripper is within 5 cm of the target."""
        return bool(self._env._is_success(self._gripper, self.target))

    def move_target(self, point: NDArray[np.float64]) -> None:
        """Place the target (and its red ball) at `point` [3], m, world."""
        model, data, site = self._model, self._env.data, self._target_site
        self._env.goal = np.array(point, np.float64)
        model.site_pos[site] = point - data.xpos[model.site_bodyid[site]]  # its body stands still and is not rotated
        data.site_xpos[site] = point

    def step(self, setpoint: NDArray[np.float32]) -> None:
        """Follow one set-point f32 [4] for one control period (40 ms). RobotError if it is not finite."""
        self._read(self._env.step(self.track(setpoint))[0])

    def track(self, setpoint: NDArray[np.float32]) -> NDArray[np.float32]:
        """The environment's action f32 [4] in [-1, 1] that brings the gripper towards a set-point; finite."""
        checked_action(setpoint, len(ACTION_NAMES), "FetchReach-v4")
        action = np.array(setpoint, np.float64)
        action[:3] = TRACKING_GAIN * (action[:3] - self._gripper)
        return checked_action(np.clip(action, -1.0, 1.0), len(ACTION_NAMES), "FetchReach-v4")  # clip keeps NaN

    def plan(self, horizon: int) -> NDArray[np.float32]:
        """The scripted expert's next set-points f32 [horizon, 4]: to the target along each axis, then there."""
        reach = PLAN_STEP * np.arange(1, horizon + 1)[:, None]
        setpoints = np.zeros((horizon, len(ACTION_NAMES)), np.float32)
        setpoints[:, :3] = self._gripper + np.clip(self.target - self._gripper, -reach, reach)
        return setpoints

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """What each camera sees now: name -> RGB u8 [96, 96, 3]."""
        return {camera.name: self._render(self._renderer, camera) for camera in CAMERAS}

    def target_points(self) -> NDArray[np.float32]:
        """The target's position in each camera's picture, f32 [2, 2]; see `Camera.project`."""
        return np.stack([camera.project(self.target) for camera in CAMERAS])

    def film_frame(self) -> NDArray[np.uint8]:
        """A larger picture from between the two cameras, RGB u8 [320, 320, 3]."""
        if self._film is None:
            self._film = self._open_renderer(FILM_SIZE)
        return self._render(self._film, FILM_CAMERA)

    def close(self) -> None:
        """Free the renderers and the simulation; a second time does nothing."""
        renderers, self._renderer, self._film = (self._renderer, self._film), None, None
        for renderer in renderers:
            if renderer is not None:
                renderer.close()
        if not self._closed:
            self._closed = True
            self._env.close()

    @property
    def _model(self) -> Any:
        return self._env.model

    def _read(self, observation: dict[str, NDArray[np.float64]]) -> None:
        self._gripper = np.array(observation["achieved_goal"], np.float64)
        self._state = observation["observation"][[0, 1, 2, 4, 3]].astype(np.float32)  # it names the right finger first

    def _render(self, renderer: Any, camera: Camera) -> NDArray[np.uint8]:
        view = self._mujoco.MjvCamera()
        view.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        view.azimuth, view.elevation, view.distance = camera.azimuth, camera.elevation, camera.distance
        view.lookat[:] = camera.look_at
        renderer.update_scene(self._env.data, view)
        picture: NDArray[np.uint8] = renderer.render()
        return picture

    def _open_renderer(self, size: int) -> Any:
        """A square off-screen renderer. Shadows, reflections and multisampling are off: they cost 60 % of the time."""
        visual = self._model.vis
        visual.global_.offwidth = visual.global_.offheight = size
        visual.global_.fovy = FIELD_OF_VIEW
        visual.quality.offsamples = visual.quality.shadowsize = 0
        renderer = _new_renderer(self._mujoco, self._model, size)
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False
        return renderer


MOVED = 1  # beside the seed, of where the target moves


class GymRobot:
    """The simulated robot `gym:FetchReach-v4`. Use it from the thread that opened it (its GL context lives there).

    `disturb`: after so many commands of an episode the target moves, to where its seed says.
    """

    name = "gym:FetchReach-v4"
    action_names = ACTION_NAMES
    simulated = True

    def __init__(self, *, prompt: str = "reach the red target", disturb: int | None = None) -> None:
        self._prompt, self._disturb = prompt, disturb
        self._scene = FetchScene()
        self._steps = 0
        self.control_hz = self._scene.control_hz

    def reset(self, seed: int | None = None) -> None:
        """Start an episode: initial pose, new target drawn from `seed`."""
        self._scene.reset(seed)
        # not the seed alone: the environment draws its first target so, and the second would be the same
        self._rng = np.random.default_rng(None if seed is None else [seed, MOVED])
        self._steps = 0

    def observe(self) -> dict[str, Any]:
        """{"images": {camera: u8 [96, 96, 3]}, "state": f32 [5], "prompt": str}."""
        return {"images": self._scene.pictures(), "state": self._scene.state, "prompt": self._prompt}

    def measure(self) -> NDArray[np.float32]:
        """The state f32 [5], without pictures."""
        return self._scene.state

    def act(self, action: NDArray[np.float32]) -> None:
        """Follow one set-point f32 [4] for one control period; how fast it is approached is limited."""
        self._scene.step(checked_action(action, len(ACTION_NAMES), self.name))
        self._steps += 1
        if self._steps == self._disturb:
            scene = self._scene
            scene.move_target(self._rng.uniform(scene.home - scene.reach, scene.home + scene.reach))

    def status(self) -> EpisodeStatus:
        """Done at the environment's limit of 50 steps; success: within 5 cm of the target now."""
        return EpisodeStatus(self._steps >= self._scene.step_limit, self._scene.success, self._steps)

    def frame(self) -> NDArray[np.uint8]:
        """A film frame, RGB u8 [320, 320, 3]."""
        return self._scene.film_frame()

    def close(self) -> None:
        """Free the simulation."""
        self._scene.close()


def _open_env() -> tuple[Any, Any, int]:
    """(mujoco, the unwrapped environment, its time limit in steps)."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco  # loads the GL library that MUJOCO_GL names

        with contextlib.redirect_stderr(io.StringIO()):  # it prints notices about other environments
            import gymnasium
            import gymnasium_robotics
    except ModuleNotFoundError as error:
        raise RobotError(f"the simulated robot needs {error.name}: pip install 'ki-edge[sim]'") from error
    except Exception as error:
        raise _no_gl(error) from error
    gymnasium.register_envs(gymnasium_robotics)
    try:
        env = gymnasium.make("FetchReach-v4", disable_env_checker=True)
    except Exception as error:  # a MuJoCo that does not fit fails in ways of its own
        reason = " ".join(str(error).split())
        raise RobotError(
            f"FetchReach-v4 cannot be made ({reason}): pip install 'ki-edge[sim]' brings what fits"
        ) from error
    limit = env.spec.max_episode_steps if env.spec is not None else None
    return mujoco, env.unwrapped, int(limit or 50)


def _new_renderer(mujoco: Any, model: Any, size: int) -> Any:
    """A square off-screen renderer; RobotError where the GL library gives none."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # a half-built renderer complains when it is freed
    try:
        return mujoco.Renderer(model, size, size)
    except Exception as error:  # each GL library fails in its own way: ImportError, AttributeError, FatalError, ...
        failure = _no_gl(error)
    finally:
        sys.unraisablehook = hook
    raise failure


def _no_gl(error: Exception) -> RobotError:
    """What was tried and what to install, in one line."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return RobotError(
        f"no picture can be rendered with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} ({reason}): install a GL library "
        "(apt install libegl1 libgl1-mesa-dri) and set MUJOCO_GL=egl before mujoco is first imported"
    )
