"""An observation as openpi's servers expect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.images import METHODS
from ki_edge.policy.keys import FLAT_ROBOTS, under_contract_keys
from ki_edge.policy.transforms import read_images, read_state


def outgoing(contract: PolicyContract, observation: Mapping[str, Any]) -> dict[str, Any]:
    """An observation as it is sent: the contract's keys, pictures as uint8 arrays, already of the model's size where
    the policy's makers resized bytes. ObservationError if it does not fit the contract.
    """
    found = dict(under_contract_keys(contract, observation))
    read_state(contract, found)
    pictures = _pictures(contract, found)
    if contract.robot in FLAT_ROBOTS:
        return {**{key: value for key, value in found.items() if "image" not in key}, **pictures}
    if contract.robot == "aloha":  # whose server expects the colours first
        pictures = {key: np.ascontiguousarray(picture.transpose(2, 0, 1)) for key, picture in pictures.items()}
    return {**found, "images": pictures}


def _pictures(contract: PolicyContract, observation: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Pictures [h, w, 3] by the contract's key, of the cameras that are there."""
    images, there = read_images(contract, observation)
    given = observation if contract.robot in FLAT_ROBOTS else observation["images"]
    sized = METHODS[contract.resize].pictures == "uint8"
    found = {}
    for camera, image, present in zip(contract.cameras, images, there, strict=True):
        if camera.key is not None and present:
            raw = image if sized else array_of(given[camera.key], f"camera {camera.key}")
            found[camera.key] = raw.transpose(1, 2, 0) if raw.shape[0] == 3 and not sized else raw
    return found
