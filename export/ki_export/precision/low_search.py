"""More bits for the layers whose low products cost the actions most, until a budget holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from ki_edge.errors import ExportError
from ki_export.passes.low_plan import Kind, LowPlan

from .low_findings import Findings, LowCost
from .low_study import MORE_BITS, Study
from .sensitivity import group_of

WATCHED = 4  # observations that layers are tried alone on


class Search:
    """More bits for the costliest layers, until the budget holds."""

    def __init__(
        self, study: Study, plans: Mapping[Kind, LowPlan], findings: Findings, say: Callable[[str], object]
    ) -> None:
        self._study, self._plans, self._findings, self._say = study, plans, findings, say

    def run(self) -> LowPlan:
        """The plan. ExportError if nothing may be in the precision that was asked for."""
        request, kind = self._study.request, self._study.request.precision
        plan, aim = self._plans[kind], request.aim
        cosine = self._measure(plan)
        self._note("", kind, cosine)
        self._say(f"actions with every layer in {kind}: cosine {cosine:.6f} (aim {aim:.6f})")
        ranked = self._rank(plan) if cosine < aim or request.sensitivity else []
        if cosine >= aim:
            return plan
        more = MORE_BITS[kind]
        if more is not None and self._measure(self._plans[more]) < aim:
            self._say(f"with every layer in {more} they miss it too: what costs most stays in 16 bits")
            more = None
        found = self._keep(plan, more, ranked)
        if not any(product.kind == kind for product in found.products.values()):
            raise ExportError(
                f"--precision {kind}: no layer may be in {kind} if the actions are to hold cosine {request.least}: "
                f"take --precision {more or 'fp16'}, or a smaller --budget-cosine"
            )
        return found

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
