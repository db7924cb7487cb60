"""The model's geometry: presets, JSON round trip, and everything that must be refused."""

import json
import math
from dataclasses import replace

import pytest

from ki_edge.checkpoints.layout.keys import parameter_shapes
from ki_edge.config import LIMITS, PI05, PRESETS, TINY, GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import CheckpointError
from ki_edge.graphs import specs


@pytest.mark.parametrize("config", PRESETS.values())
def test_round_trip(config):
    assert Pi05Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "millions"), [("tiny", 2), ("small", 30), ("base", 300), ("pi05", 3353)])
def test_a_preset_has_the_parameters_that_are_said(name, millions):
    """Without the unused lm_head of the action expert, which makes a π0.5's files hold 3.6 billion."""
    count = sum(math.prod(shape) for shape in parameter_shapes(PRESETS[name]).values())
    assert count / 1e6 == pytest.approx(millions, rel=0.1 if name == "tiny" else 0.01)


def test_the_real_model(data):
    """Sizes that follow from the shapes of the released models."""
    shapes = {key: shape for key, (shape, _) in json.loads((data / "pi05_state_dict.json").read_text()).items()}
    paligemma = "paligemma_with_expert.paligemma.model."
    vision, expert = paligemma + "vision_tower.vision_model.", "paligemma_with_expert.gemma_expert.model."
    assert shapes[vision + "embeddings.position_embedding.weight"] == [PI05.vision.patches, PI05.vision.width]
    assert shapes[paligemma + "language_model.layers.17.self_attn.q_proj.weight"] == [8 * 256, PI05.backbone.width]
    assert shapes[expert + "layers.17.mlp.gate_proj.weight"] == [PI05.expert.mlp_dim, PI05.expert.width]
    dense = [key for key in shapes if key.startswith(expert) and key.endswith(".dense.weight")]
    assert len(dense) == PI05.expert.modulated_norms == 37
    assert (PI05.vision.patches, PI05.vision.head_dim) == (256, 72)


@pytest.mark.parametrize("part", ["backbone", "expert", "vision", "vocab_size", "action_horizon"])
def test_missing_and_unknown_fields(part):
    content = PI05.to_dict()
    value = content.pop(part)
    with pytest.raises(CheckpointError, match=f"'{part}'"):
        Pi05Config.from_dict(content)
    with pytest.raises(CheckpointError, match=r"geometry 'model': missing \[\], unknown \['cameras'\]"):
        Pi05Config.from_dict({**content, part: value, "cameras": 3})


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [*((None, "action_dim", bad) for bad in (0, -1, 2.0, "32", True, None)), ("expert", "width", 0)],
)
def test_sizes_are_positive_integers(part, field, value):
    content = PI05.to_dict()
    (content[part] if part else content)[field] = value
    with pytest.raises(CheckpointError, match=rf"'{part or 'model'}\.{field}': expected a positive integer, not"):
        Pi05Config.from_dict(content)


def test_variants():
    """Manifests that were written before there were two are π0.5's."""
    content = PI05.to_dict()
    pi0 = Pi05Config.from_dict({**content, "variant": "pi0"})
    assert pi0 == replace(PI05, variant="pi0")
    assert (pi0.has_state, PI05.has_state) == (True, False)
    assert (pi0.modulation_shape, PI05.modulation_shape) == ((1, 1024), (37, 3072))
    del content["variant"]
    assert Pi05Config.from_dict(content) == PI05
    for wrong in ("pi0.5", None, 0):
        with pytest.raises(CheckpointError, match=f"'model.variant': expected one of pi05, pi0, not {wrong!r}"):
            Pi05Config.from_dict({**content, "variant": wrong})


def test_a_field_inside_a_part():
    content = PI05.to_dict()
    del content["expert"]["head_dim"]
    with pytest.raises(CheckpointError, match=r"geometry 'expert': missing \['head_dim'\], unknown \[\]"):
        Pi05Config.from_dict(content)
    with pytest.raises(CheckpointError, match="geometry: 'vision' must be an object, not list"):
        Pi05Config.from_dict({**PI05.to_dict(), "vision": []})


@pytest.mark.parametrize("changes", [{"depth": 3}, {"head_dim": 128}, {"num_heads": 4}, {"num_kv_heads": 2}])
def test_backbone_and_expert_must_share_keys_and_values(changes):
    with pytest.raises(CheckpointError, match=f"share K/V, but their {next(iter(changes))} is"):
        replace(PI05, expert=replace(PI05.expert, **changes))


def test_heads_must_divide():
    vision = {"width": 16, "depth": 1, "mlp_dim": 8, "num_heads": 2, "patch_size": 7, "image_size": 14}
    with pytest.raises(CheckpointError, match="image_size 15 is not a multiple of patch_size 7"):
        VisionConfig(**{**vision, "image_size": 15})
    for heads in (0, 3):
        with pytest.raises(CheckpointError, match=f"width 16 cannot be split into {heads} heads"):
            VisionConfig(**{**vision, "num_heads": heads})
    for heads, shared in ((0, 1), (4, 0), (4, 3)):
        with pytest.raises(CheckpointError, match=f"{heads} query heads cannot share {shared} K/V heads"):
            GemmaConfig(width=8, depth=1, mlp_dim=8, num_heads=heads, num_kv_heads=shared, head_dim=4)


def test_pictures_are_bytes_unless_it_says_floats():
    """Manifests of before have no such field; two models that differ in it alone have one geometry."""
    old = {name: value for name, value in TINY.to_dict().items() if name != "pictures"}
    assert Pi05Config.from_dict(old).pictures == "uint8"
    floats = Pi05Config.from_dict({**old, "pictures": "float32"})
    assert floats == TINY and specs(floats)[0].tensor("images").dtype == "float32"
    assert specs(TINY)[0].tensor("images").dtype == "uint8"
    with pytest.raises(CheckpointError, match=r"model\.pictures': expected one of uint8, float32, not 'float16'"):
        Pi05Config.from_dict({**old, "pictures": "float16"})


@pytest.mark.parametrize("part", ["vision", "backbone", "expert", "model"])
def test_no_size_is_believed_however_large(part):
    """Nothing is computed from them before: a depth of 10^18 would be counted through."""
    for name, most in LIMITS.items():
        data = TINY.to_dict()
        target = data if part == "model" else data[part]
        if name not in target:
            continue
        for value in (most + 1, 10**18, 2.0, True, "8", None, [8]):
            target[name] = value
            with pytest.raises(CheckpointError, match=rf"geometry '{part}\.{name}'"):
                Pi05Config.from_dict(data)


def test_pictures_of_too_many_patches():
    with pytest.raises(CheckpointError, match="16777216 patches of a picture, at most 65536"):
        VisionConfig(width=16, depth=1, mlp_dim=8, num_heads=2, patch_size=1, image_size=4096)
