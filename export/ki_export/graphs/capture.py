"""A module on the meta device as an ONNX graph, by PyTorch's exporter without the work that our modules do not need.

Half of its time goes into tracing the program again for decompositions and for promoted types, and into reading its
table of translations anew for each graph. What is left out here is private to PyTorch: where a version has it under
another name, it does that work and the graphs are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch.onnx._internal.exporter import _fx_passes, _registration

from .wrappers import Traceable


class Captured(torch.export.ExportedProgram):
    """A program that the exporter takes as it was captured.

    It would trace it twice more to decompose its operators, which is half of the time; `TRANSLATIONS` has what it
    cannot translate whole.
    """

    def run_decompositions(self, *_: object, **__: object) -> Captured:
        return self


def _cast(x: Any, dtype: int, *_: object, **__: object) -> Any:
    return op.Cast(x, to=dtype)


def _square(x: Any) -> Any:
    return op.Pow(x, 2.0)  # type: ignore[type-var]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.square.default: _square,
}


def capture(traceable: Traceable, opset: int) -> ir.Model:
    """The graph as PyTorch's exporter gives it. Raises what the exporter raises."""
    with _lean():
        program = torch.export.export(
            traceable.module,
            traceable.inputs,
            dynamic_shapes=traceable.dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program.__class__ = Captured
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=[tensor.name for tensor in traceable.spec.inputs],
            output_names=[tensor.name for tensor in traceable.spec.outputs],
            custom_translation_table=TRANSLATIONS,
            dynamic_shapes=traceable.dynamic_shapes,  # names of free dims
        )
    if exported is None:
        raise RuntimeError("the tracer gave no program")
    model: ir.Model = exported.model
    return model


@contextmanager
def _lean() -> Iterator[None]:
    with ExitStack() as stack:
        # as torch.onnx.export captures a module, so that no size is compared with 0 or 1
        stack.enter_context(torch.fx.experimental._config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        # with free dims it is slower to ask the cache of tensors' shapes than to compute them
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        # the model mixes no types: onnx.checker and the proof would tell
        stack.enter_context(_replaced(_fx_passes, "insert_type_promotion_nodes", lambda _: None))
        stack.enter_context(_replaced(_registration.ONNXRegistry, "from_torchlib", staticmethod(_translations)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    original = owner.__dict__.get(name)
    if original is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


_from_torchlib = _registration.ONNXRegistry.from_torchlib


def _translations(opset_version: int) -> _registration.ONNXRegistry:
    """A table of translations that the exporter may add to."""
    known = _read_translations(opset_version)
    registry = _registration.ONNXRegistry()
    registry.__dict__.update(known.__dict__, functions={name: list(each) for name, each in known.functions.items()})
    return registry


@cache
def _read_translations(opset: int) -> _registration.ONNXRegistry:
    return _from_torchlib(opset_version=opset)
