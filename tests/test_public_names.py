"""The names that each package promises: exactly these, each there, and each imported only when it is used."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

NAMES = {
    "ki_edge": (
        "ArgumentError BackendError Bundle BundleError Checkpoint CheckpointError ContractError DatasetError "
        "ExportError FastCodec InputPipeline KiEdgeError NormStats ObservationError OutputPipeline ParityError "
        "Pi05Config PolicyContract PromptError PromptTokenizer RobotError load_model read_norm_stats save_checkpoint"
    ),
    "ki_export": (
        "ExportOptions PolicyRequest ReferencePolicy compare_with_checkpoint compare_with_recording export inspect"
    ),
    "ki_runtime": (
        "BuildOptions ControlLoop EpisodeStatus KiEdgeError LoopOptions Policy Recorder Robot RobotError Sampler "
        "Step Watcher build_bundle episode_noise open_robot"
    ),
    "ki_runtime.serving": "Engine LocalEngine Question Server ServerOptions",
}


@pytest.mark.parametrize("package", NAMES)
def test_exactly_these_names(package: str) -> None:
    module = importlib.import_module(package)
    wanted = NAMES[package].split()
    assert sorted(module.__all__) == sorted(wanted)
    assert dir(module) == sorted([*wanted, "__version__"])
    for name in wanted:
        assert getattr(module, name).__name__ == name
    assert module.__version__ == version("ki-edge")
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Polcy'"):
        module.Polcy  # noqa: B018


@pytest.mark.parametrize("package", NAMES)
def test_what_type_checkers_see_is_what_there_is(package: str) -> None:
    """The imports under TYPE_CHECKING give the same objects."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        seen |= {alias.name: getattr(importlib.import_module(node.module), alias.name) for alias in node.names}
    assert seen == {name: getattr(module, name) for name in module.__all__}


def test_looking_at_the_names_imports_nothing() -> None:
    """`dir` and `__version__` are for everybody, `from ki_runtime import *` only for who has what it needs."""
    code = (
        "import ki_edge, ki_export, ki_runtime, sys; [dir(m) for m in (ki_edge, ki_export, ki_runtime)]; "
        "ki_runtime.__version__; assert not {'torch', 'onnx', 'numpy', 'ki_edge.model'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
