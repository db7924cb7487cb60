"""Normalisation of states and actions: the statistics, their file, and the formulas of openpi and LeRobot.

`norm_stats.json` has openpi's form: {"norm_stats": {"state": {"mean": [...], "std": ..., "q01": ..., "q99": ...},
"actions": ...}}.

Formulas, x in robot units, y normalised (not clipped anywhere, so y may leave [-1, 1]):

    kind      epsilon   normalize                                 unnormalize
    quantile  openpi    (x - q01) / (q99 - q01 + 1e-6) * 2 - 1    (y + 1) / 2 * (q99 - q01 + 1e-6) + q01
    quantile  lerobot   2 (x - q01) / w - 1                       (y + 1) / 2 * w + q01
    zscore    openpi    (x - mean) / (std + 1e-6)                 y (std + 1e-6) + mean
    zscore    lerobot   (x - mean) / (std + 1e-8)                 y std + mean
    none                x                                         y

w = q99 - q01, or 1e-8 where that is 0. LeRobot's are computed in float32, as it does: the state's bins in the prompt
are then its bins. Its MIN_MAX and QUANTILE10 are `quantile` with other percentiles in the fields q01 and q99.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import numbers
from ki_edge.errors import ArgumentError, ContractError, DatasetError, KiEdgeError
from ki_edge.files.reading import parse_json, read_file
from ki_edge.files.writing import write_file

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Floats = TypeVar("Floats", Float32, Float64)
NormalizationKind = Literal["quantile", "zscore", "none"]
EpsilonStyle = Literal["openpi", "lerobot"]

OPENPI_EPSILON = 1e-6
LEROBOT_EPSILON = 1e-8
LARGEST = float(np.finfo(np.float32).max)
MAX_BYTES = 64_000_000  # of a norm_stats.json
CROSSED = "crossed"  # of an entry in a file: its quantiles may be the wrong way round
FIELDS = ("mean", "std", "q01", "q99")


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of one feature ("state" or "actions"), each float64 [d] in robot units, or None where unknown.

    `mean` and `std` serve the z-score, `q01` and `q99` (the 1 % and 99 % quantiles, or whatever other values map to -1
    and 1) the quantile normalisation.
    """

    mean: Float64 | None = None
    std: Float64 | None = None
    q01: Float64 | None = None
    q99: Float64 | None = None

    def __post_init__(self) -> None:
        for name in FIELDS:
            value = getattr(self, name)
            if value is not None:
                array = numbers(value, f"norm stats: {name}", ContractError).copy()
                array.setflags(write=False)
                object.__setattr__(self, name, array)
        if fault := _fault({name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}):
            raise ContractError(f"norm stats: {fault}")

    @property
    def dim(self) -> int:
        """Number of dimensions; 0 if no field is known."""
        known = [value for value in (self.mean, self.std, self.q01, self.q99) if value is not None]
        return known[0].shape[0] if known else 0


def compute_stats(x: npt.ArrayLike) -> NormStats:
    """Statistics of `x` [..., d] over all leading axes: mean, population std, 1 % and 99 % quantiles, float64 [d].

    openpi estimates its quantiles from a running histogram of 5000 bins; here they are exact (linear interpolation).
    Raises DatasetError on empty or non-finite data.
    """
    array = numbers(x, "data of statistics", DatasetError)
    if array.ndim < 2 or array.size == 0:
        raise DatasetError(f"statistics need data of shape [n, d] with n and d at least 1, got {array.shape}")
    rows = array.reshape(-1, array.shape[-1])
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        raise DatasetError(f"statistics need finite data: {bad.size} of {len(rows)} rows are not, first row {bad[0]}")
    q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
    return NormStats(mean=rows.mean(axis=0), std=rows.std(axis=0), q01=q01, q99=q99)


def normalize(x: npt.ArrayLike, stats: NormStats, kind: NormalizationKind, epsilon: EpsilonStyle = "openpi") -> Float64:
    """Robot units to the model's units, by the table above.

    `x` float [..., d]; statistics longer than d are truncated to d. Returns float64 [..., d].
    Raises ContractError if the statistics are shorter than d or lack the two fields that `kind` needs.
    """
    x = _features(x, "x")
    _check(stats, kind, epsilon)
    if kind == "none":
        return x.copy()
    d = x.shape[-1]
    if stats.dim < d:
        raise ContractError(f"norm stats have {stats.dim} dimensions, the data {d}: are they those of this robot?")
    low, high = (field[:d] for field in _fields(stats, kind))
    if epsilon == "lerobot":
        with np.errstate(over="ignore"):  # beyond float32 is infinite there, as it is for LeRobot
            return _normalize_lerobot(x.astype(np.float32), low.astype(np.float32), high.astype(np.float32), kind)
    if kind == "quantile":
        return np.asarray((x - low) / (high - low + OPENPI_EPSILON) * 2.0 - 1.0)
    return np.asarray((x - low) / (high + OPENPI_EPSILON))


def unnormalize(
    y: npt.ArrayLike, stats: NormStats, kind: NormalizationKind, epsilon: EpsilonStyle = "openpi"
) -> Float64:
    """The model's units to robot units, by the table above.

    `y` float [..., D]. Dimensions past the statistics (the model's padding) pass through; like openpi's, its z-score
    treats them as mean 0, std 1, so they are multiplied by 1 + 1e-6. Statistics longer than D are truncated.
    Returns float64 [..., D]. Raises ContractError if the statistics lack the two fields that `kind` needs.
    """
    y = _features(y, "y")
    _check(stats, kind, epsilon)
    if kind == "none":
        return y.copy()
    low, high = _fields(stats, kind)
    d = min(y.shape[-1], low.shape[0])
    low, high = low[:d], high[:d]
    out = y.copy()
    if kind == "quantile":
        width = high - low + OPENPI_EPSILON if epsilon == "openpi" else _lerobot_width(low, high)
        out[..., :d] = (y[..., :d] + 1.0) / 2.0 * width + low
    elif epsilon == "openpi":
        out[..., :d] = y[..., :d] * (high + OPENPI_EPSILON) + low
        out[..., d:] = y[..., d:] * (1.0 + OPENPI_EPSILON)
    else:
        out[..., :d] = y[..., :d] * high + low
    return out


def checked_stats(
    fields: Mapping[str, object],
    where: str,
    names: Mapping[str, str] | None = None,
    error: type[KiEdgeError] = ContractError,
) -> NormStats:
    """Statistics from a file. `error` says what is wrong where: `<where>.q99[3] is NaN: expected a finite number`.

    `fields`: "mean", "std", "q01", "q99" to a list or array of numbers; None, or not there: not known. `names`: how the
    file calls a field, where it is not so.
    """
    names = names or {}
    arrays: dict[str, Float64] = {}
    for field in FIELDS:
        if (value := fields.get(field)) is None:
            continue
        name = names.get(field, field)
        if isinstance(value, np.ndarray):
            arrays[field] = value.astype(np.float64)
            continue
        if not isinstance(value, list):
            raise error(f"{where}.{name} is {str(value)[:40]!r}: expected a list of numbers")
        for at, item in enumerate(value):
            if isinstance(item, bool) or not isinstance(item, int | float):
                raise error(f"{where}.{name}[{at}] is {str(item)[:40]!r}: expected a number")
        arrays[field] = np.array(value, np.float64)
    if fault := _fault(arrays, names) or _order_fault(arrays, names):
        raise error(f"{where}.{fault}")
    return NormStats(**arrays)


def read_norm_stats(path: str | Path) -> dict[str, NormStats]:
    """Read a `norm_stats.json` (or the folder that holds one): {"state": ..., "actions": ..., ...}.

    The file may have openpi's outer key "norm_stats" or not. Raises ContractError naming the file, the feature, the
    field and the index of what is no statistic: not finite, too large for float32, q99 below q01, std below 0.
    """
    path = Path(path)
    path = path / "norm_stats.json" if path.is_dir() else path
    text = read_file(path, MAX_BYTES, ContractError)
    content = parse_json(text, str(path), ContractError, constant=float, number=float)
    content = content.get("norm_stats", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content:
        raise ContractError(f'norm stats: {path} must hold {{"norm_stats": {{"state": ..., "actions": ...}}}}')
    found = {}
    for name, fields in content.items():
        if not isinstance(fields, dict):
            raise ContractError(f"{path}: {name} must be an object with {', '.join(FIELDS)}")
        crossed = isinstance(fields, dict) and fields.get(CROSSED) is True
        found[name] = checked_stats(fields, f"{path}: {name}", {"q01": "q10", "q99": "q90"} if crossed else None)
    return found


def write_norm_stats(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Write `stats` to a file in openpi's form, whole or not at all; fields that are None are written as null.

    ContractError if it cannot be written.
    """
    write_file(Path(path), norm_stats_json(stats), ContractError)


def norm_stats_json(stats: Mapping[str, NormStats]) -> str:
    """The text of `stats` in openpi's form."""
    content = {
        name: {field: None if (value := getattr(entry, field)) is None else value.tolist() for field in FIELDS}
        for name, entry in stats.items()
    }
    for name, entry in stats.items():
        if entry.q01 is not None and entry.q99 is not None and (entry.q01 > entry.q99).any():
            content[name][CROSSED] = True  # LeRobot's q10 and q90, which were accepted as they are
    return json.dumps({"norm_stats": content}, indent=2) + "\n"


def _fault(fields: Mapping[str, Float64], names: Mapping[str, str] | None = None) -> str:
    """The first thing that is wrong with statistics, named by field and index; "" if nothing.

    q01 = q99 and std = 0 are right: that dimension never moved.
    """
    called = {field: (names or {}).get(field, field) for field in fields}
    for field, array in fields.items():
        if array.ndim != 1:
            return f"{called[field]} must be a list of finite numbers, got shape {array.shape}"
        bad = np.flatnonzero(~(np.abs(array) <= LARGEST))
        if bad.size:
            value = array[bad[0]]
            what = "too large for float32" if np.isfinite(value) else "expected a finite number"
            return f"{called[field]}[{bad[0]}] is {_shown(value)}: {what}"
    sizes = {called[field]: array.shape[0] for field, array in fields.items()}
    if len(set(sizes.values())) > 1:
        return f"all fields must have one length, got {sizes}"
    if "std" in fields and (bad := np.flatnonzero(fields["std"] < 0)).size:
        return f"{called['std']}[{bad[0]}] is {_shown(fields['std'][bad[0]])}: expected 0 or more"
    return ""


def _order_fault(fields: Mapping[str, Float64], names: Mapping[str, str]) -> str:
    """The first q99 below its q01; "" if none.

    LeRobot's q10 and q90 are used as they are: recordings of it have them crossed where a number hardly moved.
    """
    called = {field: names.get(field, field) for field in fields}
    if "q01" in fields and "q99" in fields and called["q01"] != "q10":
        width = fields["q99"] - fields["q01"]
        if (bad := np.flatnonzero((width < 0) | (width > LARGEST))).size:
            low, high = (_shown(fields[field][bad[0]]) for field in ("q01", "q99"))
            why = "below it" if width[bad[0]] < 0 else "further away than float32 can hold"
            return f"{called['q01']}[{bad[0]}] is {low} and {called['q99']}[{bad[0]}] is {high}, {why}"
    return ""


def _shown(value: np.float64) -> str:
    return "NaN" if np.isnan(value) else f"{value:.6g}"


def _features(value: npt.ArrayLike, name: str) -> Float64:
    array = numbers(value, name)
    if array.ndim < 1:
        raise ArgumentError(f"{name}: expected numbers [..., d], got a single one")
    return array


def _check(stats: NormStats, kind: str, epsilon: str) -> None:
    if not isinstance(stats, NormStats):
        raise ContractError(f"norm stats: expected NormStats, got {type(stats).__name__}")
    if not isinstance(kind, str) or kind not in get_args(NormalizationKind):
        raise ContractError(f"unknown normalization {kind!r:.60}, expected one of {get_args(NormalizationKind)}")
    if not isinstance(epsilon, str) or epsilon not in get_args(EpsilonStyle):
        raise ContractError(f"unknown epsilon style {epsilon!r:.60}, expected one of {get_args(EpsilonStyle)}")


def _fields(stats: NormStats, kind: NormalizationKind) -> tuple[Float64, Float64]:
    """(q01, q99) or (mean, std)."""
    names = ("q01", "q99") if kind == "quantile" else ("mean", "std")
    low, high = (getattr(stats, name) for name in names)
    if low is None or high is None:
        raise ContractError(f"{kind} normalization needs {names[0]} and {names[1]}, which these norm stats do not have")
    return low, high


def _normalize_lerobot(x: Float32, low: Float32, high: Float32, kind: NormalizationKind) -> Float64:
    if kind == "quantile":
        return np.asarray(2 * (x - low) / _lerobot_width(low, high) - 1, np.float64)
    return np.asarray((x - low) / (high + np.float32(LEROBOT_EPSILON)), np.float64)


def _lerobot_width(low: Floats, high: Floats) -> Floats:
    width = high - low
    return np.where(width == 0, width.dtype.type(LEROBOT_EPSILON), width)
