"""Scales, balances, and which layers get more bits."""

from dataclasses import replace

import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, BundleError, ExportError, ParityError
from ki_edge.model import Observation, load_model
from ki_export import exporter
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.exporter import export
from ki_export.graphs.tracing import trace_all
from ki_export.options import ExportOptions
from ki_export.parity.bars import bars_of
from ki_export.policies import decode_vocabulary
from ki_export.precision import low_models, low_report
from ki_export.precision.calibration import calibration
from ki_export.precision.low_bits import LowRequest, Planned, plan_low_bits
from ki_export.precision.low_search import cosines
from ki_export.precision.operands import observe_operands
from ki_export.precision.ranges_report import read_ranges
from ki_export.precision.rehearsal import STEPS, Rehearsal
from ki_export.precision.scales import balancing, choose, round_operand
from ki_export.precision.sixteen_bits import Request, lower_models
from ki_export.weights.weights import sources

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture(scope="module")
def study(checkpoint):
    """A checkpoint, observations, and its graphs in float16."""
    opened = Checkpoint.open(checkpoint)
    vocabulary = decode_vocabulary(opened.config, None, full=False, fast_head=False)
    models = trace_all(opened.config, vocabulary, 20)
    observed = calibration(opened.config, None, None, synthetic=6)
    lowered = lower_models(opened, models, vocabulary, Request("fp16", observed), lambda _: None)
    assert not lowered.decision.exponents
    return opened, models, vocabulary, observed


def plan(study, precision, **more):
    opened, models, vocabulary, observed = study
    said = []
    return plan_low_bits(opened, models, vocabulary, LowRequest(precision, observed, **more), said.append), said


def output_error(rows, weight, choice, kind):
    b = torch.ones(rows.shape[1]) if choice.balance is None else choice.balance
    given = round_operand(rows / b, choice.scale, kind) @ (weight * b).T
    exact = rows @ weight.T
    return float((given - exact).norm() / exact.norm())


def test_a_channel_of_outliers_is_balanced_where_it_helps():
    rows, weight = drawn(400, 64), drawn(48, 64)
    even = choose(rows, rows.abs().amax(0), [weight], "int8")
    assert even.balance is None, "nothing to gain, so no operation more"
    rows[:, 5] *= 80
    odd = choose(rows, rows.abs().amax(0), [weight], "int8")
    assert odd.balance is not None and odd.balance[5] > odd.balance.median()
    assert torch.equal(odd.balance.log2(), odd.balance.log2().round()), "powers of two"
    assert odd.error < 0.5 * odd.plain
    plain = type(odd)(float(rows.abs().max()) / 127, None, 0.0, 0.0)
    assert output_error(rows, weight, odd, "int8") < 0.7 * output_error(rows, weight, plain, "int8")


def test_balances_are_bounded_and_leave_unused_channels():
    largest = torch.tensor([1.0, 0.0, 1e9, 1e-9])
    b = balancing(largest, [torch.ones(2, 4)], 0.5)
    assert b[1] == 1 and b.max() <= 64 and b.min() >= 1 / 64


def test_a_single_outlier_saturates_only_if_that_costs_less():
    """Of int8, whose steps grow with the largest value; e4m3's do not, so it keeps its range."""
    rows, weight = drawn(4000, 32), drawn(16, 32)
    rows[0, 3] = 40.0
    cut = choose(rows, rows.abs().amax(0), [weight], "int8")
    assert cut.balance is not None or cut.scale < 0.5 * 40 / 127
    rows[:, 3] = torch.sign(rows[:, 3]) * 40.0
    wide = choose(rows[:, 3:4], torch.tensor([40.0]), [weight[:, 3:4]], "int8")
    assert wide.scale * 127 >= 39.9


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_a_plan_promises_is_what_its_bundle_computes(study, checkpoint, tmp_path, monkeypatch, precision):
    opened, *_, observed = study
    monkeypatch.setattr(exporter, "observations", lambda *_, **__: observed)
    planned, _ = plan(study, precision)
    assert planned.findings.holds and planned.findings.steps[-1] >= 0.9995
    options = ExportOptions(target="trt", precision=precision, model_only=True, fast_head=False, verify=False)
    sampler = arithmetic_sampler(export(checkpoint, tmp_path / "bundle", options))
    model, given, exact = load_model(opened), [], []
    for one in observed.observations:
        tokens = torch.from_numpy(one.prompt_tokens)
        inputs = torch.from_numpy(one.images), torch.ones(one.images.shape[:2], dtype=torch.bool)
        observation = Observation(*inputs, tokens, torch.ones(tokens.shape, dtype=torch.bool))
        with torch.no_grad():
            noise = torch.from_numpy(one.noise)
            exact.append(model.sample_actions(observation, noise=noise, num_steps=STEPS))
        arrays = [t.numpy() for t in (*inputs, tokens, torch.ones(tokens.shape, dtype=torch.bool))]
        given.append(torch.from_numpy(sampler.sample_actions(*arrays, noise=one.noise, num_steps=STEPS)))
    # not the same bits: what float16 rounds in front of a rounding to 3 bits falls to its other side here and there
    assert 1 - min(cosines(given, exact)) == pytest.approx(1 - planned.findings.steps[-1], rel=0.7, abs=1e-6)


def test_products_of_one_operand_share_scale_and_balance(study):
    planned, _ = plan(study, "int8")
    products = planned.plan.products
    for layer in ("backbone.layers.0", "expert.layers.1"):
        queries, keys, values = (products[f"{layer}.self_attn.{x}_proj"] for x in "qkv")
        assert queries == keys == values
        assert products[f"{layer}.mlp.gate_proj"] == products[f"{layer}.mlp.up_proj"]
    assert not any(site.endswith((".scores", ".values")) for site in products)
    attention = plan(study, "fp8")[0].plan.products["backbone.layers.0.self_attn.scores"]
    assert attention.kind == "fp8" and attention.other is not None


def test_a_width_without_blocks_takes_fp8_in_nvfp4(study):
    """The backbone is 24 wide, its MLP 40; the expert 16."""
    products = plan(study, "nvfp4", budget=0.5)[0].plan.products
    assert products["backbone.layers.0.self_attn.q_proj"].kind == "fp8"
    assert products["expert.layers.0.self_attn.q_proj"].kind == "nvfp4"


def test_the_costliest_layers_get_more_bits_until_the_budget_holds(study):
    loose, _ = plan(study, "int8")
    reached = 1 - loose.findings.steps[-1]
    tight, said = plan(study, "int8", budget=1 - reached)  # aims at half of what all layers in int8 reach
    assert tight.findings.holds and 1 - tight.findings.steps[-1] <= 0.5 * reached
    kept = {site for site, reason in tight.plan.kept.items() if reason.startswith("costs")}
    assert kept and kept.isdisjoint(tight.plan.products) and tight.plan.products
    costs = tight.findings.costs
    assert costs == sorted(costs, key=lambda cost: -cost.relative)
    assert all(site.startswith(costs[0].group) for site in kept) or len(tight.findings.kept) > 2
    assert any(site.startswith(costs[0].group) for site in kept), "the costliest first"
    assert tight.findings.kept[0][0] == "" and tight.findings.kept[-1][2] >= 1 - 0.5 * reached
    assert any(line.startswith("most sensitive in int8") for line in said)
    assert not loose.findings.costs, "nothing is tried alone while the budget holds"


def test_a_budget_that_no_low_layer_holds(study):
    with pytest.raises(ExportError, match=r"no layer may be in int8 .* cosine 0\.9999999.*--precision fp16"):
        plan(study, "int8", budget=1 - 1e-9, keep=("vision.*", "backbone.*", "expert.layers.0.*"))


def test_what_is_asked_to_be_kept_is(study):
    planned, _ = plan(study, "fp8", keep=("vision.*", "*.down_proj"))
    assert not any(site.startswith("vision") or site.endswith("down_proj") for site in planned.plan.products)
    assert planned.plan.kept["backbone.layers.0.mlp.down_proj"] == "--keep *.down_proj"
    with pytest.raises(ArgumentError, match=r"--keep 'nothing\.\*' fits no matrix product"):
        plan(study, "fp8", keep=("nothing.*",))


def test_scales_have_seen_every_step_with_all_cameras_and_with_one_absent(study):
    opened, models, vocabulary, observed = study
    assert {one.images.shape[1] for one in observed.observations} == {1, 2, 3}
    acting = {name: models[name] for name in ("prefix", "denoise")}
    origins = {name: sources(model, vocabulary) for name, model in acting.items()}
    rehearsal = Rehearsal(opened, acting, origins, 1 << 30)
    found, _, states = observe_operands(rehearsal, acting, observed.observations)
    assert len(states) == STEPS and len(states[0]) == 6
    assert len(found["expert.layers.0.mlp.up_proj"].left.drawn) == 6 * STEPS
    assert len(found["backbone.layers.0.mlp.up_proj"].left.drawn) == 6
    for seen in found.values():
        sides = [seen.left] if seen.product.weight is not None else [seen.left, seen.right]
        for side in sides:
            assert torch.isfinite(side.largest).all()
            assert side.rows.abs().amax() == side.largest.amax(), "the largest value is among the rows"


def test_a_wrong_scale_is_caught_by_the_proof_and_told_in_one_line(checkpoint, tmp_path, monkeypatch):
    def wrong(*given):
        planned = plan_low_bits(*given)
        products = {site: replace(one, operand=one.operand / 16) for site, one in planned.plan.products.items()}
        return Planned(replace(planned.plan, products=products), planned.findings)

    monkeypatch.setattr(low_models, "plan_low_bits", wrong)
    options = ExportOptions(target="trt", precision="int8", model_only=True, fast_head=False)
    with pytest.raises(ParityError, match=r"^(prefix|denoise|runtime): \S+ .*cosine distance .*cause: ") as caught:
        export(checkpoint, tmp_path / "bundle", options)
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()


def test_the_report_tells_what_layers_cost_and_what_more_bits_buy(study, checkpoint, tmp_path):
    reached = 1 - plan(study, "int8")[0].findings.steps[-1]
    budget = 1 - 0.9 * reached
    options = ExportOptions(
        target="trt", precision="int8", model_only=True, fast_head=False, budget_cosine=budget, verify=False
    )
    bundle = export(checkpoint, tmp_path / "bundle", options)
    assert bundle.manifest.budget == budget
    low = low_report.findings(read_ranges(bundle.path))
    assert "24 synthetic observations and all 10 denoising steps" in low_report.summary(low)
    assert next(low_report.bought(low))[0] == "every layer in int8"
    assert len(list(low_report.bought(low))) > 1
    rows = list(low_report.layers(low))
    assert any("16 bits" in row[1] for row in rows) and any("int8" in row[1] for row in rows)
    assert rows[0][3], "the costliest first"
    assert low_report.picture(low).startswith(b"\x89PNG")
    bars = bars_of(bundle.manifest.precision, bundle.manifest.budget)
    assert bars["actions"].limit == pytest.approx(1 - budget)


def test_a_damaged_account_of_low_bits_is_told(tmp_path):
    (tmp_path / "ranges.json").write_text('{"low_findings": {"local": {}}, "low_bits": {}}')
    with pytest.raises(BundleError, match="is not what an export writes"):
        read_ranges(tmp_path)
