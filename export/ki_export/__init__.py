"""From a checkpoint to a verified bundle of ONNX graphs: ki-export and the order of its work.

    from ki_export import ExportOptions, export
    bundle = export("checkpoint", "bundle", ExportOptions())

Imports: graphs, parity, passes, policies, precision, source, triton, weights; of ki_edge: bundle, checkpoints,
checkpoints.layout, files; of ki_runtime: backends, gpu, trt.
"""

from typing import TYPE_CHECKING

from ki_edge.public_names import public_names

if TYPE_CHECKING:
    from ki_export.exporter import export
    from ki_export.options import ExportOptions
    from ki_export.parity.parity import compare_with_checkpoint
    from ki_export.parity.recorded import compare_with_recording
    from ki_export.parity.reference import ReferencePolicy
    from ki_export.policies import PolicyRequest
    from ki_export.source.inspection import inspect

__getattr__, __dir__ = public_names(
    __name__,
    {
        "ki_export.exporter": "export",
        "ki_export.options": "ExportOptions",
        "ki_export.parity.parity": "compare_with_checkpoint",
        "ki_export.parity.recorded": "compare_with_recording",
        "ki_export.parity.reference": "ReferencePolicy",
        "ki_export.policies": "PolicyRequest",
        "ki_export.source.inspection": "inspect",
    },
)

__all__ = [
    "ExportOptions", "PolicyRequest", "ReferencePolicy", "compare_with_checkpoint", "compare_with_recording",
    "export", "inspect",
]  # fmt: skip
