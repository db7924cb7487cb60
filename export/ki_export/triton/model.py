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
from ki_runtime.policy.rows import Question

IMAGES = "images/"  # inputs that are entries of the observation's "images"
GONE = "its client has cancelled it", triton.TritonError.CANCELLED
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
        self._together = on_gpu  # on a CPU a batch takes as long as its observations one by one
        self._policy.warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; what is wrong with one is told to it alone."""
        asked = [None if request.is_cancelled() else self._questions(request) for request in requests]
        answers = iter(self._answers([question for found in asked if found is not None for question in found]))
        return [_failed(*GONE) if found is None else _response([next(answers) for _ in found]) for found in asked]

    def finalize(self) -> None:
        """Called once, when the model is unloaded."""
        del self._policy

    def _answers(self, questions: list[Question]) -> list[Any]:
        """For each question the policy's answer, or the error."""
        try:
            if self._together:
                return list(self._policy.infer_many(questions))
            return [answer for question in questions for answer in self._policy.infer_many([question])]
        except Exception as error:  # that nobody raises on purpose
            return [error] * len(questions)

    def _questions(self, request: Any) -> list[Question]:
        """One for each observation of a request, of the inputs that it has."""
        found = ((name, triton.get_input_tensor_by_name(request, name)) for name in self._names)
        given = {name: tensor.as_numpy() for name, tensor in found if tensor is not None}
        count = min(map(len, given.values()), default=0)
        return [_question({name: values[i] for name, values in given.items()}) for i in range(count)]


def _question(row: Mapping[str, Any]) -> Question:
    """The inputs of one observation as a question to the policy."""
    images = {name.removeprefix(IMAGES): value for name, value in row.items() if name.startswith(IMAGES)}
    observation: dict[str, Any] = {"images": images} if images else {}
    for name, value in row.items():
        if not name.startswith(IMAGES) and name not in ARGUMENTS:
            observation[name] = value.reshape(-1)[0] if name == "prompt" else value
    seed, steps = (int(row[name].reshape(-1)[0]) if name in row else None for name in ("seed", "num_steps"))
    return Question(observation, row.get("noise"), seed, steps)


def _response(answers: list[Any]) -> Any:
    """The actions of all observations of a request, or the first error."""
    error = next((answer for answer in answers if isinstance(answer, Exception)), None)
    if isinstance(error, KiEdgeError):
        return _failed(str(error), triton.TritonError.INVALID_ARG)
    if error is not None or not answers:
        why = "it has no inputs" if error is None else f"{type(error).__name__}: {error}"
        return _failed(why, triton.TritonError.INTERNAL)
    actions = np.stack([answer["actions"] for answer in answers])
    return triton.InferenceResponse(output_tensors=[triton.Tensor("actions", actions)])


def _see_only(device: int) -> None:
    """Let this process see one GPU, the `device`-th of those that Triton sees."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[device] if seen else str(device)


def _failed(message: str, code: Any) -> Any:
    return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(message, code))
