"""Weights in the type in which the checkpoint stores them, widened to float32 where they are used.

The bundle can then share the checkpoint's own 16-bit file. Widening bfloat16 or float16 is exact, so results are those
of float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .lower import cast, widen_rows


def keep_stored_types(model: ir.Model, types: Mapping[str, ir.DataType]) -> None:
    """Give each initializer named in `types` that type, and its users a Cast of it; a Gather, of the rows it takes."""
    order = {node: at for at, node in enumerate(model.graph)}
    for name, stored in types.items():
        value = model.graph.initializers[name]
        if stored == ir.DataType.FLOAT:
            continue
        users = list(value.uses())
        value.dtype = stored
        whole = [use for use in users if use.node.op_type != "Gather" or use.idx != 0]
        for use in users:
            if use not in whole:
                widen_rows(model.graph, use.node, stored)
        if whole:
            widened = cast(value, ir.DataType.FLOAT)
            model.graph.insert_before(min((use.node for use in whole), key=lambda node: order[node]), widened)
            for use in whole:
                use.node.replace_input_with(use.idx, widened.outputs[0])
