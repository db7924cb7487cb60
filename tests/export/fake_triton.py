"""A stand-in for `triton_python_backend_utils`, which exists only inside Triton: what a model in Python uses of it."""

import numpy as np


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message, code=INTERNAL):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        assert isinstance(error, TritonError | None)
        self._outputs, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._outputs

    def error(self):
        return self._error


class Request:
    """`tensors`: {name: array with a batch axis}; text as Triton gives it, objects that are bytes."""

    def __init__(self, tensors, cancelled=False):
        self._tensors, self._cancelled = [Tensor(*item) for item in tensors.items()], cancelled

    def inputs(self):
        return self._tensors

    def is_cancelled(self):
        return self._cancelled


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def text(*lines):
    return np.array([[line.encode()] for line in lines], np.object_)
