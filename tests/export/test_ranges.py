"""The range audit and what is decided from it."""

import json

import numpy as np
import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, BundleError, ExportError
from ki_edge.model import Observation, load_model
from ki_export.graphs.tracing import trace_all
from ki_export.policies import PolicyRequest, decode_vocabulary
from ki_export.precision.calibration import calibration
from ki_export.precision.decision import Decision, decide, forms, shift
from ki_export.precision.ranges import LARGEST, Audit, Extent, Range, audit, scaling
from ki_export.precision.ranges_report import picture, read_ranges, rows, summary
from ki_export.precision.rehearsal import STEPS
from ki_export.weights.weights import StorageFormat, TensorSlice, sources

from .complete import read_policy


@pytest.fixture(scope="module")
def audited(checkpoint):
    opened = Checkpoint.open(checkpoint)
    files = read_policy(opened.path, opened.format, opened.settings, opened.config, PolicyRequest())
    vocabulary = decode_vocabulary(opened.config, files, full=False)
    models = trace_all(opened.config, vocabulary, 20)
    origins = {name: sources(model, vocabulary) for name, model in models.items()}
    observed = calibration(opened.config, files, None, synthetic=4)
    return opened, observed, models, audit(opened, models, origins, vocabulary, observed)


def test_ranges_are_those_of_the_pytorch_model(audited):
    opened, observed, _, found = audited
    model, seen = load_model(opened), {}

    def see(name):
        def hook(module, inputs, output):
            result = output if module.bias is None else output - module.bias
            for kind, tensor in (("input", inputs[0]), ("output", result), ("weight", module.weight)):
                key = (name, kind)
                seen[key] = max(seen.get(key, 0.0), float(tensor.abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(see(name))
    with torch.no_grad():
        for one in observed.observations:
            tokens = torch.from_numpy(one.prompt_tokens)
            observation = Observation(
                torch.from_numpy(one.images),
                torch.ones(one.images.shape[:2], dtype=torch.bool),
                tokens,
                torch.ones(tokens.shape, dtype=torch.bool),
            )
            model.sample_actions(observation, noise=torch.from_numpy(one.noise), num_steps=STEPS)
    compared = 0
    for (graph, site), measured in found.ranges.items():
        if graph == "fast_decode" or (site, "input") not in seen:
            continue
        for kind in ("input", "output", "weight"):
            extent = getattr(measured, kind)
            assert extent.largest == pytest.approx(seen[site, kind], rel=1e-4), (site, kind)
            assert 0 < extent.typical <= extent.largest
            compared += 1
    assert compared > 60


def test_the_table_and_picture_show_what_is_tightest(audited):
    _, _, models, found = audited
    data = json.loads(json.dumps({**decide("fp16", found, models).to_json(), **found.to_json()}))
    table = list(rows(data))
    assert table[0][0] == min(found.ranges.values(), key=lambda r: r.headroom).site
    assert "built-in: 4 synthetic observations" in summary(data)
    assert picture(data).startswith(b"\x89PNG")


def test_a_checkpoint_that_overflows_in_float32_is_refused():
    with pytest.raises(ExportError, match="the output of x is not finite in float32"):
        Extent().see(torch.tensor([1.0, float("inf")]), "output of x")


def extent(largest, typical=None):
    return Extent(largest, (largest / 4 if typical is None else typical) ** 2, 1)


def range_of(site, operand=10.0, result=10.0, weight=1.0, graph="prefix"):
    left, out, by = (value if isinstance(value, Extent) else extent(value) for value in (operand, result, weight))
    return Range(site, graph, left, Extent(), out, by)


MLP = "backbone.layers.0.mlp"


def decided(*found, keep=(), models=None):
    everything = {f"{MLP}.{part}_proj": range_of(f"{MLP}.{part}_proj") for part in ("gate", "up", "down")}
    everything |= {one.site: one for one in found}
    result = Audit("test", 1, {("prefix", site): one for site, one in everything.items()})
    return decide("fp16", result, models or {}, keep)


def test_what_fits_is_left_alone():
    assert decided() == Decision("fp16")


@pytest.mark.parametrize("size", [8189.0, 7e5, 3e8])
def test_a_large_mlp_product_is_divided_and_undone_behind_down_proj(size):
    found = decided(range_of(f"{MLP}.down_proj", operand=size, result=100.0))
    exponent = found.factors[f"{MLP}.down_proj"]
    assert size / 2**exponent <= LARGEST / 8 < size / 2 ** (exponent - 1)
    folded, in_float32 = (exponents.get(f"{MLP}.up_proj", 0) for exponents in (found.exponents, found.factors))
    assert folded - in_float32 == exponent and not found.kept
    assert (folded == exponent) == (size < 1e8)  # in the weight of up_proj, unless that would become too small


def test_a_product_whose_up_proj_has_small_weights_is_divided_in_float32():
    up = range_of(f"{MLP}.up_proj", weight=extent(1e-2, 1e-3))
    found = decided(up, range_of(f"{MLP}.down_proj", operand=1e5))
    assert found.exponents == {} and found.factors == {f"{MLP}.up_proj": -4, f"{MLP}.down_proj": 4}


def test_a_large_result_divides_its_weight():
    found = decided(range_of("vision.encoder.layers.0.mlp.fc2", result=2e4))
    assert found.exponents == found.factors == {"vision.encoder.layers.0.mlp.fc2": 2}


def test_weights_that_float16_would_round_away_are_made_larger():
    found = decided(range_of(f"{MLP}.down_proj", weight=extent(1e-6, 1e-7), result=1.0))
    exponent = found.exponents[f"{MLP}.down_proj"]
    assert 1e-7 / 2.0**exponent >= 2**-12 and found.factors == found.exponents


def test_an_operand_too_large_for_its_type_keeps_the_product_in_float32(checkpoint):
    found = decided(range_of("vision.encoder.layers.0.self_attn.q_proj", operand=9000.0))
    assert found.kept == {"vision.encoder.layers.0.self_attn.q_proj": "its operand reaches 9e+03"}


def test_scores_too_large_stay_float32():
    site = "backbone.layers.0.self_attn.scores"
    one = Range(site, "prefix", extent(10.0), extent(10.0), extent(1e4))
    assert decided(one).kept == {site: "its result reaches 1e+04"}


def test_operands_that_would_be_rounded_away_stay_float32():
    """V of an attention: scaling the weight that makes it does not help, since it is cast where it is used."""
    site = "backbone.layers.0.self_attn.values"
    one = Range(site, "prefix", extent(1.0), extent(1e-5, 1e-6), extent(1e-5))
    assert decided(one).kept == {site: "its other operand, typically 1.0e-06, would be rounded away"}


def test_what_no_observation_reached_is_not_trusted():
    with pytest.raises(ExportError, match="no observation reached projector"):
        decided(Range("projector", "prefix"))


@pytest.mark.parametrize("largest", [1e-3, 1.0, 8188.0, 8189.0, 65504.0, 1e9, 1e30])
def test_shift_brings_values_below_the_margin(largest):
    k = shift(largest, largest / 3)
    assert largest / 2.0**k <= LARGEST / 8
    assert k <= 0 or largest / 2.0 ** (k - 1) > LARGEST / 8


def test_too_much_in_float32_is_refused_and_bf16_offered(audited):
    _, _, models, found = audited
    ruined = Audit(
        "test",
        1,
        {k: Range(r.site, r.graph, extent(1e5), r.other, r.output, r.weight) for k, r in found.ranges.items()},
    )
    with pytest.raises(ExportError, match=r"its operand reaches 1e\+05.*use --precision bf16"):
        decide("fp16", ruined, models)


def test_patterns_keep_products_and_a_wrong_one_is_told(audited):
    _, _, models, found = audited
    kept = decide("fp16", found, models, ("vision.*", "*.layers.0.mlp.down_proj")).kept
    assert all(name.startswith("vision") or name.endswith("layers.0.mlp.down_proj") for name in kept)
    assert "projector" not in kept and len(kept) == 8 + 2
    with pytest.raises(ArgumentError, match=r"--keep-fp32 'visionn\.\*' fits no matrix product"):
        decide("fp16", None, models, ("visionn.*",))


def test_a_kept_down_proj_leaves_its_product_as_it_is(audited):
    _, _, models, found = audited
    large = dict(found.ranges)
    down = f"{MLP}.down_proj"
    for key in [key for key in large if key[1] == down]:
        large[key] = range_of(down, 1e6, graph=key[0])
    kept = decide("fp16", Audit("test", 1, large), models, (down,))
    assert kept.exponents == kept.factors == {}


def test_scalings_are_told_as_what_they_are():
    assert scaling(7, 0) == "weight / 2^7"
    assert scaling(-12, -5) == "weight * 2^12, result / 2^5 in float32"


def test_forms_follow_the_decision():
    decision = Decision("fp16", {}, {"a": 3, "b": -2})
    origins = {
        "g": {
            "a.weight": TensorSlice("A"),
            "b.weight": TensorSlice("B"),
            "c.weight": TensorSlice("C"),
            "c.bias": TensorSlice("D"),
        }
    }
    found = forms(decision, {"a.weight", "c.weight"}, origins)
    assert found == {"A": StorageFormat("F16", 3), "B": StorageFormat("F32", -2), "C": StorageFormat("F16", 0)}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"ranges": [1]}', '{"sensitivity": 3}'])
def test_a_damaged_audit_is_one_error(tmp_path, text):
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(BundleError, match=r"ranges\.json is not what an export writes"):
        read_ranges(tmp_path)


def test_the_embedding_table_is_audited_whole(audited):
    """Observations use a few of its rows; a weight elsewhere in it would overflow unseen."""
    opened, _, _, found = audited
    table = opened.read("backbone.embed_tokens.weight")
    assert found.of("backbone.embed_tokens").weight.largest == pytest.approx(np.abs(table).max())
    assert found.of("backbone.embed_tokens").weight.count == table.size
