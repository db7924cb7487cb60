"""A policy as a model of Triton's Python backend: observations in, chunks of robot actions out.

It stands in the model repository beside `bundle`, the folder that ki_runtime opens. Triton's Python needs the ki-edge
wheel with an engine: pip install 'ki_edge-...whl[ort-gpu]'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from ki_edge.errors import KiEdgeError
from ki_runtime import Policy

IMAGES = "images/"  # inputs that are entries of the observation's "images"
ARGUMENTS = ("noise", "seed", "num_steps")  # inputs that are arguments of `Policy.infer`


class TritonPythonModel:
    """Its methods are called by Triton, all in the process of one instance of the model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle: on the GPU that Triton gives this instance, or on the CPU. Errors stop its loading."""
        on_gpu = args["model_instance_kind"] == "GPU"
        if on_gpu:
            _see_only(int(args["model_instance_device_id"]))
        self._names = [item["name"] for item in json.loads(args["model_config"])["input"]]
        self._policy = Policy.load(Path(__file__).with_name("bundle"), "auto" if on_gpu else "ort")
        self._policy.warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; what is wrong with one is told to it alone."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Called once, when the model is unloaded."""
        del self._policy

    def _respond(self, request: Any) -> Any:
        if request.is_cancelled():
            return _failed("the client has cancelled it", triton.TritonError.CANCELLED)
        try:
            actions = np.stack([self._answer(row) for row in self._rows(request)])
        except KiEdgeError as error:
            return _failed(str(error), triton.TritonError.INVALID_ARG)
        except Exception as error:
            return _failed(f"{type(error).__name__}: {error}", triton.TritonError.INTERNAL)
        return triton.InferenceResponse(output_tensors=[triton.Tensor("actions", actions)])

    def _rows(self, request: Any) -> list[dict[str, Any]]:
        """The inputs that a request has, {name: its value} for each of its observations."""
        found = ((name, triton.get_input_tensor_by_name(request, name)) for name in self._names)
        given = {name: tensor.as_numpy() for name, tensor in found if tensor is not None}
        return [
            {name: values[i] for name, values in given.items()} for i in range(min(map(len, given.values()), default=0))
        ]

    def _answer(self, row: Mapping[str, Any]) -> Any:
        """Actions float64 [H, action_dim] of one observation."""
        images = {name.removeprefix(IMAGES): value for name, value in row.items() if name.startswith(IMAGES)}
        observation: dict[str, Any] = {"images": images} if images else {}
        for name, value in row.items():
            if not name.startswith(IMAGES) and name not in ARGUMENTS:
                observation[name] = value
        if "prompt" in row:
            observation["prompt"] = row["prompt"].reshape(-1)[0]
        arguments: dict[str, Any] = {name: int(row[name][0]) for name in ("seed", "num_steps") if name in row}
        if "noise" in row:
            arguments["noise"] = row["noise"]
        return self._policy.infer(observation, **arguments)["actions"]


def _see_only(device: int) -> None:
    """Let this process see one GPU, the `device`-th of those that Triton sees."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[device] if seen else str(device)


def _failed(message: str, code: Any) -> Any:
    return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(message, code))
