"""Eight and four bits: scales from observations, and which layers stay in more bits until the actions hold.

Everything is measured on what the robot gets: the actions after all denoising steps, of each observation. With all
layers low, if that holds the budget; else each layer is tried alone, and the costliest get more bits, no more of them
than the budget asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, ExportError
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
from .sensitivity import group_of

BARS: Mapping[Kind, float] = {"int8": 0.999, "fp8": 0.999, "nvfp4": 0.995}  # cosine of the actions, at least
MARGIN = 0.5  # share of the distance from 1 that the budget allows: other observations are further off
MORE_BITS: Mapping[Kind, Kind | None] = {"int8": None, "fp8": None, "nvfp4": "fp8"}  # None: 16 bits
HELD_OUT = 3  # every third observation chooses no scale, so that the budget holds for what they have not seen
WATCHED = 4  # observations that layers are tried alone on
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
        return 1.0 - MARGIN * (1.0 - self.least)


@dataclass(frozen=True)
class LowCost:
    """A layer tried alone: the smallest cosine of the actions, their relative error, and its weights."""

    group: str
    kind: str
    cosine: float
    relative: float
    weights: int


@dataclass
class Findings:
    """What a plan rests on. `local`: site -> relative error of its result; `costs`: the costliest first.

    `kept`: (layer, its bits now, smallest cosine with it and all before it), in the order in which they were given more
    bits, the first entry with none; `steps`: smallest cosine after each denoising step, of the plan.
    """

    source: str
    observations: int
    budget: float
    local: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: list[LowCost] = field(default_factory=list)
    kept: list[tuple[str, str, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    holds: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "observations": self.observations,
            "budget": self.budget,
            "holds": self.holds,
            "local": self.local,
            "costs": [vars(cost) for cost in self.costs],
            "more_bits": [{"layer": layer, "bits": bits, "cosine": cosine} for layer, bits, cosine in self.kept],
            "steps": self.steps,
        }


@dataclass(frozen=True, eq=False)
class Planned:
    """The plan and what it rests on."""

    plan: LowPlan
    findings: Findings

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), **self.findings.to_json()}


def plan_low_bits(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    vocabulary: DecodeVocabulary,
    request: LowRequest,
    say: Callable[[str], object],
) -> Planned:
    """Decide what becomes of every product of lowered graphs (16-bit products), which are not changed.

    The FAST graph is left out: it keeps 16 bits. ArgumentError for a pattern that fits nothing; ExportError if the
    budget cannot be held with every layer in 16 bits.
    """
    acting = {name: models[name] for name in NAMES}
    study = _Study(checkpoint, acting, vocabulary, request)
    chosen = study.choose(say)
    findings = Findings(request.observed.source, len(request.observed.observations), request.least, study.local)
    search = _Search(study, chosen, findings, say)
    plan = search.run()
    return Planned(plan, findings)


class _Study:
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


class _Search:
    """More bits for the costliest layers, until the budget holds."""

    def __init__(
        self, study: _Study, plans: Mapping[Kind, LowPlan], findings: Findings, say: Callable[[str], object]
    ) -> None:
        self._study, self._plans, self._findings, self._say = study, plans, findings, say

    def run(self) -> LowPlan:
        request = self._study.request
        kinds: list[Kind | None] = [*self._plans, None]
        for kind, more in pairwise(kinds):
            assert kind is not None
            plan = self._plans[kind]
            cosine = self._measure(plan)
            self._note("" if kind == request.precision else "all", kind, cosine)
            self._say(f"actions with every layer in {kind}: cosine {cosine:.6f} (aim {request.aim:.6f})")
            ranked: list[str] = []
            if cosine < request.aim or (request.sensitivity and kind == request.precision):
                ranked = self._rank(plan)
            if cosine >= request.aim:
                return plan
            if more is None or self._measure(self._plans[more]) >= request.aim:
                return self._keep(plan, more, ranked)
        raise ExportError("unreachable: 16 bits are the last")

    def _measure(self, plan: LowPlan) -> float:
        """The smallest cosine of all observations; remembers it after each step."""
        states = self._study.states(plan)
        self._findings.steps = [min(cosines(s, e)) for s, e in zip(states, self._study.exact, strict=True)]
        return self._findings.steps[-1]

    def _rank(self, plan: LowPlan) -> list[str]:
        """Every layer low alone, the costliest first."""
        groups: dict[str, list[str]] = {}
        for site in plan.products:
            groups.setdefault(group_of(site), []).append(site)
        costs = []
        exact = self._study.exact[-1][:WATCHED]
        for group, sites in tqdm(groups.items(), desc="sensitivity", unit="layer", disable=None, leave=False):
            alone = replace(plan, products={site: plan.products[site] for site in sites})
            found = self._study.states(alone, WATCHED)[-1]
            error = torch.cat(list(found)) - torch.cat(list(exact))
            relative = float(error.norm() / torch.cat(list(exact)).norm())
            costs.append(LowCost(group, plan.precision, min(cosines(found, exact)), relative, self._weights(sites)))
        costs.sort(key=lambda cost: -cost.relative)
        self._findings.costs += costs
        for cost in costs[:3]:
            self._say(f"most sensitive in {plan.precision}: {cost.group}: {cost.relative:.1e} of the actions (L2)")
        return [cost.group for cost in costs]

    def _weights(self, sites: Iterable[str]) -> int:
        found = (self._study.operands[site].product.weight for site in sites)
        return sum(math.prod(w.shape.numpy()) for w in found if w is not None and w.shape is not None)

    def _keep(self, plan: LowPlan, more: Kind | None, ranked: Sequence[str]) -> LowPlan:
        """The fewest of the costliest layers that must have more bits: doubled until it holds, then halved."""
        tried: dict[int, float] = {}

        def holds(count: int) -> bool:
            if count not in tried:
                tried[count] = self._measure(self._with(plan, more, ranked[:count]))
            return tried[count] >= self._study.request.aim

        low, high = 0, 1
        while high < len(ranked) and not holds(high):
            low, high = high, min(2 * high, len(ranked))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        for count in sorted(tried):
            if count <= high:
                self._note(", ".join(ranked[:count][-3:]), more or "16 bits", tried[count])
        found = self._with(plan, more, ranked[:high])
        self._findings.holds = self._measure(found) >= self._study.request.aim
        self._say(f"{high} of {len(ranked)} layers in {more or '16 bits'}: cosine {self._findings.steps[-1]:.6f}")
        return found

    def _with(self, plan: LowPlan, more: Kind | None, groups: Sequence[str]) -> LowPlan:
        """A plan with more bits for some layers."""
        chosen = {site for site in plan.products if group_of(site) in groups}
        products = {site: product for site, product in plan.products.items() if site not in chosen}
        balances, kept = dict(plan.balances), dict(plan.kept)
        for site in chosen:
            better = self._plans[more].products.get(site) if more is not None else None
            if better is None:
                kept[site] = "costs too much of the actions"
                continue
            if better.balance:
                key = f"{better.balance} in {more}"
                balances[key] = self._plans[more].balances[better.balance]  # type: ignore[index]
                better = replace(better, balance=key)
            products[site] = better
        used = {product.balance for product in products.values()}
        return replace(plan, products=products, balances={k: b for k, b in balances.items() if k in used}, kept=kept)

    def _note(self, layer: str, bits: str, cosine: float) -> None:
        self._findings.kept.append((layer, bits, cosine))


def cosines(given: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of each observation's actions."""
    pairs = ((a.double().flatten(), b.double().flatten()) for a, b in zip(given, exact, strict=True))
    return [float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300)) for a, b in pairs]


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
