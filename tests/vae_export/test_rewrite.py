"""Every form of a graph computes what the reference computes, and its operators mean the same in ONNX.

Tests vae_export/rewrites/apply.py, vae_export/rewrites/attention.py, vae_export/rewrites/form.py,
vae_export/rewrites/last_block.py, vae_export/rewrites/norm.py, vae_export/rewrites/operators.py,
vae_export/rewrites/upsample.py, vae_export/rewrites/winograd.py.
"""

import copy
import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch.nn import functional as F

from tests.helpers.forms import FORMS
from tests.helpers.small_models import inputs_of, run_graph, small_model
from vae_export import AutoencoderKL
from vae_export.checkpoints.load import load_model
from vae_export.comparison import Case, compare
from vae_export.families.autoencoder_kl import Attention, Upsample
from vae_export.rewrites import winograd
from vae_export.rewrites.apply import fitted, rewrite
from vae_export.rewrites.attention import use_portable_attention
from vae_export.rewrites.form import LAST_BLOCKS, NORMS, PLAIN, UPSAMPLES, Form
from vae_export.rewrites.last_block import slim_last_block
from vae_export.rewrites.norm import RowNorm, use_row_norms
from vae_export.rewrites.operators import TRANSLATIONS, attend_in_blocks, row_norm
from vae_export.rewrites.upsample import fold_upsample
from vae_export.targets.onnx_graphs import DTYPES, OPSET, export_onnx

# Sums of some hundred terms of order 1 in another order, a dozen layers deep; weights added, or multiplied with each
# other, before they meet the activations. Outputs are of order 1.
TOLERANCE = 2e-5
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES.values()}


def model_of(*, channels=(16, 32, 32), attention_at=(), **fields):
    """Random weights, norms too, so that no two groups are alike."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=tuple(f"{'Attn' * (i in attention_at)}DownEncoderBlock2D" for i in range(len(channels))),
            up_block_types=tuple(f"{'Attn' * (i in attention_at)}UpDecoderBlock2D" for i in range(len(channels))),
            **{"norm_num_groups": 8, **fields},
        )
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval().requires_grad_(False)


MODELS: dict[str, dict[str, Any]] = {
    "three levels": {},
    "attention in every block": {"attention_at": (0, 1, 2), "channels": (16, 24, 32)},
    "two layers, no attention": {"layers_per_block": 2, "mid_block_add_attention": False},
    "an odd number of groups": {"norm_num_groups": 3, "channels": (9, 18)},
    "one group": {"norm_num_groups": 1, "channels": (5, 7)},
    "one channel a group": {"norm_num_groups": 8, "channels": (8, 16)},
    "no shortcut in the last block": {"channels": (16, 16)},
    "one level": {"channels": (16,)},
    "another activation, bare latents": {"act_fn": "mish", "use_quant_conv": False, "use_post_quant_conv": False},
}
#: every form, in blocks of queries or not
ALL_FORMS = [Form(*choice) for choice in itertools.product(UPSAMPLES, NORMS, LAST_BLOCKS, (1, 16))]
SIZES = [(1, 1, 1), (2, 5, 3), (1, 6, 7)]  #: batch, height, width in latents


@pytest.fixture(params=MODELS)
def any_model(request):
    return model_of(**MODELS[request.param])


def arrays_for(model, sizes=SIZES):
    """("encoder", images) and ("decoder", latents), random."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    for b, h, w in sizes:
        if h * w == 1 and min(config.block_out_channels) == config.norm_num_groups:
            continue  # a norm of one number: PyTorch refuses it
        f = config.downscale
        yield "encoder", torch.rand(b, config.in_channels, h * f, w * f, generator=generator) * 2 - 1
        yield "decoder", torch.randn(b, config.latent_channels, h, w, generator=generator)


def same(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Forms ------------------------------------------------------------------------------------------------------------


def test_every_form_gives_the_numbers_of_the_reference(any_model):
    given = [(graph, x, run_graph(any_model, graph, x)) for graph, x in arrays_for(any_model)]
    for form in ALL_FORMS:
        rewritten = rewrite(any_model, form)
        decoder_alone = (form.upsample, form.last_block) != (PLAIN.upsample, PLAIN.last_block)
        for graph, x, expected in given:
            if graph == "decoder" or not decoder_alone:
                same(run_graph(rewritten, graph, x), expected)


def test_no_form_changes_the_model_that_it_is_given_or_shares_its_weights():
    model = model_of(attention_at=(1,))
    before, looks = {name: t.clone() for name, t in model.state_dict().items()}, repr(model)
    kinds = [type(module) for module in model.modules()]
    parameters = {id(parameter) for parameter in model.parameters()}
    for form in ALL_FORMS:
        assert not parameters & {id(parameter) for parameter in rewrite(model, form).parameters()}
    assert (repr(model), [type(module) for module in model.modules()]) == (looks, kinds)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_fused_projections_stay_fused_and_right():
    model = model_of(attention_at=(1,))
    expected = [run_graph(model, graph, x) for graph, x in arrays_for(model)]
    model.fuse_qkv_projections()
    for form in (PLAIN, *FORMS.values()):
        rewritten = rewrite(model, form)
        assert all(m.qkv_weight is not None for m in rewritten.modules() if isinstance(m, Attention))
        for (graph, x), right in zip(arrays_for(model), expected, strict=True):
            same(run_graph(rewritten, graph, x), right)


def test_a_form_holds_what_it_says():
    model = model_of()
    for form in ALL_FORMS:
        kinds = [type(module).__name__ for module in rewrite(model, form).modules()]
        assert (form.upsample == "none") == ("Upsample" in kinds)
        assert (form.upsample == "deconv") == ("ConvTranspose2d" in kinds)
        assert (form.norm == "rows") == ("GroupNorm" not in kinds) == ("RowNorm" in kinds)
        names = {record["name"] for record in form.records()}
        assert len(names) == len(form.records()) == sum(ours != plain for ours, plain in zip(form, PLAIN, strict=True))
    assert PLAIN.records() == []


def test_a_form_of_a_form_is_still_the_same_function():
    """As `SimulatedHalf` and `probe` do, which take their own attention of a model that is already rewritten."""
    model = model_of(attention_at=(1,))
    for graph, x in arrays_for(model):
        twice = use_row_norms(rewrite(model, Form("conv", "rows", LAST_BLOCKS[-1], 16)))
        same(run_graph(use_portable_attention(twice), graph, x), run_graph(model, graph, x))


# Upsampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["deconv", "conv"])
def test_folding_the_upsampling_changes_nothing_but_rounding(form):
    model = small_model()
    folded = fold_upsample(model, form)
    assert not any(isinstance(module, Upsample) for module in folded.modules())
    assert any(isinstance(module, Upsample) for module in model.modules()), "the model given is not changed"
    for height, width in ((12, 10), (1, 1), (5, 3)):
        z = torch.randn(2, 4, height, width)
        # Weights are added before instead of after the products: fp32 rounding.
        torch.testing.assert_close(folded.decode_latents(z), model.decode_latents(z), rtol=0, atol=1e-5)


# Wide convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 6, 10), (1, 3, 2, 2), (1, 7, 4, 2)], ids=str)
def test_a_convolution_by_winograd_is_the_same_to_twice_the_digits_of_fp32(shape):
    conv = torch.nn.Conv2d(shape[1], 4, 3, padding=1).double()
    x = torch.randn(shape, dtype=torch.float64)
    same(winograd.WinogradConv(conv)(x), conv(x), 1e-13)


@pytest.mark.parametrize("name", ["three levels", "attention in every block", "two layers, no attention", "one level"])
def test_models_with_wide_convolutions_are_the_same_at_odd_sizes_too(monkeypatch, name):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 24)
    model = model_of(**MODELS[name]).double()
    form = Form(last_block="lean", convolutions="winograd")
    rewritten = rewrite(model, form)
    replaced = [path for path, module in rewritten.named_modules() if isinstance(module, winograd.WinogradConv)]
    # Neither the first level of the decoder nor the last of the encoder, whose sides may be odd.
    assert bool(replaced) == (name != "one level") == (fitted(form, model).convolutions == "winograd")
    odd = ("mid_block", "decoder.up_blocks.0", f"encoder.down_blocks.{len(model.encoder.down_blocks) - 1}")
    assert not [path for path in replaced if any(part in path for part in odd)]
    for graph, x in arrays_for(model):
        same(run_graph(rewritten, graph, x.double()), run_graph(model, graph, x.double()), 1e-12)


def test_narrow_convolutions_are_left_as_they_are_and_the_manifest_does_not_tell_of_them():
    model = model_of()
    form = Form(convolutions="winograd")
    assert repr(winograd.use_winograd(model)) == repr(model)
    assert fitted(form, model) == PLAIN
    assert fitted(Form(last_block="lean"), model_of(channels=(16, 16))) == PLAIN


# The last block ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["three levels", "attention in every block", "an odd number of groups", "one group"])
def test_the_lean_last_block_is_the_same_to_twice_the_digits_of_fp32(name):
    """In float64 nothing is left of the rounding: an identity, not a likeness."""
    model = model_of(**MODELS[name]).double()
    slim = slim_last_block(model)
    assert repr(slim) != repr(model), "there was something to do"
    for graph, x in arrays_for(model):
        same(run_graph(slim, graph, x.double()), run_graph(model, graph, x.double()), 1e-12)


@pytest.mark.parametrize("name", ["no shortcut in the last block", "one level"])
def test_a_model_without_a_shortcut_there_is_left_as_it_is(name):
    model = model_of(**MODELS[name])
    slim = slim_last_block(model)
    assert slim is not model and repr(slim) == repr(model)
    assert all(torch.equal(run_graph(slim, graph, x), run_graph(model, graph, x)) for graph, x in arrays_for(model))


# Norms by rows ----------------------------------------------------------------------------------------------------

GROUPS = 4


def norms(x, weight=None, bias=None, eps=1e-6):
    """(by rows, PyTorch's own, the truth in float64)."""
    channels = x.shape[1]
    weight = torch.ones(channels, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    bias = torch.zeros(channels, dtype=x.dtype) if bias is None else bias.to(x.dtype)
    truth = F.group_norm(x.double(), GROUPS, weight.double(), bias.double(), eps)
    return row_norm(x, weight, bias, GROUPS, eps), F.group_norm(x, GROUPS, weight, bias, eps), truth


def error(actual, truth):
    return (actual.double() - truth).abs().max().item()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 16, 64, 64), (1, 8, 5, 7), (2, 8, 1, 9), (1, 8, 9, 1), (3, 64, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_norms_by_rows_are_group_norms(shape, dtype):
    x = (normal(*shape) * 3 + 0.5).to(dtype)
    weight, bias = normal(shape[1], seed=1), normal(shape[1], seed=2)
    ours, theirs, truth = norms(x, weight, bias)
    assert ours.dtype == dtype and ours.shape == x.shape
    # Scale, shift, product and sum are each rounded to the type, where PyTorch rounds once.
    assert error(ours, truth) <= 8 * EPS[dtype] * truth.abs().max()
    assert error(theirs, truth) <= 8 * EPS[dtype] * truth.abs().max()


@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_a_large_mean_costs_the_digits_that_x_itself_has_lost_and_no_more(ratio):
    """|mean| / deviation of a group: once, as in PyTorch. The difference of squares would lose them twice."""
    ours, theirs, truth = norms(normal(2, 16, 64, 64) + ratio)
    for result in (ours, theirs):
        assert error(result, truth) <= 4 * EPS[torch.float32] * truth.abs().max() * (1 + ratio)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("ratio", [3, 30, 100])
def test_a_group_whose_mean_is_large_is_never_blown_up(dtype, ratio):
    """Where rounding leaves nothing of the variance, dividing by eps instead would multiply what x still holds."""
    x = (normal(2, 16, 7, 5) + ratio).to(dtype)
    ours, _, truth = norms(x)
    # Half of the output: bf16 has 8 bits, and a mean of 100 deviations leaves half a deviation to the last of them.
    assert error(ours, truth) <= 0.5 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 100.0, 30000.0])
def test_a_constant_group_becomes_the_bias_and_not_nan(dtype, value):
    bias = torch.linspace(-1, 1, 8)
    ours, *_ = norms(torch.full((2, 8, 16, 15), value, dtype=dtype), bias=bias)
    assert ours.isfinite().all()
    # x * scale and shift cancel: what is left is their rounding, at a scale of eps ** -0.5 = 1000.
    allowed = 4 * EPS[dtype] * (1 + 1000 * abs(value))
    assert error(ours, bias.double().reshape(1, 8, 1, 1)) <= allowed


@pytest.mark.parametrize("width", [8, 512])
def test_fp16_near_its_largest_number_does_not_overflow(width):
    """A row's norm would: sqrt(512) * 65504."""
    x = (torch.rand(1, 8, 16, width, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 65504
    ours, _, truth = norms(x.half())
    assert error(ours, truth) <= 8 * EPS[torch.float16] * truth.abs().max()
    x[0, :, 0, 0] = 65504.0
    assert norms(x.half())[0].isfinite().all()


@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_fp16_norms_keep_their_digits_whatever_the_size_of_the_input(weight):
    """Near 65504, and with a small weight, a scale in fp16 would be a subnormal of few digits."""
    x = normal(1, 8, 16, 64).clamp(-2, 2) * 30000
    ours, _, truth = norms(x.half(), weight=torch.full((8,), weight))
    assert error(ours, truth) <= 8 * EPS[torch.float16] * truth.abs().max()


def test_bf16_and_fp32_take_what_group_norm_takes():
    """Squares of up to 1e38 fit: values of 1e19, as in PyTorch."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs, truth = norms((normal(1, 8, 16, 16).clamp(-2, 2) * 1e18).to(dtype))
        assert theirs.isfinite().all()
        assert error(ours, truth) <= 8 * EPS[dtype] * truth.abs().max()


@pytest.mark.parametrize("colour", [-1.0, 0.0, 1.0])
def test_a_picture_of_one_colour_survives_norms_by_rows(tiny_model, colour):
    """Its first maps are flat but for their borders: the mean of a group is some hundred times its deviation."""
    x = torch.full((1, 3, 64, 64), colour)
    truth = copy.deepcopy(tiny_model).double().encode_moments(x.double()).float()
    same(tiny_model.encode_moments(x), truth, 5e-5)  # fp32 can do that
    same(use_row_norms(tiny_model).encode_moments(x), truth, 5e-5)


# Attention --------------------------------------------------------------------------------------------------------


def test_portable_attention_is_the_same_attention():
    model = small_model()
    for graph, x in inputs_of(model):
        # Another kernel sums in another order.
        torch.testing.assert_close(
            run_graph(use_portable_attention(model), graph, x), run_graph(model, graph, x), rtol=0, atol=1e-5
        )


POSITIONS = [1, 7, 16, 17, 40, 96]  #: fewer than 16 blocks, as many, one more, and not divisible by 16


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("blocks", [2, 16])
def test_attention_in_blocks_is_attention(positions, blocks):
    q, k, v = (normal(2, positions, 24, seed=seed) for seed in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    same(attend_in_blocks(q, k, v, blocks), expected, 1e-5)


# In ONNX ----------------------------------------------------------------------------------------------------------


class Blocks(torch.nn.Module):
    def forward(self, q, k, v):
        return attend_in_blocks(q, k, v, 16)


class Rows(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.norm = torch.nn.GroupNorm(GROUPS, 8, eps=1e-6, dtype=dtype).requires_grad_(False)
        self.norm.weight.copy_(normal(8, seed=1))
        self.norm.bias.copy_(normal(8, seed=2))
        self.norm.__class__ = RowNorm

    def forward(self, x):
        return self.norm(x)


def onnx_of(module, *shapes, dtype=torch.float32, free):
    """A module as an ONNX model, its axes in `free` dynamic."""
    dims = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free)
    program = torch.onnx.export(
        module.eval(), tuple(torch.zeros(shape, dtype=dtype) for shape in shapes), dynamo=True, opset_version=OPSET,
        dynamic_shapes=dims, custom_translation_table=TRANSLATIONS, verbose=False,
    )  # fmt: skip
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def session_of(proto):
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def in_onnxruntime(session, *tensors):
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))[0])


@pytest.mark.filterwarnings("ignore")  # of the exporter's own; `export_onnx` silences them
def test_attention_in_blocks_means_the_same_in_onnx():
    q = (2, 30, 24)
    proto = onnx_of(Blocks(), q, q, q, free=[(0, 1)] * 3)
    session = session_of(proto)
    for batch, positions in itertools.product((1, 2), POSITIONS):
        q, k, v = (normal(batch, positions, 24, seed=seed) for seed in range(3))
        same(in_onnxruntime(session, q, k, v), attend_in_blocks(q, k, v, 16), 1e-5)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions


@pytest.mark.filterwarnings("ignore")  # of the exporter's own; `export_onnx` silences them
@pytest.mark.parametrize("value", [100352.0, -3e5, 1e30])
def test_a_constant_map_however_large_is_normalised_to_the_bias(value):
    """Less than nothing may be left of its variance, by rounding: no root of that."""
    x = torch.full((1, 16, 7, 11), value, dtype=torch.bfloat16)
    weight, bias = torch.ones(16, dtype=torch.bfloat16), torch.full((16,), 0.5, dtype=torch.bfloat16)
    assert row_norm(x, weight, bias, 8, 1e-6).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of the exporter, when it is the first to be asked
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_norms_by_rows_mean_the_same_in_onnx(dtype):
    module = Rows(dtype)
    proto = onnx_of(module, (2, 8, 6, 10), dtype=dtype, free=[(0, 2, 3)])
    session = session_of(proto)
    for shape in ((1, 8, 5, 7), (3, 8, 1, 2), (2, 8, 1, 300), (1, 8, 64, 64)):
        # The same rounding in another order; of a constant group it is all that is left, at a scale of 1000.
        for x, size in (
            (normal(*shape) * 2 + 0.5, 1),
            (normal(*shape).clamp(-2, 2) * 30000, 1),
            (torch.full(shape, 5.0), 5000),
        ):
            expected = module(x.to(dtype))
            same(in_onnxruntime(session, x.to(dtype)), expected, 16 * EPS[dtype] * size * expected.abs().max().item())
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions


def test_a_picture_of_one_colour_survives_the_form_of_onnx_bundles(tmp_path):
    """ONNX Runtime's own GroupNormalization takes the root of a difference of squares, which may be less than nothing.

    The embedded model: a trained one, and the fp16 of its file costs its fp16 graph nothing.
    """
    model = load_model()
    export_onnx(model, "encoder", tmp_path / "m.onnx", precision="fp16", form=FORMS["onnx", "fp16"])
    session = session_of(onnx.load(tmp_path / "m.onnx"))
    pictures = [torch.full((1, 3, 256, 256), colour) for colour in (-1.0, 0.0, 1.0)]
    cases = [Case("encoder", "one colour", x.numpy(), model.encode_moments(x).numpy()) for x in pictures]
    assert compare(cases, "onnxruntime", lambda _, x: session.run(None, {"sample": x})[0], "fp16")


def test_no_intermediate_of_the_graph_holds_all_scores(tmp_path):
    """A model of one level, where attention at 40 x 40 takes 100 times what anything else takes."""
    model, side, blocks = model_of(channels=(16,)), 40, 16
    positions = side * side
    for form, most in ((PLAIN, positions**2), (Form(attention_blocks=blocks), positions**2 // blocks)):
        export_onnx(model, "decoder", tmp_path / "m.onnx", form=form)
        proto = onnx.load(tmp_path / "m.onnx")
        results = {name for node in proto.graph.node for name in node.output} - {proto.graph.output[0].name}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {"latent_sample": np.zeros((1, 4, side, side), np.float32)})
        assert max(array.size for array in found) == most


def test_bf16_graphs_keep_the_statistics_of_norms_by_rows_in_fp32(tmp_path):
    """In 8 bits sums over an image would stop growing."""
    export_onnx(model_of(channels=(16,)), "encoder", tmp_path / "m.onnx", precision="bf16", form=Form(norm="rows"))
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx"), data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for kind in ("Sqrt",):
        nodes = [node for node in graph.node if node.op_type == kind]
        assert nodes and all(types[node.output[0]] == TensorProto.FLOAT for node in nodes)
