"""Triton's own protobuf reads what ki-export --triton writes, and is what the kept description of it says."""

import json
from pathlib import Path

import pytest

from ki_export.triton import write_repository

from .conftest import succeed

pytestmark = pytest.mark.integration

READ = """
import json, pathlib, sys
from google.protobuf import descriptor_pb2, json_format, text_format
from tritonclient.grpc import model_config_pb2 as triton
out = {}
for path in pathlib.Path(sys.argv[1]).glob("*/config.pbtxt"):
    config = text_format.Parse(path.read_text("ascii"), triton.ModelConfig())
    out[config.name] = json_format.MessageToDict(config, preserving_proto_field_name=True)
kept = descriptor_pb2.FileDescriptorProto.FromString(pathlib.Path(sys.argv[2]).read_bytes())
present = descriptor_pb2.FileDescriptorProto.FromString(triton.DESCRIPTOR.serialized_pb)
now = {m.name: {(f.name, f.number, f.type, f.label) for f in m.field} for m in present.message_type}
for message in kept.message_type:
    assert {(f.name, f.number, f.type, f.label) for f in message.field} <= now[message.name], message.name
pathlib.Path(sys.argv[3]).write_text(json.dumps(out))
"""


def test_tritons_protobuf_reads_the_repository(
    triton_python: Path, fetch_bundle: Path, data: Path, tmp_path: Path
) -> None:
    write_repository(fetch_bundle, tmp_path / "models")
    kept = data / "triton" / "model_config.binpb"
    succeed(triton_python, "-c", READ, tmp_path / "models", kept, tmp_path / "read.json")
    read = json.loads((tmp_path / "read.json").read_text())
    assert set(read) == {"ki_prefix", "ki_denoise", "ki_fast_decode", "ki_policy"}
    assert read["ki_prefix"]["input"][0] == {
        "name": "images", "data_type": "TYPE_UINT8", "dims": ["-1", "-1", "96", "96", "3"]
    }  # fmt: skip
    assert read["ki_denoise"]["input"][2] == {"name": "dt", "data_type": "TYPE_FP32", "dims": ["1"], "reshape": {}}
    assert read["ki_policy"]["backend"] == "python"
