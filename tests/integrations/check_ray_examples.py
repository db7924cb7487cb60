"""Run by Ray's own Python: the files of examples/ray against Ray's schemas, and the application that they name."""

import json
import sys
from pathlib import Path

import jsonschema
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

FOLDER = Path(sys.argv[1])


def check_serve(content: dict) -> None:
    """Ray lets unknown fields pass, so every field is looked for in what it read."""
    read = ServeDeploySchema.model_validate(content).model_dump(mode="json", exclude_unset=True)
    missing = [path for path, value in leaves(content) if dict(leaves(read)).get(path, "nothing") != value]
    assert not missing, missing


def leaves(value: object, path: str = ""):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


served = yaml.safe_load((FOLDER / "serve.yaml").read_text())
check_serve(served)
service = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
check_serve(yaml.safe_load(service["spec"]["serveConfigV2"]))

schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
cluster = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
jsonschema.validate(cluster, schema)
validate_config(prepare_config(cluster))  # with the defaults of its provider

from ki_runtime.serving.ray_engine import application  # noqa: E402

for config in (served, yaml.safe_load(service["spec"]["serveConfigV2"])):
    (one,) = config["applications"]
    made = application(one["args"])
    assert made._bound_deployment.name == one["deployments"][0]["name"], made
sys.stdout.write("the examples are what Ray takes\n")
