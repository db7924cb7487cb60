"""What engines choose their kernels by: this machine's processor in words."""

from __future__ import annotations

import platform

from ki_edge.proc import cpu_info

VECTOR_UNITS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


def processor() -> str:
    """Architecture, model and vector units of this machine's processor: what engines choose their kernels by."""
    names = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    model = " ".join(found for name in names if (found := cpu_info(name))) or platform.processor()
    units = sorted(set(VECTOR_UNITS) & set((cpu_info("flags") or cpu_info("Features")).split()))
    return " ".join([platform.machine(), model, *units])
