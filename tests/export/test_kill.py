"""kill -9 while an export replaces a bundle: the old one or the new one is there, and the next export cleans up."""

import shutil
import signal
import subprocess
import sys

import pytest

from ki_edge.bundle import Bundle, write_bundle

# A child that exports with graphs traced before, and stops for good at one moment.
CHILD = """
import sys, time
from pathlib import Path
import onnx_ir as ir
from ki_edge.files import publishing
from ki_export import exporter
from ki_export.graphs import tracing
from ki_export.parity import parity

checkpoint, target, traced, moment = sys.argv[1:]

def halt():
    print("halted", flush=True)
    time.sleep(600)

def trace(traceable, opset, sizes):
    model = ir.load(Path(traced) / f"{traceable.spec.name}.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model

tracing.trace = trace
if moment == "graphs":
    exporter.check = lambda path: halt()
elif moment == "proof":
    parity.compare_with_checkpoint = lambda *arguments, **more: halt()
else:
    rename = publishing._rename
    def rename_once(*arguments):
        rename(*arguments)
        halt()
    publishing._rename = rename_once
exporter.export(checkpoint, target, exporter.ExportOptions(force=True, verify=moment == "proof"))
"""


@pytest.fixture(scope="module")
def halted(bundle, checkpoint, tmp_path_factory):
    """For each moment a folder with an old bundle, and a child process that stands still there."""
    children = {}
    for moment in ("graphs", "proof", "publication"):
        folder = tmp_path_factory.mktemp(moment)
        shutil.copytree(bundle.path, folder / "bundle")
        arguments = [checkpoint, folder / "bundle", bundle.path, moment]
        command = [sys.executable, "-c", CHILD, *map(str, arguments)]
        children[moment] = folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield children
    for _, child in children.values():
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("moment", ["graphs", "proof", "publication"])
def test_kill_nine(halted, moment):
    folder, child = halted[moment]
    assert child.stdout.readline() == "halted\n"
    left = [path for path in folder.iterdir() if path.name.startswith(".bundle.partial-") and path.is_dir()]
    assert len(left) == 1  # the child was in the middle of it
    child.send_signal(signal.SIGKILL)
    child.wait()
    proven = moment != "publication"  # the one that replaced it was exported without proof
    assert Bundle.open(folder / "bundle", verify=True).manifest.parity["verified"] is proven
    with pytest.raises(RuntimeError, match="not today"), write_bundle(folder / "bundle", force=True):
        raise RuntimeError("not today")
    assert [path.name for path in folder.iterdir()] == ["bundle"]  # swept
    assert Bundle.open(folder / "bundle", verify=True).manifest.parity["verified"] is proven
