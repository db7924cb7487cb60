"""Pictures of a MuJoCo scene without a screen, and what to do where no GL library draws them."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.errors import RobotError

FIELD_OF_VIEW = 45.0  # degrees, vertical


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


class Renderer:
    """Draws `height` x `width` pictures of one model. Use it from the thread that opened it (its GL context lives
    there). Shadows, reflections and multisampling are off: they cost 60 % of the time. RobotError without GL.
    """

    def __init__(self, model: Any, height: int, width: int) -> None:
        self._mujoco = import_mujoco()
        visual = model.vis
        visual.global_.offwidth, visual.global_.offheight = width, height
        visual.global_.fovy = FIELD_OF_VIEW
        visual.quality.offsamples = visual.quality.shadowsize = 0
        self._renderer: Any = _new_renderer(self._mujoco, model, height, width)
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False

    def picture(self, data: Any, camera: Camera | str) -> NDArray[np.uint8]:
        """What a free camera, or the model's camera of that name, sees: RGB u8 [height, width, 3]."""
        view = camera if isinstance(camera, str) else self._view(camera)
        self._renderer.update_scene(data, view)
        picture: NDArray[np.uint8] = self._renderer.render()
        return picture

    def close(self) -> None:
        """Free the GL context; a second time does nothing."""
        renderer, self._renderer = self._renderer, None
        if renderer is not None:
            renderer.close()

    def _view(self, camera: Camera) -> Any:
        view = self._mujoco.MjvCamera()
        view.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        view.azimuth, view.elevation, view.distance = camera.azimuth, camera.elevation, camera.distance
        view.lookat[:] = camera.look_at
        return view


def choose_gl() -> None:
    """EGL, where MUJOCO_GL names no GL library. MuJoCo reads it once: when it is imported, by whomever."""
    os.environ.setdefault("MUJOCO_GL", "egl")


def import_mujoco() -> Any:
    """MuJoCo, which loads the GL library that MUJOCO_GL names. RobotError if it cannot."""
    choose_gl()
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise RobotError(f"the simulated robot needs {error.name}: pip install 'ki-edge[sim]'") from error
    except Exception as error:
        raise _no_gl(error) from error
    return mujoco


def _new_renderer(mujoco: Any, model: Any, height: int, width: int) -> Any:
    """RobotError where the GL library gives none."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # a half-built renderer complains when it is freed
    try:
        return mujoco.Renderer(model, height, width)
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
