"""What is no bundle, and what a manifest may not say of a graph."""

import pytest

from ki_edge.bundle import Bundle
from ki_edge.bundle.manifest_fields import check_fields
from ki_edge.errors import BundleError


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "adapter_config.json", "params", "_METADATA"]
)
def test_a_checkpoint_given_as_a_bundle(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BundleError, match=r"is a checkpoint, not a bundle: run ki-export .* -o BUNDLE first"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": "20"}, "needs its opset as an integer up to"),
        ({"opset": 10**9}, "needs its opset as an integer up to"),
        ({"weight_bytes": -1}, "needs its weight_bytes as an integer"),
        ({"weight_bytes": True}, "needs its weight_bytes as an integer"),
        ({"ops": "Gemm"}, "needs its ops in a list of names"),
        ({"ops": ["Gemm", 3]}, "needs its ops in a list of names"),
    ],
)
def test_what_a_graph_says_of_itself(tmp_path, change, message):
    path = tmp_path / "manifest.json"
    path.write_text("{}")
    data = {"files": {}, "graphs": {"prefix": {"file": "prefix.onnx", **change}}}
    with pytest.raises(BundleError, match=message):
        check_fields(path, data)
