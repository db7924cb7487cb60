"""What Triton's models take and give: the graphs' tensors as the bundle has them, the policy's as its contract does."""

from __future__ import annotations

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.graphs import TensorSpec
from ki_edge.policy.contract import DROID_DIM, PolicyContract
from ki_edge.policy.keys import FLAT_ROBOTS, state_key

from .configuration import Tensor

IMAGES = "images/"  # before the names of cameras that an observation has in a dict of its own


def graph_tensors(bundle: Bundle, graph: str) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs, outputs) of a graph of the bundle, with -1 for the sizes that stay free."""
    manifest = bundle.manifest
    sizes = graphs.sizes(manifest.config, len(manifest.vocabulary.ids))
    spec = {found.name: found for found in graphs.specs(manifest.config, fast=manifest.has_fast)}[graph]

    def tensor(found: TensorSpec) -> Tensor:
        dims = tuple(size if isinstance(size, int) else -1 for size in found.resolve(sizes))
        return Tensor(found.name, found.dtype, dims)

    return [*map(tensor, spec.inputs)], [*map(tensor, spec.outputs)]


def policy_tensors(contract: PolicyContract) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs, outputs) of the whole policy, of one observation.

    An observation's keys are the names, those of cameras in the dict "images" with that before them: "images/left".
    """
    before = "" if contract.robot in FLAT_ROBOTS else IMAGES
    cameras = [
        Tensor(before + camera.key, "uint8", (-1, -1, 3), optional=not camera.required)
        for camera in contract.cameras
        if camera.key is not None
    ]
    state = [Tensor(state_key(contract), "float32", (contract.state_dim,))]
    if contract.robot == "droid":
        state = [
            Tensor(state_key(contract), "float32", (DROID_DIM - 1,)),
            Tensor("observation/gripper_position", "float32", (1,)),
        ]
    chunk = contract.action_horizon, contract.model_action_dim
    asked = [
        Tensor("prompt", "text", (1,), optional=contract.default_prompt is not None),
        Tensor("noise", "float32", chunk, optional=True),
        Tensor("seed", "int64", (1,), optional=True),
        Tensor("num_steps", "int32", (1,), optional=True),
    ]
    return [*cameras, *state, *asked], [Tensor("actions", "float64", (contract.action_horizon, contract.action_dim))]
