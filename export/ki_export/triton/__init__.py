"""A bundle as a model repository of Triton Inference Server: its graphs, and the whole policy as a Python model.

    from ki_export.triton import write_repository
    write_repository("bundle", "repository")

`model.py` runs inside Triton and nowhere else.

Imports: of ki_edge: bundle, files, policy; of ki_runtime: itself, backends, policy, trt.
"""

from .repository import BACKENDS, write_repository

__all__ = ["BACKENDS", "write_repository"]
