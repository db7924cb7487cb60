"""witness.npz: observations with the float32 reference's answers, which every engine must reproduce where it runs.

    n observations (3 to 5)    N camera slots    T prompt tokens with padding    f forced, m sampled FAST tokens
    h, w, H, A, Z of `ki_edge.graphs`

One array a name, all in ARRAYS; those of FAST only if the bundle has fast_decode. An .npz is a zip archive, so a
hostile one could be a bomb, hold pickled objects or other shapes than it says: everything is checked against the
manifest's geometry before anything is unpacked.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge import graphs
from ki_edge.errors import BundleError
from ki_edge.files.reading import read_file
from ki_edge.flow import MAX_STEPS

from . import Bundle, Manifest

WITNESS = "witness.npz"
FORMAT = 1
Array = npt.NDArray[Any]
# array -> (dtype, dims); "pictures" stands for the type that the prefix graph takes
ARRAYS: Mapping[str, tuple[str, tuple[str | int, ...]]] = {
    "format": ("int64", ()),
    "images": ("pictures", ("n", "N", "h", "w", 3)),  # RGB
    "camera_mask": ("bool", ("n", "N")),  # False: absent
    "prompt_tokens": ("int32", ("n", "T")),
    "prompt_mask": ("bool", ("n", "T")),
    "noise": ("float32", ("n", "H", "A")),
    "state": ("float32", ("n", "Z")),  # of a π0 alone
    "num_steps": ("int64", ()),
    "actions": ("float32", ("n", "H", "A")),  # the reference's, in the model's space
    "max_abs": ("float64", ("n",)),  # the bars: largest error of one number,
    "cosine_distance": ("float64", ()),  # 1 - cosine of the angle between both sides' actions,
    "apart": ("float64", ()),  # and how far two runs of one engine on the same inputs may be apart
    "fast_row": ("int64", ()),  # the observation that is continued
    "fast_forced": ("int64", ("f",)),
    "fast_max_tokens": ("int64", ()),
    "fast_constrained": ("bool", ()),
    "fast_ids": ("int64", ("m",)),  # greedy
    "fast_margins": ("float32", ("m",)),  # by how much each was the most likely, in logits
    "fast_ties": ("float32", ("m",)),  # below this margin, this precision may choose another
}
CONTINUED = {name for name in ARRAYS if name.startswith("fast_")}
LARGEST = {"n": 5, "N": 16, "T": 4096, "f": 64, "m": 512}
HEADER = 4096  # bytes; what describes an array takes 128
TAIL = 22  # bytes of a zip's last record
DIRECTORY = 8192  # bytes of its list of files
PICTURES = ("uint8", "float32")


@dataclass(frozen=True, eq=False)
class Continuation:
    """Greedy FAST tokens of one observation: what is fed first, and ids i64 [m] with their margins f32 [m]."""

    row: int
    forced: tuple[int, ...]
    max_tokens: int
    constrained: bool
    ids: Array
    margins: Array
    ties: Array

    def matches(self, given: Array) -> bool:
        """Whether ids i64 [k] are these, up to the first that the reference itself chose by less than its tie."""
        for at, expected in enumerate(self.ids):
            if at >= len(given):
                return False
            if given[at] != expected:
                return bool(self.margins[at] < self.ties[at])
        return len(given) == len(self.ids)

    def agreement(self, given: Array) -> int:
        """How many of `given` are these, before the first that is not."""
        count = min(len(given), len(self.ids))
        different = np.flatnonzero(given[:count] != self.ids[:count])
        return int(different[0]) if different.size else count


@dataclass(frozen=True, eq=False)
class Witness:
    """Arrays as in ARRAYS. `state` is None but for a π0, `fast` without the FAST head."""

    images: Array
    camera_mask: Array
    prompt_tokens: Array
    prompt_mask: Array
    noise: Array
    state: Array | None
    num_steps: int
    actions: Array
    max_abs: Array
    cosine_distance: float
    apart: float
    fast: Continuation | None

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, row: int) -> tuple[Array, Array, Array, Array]:
        """A sampler's four inputs of one observation, with a batch axis of one."""
        every = (self.images, self.camera_mask, self.prompt_tokens, self.prompt_mask)
        return tuple(array[row : row + 1] for array in every)  # type: ignore[return-value]

    def more(self, row: int) -> dict[str, Any]:
        """The other arguments of `sample_actions` for that observation."""
        state = None if self.state is None else self.state[row : row + 1]
        return {"state": state, "noise": self.noise[row : row + 1], "num_steps": self.num_steps}

    def describe(self, row: int) -> str:
        """For people: "2 cameras, 9 tokens"."""
        cameras, tokens = int(self.camera_mask[row].sum()), int(self.prompt_mask[row].sum())
        return f"{cameras} camera{'s' * (cameras != 1)}, {tokens} token{'s' * (tokens != 1)}"

    def write(self, path: Path) -> None:
        """Write the file; the same witness is the same bytes."""
        fast = {} if self.fast is None else {f"fast_{name}": value for name, value in vars(self.fast).items()}
        content = {"format": FORMAT, **{name: getattr(self, name) for name in ARRAYS if hasattr(self, name)}, **fast}
        arrays = {
            name: np.asarray(value, None if ARRAYS[name][0] == "pictures" else ARRAYS[name][0])
            for name, value in content.items()
            if value is not None
        }
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def has_witness(manifest: Manifest) -> bool:
    """Whether a bundle carries one: those that were not verified do not, nor do those of older versions."""
    return WITNESS in manifest.files


def read_witness(bundle: Bundle) -> Witness:
    """The witness of a bundle, checked; BundleError if there is none or anything in it is not as it must be."""
    if not has_witness(bundle.manifest):
        raise BundleError(
            f"{bundle.path} carries no {WITNESS}: it was exported with --no-verify or by an older version; "
            "export it again, or compare it with --checkpoint"
        )
    path = bundle.file(WITNESS)
    try:
        dims, kind = _geometry(bundle.manifest)
        most = sum(_bytes(name, dims, kind) + HEADER for name in ARRAYS) + DIRECTORY
        found = _unpack(read_file(path, most, BundleError), dims, kind)
        return _checked(found, bundle.manifest)
    except (ValueError, LookupError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        if isinstance(error, BundleError) and str(path) in str(error):
            raise
        raise BundleError(f"{path} cannot be used: {error}; copy the bundle again, or export it again") from None
    except Exception as error:  # zlib.error, and what else a compressed stream may raise
        raise BundleError(f"{path} is damaged ({type(error).__name__}: {error}): copy the bundle again") from None


def picture_type(manifest: Manifest) -> str:
    """The type of the pictures that a bundle's prefix graph takes."""
    inputs = manifest.graphs.get("prefix", {}).get("inputs") or ()
    recorded = next((t.get("dtype") for t in inputs if isinstance(t, dict) and t.get("name") == "images"), None)
    found = recorded or graphs.specs(manifest.config)[0].tensor("images").dtype
    if found not in PICTURES:
        raise BundleError(f"the manifest's pictures are {found!r:.40}, expected one of {', '.join(PICTURES)}")
    return str(found)


def _geometry(manifest: Manifest) -> tuple[dict[str, int], str]:
    return graphs.sizes(manifest.config, 0), picture_type(manifest)


def _bytes(name: str, dims: Mapping[str, int], kind: str) -> int:
    """The most that an array can take."""
    dtype, symbols = ARRAYS[name]
    count = np.dtype(kind if dtype == "pictures" else dtype).itemsize
    for symbol in symbols:
        count *= symbol if isinstance(symbol, int) else LARGEST.get(symbol) or dims[symbol]
    return count


def _unpack(content: bytes, dims: Mapping[str, int], kind: str) -> dict[str, Array]:
    """All arrays, none of which is unpacked beyond the size that it may have."""
    _check_directory(content)
    known: dict[str, int] = dict(dims)
    found = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        missing = {*ARRAYS} - {*names}
        if missing - {"state"} not in (set(), CONTINUED) or sorted([*names, *missing]) != sorted(ARRAYS):
            raise ValueError(f"its arrays are {', '.join(sorted(names))[:300]}")
        for info, name in zip(archive.infolist(), names, strict=True):
            if info.file_size > _bytes(name, dims, kind) + HEADER:
                raise ValueError(f"'{name}' has {info.file_size} bytes, more than it can have")
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"'{name}' is encrypted or packed in an unknown way")
            with archive.open(info) as file:
                found[name] = _array(name, file.read(info.file_size), known, kind)
    return found


def _check_directory(content: bytes) -> None:
    """ValueError unless the zip ends with a short list of files, before anybody makes an object of each entry."""
    end = content[-TAIL:]
    if len(end) < TAIL or end[:4] != b"PK\5\6" or content[-TAIL - 20 : -TAIL].startswith(b"PK\6\7"):
        raise ValueError("it is not an .npz file, or it is truncated")
    entries, size = (int.from_bytes(end[at : at + width], "little") for at, width in ((10, 2), (12, 4)))
    if entries > len(ARRAYS) or size > DIRECTORY:
        raise ValueError(f"it lists {entries} files, more than a witness has")


def _array(name: str, content: bytes, known: dict[str, int], kind: str) -> Array:
    """One array in .npy form; its dimensions must agree with those known, and those not known become so."""
    file = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)  # type: ignore[no-untyped-call]
    wanted, symbols = ARRAYS[name]
    wanted = kind if wanted == "pictures" else wanted
    fits = dtype == np.dtype(wanted) and len(shape) == len(symbols) and not fortran
    for size, symbol in zip(shape, symbols, strict=False):
        if isinstance(symbol, str) and symbol in LARGEST:
            fits = fits and 0 <= size <= LARGEST[symbol]
            known.setdefault(symbol, size)
        fits = fits and size == (symbol if isinstance(symbol, int) else known[symbol])
    if not fits:
        names = [known.get(symbol, symbol) if isinstance(symbol, str) else symbol for symbol in symbols]
        raise ValueError(f"'{name}' is {dtype}{list(shape)}, expected {wanted}{names}")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def _checked(found: Mapping[str, Array], manifest: Manifest) -> Witness:
    """ValueError for values that no export writes."""
    config = manifest.config
    if found["format"] != FORMAT:
        raise ValueError(f"format {int(found['format'])}, this version reads {FORMAT}: upgrade ki-edge")
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds NaN or infinity")
    rows, bars = len(found["images"]), (found["max_abs"], found["cosine_distance"], found["apart"])
    if rows == 0 or any((bar < 0).any() for bar in bars):
        raise ValueError("it has no observations, or negative bars")
    if config.has_state != ("state" in found):
        raise ValueError("'state' belongs to a π0 and to no other model")
    if manifest.has_fast != (found.keys() >= CONTINUED):
        raise ValueError("a FAST continuation belongs to a bundle with fast_decode and to no other")
    ids = [found[name] for name in ("prompt_tokens", "fast_ids", "fast_forced") if name in found]
    if any(((array < 0) | (array >= config.vocab_size)).any() for array in ids):
        raise ValueError(f"a token is outside of the model's vocabulary of {config.vocab_size}")
    mask = found["prompt_mask"]
    if not mask[:, :1].all() or (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("a prompt is empty or has a gap")
    within = {"num_steps": (1, MAX_STEPS)}
    if manifest.has_fast:
        within |= {"fast_row": (0, rows - 1), "fast_max_tokens": (max(1, len(found["fast_ids"])), LARGEST["m"])}
    for name, (least, most) in within.items():
        if not least <= found[name] <= most:
            raise ValueError(f"'{name}' is {int(found[name])}, expected {least} to {most}")
    names = ("images", "camera_mask", "prompt_tokens", "prompt_mask", "noise", "actions", "max_abs")
    return Witness(
        **{name: found[name] for name in names},
        state=found.get("state"),
        num_steps=int(found["num_steps"]),
        cosine_distance=float(found["cosine_distance"]),
        apart=float(found["apart"]),
        fast=_continuation(found) if manifest.has_fast else None,
    )


def _continuation(found: Mapping[str, Array]) -> Continuation:
    return Continuation(
        row=int(found["fast_row"]),
        forced=tuple(map(int, found["fast_forced"])),
        max_tokens=int(found["fast_max_tokens"]),
        constrained=bool(found["fast_constrained"]),
        ids=found["fast_ids"],
        margins=found["fast_margins"],
        ties=found["fast_ties"],
    )
