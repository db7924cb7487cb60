"""config.pbtxt: a model's description in the text form of Triton's `ModelConfig` message, written without protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

# numpy names of the graphs' and the policy's tensors -> Triton's data types
TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "text": "TYPE_STRING",
}
Kind = Literal["KIND_AUTO", "KIND_GPU", "KIND_CPU"]


@dataclass(frozen=True)
class Tensor:
    """One input or output. `dims`: -1 where any size goes; none for a scalar."""

    name: str
    dtype: str  # a key of TYPES
    dims: tuple[int, ...]
    optional: bool = False

    def lines(self) -> list[str]:
        """The fields of a ModelInput or ModelOutput."""
        out = [f"name: {quoted(self.name)}", f"data_type: {TYPES[self.dtype]}"]
        out.append(f"dims: [ {', '.join(map(str, self.dims or (1,)))} ]")
        if not self.dims:  # Triton's dims must not be empty, a scalar is one number under another shape
            out.append("reshape: { shape: [ ] }")
        return [*out, "optional: true"] if self.optional else out


@dataclass(frozen=True)
class ModelConfig:
    """A model. `most` observations of a request's first axis; 0: its tensors have no common batch axis."""

    name: str
    backend: str
    kind: Kind
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    most: int = 0
    batching: bool = False  # requests that wait go in together
    file: str | None = None  # in the version's folder
    files: Mapping[str, str] = field(default_factory=dict)  # compute capability -> file
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The content of config.pbtxt."""
        lines = [f"name: {quoted(self.name)}", f"backend: {quoted(self.backend)}", f"max_batch_size: {self.most}"]
        if self.file is not None:
            lines.append(f"default_model_filename: {quoted(self.file)}")
        for capability, name in self.files.items():
            lines += _block("cc_model_filenames", [f"key: {quoted(capability)}", f"value: {quoted(name)}"])
        for role, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                lines += _block(role, tensor.lines())
        lines += _block("instance_group", ["count: 1", f"kind: {self.kind}"])
        if self.batching:
            lines += _block("dynamic_batching", [])
        for key, value in self.parameters.items():
            lines += _block("parameters", [f"key: {quoted(key)}", f"value: {{ string_value: {quoted(value)} }}"])
        return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A string of protobuf's text form: printable ASCII, all other bytes of its UTF-8 in octal."""
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F)} | {0x22: r"\"", 0x5C: r"\\"}
    return '"' + "".join(plain.get(byte, f"\\{byte:03o}") for byte in text.encode("utf-8")) + '"'


def _block(name: str, lines: Iterable[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]
