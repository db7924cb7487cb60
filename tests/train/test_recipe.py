"""From demonstrations to token arrays: the small tokenizer, the FAST ids, and what a frame becomes."""

from dataclasses import replace

import numpy as np
import pytest
import sentencepiece

from ki_edge.errors import DatasetError, KiEdgeError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.normalize import read_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.train.demonstrations import Demonstrations
from ki_edge.train.recipe import LOC_BINS, Examples, Recipe, Tokens

BINS = range(-1, 256)


@pytest.fixture(scope="module")
def data(demonstrations):
    return Demonstrations.open(demonstrations)


@pytest.fixture(scope="module")
def recipe(data, small_config):
    return Recipe.fit(data, small_config)


@pytest.fixture(scope="module")
def examples(data, recipe):
    return Examples.encode(data, recipe)


@pytest.fixture(scope="module")
def words(recipe):
    """The fitted model in the library that defines the format."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(recipe.tokenizer_model)
    return processor


# ---------------------------------------------------------------------- the vocabulary


def test_every_state_bin_is_one_piece(words):
    before, after = words.encode("State:"), words.encode(";\n")
    for value in BINS:
        ids = words.encode(f"State: {value};\n")
        assert ids[: len(before)] == before
        assert ids[-len(after) :] == after
        assert words.id_to_piece(ids[len(before) : -len(after)]) == [f"▁{value}"]
    ids = words.encode("State: " + " ".join(map(str, BINS)))
    assert words.id_to_piece(ids[len(before) :]) == [f"▁{value}" for value in BINS]


def test_special_ids_are_paligemmas(words):
    assert (words.pad_id(), words.eos_id(), words.bos_id(), words.unk_id()) == (0, 1, 2, 3)
    for text in ("\n", "|"):
        assert words.id_to_piece(words.encode(text)) == [text]


def test_nothing_that_is_said_is_unknown(words, data):
    for prompt in data.meta["prompts"]:
        text = f"Task: {prompt.lower()}, State: -1 0 255;\nAction: |"
        ids = words.encode(text)
        assert words.unk_id() not in ids
        assert words.decode(ids) == text


def test_loc_tokens_are_contiguous(words):
    """<loc0000>, <loc0016>, ... as PaliGemma spells them, one piece each."""
    ids = [words.piece_to_id(f"<loc{16 * i:04d}>") for i in range(LOC_BINS)]
    assert ids == list(range(ids[0], ids[0] + LOC_BINS))
    assert words.unk_id() not in ids
    assert words.encode("<loc0016><loc1008>") == [ids[1], ids[63]]


def test_fast_ids_are_contiguous_above_the_text(recipe, words):
    ids = sorted(recipe.fast_ids.to_model(range(recipe.codec.vocab_size)).tolist())
    assert ids == list(range(ids[0], ids[0] + recipe.codec.vocab_size))
    assert ids[0] >= words.vocab_size()
    assert ids[-1] == recipe.config.vocab_size - 1
    assert recipe.config.vocab_size % 64 == 0


# ---------------------------------------------------------------------- the contract and its files


def test_contract(recipe, data):
    contract = recipe.contract
    assert [camera.slot for camera in contract.cameras] == ["top", "hand"]
    assert (contract.state_dim, contract.action_dim, contract.action_horizon) == (3, 3, 4)
    assert (contract.model_action_dim, contract.image_size, contract.prompt_format) == (4, (8, 8), "ki")
    assert (contract.default_prompt, contract.control_hz) == ("Reach the red target", 25)
    assert contract.action_names == ("dx", "dy", "dz")
    assert (recipe.config.action_horizon, recipe.config.action_dim) == (4, 4)


def test_assets_are_read_back(recipe, tmp_path):
    recipe.save_assets(tmp_path)
    contract = PolicyContract.load(tmp_path / "contract.json")
    assert contract == recipe.contract
    tokenizer = PromptTokenizer(tmp_path / "assets" / "tokenizer.model", contract.prompt_format, contract.max_token_len)
    np.testing.assert_array_equal(tokenizer.encode("go home", [0.5]), recipe.tokenizer.encode("go home", [0.5]))
    chunk = np.linspace(-1, 1, 12).reshape(4, 3)
    codec = FastCodec.load(tmp_path / "assets" / contract.fast.folder)
    assert codec.encode(chunk) == recipe.codec.encode(chunk)
    stats = read_norm_stats(tmp_path / "assets")
    assert stats.keys() == {"state", "actions"}
    for name, entry in recipe.stats.items():
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(stats[name], field), getattr(entry, field))


def test_statistics_are_those_of_the_data(recipe, data):
    for name, values in (("state", data.state), ("actions", data.actions.reshape(-1, 3))):
        values = values.astype(np.float64)
        np.testing.assert_allclose(recipe.stats[name].mean, values.mean(axis=0))
        np.testing.assert_allclose(recipe.stats[name].std, values.std(axis=0))
        np.testing.assert_allclose(recipe.stats[name].q01, np.quantile(values, 0.01, axis=0))
        np.testing.assert_allclose(recipe.stats[name].q99, np.quantile(values, 0.99, axis=0))


def test_two_fits_are_equal(recipe, data, small_config, tmp_path):
    """A resumed run fits again and must get the same tokens."""
    again = Recipe.fit(data, small_config)
    for folder, one in (("first", recipe), ("second", again)):
        one.save_assets(tmp_path / folder)
    for path in (tmp_path / "first").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_wrong_picture_size(record, small_config, tmp_path):
    wrong = Demonstrations.open(record(tmp_path / "big", size=9))
    with pytest.raises(DatasetError, match=r"pictures of \(9, 9\), the model takes 8 x 8"):
        Recipe.fit(wrong, small_config)


def test_too_many_action_dimensions(data, small_config):
    with pytest.raises(KiEdgeError, match="action_dim 3 exceeds model_action_dim 2"):
        Recipe.fit(data, replace(small_config, action_dim=2))


# ---------------------------------------------------------------------- what a frame becomes


def test_actions_are_normalised_and_padded(examples, recipe, data):
    low, high = recipe.stats["actions"].q01, recipe.stats["actions"].q99
    expected = (data.actions - low) / (high - low + 1e-6) * 2 - 1
    np.testing.assert_allclose(examples.actions[..., :3], expected, atol=1e-6)
    assert examples.actions.shape == (12, 4, 4)
    assert examples.actions.dtype == np.float32
    assert not examples.actions[..., 3:].any()


def test_prompts_spell_task_and_state(examples, recipe, data, words):
    low, high = recipe.stats["state"].q01, recipe.stats["state"].q99
    for frame in range(12):
        normalised = (data.state[frame].astype(np.float64) - low) / (high - low + 1e-6) * 2 - 1
        bins = np.clip(np.floor((normalised + 1) * 128), -1, 255).astype(int)
        task = data.meta["prompts"][frame % 2].lower()
        ids = examples.prompt.ids[frame][examples.prompt.mask[frame]].tolist()
        assert ids[0] == words.bos_id()
        assert words.decode(ids[1:]) == f"Task: {task}, State: {' '.join(map(str, bins))};\n"


def test_postfixes_decode_to_the_actions(examples, recipe, words):
    tokenizer, ids = recipe.tokenizer, recipe.fast_ids
    assert isinstance(ids, FastIds)
    for frame in range(12):
        postfix = examples.postfix.ids[frame][examples.postfix.mask[frame]].tolist()
        assert words.decode(postfix[: len(tokenizer.action_ids)]) == "Action: "
        assert [words.decode(postfix[-2]), postfix[-1]] == ["|", words.eos_id()]
        parsed = ids.parse(postfix, tokenizer)
        assert parsed.terminated
        decoded = recipe.codec.decode(parsed.fast_ids, 4, 3).actions
        np.testing.assert_allclose(decoded, examples.actions[frame, :, :3], rtol=0, atol=0.1)


def test_pointing_answers(examples, data, words):
    """y before x for each camera, in 64 bins; only where the target is in every picture."""
    assert words.decode(examples.pointing_prompt.ids[0, 1:].tolist()) == "point to the target\n"
    np.testing.assert_array_equal(examples.pointable, range(10))
    assert examples.pointing.mask.all()
    for frame in examples.pointable:
        expected = [f"<loc{int(value * 64) * 16:04d}>" for camera in data.points[frame] for value in camera[::-1]]
        assert words.id_to_piece(examples.pointing.ids[frame].tolist()) == [*expected, "</s>"]


def test_without_points_nothing_is_pointable(record, small_config, tmp_path):
    folder = record(tmp_path / "blind")
    (folder / "points.npy").unlink()
    data = Demonstrations.open(folder)
    assert len(Examples.encode(data, Recipe.fit(data, small_config)).pointable) == 0


def test_pack():
    rows = [np.array([5, 6, 7], np.int32), np.array([], np.int32), np.array([0], np.int32)]
    tokens = Tokens.pack(rows)
    assert tokens.ids.tolist() == [[5, 6, 7], [0, 0, 0], [0, 0, 0]]
    assert tokens.mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert (tokens.ids.dtype, tokens.mask.dtype) == (np.int64, np.bool_)
    wide = Tokens.pack(rows, 5)
    assert wide.ids[0].tolist() == [5, 6, 7, 0, 0]
    assert wide.mask.sum(axis=1).tolist() == [3, 0, 1]
