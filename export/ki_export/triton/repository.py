"""A model repository: a folder for each graph, which Triton's own backends run, and one for the whole policy.

    REPOSITORY/ki_prefix/config.pbtxt, 1/prefix.onnx, 1/weights.safetensors       (or 1/prefix-8.9.plan)
    REPOSITORY/ki_denoise/...        ki_fast_decode/...
    REPOSITORY/ki_policy/config.pbtxt, 1/model.py, 1/bundle/      opens the bundle with ki_runtime

It shares no file with the bundle, which may change or go. Each graph has its own copy of the weights: ONNX refuses
weights that have another name too (hard links), as it does links.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ki_edge.bundle import MANIFEST, Bundle
from ki_edge.bundle.files import DIGEST
from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, ExportError
from ki_edge.files.publishing import publishing
from ki_edge.files.writing import write_file
from ki_runtime.backends.ort import of_engines
from ki_runtime.policy.assets import read_assets
from ki_runtime.trt.engines import FOLDER

from .configuration import Kind, ModelConfig
from .plans import plans_of
from .tensors import graph_tensors, policy_tensors

BACKENDS = {"ort": "onnxruntime", "trt": "tensorrt"}  # ki-export's targets -> Triton's backends
POLICY = "ki_policy"
VERSION = "1"
MOST = 8  # observations in a request
# int8 is for CPUs, 16 bits for GPUs; float32 goes where Triton finds something
KINDS: dict[str, Kind] = {"int8": "KIND_CPU", "float16": "KIND_GPU", "bfloat16": "KIND_GPU"}
Say = Callable[[str], object]


def write_repository(bundle: str | Path, repository: str | Path, target: str = "ort", say: Say = tell) -> list[str]:
    """Write a model repository for a bundle with a policy; the names of its models.

    `target`: "ort" runs the graphs on Triton's ONNX Runtime, "trt" the engines that lie in the bundle on its TensorRT.
    Nothing is left if it fails. ExportError if `repository` exists or cannot be written, ArgumentError for another
    target, BundleError for what is no bundle or one without a policy, BackendError where engines are missing.
    """
    if target not in BACKENDS:
        raise ArgumentError(
            f"Triton has no backend for the target {target!r:.50}: expected {' or '.join(BACKENDS)}, for its ONNX "
            "Runtime or its TensorRT"
        )
    opened = Bundle.open(bundle, say=say)
    if target == "ort" and (reason := of_engines(opened)) is not None:
        raise ExportError(f"{opened.path}: {reason}; or --triton with --target trt")
    contract = read_assets(opened).contract
    graphs = opened.manifest.graphs
    plans = {name: plans_of(opened, name, say) for name in graphs} if target == "trt" else {}
    with publishing(Path(repository), _refuse, ExportError) as folder:
        inner = folder / POLICY / VERSION / "bundle"
        _copy_bundle(opened, inner, engines=bool(plans))
        models = [_write_graph(opened, name, folder, target, plans.get(name, {})) for name in graphs]
        kind = _kind(opened, target)
        inputs, outputs = policy_tensors(contract)
        config = ModelConfig(
            POLICY, "python", kind, inputs, outputs, most=MOST, batching=kind != "KIND_CPU",
            parameters={"contract": json.dumps(contract.to_json())},
        )  # fmt: skip
        write_file(folder / POLICY / "config.pbtxt", config.text(), ExportError)
        shutil.copyfile(Path(__file__).with_name("model.py"), folder / POLICY / VERSION / "model.py")
        opened.check_unchanged()
    return [*models, POLICY]


def _refuse(target: Path) -> None:
    raise ExportError(f"{target} exists: name a folder that does not, which becomes the model repository")


def _kind(bundle: Bundle, target: str) -> Kind:
    return "KIND_GPU" if target == "trt" else KINDS.get(bundle.manifest.precision, "KIND_AUTO")


def _copy_bundle(bundle: Bundle, to: Path, *, engines: bool) -> None:
    for name in (*bundle.manifest.files, MANIFEST, DIGEST):
        if name == DIGEST and not (bundle.path / name).is_file():
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, to / name)
    if engines:
        shutil.copytree(bundle.path / FOLDER, to / FOLDER, ignore=shutil.ignore_patterns(".*"))


def _write_graph(bundle: Bundle, graph: str, folder: Path, target: str, plans: Mapping[str, Path]) -> str:
    """One graph as a model. Keys and values have their batch on the second axis, so Triton cannot batch it."""
    name = f"ki_{graph}"
    version = folder / name / VERSION
    version.mkdir(parents=True)
    inputs, outputs = graph_tensors(bundle, graph)
    files = {capability: f"{graph}-{capability}.plan" for capability in plans}
    for capability, engine in plans.items():
        shutil.copyfile(engine, version / files[capability])
    file = None if plans else bundle.graph(graph).name
    if file is not None:
        for part in (file, str(bundle.manifest.weights["file"])):
            shutil.copyfile(bundle.file(part), version / part)
    config = ModelConfig(name, BACKENDS[target], _kind(bundle, target), inputs, outputs, file=file, files=files)
    write_file(folder / name / "config.pbtxt", config.text(), ExportError)
    return name
