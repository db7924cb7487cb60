"""Write JAX checkpoints with the real orbax library: the folders beside this file, or one from any openpi checkpoint.

    python write_orbax.py openpi_a lora ...       # the folders named in made.json, each with the versions named there
    python write_orbax.py --checkpoint DIR --out DIR     # any π0.5 of openpi's PyTorch layout, in its type

It needs jax, flax and orbax-checkpoint, which nothing else here does. openpi's training pins jax 0.5.3,
flax 0.10.2 and orbax-checkpoint 0.11.13.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax_layout import to_jax
from safetensors import safe_open
from safetensors.numpy import save_file
from small_models import add_adapters, small_tree, small_weights

HERE = Path(__file__).parent


def frozen(tree):
    """openpi's training keeps what a LoRA run does not train in bfloat16 (scripts/train.py)."""

    def cast(path, leaf):
        names = [str(part.key) for part in path]
        return leaf if "llm" not in names or "lora" in names[-1] else leaf.astype(ml_dtypes.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, tree)


def spread(tree):
    """Arrays over four devices: the longest axis that four divides is cut, as openpi's fsdp_sharding does."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))

    def place(leaf):
        cut = [None] * leaf.ndim
        fitting = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % 4 == 0]
        if leaf.ndim > 1 and fitting:
            cut[max(fitting, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*cut)))

    return jax.tree.map(place, tree)


def save_training(tree, folder):
    """As openpi's training does: an nnx.State as the item "params" of a CheckpointManager."""
    flat = {tuple(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    state = nnx.State.from_flat_path(
        {path: nnx.VariableState(nnx.Param, jax.numpy.asarray(leaf)) for path, leaf in flat.items()}
    )
    with tempfile.TemporaryDirectory() as scratch:
        manager = ocp.CheckpointManager(
            scratch,
            item_handlers={"params": ocp.PyTreeCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(max_to_keep=1, create=False),
        )
        manager.save(30, {"params": {"params": state}})
        manager.wait_until_finished()
        manager.close()
        shutil.copytree(Path(scratch) / "30" / "params", folder / "params")


def save_released(tree, folder, **layout):
    """A pure dict through PyTreeCheckpointer, which is Checkpointer(PyTreeCheckpointHandler())."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)) as checkpointer:
        checkpointer.save((folder / "params").resolve(), {"params": tree})
    (folder / "params" / "commit_success.txt").unlink(missing_ok=True)  # new versions note the absolute path in it


def write(name):
    """One of the committed folders, and the tensors that reading it must give."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name == "openpi_a":
        source = HERE.parent / "openpi_a"
        shutil.copyfile(source / "config.json", folder / "config.json")
        with safe_open(source / "model.safetensors", "np") as file:
            save_training(to_jax(file.get_tensor, set(file.keys()), 4, 4), folder)
        return
    weights = small_weights(7, pi0=name == "pi0")
    tree = small_tree(weights)
    if name == "pi0":
        save_file(weights, HERE / "pi0.safetensors")
        save_released(tree, folder)
    elif name == "lora":
        save_file(add_adapters(tree, weights, 8), HERE / "lora.safetensors")
        save_training(frozen(tree), folder)
    else:
        save_file(weights, HERE / "small.safetensors")
        if name == "sharded":
            save_training(spread(tree), folder)
        elif name == "bfloat16":
            save_released(jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), tree), folder)
        elif name == "files":
            save_released(tree, folder, use_ocdbt=False)
        elif name == "zarr3":
            save_released(tree, folder, use_zarr3=True)
        else:
            raise SystemExit(f"no folder {name}")


def convert(checkpoint, out):
    """A checkpoint of any size in its stored type; takes about three times its size in memory."""
    with safe_open(checkpoint / "model.safetensors", "np") as file:

        def bits(key):  # einsum does not know bfloat16
            tensor = file.get_tensor(key)
            return tensor.view(np.uint16) if tensor.dtype == ml_dtypes.bfloat16 else tensor

        tree = to_jax(bits, set(file.keys()), 16, 8)
    tree = jax.tree.map(lambda leaf: leaf.view(ml_dtypes.bfloat16) if leaf.dtype == np.uint16 else leaf, tree)
    out.mkdir(parents=True)
    save_released(tree, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        convert(arguments.checkpoint, arguments.out)
    made = HERE / "made.json"
    record = json.loads(made.read_text()) if made.exists() else {}
    for name in arguments.names:
        write(name)
        packages = ("orbax-checkpoint", "jax", "flax", "tensorstore", "numpy")
        record[name] = {package: version(package) for package in packages}
        made.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
