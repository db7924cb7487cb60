"""What ki-bench counts: operations and bytes against formulas, PyTorch's own counter, and graphs made by hand."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from ki_edge import graphs
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import BundleError
from ki_edge.flow import denoise_times
from ki_edge.graphs import GraphSpec, TensorSpec
from ki_edge.model import load_model
from ki_export.bench import peaks, pytorch
from ki_export.bench.options import Case
from ki_export.bench.peaks import GemmRate, PeakContenders, Peaks, biggest, gemm_run
from ki_export.bench.process import needed_bytes
from ki_export.bench.rounds import Samples, WarmUp
from ki_export.bench.stages import Works, draw_inputs, draw_noise, room
from ki_export.bench.work import INT8, Product, Work, count

from .conftest import CONFIG

CASE = Case(cameras=2, tokens=7, steps=3)

# ---------------------------------------------------------------------- operations


def analytical(config, cameras, tokens):
    """(prefix, step) operations by hand, as the roofline of docs/bench.md has them."""
    v, b, e = config.vision, config.backbone, config.expert
    pixels, length, horizon = v.patch_size**2 * 3, cameras * v.patches + tokens, config.action_horizon
    tower = v.depth * (4 * v.width * v.width + 2 * v.width * v.mlp_dim)
    vision = 2 * v.patches * (pixels * v.width + tower + v.width * b.width) + 4 * v.patches**2 * v.width * v.depth
    heads, kv = b.num_heads * b.head_dim, 2 * b.num_kv_heads * b.head_dim
    finish = 2 * length * (2 * b.width * heads + 3 * b.width * b.mlp_dim) + 4 * length**2 * heads
    prefix = cameras * vision + b.depth * 2 * length * b.width * kv + (b.depth - 1) * finish  # its last tail is dead
    layer = 2 * horizon * (e.width * (2 * heads + kv) + 3 * e.width * e.mlp_dim)
    layer += 4 * horizon * (length + horizon) * heads
    return prefix, e.depth * layer + 2 * 2 * horizon * config.action_dim * e.width


@pytest.mark.parametrize(("cameras", "tokens"), [(1, 1), (2, 7), (3, 20)])
def test_operations_are_those_of_the_formula(bundle, cameras, tokens):
    works, case = Works(bundle), Case(cameras, tokens, 1)
    prefix, step = analytical(CONFIG, cameras, tokens)
    assert works.prefix(case).flops == {"float32": prefix}
    assert works.step(case).flops == {"float32": step}
    assert works.prefix(case).uncounted == works.step(case).uncounted == ()


def test_operations_are_those_that_pytorch_counts(bundle, checkpoint):
    works, model = Works(bundle), load_model(Checkpoint.open(checkpoint))
    space = replace(room(bundle), slots=CASE.cameras, padded=CASE.tokens)  # nothing is absent
    tensors = [torch.from_numpy(array) for array in draw_inputs(CONFIG, space, CASE).arrays]
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            prefix = model.prefix_forward(*tensors)
        assert sum(works.prefix(CASE).flops.values()) == counter.get_total_flops()
        row = model.modulation(torch.from_numpy(denoise_times(3)))[0]
        with FlopCounterMode(display=False) as counter:
            model.denoise_step(torch.from_numpy(draw_noise(CONFIG)), row, torch.tensor(-0.1), *prefix)
        assert sum(works.step(CASE).flops.values()) == counter.get_total_flops()
        k, v, mask = prefix
        tokens = torch.zeros(1, 4, dtype=torch.int32)
        unembedding = model.backbone.embed_tokens.weight[: len(bundle.manifest.vocabulary.ids)]
        with FlopCounterMode(display=False) as counter:
            model.fast_decode_step(tokens, tokens, *(pad(x, works.tokens(CASE) + 4) for x in (k, v)),
                                   pad(mask[..., None], works.tokens(CASE) + 4)[..., 0], unembedding)  # fmt: skip
        assert sum(works.fast(CASE, 4).flops.values()) == counter.get_total_flops()


def pad(x, length):
    """More places along the next to last axis."""
    shape = list(x.shape)
    shape[-2] = length - shape[-2]
    return torch.cat([x, x.new_zeros(shape)], dim=-2)


def test_openpis_way_computes_more_and_gives_the_same(bundle, checkpoint):
    model = load_model(Checkpoint.open(checkpoint))
    space, noise = room(bundle), draw_noise(CONFIG)
    inputs = draw_inputs(CONFIG, space, Case(1, 7, 3))
    assert inputs.camera_mask.tolist() == [[True, False]] and inputs.prompt_mask.sum() == 7
    assert inputs.prompt_tokens.shape == (1, 20) and not inputs.images[0, 1].any() and inputs.images[0, 0].any()
    side = pytorch.TorchSide(model, inputs, noise, convention="openpi", steps=3)
    with FlopCounterMode(display=False) as counter:
        side.run()
    whole, step = analytical(CONFIG, 2, 20)
    b, e = CONFIG.backbone, CONFIG.expert
    length, heads = 2 * CONFIG.vision.patches + 20, b.num_heads * b.head_dim
    whole += (
        2 * length * (2 * b.width * heads + 3 * b.width * b.mlp_dim) + 4 * length**2 * heads
    )  # the last layer's end
    times = 2 * e.width * (2 * e.width + (2 * e.depth + 1) * 3 * e.width)  # time MLP and modulations, each step
    assert counter.get_total_flops() == whole + 3 * (step + times)


def test_bfloat16_is_openpis_mixture(checkpoint, bundle):
    """SPEC's list: matrices of vision, projector, backbone and expert in bfloat16, the rest in float32."""
    model = pytorch.load(checkpoint, "bfloat16", 1)
    low = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    everything = {name for name, _ in model.named_parameters()}
    high = everything - low
    assert all(name.startswith(("vision.", "projector.", "backbone.", "expert.")) for name in low)
    kept = ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm")
    assert {name for name in high if name.split(".")[0] in ("vision", "projector", "backbone", "expert")} == {
        name for name in everything
        if any(word in name for word in kept) or name.startswith(("backbone.norm.", "expert.norm."))
    }  # fmt: skip
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, given, out, name=name: seen.update({name: (given[0].dtype, out.dtype)})
            )
    inputs = draw_inputs(CONFIG, room(bundle), CASE)
    side = pytorch.TorchSide(model, inputs, draw_noise(CONFIG), convention="openpi", steps=1)
    side.run()
    assert side.actions.dtype == np.float32
    layers = {name: types for name, types in seen.items() if name.startswith(("vision.", "projector", "backbone."))}
    layers |= {name: types for name, types in seen.items() if name.startswith("expert.") and "layernorm" not in name}
    layers.pop("expert.norm.dense")
    assert len(layers) == CONFIG.vision.depth * 6 + 1 + (CONFIG.backbone.depth + CONFIG.expert.depth) * 7
    assert set(layers.values()) == {(torch.bfloat16, torch.bfloat16)}
    assert seen["action_in_proj"] == seen["action_out_proj"] == (torch.float32, torch.float32)


# ---------------------------------------------------------------------- other graphs


SPEC = GraphSpec("toy", (TensorSpec("x", "float32", ("B", "T", 8)),), (TensorSpec("y", "float32", ("B", "T", 12)),))


def toy(tmp_path, nodes, weights, *, inputs=None):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "toy.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "toy", [x], [y], weights), opset_imports=opsets), path)
    return path


def constant(name, kind, *shape):
    return helper.make_tensor(
        name, kind, shape, np.zeros(math.prod(shape)).astype(helper.tensor_dtype_to_np_dtype(kind))
    )


def test_dynamic_int8(tmp_path):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    work = count(toy(tmp_path, nodes, [constant("w", TensorProto.INT8, 8, 12)]), SPEC, {"B": 2, "T": 5})
    assert work.products == {Product(INT8, 10, 8, 12): 1}
    assert work.flops == {INT8: 2 * 10 * 8 * 12}
    assert (work.read, work.written) == (2 * 5 * 8 * 4 + 8 * 12, 2 * 5 * 12 * 4)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "kind"),
    [
        ("DynamicQuantizeMatMul", ["x", "w", "s"], {}, INT8),
        ("MatMulNBits", ["x", "packed", "s"], {"K": 8, "N": 12, "bits": 4, "block_size": 16}, "float32"),
        ("MatMulNBits", ["x", "packed", "s"], {"K": 8, "N": 12, "accuracy_level": 4}, INT8),
    ],
)
def test_the_engines_own_products(tmp_path, op, inputs, attributes, kind):
    nodes = [
        helper.make_node(op, inputs, ["h"], domain="com.microsoft", **attributes),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    weights = [constant("w", TensorProto.INT8, 8, 12), constant("packed", TensorProto.UINT8, 12, 1, 8)]
    work = count(toy(tmp_path, nodes, [*weights, constant("s", TensorProto.FLOAT, 1)]), SPEC, {"B": 1, "T": 5})
    assert work.flops == {kind: 2 * 5 * 8 * 12} and work.written == 5 * 12 * 4


def test_the_engines_own_rotation_counts_as_free(tmp_path):
    tables = [constant(name, TensorProto.FLOAT, 5, 4) for name in ("cos", "sin")]
    nodes = [
        helper.make_node("RotaryEmbedding", ["x", "first", "cos", "sin"], ["h"], domain="com.microsoft"),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    weights = [*tables, constant("first", TensorProto.INT64, 1), constant("w", TensorProto.FLOAT, 8, 12)]
    work = count(toy(tmp_path, nodes, weights), SPEC, {"B": 1, "T": 5})
    assert work.products == {Product("float32", 5, 8, 12): 1}
    assert work.uncounted == ()


def test_products_of_activations_and_broadcast_heads(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    work = count(toy(tmp_path, nodes, []), SPEC, {"B": 3, "T": 5})
    assert work.products == {Product("float32", 5, 8, 5, batch=3): 1}


def test_what_cannot_be_counted_is_named(tmp_path):
    nodes = [helper.make_node("Einsum", ["x", "x"], ["y"], equation="bij,bij->bij")]
    assert count(toy(tmp_path, nodes, []), SPEC, {"B": 1, "T": 5}).uncounted == ("Einsum",)
    nodes = [
        helper.make_node("Own", ["x"], ["h"], domain="com.microsoft"),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    with pytest.raises(BundleError, match=r"toy.onnx.*MatMul.*'h' cannot be inferred"):
        count(toy(tmp_path, nodes, [constant("w", TensorProto.FLOAT, 8, 12)]), SPEC, {"B": 1, "T": 5})


def test_a_table_counts_by_the_rows_that_are_read(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["y"]),
    ]
    work = count(toy(tmp_path, nodes, [constant("table", TensorProto.FLOAT, 1000, 4)]), SPEC, {"B": 1, "T": 2})
    assert work.read == 2 * 8 * 4 + 16 * 4 * 4


# ---------------------------------------------------------------------- bytes and limits


def test_bytes_of_the_weights(bundle, checkpoint):
    """A step reads the action expert and both projections once; modulation layers are not in the graph."""
    config, works = CONFIG, Works(bundle)
    model = load_model(Checkpoint.open(checkpoint))
    weights = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name.startswith(("expert.", "action_")) and "norm" not in name
    )
    length = works.tokens(CASE)
    sizes = graphs.sizes(config, 1)
    cache = 2 * 4 * sizes["L"] * sizes["K"] * sizes["D"] * length
    surface = 4 * (2 * sizes["H"] * sizes["A"] + sizes["M"] * sizes["R"] + 1) + cache + length
    assert 0 <= works.step(CASE).bytes - weights - surface < 1000  # small inline constants
    assert needed_bytes(bundle) > weights


def test_limits_are_the_larger_of_two():
    found = Peaks({"float32": 100.0, INT8: 400.0}, 10.0, ())
    assert found.limit_ms({"float32": 10**9, INT8: 4 * 10**9}, 10**6) == (pytest.approx(20.0), "compute")
    assert found.limit_ms({"float32": 10**6}, 10**9) == (pytest.approx(100.0), "memory")


def test_peaks_come_from_the_biggest_products(monkeypatch):
    monkeypatch.setattr(peaks, "ARRAY_BYTES", 1 << 20)
    small, large, int8 = Product("float32", 4, 8, 8), Product("float32", 4, 64, 64), Product(INT8, 4, 8, 8)
    attention = Product("float32", 4, 32, 32, batch=50)
    chosen = biggest([Work({small: 1, large: 2, attention: 1}, 0, 0), Work({int8: 1}, 0, 0)])
    assert chosen == [replace(attention, batch=1), large, int8]
    contenders = PeakContenders([large], 1)
    samples = {name: Samples({"run": [2.0]}, WarmUp(2, True)) for name in contenders.contenders()}
    samples["gemm float32 4x64x64 prepacked"] = Samples({"run": [1.0]}, WarmUp(2, True))
    found = contenders.peaks(samples)
    assert found.gflops == {"float32": pytest.approx(2 * 4 * 64 * 64 / 1e6)}
    assert found.bandwidth == pytest.approx((1 << 20) / 2e6)
    samples["reading product"] = Samples({"run": [0.5]}, WarmUp(2, True))  # the fastest way counts
    assert contenders.peaks(samples).bandwidth == pytest.approx((1 << 20) / 0.5e6)
    assert found.measured[0] == GemmRate(large, False, pytest.approx(2 * 4 * 64 * 64 / 2e6))


@pytest.mark.parametrize("prepacked", [False, True])
def test_the_products_that_are_timed_are_computed(prepacked):
    x, y = gemm_run(Product("float32", 3, 40, 8), 1, prepacked)()
    weights = np.random.default_rng(0)
    assert np.array_equal(weights.standard_normal((3, 40), np.float32), x)
    assert np.allclose(y, x @ weights.standard_normal((8, 40), np.float32).T, atol=1e-4)
    x, y = gemm_run(Product(INT8, 3, 40, 8), 1, prepacked)()
    weights = np.random.default_rng(0)
    weights.integers(0, 256, (3, 40))
    assert np.array_equal(y, (x.astype(int) - 128) @ weights.integers(-127, 128, (40, 8)))


@pytest.mark.parametrize(
    ("product", "runs"), [(Product(INT8, 542, 2048, 4096), 5), (Product(INT8, 542, 2048, 32768), 1)]
)
def test_a_short_product_is_timed_several_times_in_a_row(monkeypatch, product, runs):
    """Its rate is that of one of them, and the first, whose weights come from memory, is not timed."""
    now, ran = [0.0], []

    def run():
        ran.append(now[0])
        now[0] += 1.0 if len(ran) == 1 and runs > 1 else 0.25

    monkeypatch.setattr(peaks, "gemm_run", lambda *arguments, **settings: run)
    monkeypatch.setattr(peaks, "_readers", lambda threads: {})
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: now[0])
    found = PeakContenders([product], 1).contenders()
    (first, *_) = found.values()
    assert first() == {"run": pytest.approx(250.0)} and len(ran) == runs
