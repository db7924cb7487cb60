"""The Python model of a Triton repository, run on a real bundle. Triton is not here: `fake_triton` stands in for it."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
from google.protobuf import json_format

from ki_export.triton import write_repository
from ki_runtime import Policy

from . import fake_triton
from .fake_triton import Request, text
from .test_triton import parse  # noqa: F401


@pytest.fixture(scope="module")
def repository(fetch_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(fetch_bundle, folder)
    return folder / "ki_policy"


@pytest.fixture
def loaded(repository, parse, monkeypatch):  # noqa: F811
    """loaded(kind, device) -> the model as Triton opens it: its file alone, and its configuration as JSON."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = json_format.MessageToDict(
        parse((repository / "config.pbtxt").read_text()), preserving_proto_field_name=True
    )

    def load(kind="CPU", device="0"):
        spec = importlib.util.spec_from_file_location("model", repository / "1" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize({
            "model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": device,
            "model_repository": "/elsewhere", "model_version": "1", "model_name": "ki_policy",
        })  # fmt: skip
        return model

    return load


def observed(count, size=(96, 128), seed=0):
    """Observations, and the tensors of a request for them."""
    random = np.random.default_rng(seed)
    pictures = {name: random.integers(0, 256, (count, *size, 3), np.uint8) for name in ("front_left", "front_right")}
    states = random.uniform(-0.1, 0.1, (count, 5)).astype(np.float32) + np.float32([1.3, 0.7, 0.5, 0.0, 0.0])
    tensors = {**{f"images/{name}": images for name, images in pictures.items()}, "state": states}
    rows = [
        {"images": {name: images[i] for name, images in pictures.items()}, "state": states[i]} for i in range(count)
    ]
    return rows, tensors


def test_answers_are_those_of_the_policy(loaded, fetch_bundle):
    """Requests of one and of three observations, with seeds, noise, steps and sentences of their own."""
    model, policy = loaded(), Policy.load(fetch_bundle, "ort")
    (one,), first = observed(1)
    three, second = observed(3, size=(60, 80), seed=1)
    noise = np.random.default_rng(2).standard_normal((3, 8, 8)).astype(np.float32)
    prompts = ("reach the green target", "reach the red target", "reach the blue target")
    responses = model.execute([
        Request({**first, "seed": np.int64([[7]])}),
        Request({**second, "noise": noise, "prompt": text(*prompts), "num_steps": np.int32([[4], [5], [10]])}),
    ])  # fmt: skip
    assert [response.error() for response in responses] == [None, None]
    alone, together = ({out.name(): out.as_numpy() for out in found.output_tensors()} for found in responses)
    assert alone.keys() == together.keys() == {"actions"}
    assert np.array_equal(alone["actions"], policy.infer(one, seed=7)["actions"][None])
    for i, (row, prompt, steps) in enumerate(zip(three, prompts, (4, 5, 10), strict=True)):
        wanted = policy.infer({**row, "prompt": prompt}, noise=noise[i], num_steps=steps)["actions"]
        assert np.array_equal(together["actions"][i], wanted)
    assert together["actions"].dtype == np.float64 and together["actions"].shape == (3, 8, 4)
    model.finalize()


def test_a_wrong_request_fails_alone(loaded):
    """Its neighbours in the same call are answered; what is wrong is told, by kind."""
    model = loaded()
    _, good = observed(1)
    seeded = {**good, "seed": np.int64([[1]])}
    wrong = {
        "NaN or infinity": {**seeded, "state": np.full((1, 5), np.nan, np.float32)},
        "camera front_right is missing": {
            name: value for name, value in seeded.items() if name != "images/front_right"
        },
        "num_steps": {**seeded, "num_steps": np.int32([[0]])},
        "noise": {**good, "noise": np.full((1, 8, 8), np.inf, np.float32)},
    }
    responses = model.execute([
        Request(seeded), *(Request(tensors) for tensors in wrong.values()), Request(seeded, cancelled=True),
        Request({}), Request(seeded),
    ])  # fmt: skip
    first, *failed, cancelled, empty, last = responses
    assert first.error() is last.error() is None
    assert np.array_equal(first.output_tensors()[0].as_numpy(), last.output_tensors()[0].as_numpy())
    for message, response in zip(wrong, failed, strict=True):
        assert message in response.error().message(), response.error().message()
        assert response.error().code() == fake_triton.TritonError.INVALID_ARG
    assert cancelled.error().code() == fake_triton.TritonError.CANCELLED
    assert empty.error() is not None and not empty.output_tensors()


@pytest.mark.parametrize(
    ("seen", "device", "left"), [("", "1", "1"), ("4,6", "1", "6"), ("GPU-aa,GPU-bb", "0", "GPU-aa")]
)
def test_an_instance_sees_the_gpu_that_triton_gives_it(loaded, monkeypatch, seen, device, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    loaded("GPU", device).finalize()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_requests_that_wait_run_as_one_batch_on_a_gpu(loaded, fetch_bundle, monkeypatch):
    """Triton hands over what waits; answers differ from those of a request alone by rounding. One wrong stays alone."""
    runs = []
    many = Policy.infer_many
    monkeypatch.setattr(Policy, "infer_many", lambda self, asked: runs.append(len(asked)) or many(self, asked))
    model, policy = loaded("GPU"), Policy.load(fetch_bundle, "ort")
    rows, tensors = observed(4)
    each = [{**{name: value[i : i + 1] for name, value in tensors.items()}, "seed": np.int64([[i]])} for i in range(4)]
    each[2]["state"] = np.full((1, 5), np.nan, np.float32)
    responses = model.execute([Request(given) for given in each])
    assert runs == [4]
    for i in (0, 1, 3):
        found = responses[i].output_tensors()[0].as_numpy()[0]
        assert np.abs(found - policy.infer(rows[i], seed=i)["actions"]).max() < 1e-5
    assert "NaN or infinity" in responses[2].error().message()
