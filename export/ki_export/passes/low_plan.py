"""Which products of a model are computed in eight or four bits, and with which scales: decided elsewhere, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["int8", "fp8", "nvfp4"]
Base = Literal["fp16", "bf16"]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LowProduct:
    """One product, by its site's name in `passes.products`.

    `operand`: the scale of its left operand, the same for all observations: the operand is about scale * q. Of nvfp4
    it is the scale of the whole tensor beside those of blocks, which are computed as they come. `other`: the same of
    the right operand of an attention's product; None where that is a weight. `balance`: key of `LowPlan.balances`, ""
    for none.
    """

    kind: Kind
    operand: float
    other: float | None = None
    balance: str = ""

    def to_json(self) -> dict[str, Any]:
        more: dict[str, Any] = {} if self.other is None else {"other": self.other}
        return {
            "kind": self.kind,
            "operand": self.operand,
            **more,
            **({"balance": self.balance} if self.balance else {}),
        }


@dataclass(frozen=True, eq=False)
class LowPlan:
    """What becomes of every product. `precision`: asked for; `products`: site -> how, all others stay in 16 bits.

    `balances`: f32 [in] powers of two b: the operand is multiplied by 1 / b and the weight's columns by b, which is
    exact; products of one operand share one. `base`: the 16 bits of all else; `kept`: site -> why it stays in them.
    `fast`: whether the FAST graph takes the low products too, instead of 16-bit weights of its own.
    """

    precision: Kind
    products: Mapping[str, LowProduct]
    balances: Mapping[str, F32] = field(default_factory=dict)
    base: Base = "bf16"
    kept: Mapping[str, str] = field(default_factory=dict)
    fast: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "base": self.base,
            "fast": self.fast,
            "products": {site: product.to_json() for site, product in self.products.items()},
            "balances": {key: np.log2(values).astype(int).tolist() for key, values in self.balances.items()},
            "kept": dict(self.kept),
        }
