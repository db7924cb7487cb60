"""What CUDA's statuses and cuda-python's exceptions mean to this runtime."""

from __future__ import annotations

import re

from ki_edge.errors import BackendError
from ki_runtime.backends.session import first_line

NO_DRIVER = "no NVIDIA driver on this machine"
SUCCESS, OUT_OF_MEMORY = 0, 2
# Initialisation, stub library, driver too old, devices unavailable, no device, system not ready, versions of driver and
# kernel module, forward compatibility on a card that has none.
ABSENT = (3, 34, 35, 46, 100, 802, 803, 804)
# Errors after which the context is lost: every later call fails with them, until the process ends.
LOST = (214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999)


def raised(what: str, error: Exception) -> BackendError:
    """The error of what cuda-python raised in `what` instead of giving a status.

    Its 12.6 and 12.8 raise RuntimeError where there is no driver: "Failed to dlopen libcuda.so.1" at the first call,
    and at later ones 'Function "cuInit" not found'.
    """
    if re.search(r'libcuda\.so|Function "cu\w+" not found', str(error)):
        return BackendError(f"{NO_DRIVER}: {first_line(error)}")
    if isinstance(error, AttributeError):
        return BackendError(
            f"cuda-python has no {what}: pip install --upgrade cuda-python (of the driver's CUDA version)"
        )
    return BackendError(f"CUDA failed in {what}: {type(error).__name__}: {first_line(error)}")
