"""What may import what: folders in one direction, and the runtime where torch, onnx and the backends do not exist."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"ki_edge": ROOT, "ki_runtime": ROOT / "runtime", "ki_export": ROOT / "export"}
# Folder -> the other folders that it may import. `ki_edge` alone is what lies in that folder itself, as for all others.
DIRECTIONS: dict[str, str] = {
    "ki_edge": "",
    "ki_edge.files": "ki_edge",
    "ki_edge.bundle": "ki_edge ki_edge.files",
    "ki_edge.checkpoints.layout": "ki_edge ki_edge.files",
    "ki_edge.checkpoints.jax": "ki_edge ki_edge.checkpoints.layout",
    "ki_edge.checkpoints.peft": "ki_edge ki_edge.checkpoints.layout ki_edge.files",
    "ki_edge.checkpoints": (
        "ki_edge ki_edge.checkpoints.jax ki_edge.checkpoints.layout ki_edge.checkpoints.peft ki_edge.files"
    ),
    "ki_edge.model": "ki_edge ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.files",
    "ki_edge.planning": "ki_edge ki_edge.checkpoints.layout",
    "ki_edge.policy": "ki_edge ki_edge.files",
    "ki_edge.recordings": "ki_edge ki_edge.files ki_edge.policy",
    "ki_edge.train.step": "ki_edge ki_edge.model",
    "ki_edge.train.data": (
        "ki_edge ki_edge.checkpoints ki_edge.files ki_edge.model ki_edge.planning ki_edge.policy ki_edge.recordings "
        "ki_edge.train.step ki_export.policies ki_export.source"
    ),
    "ki_edge.train.parallel": (
        "ki_edge ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.checkpoints.peft ki_edge.files ki_edge.model "
        "ki_edge.planning ki_edge.train.step"
    ),
    "ki_edge.train.watching": "ki_edge ki_edge.files ki_edge.model ki_edge.train.step",
    "ki_edge.train": (
        "ki_edge ki_edge.files ki_edge.model ki_edge.planning ki_edge.train.data ki_edge.train.parallel "
        "ki_edge.train.step ki_edge.train.watching"
    ),
    "ki_runtime": "ki_edge",
    "ki_runtime.backends": "ki_edge ki_edge.bundle ki_edge.files",
    "ki_runtime.gpu": "ki_edge ki_edge.bundle ki_runtime.backends",
    "ki_runtime.openvino": "ki_edge ki_edge.bundle ki_edge.files ki_runtime.backends",
    "ki_runtime.policy": "ki_edge ki_edge.bundle ki_edge.files ki_edge.policy ki_runtime.backends",
    "ki_runtime.robots": "ki_edge ki_edge.files ki_edge.policy ki_edge.recordings",
    "ki_runtime.recording": "ki_edge ki_edge.files ki_edge.recordings",
    "ki_runtime.remote": "ki_edge ki_edge.policy ki_runtime.policy",
    "ki_runtime.control": (
        "ki_edge ki_edge.bundle ki_edge.files ki_edge.policy ki_runtime.backends ki_runtime.policy "
        "ki_runtime.recording ki_runtime.remote ki_runtime.robots"
    ),
    "ki_runtime.monitoring": "ki_edge ki_edge.files ki_edge.policy ki_runtime.recording",
    "ki_runtime.serving": (
        "ki_edge ki_edge.bundle ki_edge.files ki_edge.policy ki_runtime.backends ki_runtime.monitoring "
        "ki_runtime.policy ki_runtime.remote"
    ),
    "ki_runtime.trt": "ki_edge ki_edge.bundle ki_edge.files ki_edge.policy ki_runtime.backends ki_runtime.gpu",
    "ki_runtime.doctor": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.planning ki_edge.policy "
        "ki_runtime.backends ki_runtime.gpu ki_runtime.openvino ki_runtime.policy ki_runtime.trt"
    ),
    "ki_export.bench": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.files ki_edge.model ki_edge.policy ki_runtime "
        "ki_runtime.backends ki_runtime.policy"
    ),
    "ki_export.passes": "",
    "ki_export.graphs": "ki_edge ki_edge.bundle ki_edge.model ki_export.passes",
    "ki_export.policies": "ki_edge ki_edge.bundle ki_edge.checkpoints.layout ki_edge.files ki_edge.policy",
    "ki_export.source": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.checkpoints.peft "
        "ki_edge.files ki_edge.policy ki_runtime.doctor ki_export.policies"
    ),
    "ki_export.weights": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.files "
        "ki_export.graphs ki_export.passes"
    ),
    "ki_export.arithmetic": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_runtime.backends ki_runtime.policy ki_export.weights"
    ),
    "ki_export.precision": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.files ki_edge.policy "
        "ki_edge.recordings ki_export.arithmetic ki_export.graphs ki_export.passes ki_export.policies "
        "ki_export.weights"
    ),
    "ki_export.parity": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.files ki_edge.model "
        "ki_edge.policy ki_edge.recordings ki_runtime.backends ki_runtime.policy ki_export.arithmetic "
        "ki_export.policies ki_export.precision ki_export.source ki_export.weights"
    ),
    "ki_export.triton": (
        "ki_edge ki_edge.bundle ki_edge.files ki_edge.policy ki_runtime ki_runtime.backends ki_runtime.policy "
        "ki_runtime.trt"
    ),
    "ki_export": (
        "ki_edge ki_edge.bundle ki_edge.checkpoints ki_edge.checkpoints.layout ki_edge.files ki_runtime.backends "
        "ki_runtime.gpu ki_runtime.trt ki_export.graphs ki_export.parity ki_export.passes ki_export.policies "
        "ki_export.precision ki_export.source ki_export.triton ki_export.weights"
    ),
}
BLOCKED = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "tensorrt",
    "tensorrt_lean",
    "cuda",
    "tensorrt_rtx",
    "transformers",
    "ki_export",
)

PROBE = """
import importlib, json, pkgutil, sys
BLOCKED = {blocked!r}
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name.startswith(("ki_edge.model", "ki_edge.train")):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Wall())
done = []
for package in ("ki_edge", "ki_runtime"):
    root = importlib.import_module(package)
    done.append(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        if module.name.startswith(("ki_edge.model", "ki_edge.train")):
            continue
        importlib.import_module(module.name)
        done.append(module.name)
print(json.dumps(done))
"""


def folder_of(module: str) -> str:
    """The folder of a module or package."""
    home = HOMES[module.split(".")[0]]
    return module if (home / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]


def imported(path: Path, folder: str) -> Iterator[str]:
    """Folders of our own that a file imports, wherever in it, but for what only the type checker reads."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            parents = folder.split(".")
            base = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [node.module])])
            module = base if node.level else str(node.module)
            names = [f"{module}.{name}" if is_module(f"{module}.{name}") else module for name in names]
        yield from (folder_of(name) for name in names if name.split(".")[0] in HOMES)


def is_module(name: str) -> bool:
    place = HOMES.get(name.split(".")[0], ROOT) / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def test_folders_import_in_one_direction() -> None:
    found: dict[str, set[str]] = {}
    for package, home in HOMES.items():
        for path in (home / package).rglob("*.py"):
            folder = ".".join(path.parent.relative_to(home).parts)
            found.setdefault(folder, set()).update(set(imported(path, folder)) - {folder})
    assert {folder: sorted(others) for folder, others in found.items()} == {
        folder: sorted(others.split()) for folder, others in DIRECTIONS.items()
    }
    assert list(graphlib.TopologicalSorter(found).static_order())  # CycleError names the circle


def modules_that_import(source: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


def test_runtime_and_shared_code_import_without_torch_or_backends() -> None:
    done = modules_that_import(PROBE.format(blocked=BLOCKED))
    for name in (
        "ki_edge.policy.transforms",
        "ki_edge.bundle",
        "ki_runtime.policy.policy",
        "ki_runtime.control.cli",
        "ki_runtime.robots.fetch",
    ):
        assert name in done


@pytest.mark.parametrize("package", ["ki_edge", "ki_runtime", "ki_export"])
def test_importing_a_package_is_light(package: str) -> None:
    """The package alone imports numpy at most: heavy libraries come with the first use."""
    heavy = "('torch', 'onnx', 'onnxruntime', 'matplotlib', 'mujoco', 'tokenizers', 'sentencepiece', 'PIL')"
    source = f"import sys, json, {package}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    assert modules_that_import(source) == []


def test_no_source_names_what_must_not_be_there() -> None:
    """Nothing is pickled, no remote code is trusted, no shell string is run."""
    words = (
        "trust_remote_code=True",
        "allow_pickle=True",
        "import pickle",
        "shell=True",
        "os.system",
        "weights_only=False",
    )
    for path in [*ROOT.glob("ki_edge/**/*.py"), *ROOT.glob("export/**/*.py"), *ROOT.glob("runtime/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path


def test_onnxruntime_neither_reports_its_use_nor_leaves_an_identifier(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    del environment["ORT_DISABLE_TELEMETRY"]
    code = "from ki_runtime.backends.ort import onnxruntime; print(onnxruntime().__version__)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert list(home.rglob("*")) == []


def test_onnxruntime_is_imported_at_one_place() -> None:
    places = [
        path.relative_to(ROOT).as_posix()
        for folder in ("ki_edge", "export", "runtime", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"import_module\(\"onnxruntime\"\)|^\s*(import|from) onnxruntime", path.read_text("utf-8"), re.M)
    ]
    assert places == ["runtime/ki_runtime/backends/ort.py"]


def test_openvino_is_imported_where_it_cannot_report() -> None:
    pattern = re.compile(r"(import_module|load)\(\"openvino\"\)|^\s*(import|from) openvino", re.M)
    found = {
        path.relative_to(ROOT).as_posix(): [text[: match.start()] for match in pattern.finditer(text)]
        for folder in ("ki_edge", "export", "runtime", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if pattern.search(text := path.read_text("utf-8"))
    }
    assert sorted(found) == ["runtime/ki_runtime/doctor/packages.py", "runtime/ki_runtime/openvino/devices.py"]
    assert all(re.search(r"with unreported\(\):\n.*$", before) for places in found.values() for before in places)
