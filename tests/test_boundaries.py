"""What may import what: the runtime and everything it uses run where torch, onnx and the backends do not exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
