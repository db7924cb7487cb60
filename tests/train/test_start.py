"""What a run starts from: the tokens and numbers of a checkpoint in each format, and of none."""

from dataclasses import replace

import numpy as np
import pytest

from ki_edge.checkpoints import Checkpoint
from ki_edge.config import PI05
from ki_edge.errors import ArgumentError, CheckpointError, KiEdgeError
from ki_edge.model import build, save_checkpoint
from ki_edge.policy.fast import FastCodec
from ki_edge.train.data.recipe import Choice, Recipe
from ki_edge.train.data.start import OPENPI_SLOTS, Start

from .test_tokens import robot


@pytest.fixture
def paligemma(data):
    """A small tokenizer in the file and the folder that PaliGemma's would be in."""
    return data / "policies" / "tokenizer"


def test_from_nothing_the_vocabulary_is_the_datas(small_config):
    start = Start.from_nothing(small_config)
    assert start.small_vocabulary and start.checkpoint is None and start.slots is None
    recipe = Recipe.fit(start, [robot()])
    assert recipe.config == replace(small_config, vocab_size=recipe.config.vocab_size, action_horizon=4)


def test_from_nothing_with_a_tokenizer(small_config, paligemma):
    start = Start.from_nothing(small_config, paligemma / "tokenizer.model")
    recipe = Recipe.fit(start, [robot()])
    assert recipe.encoder.tokenizer_model == (paligemma / "tokenizer.model").read_bytes()
    assert recipe.contracts[0].max_token_len == 200
    assert recipe.config.vocab_size == recipe.contracts[0].fast.id_offset + 1


def test_paligemmas_geometry_needs_its_tokenizer(paligemma):
    with pytest.raises(ArgumentError, match="a vocabulary of 257152 ids needs --tokenizer; PaliGemma's is"):
        Start.from_nothing(PI05)
    with pytest.raises(ArgumentError, match=r"--tokenizer .*nowhere: there is no such file"):
        Start.from_nothing(PI05, paligemma / "nowhere")
    start = Start.from_nothing(PI05, paligemma)
    assert Recipe.fit(start, [robot()]).config.vocab_size == 257_152, "its rows are those of released checkpoints"


def test_from_a_checkpoint_of_our_own(fetch_checkpoint):
    """Tokenizer, codec and their place are the checkpoint's; the robot's numbers are the data's."""
    start = Start.from_checkpoint(fetch_checkpoint)
    assert start.slots == ("front_left", "front_right") and (start.prompt_format, start.max_prompt) == ("ki", 64)
    recipe = Recipe.fit(start, [robot(tasks=("reach the red target",))])
    (contract,) = recipe.contracts
    assert (contract.fast.id_offset, contract.fast.size, recipe.config.vocab_size) == (767, 256, 768)
    assert (contract.action_dim, contract.action_horizon, contract.control_hz) == (3, 4, 25)
    assert contract.action_names == ("x", "y", "z") and recipe.notes == ()
    own = FastCodec.load(fetch_checkpoint / "assets" / "fast")
    assert recipe.codec.tokenizer.to_str() == own.tokenizer.to_str()
    assert recipe.encoder.tokenizer_model == (fetch_checkpoint / "assets" / "tokenizer.model").read_bytes()
    fitted = Recipe.fit(start, [robot()], (), Choice(fast="fit"))
    assert fitted.codec.tokenizer.to_str() != own.tokenizer.to_str()
    assert fitted.contracts[0].fast.id_offset == 767 and fitted.contracts[0].fast.size <= 256


def test_words_that_a_small_vocabulary_lacks_are_told(fetch_checkpoint):
    start = Start.from_checkpoint(fetch_checkpoint)
    recipe = Recipe.fit(start, [robot(tasks=("reach the red target", "Zieh die 7 Schüsseln weg"))])
    (note,) = recipe.notes
    assert note.startswith("the checkpoint's tokenizer cannot spell 1 of the instructions, such as 'Zieh die")


def test_from_lerobot(data, paligemma):
    """Its resizing, normalisation and times; a margin of -3, which no byte can be, becomes -1."""
    start = Start.from_checkpoint(data / "policies" / "h_a01_q_2cam_480x640")
    assert start.lerobot and (start.prompt_format, start.max_prompt, start.slots) == ("pi05", 200, ("front", "wrist"))
    (contract,) = Recipe.fit(start, [robot()]).contracts
    assert (contract.resize, contract.normalization, contract.normalization_epsilon) == (
        "torch_pad",
        "quantile",
        "lerobot",
    )
    assert (contract.time_convention, contract.model_action_dim, contract.image_size) == ("lerobot", 32, (224, 224))
    older = data / "policies" / "v2_044_480x640"
    found = Start.from_checkpoint(older, tokenizer=paligemma, lerobot_version="0.4")
    (contract,) = Recipe.fit(found, [robot()]).contracts
    assert contract.resize == "torch_pad" and contract.pad_state_first
    prompt, _ = Recipe.fit(found, [robot()]).encode_actions("go", np.zeros(3), np.zeros((4, 3)))
    state = found.tokenizer and Recipe.fit(found, [robot()]).tokenizer.decode(prompt[1:]).split("State: ")[1]
    assert state.split(";")[0].split() == ["128"] * 32, "the policy's makers padded the prompt's state"


def test_from_openpi(data, paligemma, tmp_path):
    """It records weights and at most sizes; what openpi trains every π0.5 with is taken for the rest."""
    folder = data / "policies" / "o14_droid_finetune"
    start = Start.from_checkpoint(folder, tokenizer=paligemma)
    assert (start.prompt_format, start.max_prompt, start.slots) == ("pi05", 200, OPENPI_SLOTS)
    (contract,) = Recipe.fit(start, [robot(horizon=6)]).contracts
    assert (contract.resize, contract.normalization, contract.normalization_epsilon) == (
        "pil_pad",
        "quantile",
        "openpi",
    )
    assert (contract.robot, contract.action_horizon, contract.delta_mask) == ("generic", 6, None)
    told = Start.from_checkpoint(folder, tokenizer=paligemma, contract="pi05_libero")
    assert (told.prompt_format, told.slots) == ("pi0", OPENPI_SLOTS)


def test_from_an_adapter(data, paligemma):
    """As ki-export takes one: its base's policy, the weights of both."""
    base = data / "policies" / "h_a01_q_2cam_480x640"
    start = Start.from_checkpoint(data / "lora" / "lerobot", base=str(base), tokenizer=paligemma)
    assert (start.prompt_format, start.slots, start.lerobot) == ("pi05", ("front", "wrist"), True)
    plain = Checkpoint.open(base)
    assert start.checkpoint.config == replace(plain.config, rtc="none")
    changed = next(name for name in plain.source.tensors if "q_proj" in name)
    assert not np.array_equal(start.checkpoint.source.array(changed), plain.source.array(changed))


def test_what_is_nowhere_is_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="nobody/has-it is not a folder here, is not in the local cache"):
        Start.from_checkpoint("nobody/has-it")


def test_a_checkpoint_without_a_tokenizer_names_the_flag(data, monkeypatch, tmp_path):
    for name in ("HF_HOME", "HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(CheckpointError, match="o14_droid_finetune has no tokenizer: give --tokenizer; PaliGemma's is"):
        Start.from_checkpoint(data / "policies" / "o14_droid_finetune")


def test_a_codec_that_is_given(data, small_config, tmp_path):
    recipe = Recipe.fit(Start.from_nothing(small_config), [robot()], (), Choice(fast=str(data / "fast")))
    assert recipe.codec.tokenizer.to_str() == FastCodec.load(data / "fast").tokenizer.to_str()
    with pytest.raises(ArgumentError, match=r"--fast .*nowhere: no such folder"):
        Recipe.fit(Start.from_nothing(small_config), [robot()], (), Choice(fast=str(tmp_path / "nowhere")))
    with pytest.raises(KiEdgeError, match=r"--fast .*: no FAST codec, which has processor_config\.json"):
        Recipe.fit(Start.from_nothing(small_config), [robot()], (), Choice(fast=str(tmp_path)))


def test_a_codec_that_the_checkpoint_has_no_room_for(fetch_checkpoint, data):
    start = Start.from_checkpoint(fetch_checkpoint)
    given = Choice(fast=str(data / "fast"))
    size = FastCodec.load(data / "fast").vocab_size
    assert size > 256
    with pytest.raises(ArgumentError, match=f"the FAST codec has {size} ids, the checkpoint has room for 256"):
        Recipe.fit(start, [robot()], (), given)
    with pytest.raises(ArgumentError, match="a checkpoint's vocabulary does not grow"):
        Recipe.fit(start, [robot()], (), replace(given, placement="top"))


def test_a_vocabulary_of_a_size(small_config):
    small = Recipe.fit(Start.from_nothing(small_config), [robot(frames=400)], (), Choice(vocabulary=90))
    assert small.codec.vocab_size <= 90
    with pytest.raises(ArgumentError, match=r"vocab_size 10 is below the .* symbols"):
        Recipe.fit(Start.from_nothing(small_config), [robot()], (), Choice(vocabulary=10))


def test_a_pi0_is_refused(small_config, tmp_path):
    save_checkpoint(build(replace(small_config, variant="pi0")), tmp_path / "pi0")
    with pytest.raises(
        CheckpointError, match=r"--init .*pi0 holds a π0, whose state is a token of its own: give a π0\.5"
    ):
        Start.from_checkpoint(tmp_path / "pi0")
