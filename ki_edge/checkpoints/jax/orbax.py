"""openpi's JAX checkpoints, read without JAX: the `params` item that orbax wrote.

The tree's names are in `_METADATA`, its values in zarr arrays named params.PaliGemma.llm..., each in its own folder or
all in one OCDBT database (manifest.ocdbt). A tree saved by training ends every path with "value", a released one does
not (openpi model.py, restore_params).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.checkpoints.layout.formats import read_json
from ki_edge.checkpoints.layout.source import F32, StoredTensor, TensorSource, widen
from ki_edge.errors import CheckpointError

from .names import Array, same
from .tree import Recipe, belongs, head_sizes, merge, recipes
from .zarr_arrays import ArrayStore, StoredArray

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
MAX_LEAVES = 10_000
MAX_FILES = 100_000


class OrbaxSource(TensorSource):
    """Tensors of openpi's JAX tree in PyTorch layout, one layer's matrix in memory at a time (134 MB for a π0.5).

    `ignored`: parameters in the folder that openpi's policy does not have. `geometry`: the head sizes that PyTorch
    shapes cannot tell, as config.json's geometry block has them. LoRA adapters are added to their weights, which then
    are float32 whatever the base was stored in.

    Read the layers in ascending order: zarr_arrays says what going back costs.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, StoredArray], ignored: tuple[str, ...] = ()) -> None:
        shapes = {leaf: array.shape for leaf, array in arrays.items()}
        self.folder, self.arrays, self.ignored = folder, arrays, ignored
        self.files = _files(folder)
        self.recipes = recipes(shapes, folder)
        self.geometry = head_sizes(shapes)
        self.tensors = {key: self._describe(recipe) for key, recipe in self.recipes.items()}
        self._last: tuple[str, Array] = ("", np.empty(0))

    @classmethod
    def open(cls, folder: Path) -> OrbaxSource:
        """The params folder, or the checkpoint folder that holds it. No value is read.

        CheckpointError if it is incomplete, not openpi's, of another dtype, or if tensorstore is not installed.
        """
        folder = folder / "params" if (folder / "params").is_dir() else folder
        if not (folder / METADATA).is_file():
            raise CheckpointError(f"{folder}: no {METADATA}, so this is not a complete orbax folder: copy it again")
        _files(folder)
        metadata = read_json(folder / METADATA)
        ocdbt = (folder / MANIFEST).is_file()
        if metadata.get("use_ocdbt") and not ocdbt:
            raise CheckpointError(f"{folder}: no {MANIFEST}, which its {METADATA} asks for: copy the folder again")
        store = ArrayStore(
            folder,
            ocdbt=ocdbt,
            zarr3=metadata.get("use_zarr3") is True,
            complete=metadata.get("store_array_data_equal_to_fill_value") is True,
        )
        names = leaf_names(metadata, folder)
        ignored = tuple(sorted(leaf for leaf in names if not belongs(leaf)))
        arrays = {leaf: store.open(name) for leaf, name in names.items() if leaf not in ignored}
        return cls(folder, arrays, ignored)

    def rows(self, key: str, start: int, stop: int) -> F32:
        recipe, tensor = self.recipes[key], self.tensors[key]
        if recipe.convert is same and not recipe.index:  # rows as they lie in the file: the embedding of 2 GB
            piece = self.arrays[recipe.leaf].read((), start, stop)
        else:
            if self._last[0] != key:
                self._last = ("", np.empty(0))  # free the old matrix before the new one comes
                self._last = (key, self._matrix(recipe))
            piece = self._last[1][start:stop]
        raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        return widen(raw, tensor.dtype).reshape(piece.shape)

    def _matrix(self, recipe: Recipe) -> Array:
        """The whole tensor in its stored type, a view of the turned block where that is possible."""
        if recipe.adapter is None:
            return recipe.convert(self._block(recipe.leaf, recipe.index))
        adapter = recipe.adapter
        weight, a, b = (self._wide(leaf, recipe.index) for leaf in (recipe.leaf, adapter.a, adapter.b))
        merge(weight, a, b.sum(axis=0) if adapter.summed else b)
        return recipe.convert(weight)

    def _wide(self, leaf: str, index: tuple[int, ...]) -> F32:
        block = self._block(leaf, index)
        return widen(block.reshape(-1).view(np.uint8), self.arrays[leaf].dtype).reshape(block.shape)

    def _block(self, leaf: str, index: tuple[int, ...]) -> Array:
        array = self.arrays[leaf]
        return array.read(index, 0, array.shape[len(index)])

    def _describe(self, recipe: Recipe) -> StoredTensor:
        array = self.arrays[recipe.leaf]
        like = np.broadcast_to(np.uint8(0), array.shape[len(recipe.index) :])
        dtype = array.dtype if recipe.adapter is None else "F32"
        return StoredTensor(dtype, recipe.convert(like).shape)


def leaf_names(metadata: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Path in openpi's tree -> name of its array, from `_METADATA`."""
    try:
        keys = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in metadata["tree_metadata"].values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / METADATA} does not describe a tree: {error!r}") from None
    if not 0 < len(keys) <= MAX_LEAVES:
        raise CheckpointError(f"{folder / METADATA} lists {len(keys)} parameters, expected 1 to {MAX_LEAVES}")
    for key in keys:
        if not key or not all(part.isprintable() and "/" not in part and part not in ("", ".", "..") for part in key):
            raise CheckpointError(
                f"{folder / METADATA} names a parameter {key!r:.80}, which cannot be a name in a tree"
            )
    paths = [key[1:] if key[:1] == ["params"] else key for key in keys]
    if all(path[-1:] == ["value"] for path in paths):
        paths = [path[:-1] for path in paths]
    return {"/".join(path): ".".join(key) for path, key in zip(paths, keys, strict=True)}


def _files(folder: Path) -> tuple[Path, ...]:
    """All files below it. CheckpointError if they are too many, or no regular files, which would be waited for."""
    files = []
    for path in folder.rglob("*"):
        if path.is_file():
            files.append(path)
        elif path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is not a regular file: copy the checkpoint again")
        if len(files) > MAX_FILES:
            raise CheckpointError(f"{folder} holds more than {MAX_FILES} files")
    return tuple(sorted(files))
