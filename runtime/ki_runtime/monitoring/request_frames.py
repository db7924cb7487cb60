"""A request with its answer as the frame of a dataset: the columns of a recorded run, and the whole answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import under_contract_keys
from ki_edge.policy.transforms import given_pictures, read_prompt, read_state
from ki_runtime.recording.features import Features, Frame, camera_names
from ki_runtime.recording.video import even

from .words import RULES, guards

F32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
ANSWER = "ki.answer"
USUAL_HZ = 25.0  # of a policy that does not tell its rate, as a replay assumes


@dataclass(frozen=True, eq=False)
class RequestFrame(Frame):
    """`action` is the first one of the answer; `age`: seconds that the answer took; `chunk`: the episode's request."""

    answer: F32  # [H, a]


@dataclass(frozen=True)
class RequestFeatures(Features):
    """The columns of a recorded run, and `ki.answer` f32 [H * a], the whole chunk row by row."""

    horizon: int = 1

    def columns(self) -> dict[str, tuple[str, tuple[int, ...], list[str] | None]]:
        return {**super().columns(), ANSWER: ("float32", (self.horizon * len(self.action_names),), None)}

    def values(self, frame: Frame) -> dict[str, Any]:
        assert isinstance(frame, RequestFrame)
        return {**super().values(frame), ANSWER: frame.answer.reshape(-1)}

    def fits(self, pictures: Mapping[str, UInt8]) -> bool:
        """Whether these pictures are of its cameras, or of some of them, and of their sizes."""
        return all(self.cameras.get(name) == picture.shape[:2] for name, picture in pictures.items())


def features_of(contract: PolicyContract, name: str, pictures: Mapping[str, UInt8]) -> RequestFeatures:
    """What a dataset of this policy's requests holds. Its rate is that of a client that keeps to the contract."""
    actions = contract.action_names or tuple(f"action_{i}" for i in range(contract.action_dim))
    rate = max(1, round((contract.control_hz or USUAL_HZ) / contract.execute))
    sizes = {camera: (picture.shape[0], picture.shape[1]) for camera, picture in pictures.items()}
    return RequestFeatures(rate, name, contract.state_dim, actions, sizes, RULES, horizon=contract.action_horizon)


@dataclass(frozen=True, eq=False)
class Exchange:
    """What a request and its answer say, read by the contract."""

    state: F32
    pictures: dict[str, UInt8]  # by the camera's name in a dataset, of even size
    task: str
    answer: F32  # [H, a]
    guards: tuple[str, ...]  # rules that the client reported

    @classmethod
    def read(
        cls,
        contract: PolicyContract,
        observation: Mapping[str, Any],
        answer: Mapping[str, Any],
        reported: Mapping[str, float],
    ) -> Exchange | None:
        """None where the answer is no finite chunk of the contract. ObservationError as of the policy."""
        actions = np.asarray(answer.get("actions"), np.float32)
        if actions.shape != (contract.action_horizon, contract.action_dim) or not np.isfinite(actions).all():
            return None
        keyed = under_contract_keys(contract, observation)
        names = camera_names([camera.key for camera in contract.cameras if camera.key is not None])
        return cls(
            np.asarray(read_state(contract, keyed), np.float32),
            {names[key]: even(picture) for key, picture in given_pictures(contract, observation).items()},
            read_prompt(contract, keyed),
            actions,
            tuple(guards(reported)),
        )

    def frame(self, features: RequestFeatures, number: int, time: float, took: float) -> RequestFrame:
        """The `number`-th request of its episode, `time` seconds after its first; the answer `took` seconds.

        A camera that this request does not have is black.
        """
        pictures = {
            name: self.pictures.get(name, np.zeros((*size, 3), np.uint8)) for name, size in features.cameras.items()
        }
        return RequestFrame(
            tick=number,
            time=time,
            state=self.state,
            action=self.answer[0],
            planned=self.answer[0],
            pictures=pictures,
            picture_age=0.0,
            chunk=number,
            row=0,
            age=took,
            seam=number > 0,
            guards=self.guards,
            task=self.task,
            answer=self.answer,
        )
