"""Tokenizers and FAST codecs where LeRobot and transformers of today put them, read into a bundle's assets."""

import json
import shutil

import numpy as np
import pytest

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import ArgumentError, CheckpointError, ContractError
from ki_edge.policy.fast import FastCodec
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import InputPipeline
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.reference import ReferencePolicy
from ki_export.policies import PolicyRequest, describe_policy
from ki_export.source.opening import CheckpointRef
from ki_runtime.policy.assets import read_assets

from .complete import read_policy

GEMMA = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
VISION = VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=14, image_size=224)
MODEL = Pi05Config(VISION, GEMMA, GEMMA, vocab_size=257152, action_dim=32, action_horizon=10)
BEFORE = "policy_preprocessor.json"


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "HF_HUB_CACHE"


@pytest.fixture
def words(data):
    return data / "policies" / "tokenizer"


@pytest.fixture
def folder(data, tmp_path, words):
    """As LeRobot's main saves it: the tokenizer in the checkpoint, as tokenizer.json only."""
    folder = shutil.copytree(data / "policies" / "h_a01_tokenizer", tmp_path / "checkpoint")
    shutil.copy(words / "tokenizer.json", folder / "tokenizer")
    return folder


def describe(folder, **request):
    settings = json.loads((folder / "config.json").read_text())
    return describe_policy(folder, "lerobot", settings, MODEL, PolicyRequest(**request))


def name_tokenizer(folder, name):
    content = json.loads((folder / BEFORE).read_text())
    step = next(step for step in content["steps"] if step["registry_name"] == "tokenizer_processor")
    step["config"]["tokenizer_name"] = name
    (folder / BEFORE).write_text(json.dumps(content))


def test_the_tokenizer_of_the_checkpoint_gives_lerobots_ids(folder, tmp_path):
    files = describe(folder).files
    assert files.tokenizer_file.source == "tokenizer/tokenizer.json"
    inputs, golden = InputPipeline(files.contract, files.stats, files.tokenizer), np.load(folder / "golden.npz")
    images = {camera.key: np.zeros((224, 224, 3), np.uint8) for camera in files.contract.cameras}
    for at in range(2):
        state, prompt = golden[f"{at}/observation:state"], str(golden[f"{at}/prompt"])
        found = inputs({"images": images, "state": state, "prompt": prompt})
        np.testing.assert_array_equal(found.prompt_tokens, golden[f"{at}/tokens"])
    (tmp_path / "bundle").mkdir()
    files.write(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "assets" / "tokenizer.json").is_file()
    assert not (tmp_path / "bundle" / "assets" / "tokenizer.model").exists()


def test_a_bundle_acts_on_tokenizer_json(copied, words, tmp_path):
    (copied / "assets" / "tokenizer.model").unlink()
    shutil.copy(words / "tokenizer.json", copied / "assets")
    bundle = export(copied, tmp_path / "bundle", ExportOptions(verify=False))
    assert "assets/tokenizer.json" in bundle.manifest.files and "assets/tokenizer.model" not in bundle.manifest.files
    found = read_assets(bundle).tokenizer
    assert (
        found.encode("pick", [0.1]).tolist()
        == PromptTokenizer(words / "tokenizer.model", "ki", 20).encode("pick", [0.1]).tolist()
    )


def test_tokenizer_model_comes_before_tokenizer_json(folder, words):
    shutil.copy(words / "tokenizer.model", folder / "tokenizer")
    assert describe(folder).tokenizer.source == "tokenizer/tokenizer.model"


@pytest.mark.parametrize("name", ["gone", "../tokenizer", "/home/me/paligemma", "C:\\words", "a" * 300])
def test_nothing_stands_in_for_a_recorded_path(folder, words, name):
    shutil.copy(words / "tokenizer.model", folder.parent)
    shutil.copy(words / "tokenizer.model", folder)
    name_tokenizer(folder, name)
    (sentence,) = describe(folder).missing
    assert "the path that the checkpoint records (give --tokenizer" in sentence and len(sentence) < 250


def test_a_name_that_is_not_recorded_is_asked_for(folder):
    name_tokenizer(folder, None)
    (sentence,) = describe(folder).missing
    assert "the policy's tokenizer is not recorded (give --tokenizer" in sentence


def test_tokenizer_json_in_the_hubs_cache(folder, words, caches):
    name_tokenizer(folder, "google/paligemma-3b-pt-224")
    (sentence,) = describe(folder).missing
    for part in ("--tokenizer", "4.3 MB", "licence", "hf download google/paligemma-3b-pt-224 tokenizer.model"):
        assert part in sentence
    snapshot = caches / "models--google--paligemma-3b-pt-224" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(words / "tokenizer.json", snapshot)
    assert describe(folder).tokenizer.source == "Hugging Face cache, google/paligemma-3b-pt-224 at abc"


def test_what_is_given_as_tokenizer(folder, words, tmp_path):
    openpis = tmp_path / "big_vision"
    openpis.mkdir()
    shutil.copy(words / "tokenizer.model", openpis / "paligemma_tokenizer.model")
    for given, source in (
        (words, "tokenizer.model"),
        (words / "tokenizer.json", "tokenizer.json"),
        (folder / "tokenizer", "tokenizer.json"),
        (openpis, "paligemma_tokenizer.model"),
    ):
        assert describe(folder, tokenizer=given).tokenizer.source == source
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"a folder without tokenizer\.model and tokenizer\.json; .* hf download"):
        describe(folder, tokenizer=tmp_path / "empty")
    with pytest.raises(ArgumentError, match=r"--tokenizer .*gone: there is no such file; .* hf download"):
        describe(folder, tokenizer=tmp_path / "gone")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ContractError, match=r"the tokenizer tokenizer\.json is not a tokenizer\.json"):
        describe(folder, tokenizer=tmp_path / "tokenizer.json")


@pytest.fixture
def fast_v5(data, tmp_path):
    """The codec of `fast` as transformers 5 saves it."""
    folder = tmp_path / "fast_v5"
    (folder / "bpe_tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data / "fast" / name, folder / "bpe_tokenizer")
    shutil.copy(data / "fast" / "processor_config.json", folder)
    return folder


def test_a_codec_of_transformers_5(data, fast_v5, folder, tmp_path):
    golden, vectors = np.load(data / "fast" / "vectors.npz"), json.loads((data / "fast" / "vectors.json").read_text())
    codec, plain = FastCodec.load(fast_v5), FastCodec.load(data / "fast")
    for chunk in golden["actions"]:
        assert codec.encode(chunk, lossy=True) == plain.encode(chunk, lossy=True)
    assert vectors  # the same ids as of the published layout, which test_fast.py compares with the makers'
    files = describe(folder, fast=fast_v5).files
    (tmp_path / "bundle").mkdir()
    files.write(tmp_path / "bundle")
    written = tmp_path / "bundle" / "assets" / "fast"
    assert {"processor_config.json", "tokenizer.json"} <= {path.name for path in written.iterdir()}
    assert FastCodec.load(written).vocab_size == codec.vocab_size == files.contract.fast.size


def test_a_codec_in_the_layout_of_the_hubs_cache(fast_v5, folder, tmp_path):
    repository = tmp_path / "models--physical-intelligence--fast"
    shutil.copytree(fast_v5, repository / "snapshots" / "abc")
    assert describe(folder, fast=repository).files.codec == repository / "snapshots" / "abc"
    assert describe(folder, fast=repository / "snapshots" / "abc").files is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "processor_config.json").unlink(), r"processor_config\.json missing, found bpe_tokenizer"),
        (lambda f: (f / "bpe_tokenizer" / "tokenizer.json").unlink(), r"tokenizer\.json missing"),
        (lambda f: (f / "processor_config.json").write_text("[]"), "expected a JSON object"),
        (
            lambda f: (f / "processor_config.json").write_text('{"scale": "10", "min_token": 0}'),
            "'scale' is '10', expected a number",
        ),
        (lambda f: (f / "processor_config.json").write_text('{"scale": 10}'), "'min_token' is None"),
        (lambda f: (f / "bpe_tokenizer" / "tokenizer.json").write_text("{}"), r"is not a tokenizer\.json"),
    ],
)
def test_what_a_codec_lacks_is_named(fast_v5, folder, change, message):
    change(fast_v5)
    with pytest.raises((ArgumentError, ContractError, CheckpointError), match=message) as caught:
        describe(folder, fast=fast_v5)
    assert str(fast_v5) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="no such folder"):
        describe(folder, fast=fast_v5 / "gone")


def infer(policy, golden, at):
    observation = {"prompt": str(golden[f"{at}/prompt"])}
    for key in golden.files:
        name = key.removeprefix(f"{at}/observation:")
        if name.startswith("images/"):
            observation.setdefault("images", {})[name.removeprefix("images/")] = golden[key]
        elif name != key:
            observation[name] = golden[key]
    return policy.infer(observation, noise=golden[f"{at}/noise"])["actions"]


def test_a_state_longer_than_the_models_width(data, words):
    """40 numbers in the prompt of a π0.5 of width 32; right are LeRobot's actions."""
    folder = data / "policies" / "a11_state40"
    policy, golden = ReferencePolicy(folder, PolicyRequest(tokenizer=words)), np.load(folder / "golden.npz")
    assert (policy.contract.state_dim, policy.contract.model_action_dim) == (40, 32)
    for at in range(2):
        np.testing.assert_allclose(infer(policy, golden, at), golden[f"{at}/actions"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("contract", "horizon"), [("pi05_droid_finetune", None), ("droid", 16)])
def test_a_training_step_whose_horizon_is_given(data, words, contract, horizon):
    folder = data / "policies" / "o14_droid_finetune"
    request = PolicyRequest(tokenizer=words, contract=contract)
    policy, golden = (
        ReferencePolicy(CheckpointRef(str(folder), horizon=horizon), request),
        np.load(folder / "golden.npz"),
    )
    np.testing.assert_allclose(infer(policy, golden, 1), golden["1/actions"], rtol=0, atol=2e-5)
    with pytest.raises(CheckpointError, match=r"action horizon is not recorded .*15 \(pi05_droid\), 16"):
        ReferencePolicy(folder, PolicyRequest(tokenizer=words, contract="droid"))


def test_read_policy_lists_what_is_missing(folder):
    shutil.rmtree(folder / "tokenizer")
    settings = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="is not a complete policy: no tokenizer at 'tokenizer'"):
        read_policy(folder, "lerobot", settings, MODEL, PolicyRequest())
