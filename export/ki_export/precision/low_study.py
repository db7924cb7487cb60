"""The graphs of acting over observations, exactly and with some products in eight or four bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_ir as ir
from torch import Tensor
from tqdm import tqdm

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError
from ki_export.arithmetic.readers import CheckpointWeights
from ki_export.passes.low_plan import Kind, LowPlan, LowProduct
from ki_export.passes.products import EMBEDDING
from ki_export.weights.rounding import BLOCK
from ki_export.weights.weights import TensorSlice, sources

from .calibration import Calibration, Observed
from .low_products import RoundedWeights, replacements
from .operands import Operands, observe_operands
from .ranges import BUDGET
from .rehearsal import Prefixes, Rehearsal
from .scales import choose, choose_alone

BARS: Mapping[Kind, float] = {"int8": 0.999, "fp8": 0.999, "nvfp4": 0.995}  # cosine of the actions, at least
# share of the distance from 1 that the budget allows: other observations are further off, in 4 bits most
MARGINS: Mapping[Kind, float] = {"int8": 0.5, "fp8": 0.5, "nvfp4": 0.25}
HELD_OUT = 3  # every third observation chooses no scale, so that the budget holds for what they have not seen
MORE_BITS: Mapping[Kind, Kind | None] = {"int8": None, "fp8": None, "nvfp4": "fp8"}  # None: 16 bits
NAMES = (graphs.PREFIX.name, graphs.DENOISE.name)
States = Sequence[Sequence[Tensor]]  # actions after each step, of each observation


@dataclass(frozen=True)
class LowRequest:
    """`keep`: patterns of sites that stay in 16 bits; `budget`: cosine of the actions of each observation, None: BARS'.

    `exponents` and `kept`: those of the 16-bit decision; `sensitivity`: try every layer alone even if the budget holds.
    """

    precision: Kind
    observed: Calibration
    keep: tuple[str, ...] = ()
    budget: float | None = None
    exponents: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    sensitivity: bool = False

    @property
    def least(self) -> float:
        """The cosine that has to hold on other observations."""
        return BARS[self.precision] if self.budget is None else self.budget

    @property
    def aim(self) -> float:
        """The cosine that has to hold on these."""
        return 1.0 - MARGINS[self.precision] * (1.0 - self.least)


class Study:
    """The graphs over the observations: exactly, and with some products low."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        models: Mapping[str, ir.Model],
        vocabulary: DecodeVocabulary,
        request: LowRequest,
    ) -> None:
        self.request, self._models = request, models
        self._checkpoint = checkpoint
        self._origins: dict[str, Mapping[str, TensorSlice]] = {n: sources(m, vocabulary) for n, m in models.items()}
        given = request.observed.observations
        held = [one for at, one in enumerate(given) if at % HELD_OUT == HELD_OUT - 1]
        seen = [one for at, one in enumerate(given) if at % HELD_OUT != HELD_OUT - 1]
        self.observations: tuple[Observed, ...] = (*seen, *held)
        exact = Rehearsal(checkpoint, models, self._origins, BUDGET, request.exponents)
        self.operands, self.prefixes, self.exact = observe_operands(exact, models, seen)
        if held:
            more = exact.prefix(held)
            states = exact.states(held, more)
            self.prefixes += more
            self.exact = [[*one, *two] for one, two in zip(self.exact, states, strict=True)]
        self.fixed = _kept(request, self.operands)
        self.local: dict[str, dict[str, float]] = {}
        self._rounded: dict[Kind, RoundedWeights] = {}

    def choose(self, say: Callable[[str], object]) -> dict[Kind, LowPlan]:
        """A plan with everything low that may be, for the precision and for those with more bits."""
        kinds: list[Kind] = [self.request.precision]
        while (more := MORE_BITS[kinds[-1]]) is not None:
            kinds.append(more)
        plans = {kind: LowPlan(kind, {}, {}, base="fp16", kept=dict(self.fixed)) for kind in kinds}
        for sites in tqdm(self._shared(), desc="scales", unit="operand", disable=None, leave=False):
            self._choose(sites, plans)
        balanced = sum(bool(product.balance) for product in plans[kinds[0]].products.values())
        say(f"chose scales of {len(plans[kinds[0]].products)} products in {kinds[0]}, {balanced} of them balanced")
        return plans

    def _shared(self) -> list[list[Operands]]:
        """Products by the operand that they share."""
        found: dict[object, list[Operands]] = {}
        for site, seen in self.operands.items():
            if site not in self.fixed:
                key = seen.product.node.inputs[0] if seen.product.weight is not None else site
                found.setdefault(key, []).append(seen)
        return list(found.values())

    def _choose(self, sites: list[Operands], plans: Mapping[Kind, LowPlan]) -> None:
        first = sites[0]
        rows, largest = first.left.rows, first.left.largest
        if first.product.weight is None:
            for plan in plans.values():
                if plan.precision != "int8":
                    self._attention(first, plan)
            return
        weights = [self._weight(seen) for seen in sites]
        for asked, plan in plans.items():
            kind: Kind = asked if asked != "nvfp4" or rows.shape[1] % BLOCK == 0 else "fp8"
            made = choose(rows, largest, weights, kind)
            key = ""
            if made.balance is not None:
                key = first.product.name
                plan.balances[key] = made.balance.numpy()  # type: ignore[index]
            for seen in sites:
                plan.products[seen.product.name] = LowProduct(kind, made.scale, None, key)  # type: ignore[index]
                self.local.setdefault(seen.product.name, {})[kind] = made.error

    def _attention(self, seen: Operands, plan: LowPlan) -> None:
        """An attention's product: e4m3 in all plans but int8, whose steps are too coarse for probabilities."""
        (left, error), (right, other) = (choose_alone(o.rows, o.largest, "fp8") for o in (seen.left, seen.right))
        plan.products[seen.product.name] = LowProduct("fp8", left, right)  # type: ignore[index]
        self.local.setdefault(seen.product.name, {})["fp8"] = (error**2 + other**2) ** 0.5

    def _weight(self, seen: Operands) -> Tensor:
        value = seen.product.weight
        assert value is not None and value.shape is not None
        reader = CheckpointWeights(self._checkpoint.source, self._origins[seen.graph], self.request.exponents)
        return reader.part(value, 0, int(value.shape[0])).float()  # type: ignore[arg-type]

    def states(self, plan: LowPlan, count: int | None = None) -> States:
        """The actions after each step, with the plan's products low. What the plan leaves exact is not run again."""
        rounded = self._rounded.setdefault(plan.precision, RoundedWeights())
        replaced = replacements(plan, self._models, rounded)
        observations = self.observations[:count]
        rehearsal = Rehearsal(self._checkpoint, self._models, self._origins, BUDGET, self.request.exponents, replaced)
        touched = any(self.operands[site].graph == NAMES[0] for site in plan.products)
        prefixes: Prefixes = rehearsal.prefix(observations) if touched else self.prefixes[:count]
        return rehearsal.states(observations, prefixes)


def _kept(request: LowRequest, operands: Mapping[str, Operands]) -> dict[str, str]:
    """Sites that stay in 16 bits whatever is measured: site -> why."""
    kept = dict(request.kept)
    kept.update({site: "a table of rows" for site in operands if site == EMBEDDING})
    for pattern in request.keep:
        found = [site for site in operands if fnmatchcase(site, pattern)]
        if not found:
            names = list(operands)
            raise ArgumentError(
                f"--keep {pattern!r} fits no matrix product of prefix and denoise: there are such as "
                f"{', '.join(names[:3])}, {names[-1]}; try 'backbone.layers.0.*' or '*.down_proj'"
            )
        kept.update(dict.fromkeys(found, f"--keep {pattern}"))
    if request.precision == "int8":
        attention = (site for site, seen in operands.items() if seen.product.weight is None)
        kept.update(dict.fromkeys(attention, "an attention's own product: probabilities need finer steps"))
    return kept
