"""Formats that record little or all: openpi's and ki-train's, with contracts, statistics, tokenizers that are given."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import ArgumentError, CheckpointError, ContractError
from ki_edge.policy.contract import FastContract, PolicyContract, droid, generic
from ki_edge.policy.normalize import NormStats, read_norm_stats, write_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_export.policies import PolicyRequest, decode_vocabulary, describe_policy

from .complete import read_policy

GEMMA = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
STATS = NormStats(mean=[0.5] * 8, std=[1.0] * 8, q01=[0.0] * 8, q99=[1.0] * 8)


def model(horizon=15, action_dim=32, vocab_size=257152, variant="pi05"):
    vision = VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=14, image_size=224)
    return Pi05Config(vision, GEMMA, GEMMA, vocab_size, action_dim, horizon, variant)


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def tokenizer(tmp_path, tokenizer_model):
    (tmp_path / "words.model").write_bytes(tokenizer_model)
    return tmp_path / "words.model"


@pytest.fixture
def step(tmp_path):
    """A step of openpi's training: no config.json, statistics under an id with a slash."""
    folder = tmp_path / "run" / "20000"
    add_stats(folder / "assets" / "lab" / "droid")
    return folder


def add_stats(folder, stats=STATS):
    folder.mkdir(parents=True)
    write_norm_stats(folder / "norm_stats.json", {"state": stats, "actions": stats})


def describe(folder, settings=None, config=None, format="openpi", **request):
    return describe_policy(folder, format, settings or {}, config, PolicyRequest(**request))


def read(folder, settings=None, config=None, format="openpi", **request):
    return read_policy(folder, format, settings or {}, config or model(), PolicyRequest(**request))


def test_everything_that_is_missing_is_listed_in_one_line(tmp_path):
    (tmp_path / "bare").mkdir()
    facts = describe(tmp_path / "bare")
    assert facts.contract is None and len(facts.missing) == 3
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "bare")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "robot, cameras, prompt format", "--contract droid|droid_joint_position|libero|aloha,",
        "no norm_stats.json under assets/ (give --norm-stats", "--tokenizer", "google/paligemma-3b-pt-224",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("format", ["openpi", "openpi-jax"])
def test_a_preset_makes_a_step_folder_a_policy(step, tokenizer, tmp_path, format):
    files = read(step, format=format, contract="droid", tokenizer=tokenizer, prompt="tidy up")
    assert files.contract == droid(default_prompt="tidy up") and files.known["default_prompt"] == "--prompt"
    assert files.sources["statistics"]["from"] == "assets/lab/droid/norm_stats.json"
    assert files.sources["tokenizer"] == {
        "from": "words.model", "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(files.sources)
    (tmp_path / "bundle").mkdir()
    files.write(tmp_path / "bundle")
    written = {path.relative_to(tmp_path / "bundle").as_posix() for path in (tmp_path / "bundle").rglob("*.*")}
    assert written == {"assets/tokenizer.model", "assets/norm_stats.json"}
    again = read_norm_stats(tmp_path / "bundle" / "assets")
    np.testing.assert_array_equal(again["actions"].q99, STATS.q99)


def test_what_config_json_records_takes_the_place_of_the_presets(step, tokenizer):
    settings = {"action_horizon": 20, "action_dim": 8, "max_token_len": 64, "discrete_state_input": False}
    files = read(step, settings, model(20, 8), contract="droid", tokenizer=tokenizer)
    contract = files.contract
    assert (contract.action_horizon, contract.execute, contract.model_action_dim) == (20, 10, 8)
    assert (contract.max_token_len, contract.prompt_format) == (64, "pi0")
    assert files.known["prompt_format"] == "config.json" and files.known["robot"] == "--contract droid"
    assert read(step, {"discrete_state_input": True}, contract="droid", tokenizer=tokenizer).contract.state_in_prompt


def test_an_action_dim_that_only_the_tensors_tell(step, tokenizer):
    files = read(step, {}, model(action_dim=8), contract="droid", tokenizer=tokenizer)
    assert files.contract.model_action_dim == 8 and files.known["model_action_dim"] == "tensors"


def test_a_contract_file_must_agree_with_config_json(step, tokenizer, tmp_path):
    path = tmp_path / "mine.json"
    droid(prompt_format="ki").save(path)
    assert read(step, contract=str(path), tokenizer=tokenizer).contract == droid(prompt_format="ki")
    for settings, field in (
        ({"discrete_state_input": True}, "prompt_format"),
        ({"max_token_len": 48}, "max_token_len"),
    ):
        with pytest.raises(CheckpointError, match=rf"mine\.json: {field} is .*, the checkpoint records"):
            read(step, settings, contract=str(path), tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="action_horizon is 15, the checkpoint records 10"):
        read(step, {}, model(10), contract=str(path), tokenizer=tokenizer)


def test_wrong_contracts(step, tmp_path):
    with pytest.raises(ArgumentError, match="--contract ur5: neither a file nor one of droid"):
        describe(step, contract="ur5")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ContractError, match="missing key"):
        describe(step, contract=str(tmp_path / "bad.json"))
    for settings in ({"action_horizon": "15"}, {"action_dim": 0}, {"discrete_state_input": "yes"}):
        with pytest.raises(CheckpointError, match=f"{next(iter(settings))} is"):
            describe(step, settings, contract="droid")


def test_a_pi0_model_needs_a_contract_without_state_in_the_prompt(step, tokenizer):
    with pytest.raises(CheckpointError, match="--contract pi0_droid"):
        read(step, {}, model(10, variant="pi0"), contract="droid", tokenizer=tokenizer)
    files = read(step, {}, model(10, variant="pi0"), contract="pi0_droid", tokenizer=tokenizer)
    assert (files.contract.prompt_format, files.contract.normalization) == ("pi0", "zscore")


def test_statistics_beside_the_checkpoint_folder(tmp_path, tokenizer):
    (tmp_path / "run" / "converted").mkdir(parents=True)
    add_stats(tmp_path / "run" / "assets" / "droid")
    files = read(tmp_path / "run" / "converted", contract="droid", tokenizer=tokenizer)
    assert files.statistics is not None and files.statistics.source == "assets/droid/norm_stats.json"


def test_statistics_of_several_robots_are_not_chosen_from(step, tokenizer):
    add_stats(step / "assets" / "trossen")
    facts = describe(step, contract="droid", tokenizer=tokenizer)
    assert facts.missing == (
        "statistics of several robots under assets/: trossen, lab/droid (give --norm-stats assets/ID)",
    )
    for given in (
        step / "assets" / "trossen",
        step / "assets" / "trossen" / "norm_stats.json",
        step / "assets" / "lab",
    ):
        assert read(step, contract="droid", tokenizer=tokenizer, assets=given).statistics is not None
    with pytest.raises(ArgumentError, match=r"--norm-stats .*: no such file or folder"):
        describe(step, contract="droid", assets=step / "gone")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"state": 7, "actions": 8}, "length does not fit: 'state' has 7 numbers, the contract 8"),
        ({"state": 8, "actions": 7}, "length does not fit: 'actions' has 7 numbers"),
        ({"state": 8}, "no statistics of 'actions', which quantile normalisation needs"),
    ],
)
def test_statistics_that_do_not_fit(step, tokenizer, features, message):
    stats = {name: NormStats(q01=[0.0] * size, q99=[1.0] * size) for name, size in features.items()}
    write_norm_stats(step / "assets" / "lab" / "droid" / "norm_stats.json", stats)
    with pytest.raises(CheckpointError, match=message):
        read(step, contract="droid", tokenizer=tokenizer)


def test_statistics_without_quantiles(step, tokenizer):
    stats = NormStats(mean=[0.0] * 32, std=[1.0] * 32)  # longer ones, padded to the model's width, do fit
    write_norm_stats(step / "assets" / "lab" / "droid" / "norm_stats.json", {"state": stats, "actions": stats})
    with pytest.raises(CheckpointError, match="'state' has no q01, q99"):
        read(step, contract="droid", tokenizer=tokenizer)
    read(step, {}, model(10, variant="pi0"), contract="pi0_droid", tokenizer=tokenizer)


def test_where_a_tokenizer_is_found(step, caches, tokenizer_model, tokenizer):
    def source(**request):
        found = describe(step, contract="droid", **request).tokenizer
        return None if found is None else found.source

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tokenizer_model)

    assert source() is None
    put(caches / "OPENPI_DATA_HOME" / "big_vision" / "paligemma_tokenizer.model")
    assert source() == "openpi's cache, big_vision/paligemma_tokenizer.model"
    repository = caches / "HF_HUB_CACHE" / "models--google--paligemma-3b-pt-224"
    for revision in ("aaa", "bbb"):
        put(repository / "snapshots" / revision / "tokenizer.model")
    assert source() == "Hugging Face cache, google/paligemma-3b-pt-224 at aaa"
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    assert source() == "Hugging Face cache, google/paligemma-3b-pt-224 at bbb"
    put(step / "tokenizer.model")
    assert source() == "tokenizer.model"
    assert source(tokenizer=tokenizer) == "words.model"
    with pytest.raises(ArgumentError, match=r"--tokenizer .*gone\.model: there is no such file"):
        describe(step, tokenizer=step / "gone.model")


def test_a_tokenizer_beyond_the_models_vocabulary(step, tokenizer):
    with pytest.raises(CheckpointError, match=r"tokenizer has ids up to \d+, the model's embedding 100 rows"):
        read(step, {}, model(vocab_size=100), contract="droid", tokenizer=tokenizer)


def test_fast_is_added_to_a_preset_with_the_published_offset(step, data, tokenizer, tmp_path):
    files = read(step, contract="droid", tokenizer=tokenizer, fast=data / "fast")
    assert files.contract.fast == FastContract(id_offset=257023, size=512, folder="fast")
    shutil.copytree(data / "fast", tmp_path / "codec")
    (tmp_path / "codec" / "processing_action_tokenizer.py").write_text("raise SystemExit")
    files = read(step, contract="droid", tokenizer=tokenizer, fast=tmp_path / "codec")
    (tmp_path / "bundle").mkdir()
    files.write(tmp_path / "bundle")
    names = {path.name for path in (tmp_path / "bundle" / "assets" / "fast").iterdir()}
    assert {"tokenizer.json", "processor_config.json"} <= names and not any(name.endswith(".py") for name in names)
    vocabulary = decode_vocabulary(model(), files, full=False)
    assert (vocabulary.first, vocabulary.count) == (257023 - 511, 512)
    with pytest.raises(CheckpointError, match="FAST head has ids up to 257023"):
        read(step, {}, model(vocab_size=1024), contract="droid", tokenizer=tokenizer, fast=data / "fast")
    with pytest.raises(ContractError, match="no FAST codec"):
        describe(step, contract="droid", fast=step)


def test_a_contract_with_fast_needs_its_codec(step, data, tokenizer, tmp_path):
    droid(fast=FastContract(size=512)).save(tmp_path / "mine.json")
    facts = describe(step, contract=str(tmp_path / "mine.json"), tokenizer=tokenizer)
    assert facts.missing == ("no assets/fast/tokenizer.json (give --fast-codec, the folder of the FAST codec)",)
    droid(fast=FastContract(size=100)).save(tmp_path / "mine.json")
    with pytest.raises(CheckpointError, match="512 FAST ids, the contract has 100"):
        describe(step, contract=str(tmp_path / "mine.json"), fast=data / "fast")


def test_a_folder_with_its_own_contract(fetch_checkpoint, tokenizer):
    contract = PolicyContract.load(fetch_checkpoint / "contract.json")
    facts = describe(fetch_checkpoint, format="ki-train")
    assert facts.contract == contract and facts.missing == () and facts.codec is not None
    assert set(facts.known.values()) == {"contract.json"}
    with pytest.raises(ArgumentError, match=r"records its own in contract\.json"):
        describe(fetch_checkpoint, format="ki-train", contract="droid")
    other = describe(fetch_checkpoint, format="ki-train", tokenizer=tokenizer).tokenizer
    assert other is not None and other.source == "words.model"


def test_a_policy_without_normalisation_needs_no_statistics(tmp_path, tokenizer):
    contract = generic(["top"], state_dim=3, action_dim=2, action_horizon=15, normalization="none")
    contract.save(tmp_path / "contract.json")
    files = read(tmp_path, format="ki-train", tokenizer=tokenizer)
    assert files.stats == {} and files.sources["statistics"] is None
    replace(contract, action_normalization="zscore").save(tmp_path / "contract.json")
    with pytest.raises(CheckpointError, match=r"no assets/norm_stats\.json"):
        read(tmp_path, format="ki-train", tokenizer=tokenizer)


def test_a_tokenizer_that_is_none(step):
    (step / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ContractError, match="SentencePiece"):
        read(step, contract="droid")


def test_the_written_tokenizer_is_the_one_that_was_read(step, tokenizer, tokenizer_model, tmp_path):
    files = read(step, contract="droid", tokenizer=tokenizer)
    tokenizer.write_bytes(b"changed meanwhile")
    (tmp_path / "bundle").mkdir()
    files.write(tmp_path / "bundle")
    written = (tmp_path / "bundle" / "assets" / "tokenizer.model").read_bytes()
    assert written == tokenizer_model and PromptTokenizer(written, "pi05", 200).vocab_size == files.tokenizer.vocab_size
