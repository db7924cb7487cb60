"""How far a bundle may be from its float32 reference: one table a precision, each bar with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError

MAX_ABS = "max abs error"
COSINE = "cosine distance"  # 1 - cos of the angle between both tensors as vectors
CHANGED = "share changed"
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bar:
    """The largest error allowed in `metric`; `scaled`: times the reference's largest magnitude where it exceeds 1."""

    limit: float
    scaled: bool
    reason: str
    metric: str = MAX_ABS

    def at(self, magnitude: float) -> float:
        """The bar of a tensor whose reference reaches `magnitude`."""
        return self.limit * max(1.0, magnitude) if self.scaled else self.limit


KV_REASON = (
    "float32 sums of up to 16384 terms in another order: about 1e-6 of the largest value a layer; K/V of large models "
    "reach tens, hence scaled"
)
INT8_REASON = (
    "8-bit products round by about 1 % a layer, in random directions: the direction must hold, not each value; "
    "measured: 1e-3 with 4 layers of real width and with a small trained policy, so this leaves room for depth"
)

FLOAT32 = {
    "times": Bar(0.0, False, "the float32 times of both conventions are exact; any difference is the wrong convention"),
    "modulation": Bar(2e-5, True, "three small float32 dense layers, computed once a step count"),
    "prefix_mask": Bar(0.0, False, "boolean"),
    "prefix_k": Bar(2e-5, True, KV_REASON),
    "prefix_v": Bar(2e-5, True, KV_REASON),
    "x_next": Bar(2e-5, False, "one step from the reference's own x and K/V: nothing accumulates, x is of order 1"),
    "velocity": Bar(2e-4, True, "of x_next: the same error divided by dt, about 0.1, and up to 5 in size"),
    "x": Bar(2e-5, False, "x after each step of the whole pipeline; openpi in float32 is itself 1.4e-6 from float64"),
    "actions": Bar(2e-5, False, "the last x: what the robot gets, before normalisation is undone"),
    "logits": Bar(2e-5, True, "as K/V; large vocabularies have logits of order 10"),
    "new_k": Bar(2e-5, True, KV_REASON),
    "new_v": Bar(2e-5, True, KV_REASON),
    "greedy_ids": Bar(0.0, False, "token ids are integers: one difference changes everything after it"),
}

INT8 = {
    **FLOAT32,
    **dict.fromkeys(("prefix_k", "prefix_v", "new_k", "new_v"), Bar(2e-2, False, INT8_REASON, COSINE)),
    "logits": Bar(2e-2, False, INT8_REASON, COSINE),
    "x_next": Bar(1e-2, False, "one step; hides the velocity's error behind the x that it started from", COSINE),
    "velocity": Bar(2e-2, False, INT8_REASON, COSINE),
    "x": Bar(1e-2, False, "as the actions, which it becomes", COSINE),
    "actions": Bar(1e-2, False, "cosine 0.99: below it the robot misses; success on a robot decides", COSINE),
    "greedy_ids": Bar(1.0, False, "near ties fall the other way, and one difference changes all that follow", CHANGED),
    "changed_weights": Bar(
        0.0, False, "number of weights: bars this wide do not show a damaged one, so all are compared"
    ),
}

FLOAT16_REASON = "products rounded to 11 bits: 2e-4 of a tensor each, in random directions, over all layers"
FLOAT16 = {
    **FLOAT32,
    **dict.fromkeys(("prefix_k", "prefix_v", "new_k", "new_v", "logits"), Bar(1e-4, False, FLOAT16_REASON, COSINE)),
    "x_next": Bar(5e-3, False, "one step of the actions' bar"),
    "velocity": Bar(1e-4, False, FLOAT16_REASON, COSINE),
    "x": Bar(5e-3, False, "as the actions, which it becomes"),
    "actions": Bar(5e-3, False, "the strictest bar that a published float16 engine is held to"),
    "actions_direction": Bar(1e-5, False, "cosine 0.99999, of the same engine", COSINE),
    "greedy_ids": Bar(1.0, False, "near ties fall the other way, and one difference changes all that follow", CHANGED),
    "changed_weights": Bar(0.0, False, "number of weights that are not the checkpoint's, rounded: all are compared"),
}
BFLOAT16_REASON = "products rounded to 8 bits: 2e-3 of a tensor each; openpi's own bfloat16 is 0.046 from its float32"
BFLOAT16 = {
    **FLOAT16,
    **dict.fromkeys(("prefix_k", "prefix_v", "new_k", "new_v", "logits"), Bar(5e-3, False, BFLOAT16_REASON, COSINE)),
    **dict.fromkeys(("x_next", "x", "actions"), Bar(5e-2, False, BFLOAT16_REASON)),
    "velocity": Bar(5e-3, False, BFLOAT16_REASON, COSINE),
    "actions_direction": Bar(1e-3, False, BFLOAT16_REASON, COSINE),
}

LOW_REASON = (
    "products of {} bits, the rest in float16: the direction must hold; what the layers' errors come to is held by the "
    "actions, for which the costliest layers have more bits"
)
SHARED = {"greedy_ids": FLOAT16["greedy_ids"], "changed_weights": FLOAT16["changed_weights"]}
FAST_HEAD = {name: FLOAT16[name] for name in ("logits", "new_k", "new_v")}  # the FAST graph keeps 16 bits


def _low(bits: str, actions: float, inside: float, reason: str) -> dict[str, Bar]:
    """Bars of engines' eight and four bits: cosine distances of the actions, and of what comes before them."""
    why = LOW_REASON.format(bits)
    return {
        **FLOAT32,
        **dict.fromkeys(("prefix_k", "prefix_v", "velocity"), Bar(inside, False, why, COSINE)),
        **FAST_HEAD,
        "x_next": Bar(actions, False, "one step; hides the velocity's error behind the x that it started from", COSINE),
        "x": Bar(actions, False, "as the actions, which it becomes", COSINE),
        "actions": Bar(actions, False, reason, COSINE),
        **SHARED,
    }


LOW = {
    "int8_static": _low("8", 1e-3, 2e-2, "cosine 0.999 on every observation; success on a robot decides"),
    "float8": _low("8", 1e-3, 2e-2, "cosine 0.999 on every observation; success on a robot decides"),
    "nvfp4": _low("4", 5e-3, 1e-1, "cosine 0.995 on every observation; success on a robot decides"),
}
BUDGETED = ("x_next", "x", "actions")  # what a bundle's own budget of the actions holds

BARS = {  # by the manifest's precision
    "float32": FLOAT32,
    "int8": INT8,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    **LOW,
}

# What the witness of a bundle holds every engine to, wherever it runs: the actions, their direction, two runs apart.
SAME_KERNELS = "one engine, the same kernels and inputs: only sums that are added in no fixed order may differ"
WITNESS = {
    "float32": {
        "actions": Bar(
            2e-4,
            False,
            "ten times what ONNX Runtime is held to on a CPU: other engines choose the order of every sum and "
            "approximate exponentials; products in TF32 would show, they are off by 1e-3",
        ),
        "actions_direction": Bar(1e-7, False, "of actions of order 1 that differ by that much", COSINE),
        "apart": Bar(2e-5, False, SAME_KERNELS),
    },
    "float16": {
        "actions": FLOAT16["actions"],
        "actions_direction": FLOAT16["actions_direction"],
        "apart": Bar(1e-3, False, SAME_KERNELS),
    },
    "bfloat16": {
        "actions": BFLOAT16["actions"],
        "actions_direction": BFLOAT16["actions_direction"],
        "apart": Bar(1e-2, False, SAME_KERNELS),
    },
    "int8": {
        "actions": Bar(1.0, True, "of a range from -1 to 1: what the direction below allows to a single number"),
        "actions_direction": INT8["actions"],
        "apart": Bar(1e-3, False, SAME_KERNELS),
    },
    **{
        precision: {
            "actions": Bar(1.0, True, "of a range from -1 to 1: what the direction below allows to a single number"),
            "actions_direction": bars["actions"],
            "apart": Bar(1e-2, False, SAME_KERNELS),
        }
        for precision, bars in LOW.items()
    },
}
FAST_TIE = 16.0  # times the proving engine's error of the logits: other engines, and the K/V before, add theirs


def bars_of(precision: str, budget: float | None = None) -> Mapping[str, Bar]:
    """The bars of a bundle's precision; ArgumentError for one that has none.

    `budget`: cosine of the actions that the export of a low precision was asked to hold.
    """
    if precision not in BARS:
        raise ArgumentError(f"no bars for precision '{precision}': expected one of {', '.join(BARS)}")
    bars = BARS[precision]
    if budget is None or precision not in LOW:
        return bars
    asked = Bar(1.0 - budget, False, f"--budget-cosine {budget:g}", COSINE)
    return {**bars, **dict.fromkeys(BUDGETED, asked)}


@dataclass(frozen=True)
class Measurement:
    """One comparison. `place`: the layer or step, or None for a tensor as a whole.

    `error` is in `metric`, whose bar is `limit`, and may be NaN; `max_abs` and `relative` (L2, of the reference's) are
    there whatever the metric, as is `cosine`. `magnitude`: the reference's largest absolute value.
    """

    case: str
    graph: str
    tensor: str
    place: int | None
    error: float
    magnitude: float
    limit: float
    metric: str
    max_abs: float
    relative: float
    cosine: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def where(self) -> str:
        """For people: graph, tensor and place."""
        kind = "layer" if self.tensor.endswith(("_k", "_v")) else "step"
        return f"{self.graph}: {self.tensor}" + ("" if self.place is None else f" {kind} {self.place}")

    @property
    def figures(self) -> str:
        """Error and bar, for people."""
        measure = "error" if self.metric == MAX_ABS else self.metric
        return f"{measure} {self.error:.1e}, allowed {self.limit:.1e}"

    @property
    def severity(self) -> float:
        """Error relative to the bar, above 1 if it failed; 0 for what is only counted."""
        if math.isnan(self.error):
            return math.inf
        if self.metric == CHANGED and self.passed:
            return 0.0
        if self.limit == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.limit


def measure(
    case: str,
    graph: str,
    tensor: str,
    given: npt.ArrayLike,
    reference: npt.ArrayLike,
    place: int | None = None,
    bars: Mapping[str, Bar] = FLOAT32,
) -> Measurement:
    """Compare arrays of one shape against the bar called `tensor`. Another shape, NaN or infinity fails."""
    ours, theirs, bar = np.asarray(given, np.float64), np.asarray(reference, np.float64), bars[tensor]
    magnitude = float(np.abs(theirs).max(initial=0.0))
    fits = ours.shape == theirs.shape
    max_abs = _max_abs(ours, theirs)
    relative = _ratio(float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(theirs))) if fits else math.inf
    cosine = 1.0 - _cosine_distance(ours, theirs)
    error = METRICS[bar.metric](ours, theirs)
    return Measurement(
        case, graph, tensor, place, error, magnitude, bar.at(magnitude), bar.metric, max_abs, relative, cosine
    )


def _max_abs(ours: Array, theirs: Array) -> float:
    return float(np.abs(ours - theirs).max(initial=0.0)) if ours.shape == theirs.shape else math.inf


def _ratio(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)


def _cosine_distance(ours: Array, theirs: Array) -> float:
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return math.inf
    lengths = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    if lengths == 0:
        return 0.0 if not ours.any() and not theirs.any() else 1.0
    return max(0.0, 1.0 - float(np.vdot(ours, theirs)) / lengths)


def _changed(ours: Array, theirs: Array) -> float:
    """Rows [B,n] of ids may end early: what only one side has counts as changed."""
    common = min(ours.shape[1], theirs.shape[1])
    same = int((ours[:, :common] == theirs[:, :common]).sum())
    return 1.0 - same / max(1, ours.size, theirs.size)


METRICS = {MAX_ABS: _max_abs, COSINE: _cosine_distance, CHANGED: _changed}
