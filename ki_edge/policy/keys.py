"""Observations under other programs' keys: LeRobot's and openpi's flat ones, under those of the contract.

observation.state, observation/state                      state (droid: joints, then the gripper)
observation.images.NAME, observation.image, observation/NAME    the contract's camera of that name or slot
task                                                      prompt
"""

from collections.abc import Mapping
from typing import Any

from ki_edge.arguments import array_of
from ki_edge.errors import ObservationError

from .contract import PolicyContract

FLAT_ROBOTS = ("droid", "libero")  # whose cameras are keys of the observation, not of its "images"
STATES = ("observation.state", "observation/state")
PREFIXES = ("observation.images.", "observation.", "observation/")


def under_contract_keys(contract: PolicyContract, observation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The observation with every key that another program gave it under the contract's; the rest as it is.

    A camera is that of the contract with its name, of its slot, or the only one where there is one of each.
    ObservationError if two keys give the same thing.
    """
    flat = contract.robot in FLAT_ROBOTS
    foreign = [
        key for key in observation if isinstance(key, str) and key != state_key(contract) and _is_foreign(key, flat)
    ]
    if not foreign:
        return observation
    found = {key: value for key, value in observation.items() if key not in foreign}
    images = found.get("images")
    cameras = dict(images) if isinstance(images, Mapping) else {}
    pictures = [key for key in foreign if "image" in key]
    for key in foreign:
        value = observation[key]
        if key in pictures:
            _put(found if flat else cameras, _camera(contract, key, len(pictures)), value, key)
        elif key == "task":
            _put(found, "prompt", value[0] if isinstance(value, list | tuple) and len(value) == 1 else value, key)
        elif contract.robot == "droid":
            state = array_of(value, key, ObservationError)
            if state.shape != (contract.state_dim,):
                raise ObservationError(
                    f"{key} of the observation has shape {state.shape}, the policy's contract has "
                    f"({contract.state_dim},): the joints, then the gripper"
                )
            _put(found, "observation/joint_position", state[:-1], key)
            _put(found, "observation/gripper_position", state[-1:], key)
        else:
            _put(found, state_key(contract), value, key)
    if pictures and not flat and (images is None or isinstance(images, Mapping)):
        found["images"] = cameras
    return found


def state_key(contract: PolicyContract) -> str:
    """Where an observation has the state (droid: the joints)."""
    return {"droid": "observation/joint_position", "libero": "observation/state"}.get(contract.robot, "state")


def expected(contract: PolicyContract) -> str:
    """The observation that a contract takes, for messages."""
    cameras = ", ".join(
        f'"{camera.key}": uint8 [h, w, 3]' + ("" if camera.required else " (may be left out)")
        for camera in contract.cameras
        if camera.key is not None
    )
    size = contract.state_dim
    state = f'"{state_key(contract)}": float [{size}]'
    if contract.robot == "droid":
        state = f'"{state_key(contract)}": float [{size - 1}], "observation/gripper_position": float [1]'
    pictures = cameras if contract.robot in FLAT_ROBOTS else f'"images": {{{cameras}}}'
    return f'expected {{{pictures}, {state}, "prompt": text}}'


def _is_foreign(key: str, flat: bool) -> bool:
    """`flat`: the robot's own keys begin with "observation/"."""
    if flat and key.startswith("observation/") and key != "observation/state":
        return False
    return key in ("task", *STATES) or (key.startswith(PREFIXES) and "image" in key)


def _camera(contract: PolicyContract, key: str, pictures: int) -> str:
    """The contract's key for a picture; the given one if there is none, which is then refused as an unknown camera."""
    name = key.removeprefix(next(prefix for prefix in PREFIXES if key.startswith(prefix)))
    cameras = [camera for camera in contract.cameras if camera.key is not None]
    for camera in cameras:
        if camera.key in (key, name, f"observation/{name}"):
            return str(camera.key)
    by_slot = [camera for camera in cameras if camera.slot == name]
    if by_slot or len(cameras) == pictures == 1:
        return str((by_slot or cameras)[0].key)
    return key if contract.robot in FLAT_ROBOTS else name


def _put(place: dict[str, Any], name: str, value: Any, key: str) -> None:
    if place.get(name) is not None:
        raise ObservationError(f"the observation gives {name} twice, the second time as {key}: send one of them")
    place[name] = value
