"""Engines of a bundle as a build leaves them, without a compiler."""

from dataclasses import replace
from hashlib import sha256

from ki_runtime.gpu.device import Device
from ki_runtime.trt.api import Api
from ki_runtime.trt.engines import EngineFile, Engines, identify

ORIN = Device("Orin", (8, 7), 16 << 30, multiprocessors=8)
ADA = Device("NVIDIA GeForce RTX 4090", (8, 9))


def api(name="tensorrt", version="10.3.0"):
    return Api(None, name, tuple(map(int, version.split("."))), version)


def publish(bundle, used=None, device=ORIN, capabilities=None, graphs=None, **changes):
    """Engines with contents of their own; `changes` are fields of their identity."""
    identity = identify(bundle, used or api(), device, capabilities or [device.capability], graphs=graphs)
    identity = replace(identity, **changes)
    folder = bundle.path / "engines" / identity.key
    folder.mkdir(parents=True)
    files = {}
    for graph in identity.graphs:
        content = f"engine of {graph} in {identity.key}".encode()
        (folder / f"{graph}.engine").write_bytes(content)
        files[graph] = EngineFile(f"{graph}.engine", len(content), sha256(content).hexdigest(), 10, 1.5)
    engines = Engines(folder, identity, files)
    engines.write()
    return engines
