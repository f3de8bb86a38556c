"""Quantised networks: their matrices are read in real numbers, or named with the reason; none vanishes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.nn import quantized

import brittle
from brittle.errors import InputError
from brittle.linear.convolution import apply
from brittle.models.layers import read_layers
from brittle.models.selection import chosen_layers
from brittle.models.trace import NoRule, trace

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces where its quantisation is to move


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def dynamic(model, kinds=(nn.Linear,), dtype=torch.qint8):
    return quantization.quantize_dynamic(model, set(kinds), dtype=dtype)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = quantization.QuantStub(), quantization.DeQuantStub()
        self.first = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.second = nn.Conv2d(4, 3, 2, dilation=2)
        self.act = nn.ReLU()
        self.head = nn.Linear(3 * 4, 3)

    def forward(self, x):
        x = self.act(self.second(self.first(self.enter(x))))
        return self.leave(self.head(x.flatten(1)))


def static():
    torch.manual_seed(0)
    model = Images().eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.fuse_modules(model, [["second", "act"]], inplace=True)
    ready = quantization.prepare(model)
    ready(torch.rand(64, 4, 8, 8))
    return quantization.convert(ready)


# --- torch.ao -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamically_quantised_layers_are_read_in_real_numbers(dtype):
    model = dense()
    views, unread = read_layers(dynamic(model, dtype=dtype))
    assert unread == []
    assert [(view.name, view.kind, view.parameters) for view in views] == [
        ("1", "Linear (quantised)", 128),
        ("3", "Linear (quantised)", 24),
    ]
    for view in views:
        exact = model.get_submodule(view.name).weight
        step = float(exact.detach().abs().max()) / 127 if dtype == torch.qint8 else 2.0**-11
        assert view.weight.dtype == torch.float32
        assert not view.weight.requires_grad
        assert float((view.weight - exact).abs().max()) <= step


def test_what_a_dynamic_layer_computes_is_its_matrix_on_rounded_inputs():
    model = dynamic(dense())
    view = read_layers(model).views[0]
    x = torch.randint(0, 128, (5, 16)).float() / 127  # the 128 steps from 0 to 1 that the layer rounds its inputs to
    x[:, 0], x[:, 1] = 0, 1
    _, bias = view.module._packed_params._weight_bias()
    expected = x.double() @ view.weight.double().T + bias.detach().double()
    torch.testing.assert_close(view.module(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_static_convolutions_compute_the_views_matrix_up_to_the_outputs_step():
    model = static()
    views = {view.name: view for view in read_layers(model).views}
    assert {name: view.kind for name, view in views.items()} == {
        "first": "Conv2d (2 groups, quantised)",
        "second": "Conv2d (quantised)",
        "head": "Linear (quantised)",
    }
    view = views["first"]
    assert view.output is model.first
    x = model.enter(torch.rand(4, 4, 8, 8))
    y = model.first(x)
    _, bias = model.first._weight_bias()
    expected = apply(view.weight.double(), view.geometry, x.dequantize().double()) + bias.detach()[:, None, None]
    inside = (y.int_repr() > 0) & (y.int_repr() < 127)
    assert inside.any()
    off = (y.dequantize() - expected).abs()[inside]
    assert float(off.max()) <= 0.501 * y.q_scale()


def test_a_fused_activation_leaves_the_layer_no_output_of_its_own():
    views = {view.name: view for view in read_layers(static()).views}
    assert views["second"].output is None
    assert views["second"].geometry.dilation == (2, 2)


UNREAD = {
    "memory": (lambda: dynamic(nn.Sequential(nn.LSTM(3, 4)), (nn.LSTM,))[0], "recurrent"),
    "cell": (lambda: dynamic(nn.Sequential(nn.GRUCell(3, 4)), (nn.GRUCell,))[0], "recurrent"),
    "table": (lambda: quantized.Embedding(5, 4), "look-up table"),
    "bags": (lambda: quantized.EmbeddingBag(5, 4), "look-up table"),
    "transposed": (lambda: quantized.ConvTranspose2d(2, 2, 3), "transposed convolution"),
    "slope": (lambda: quantized.PReLU(1.0, 0), "activation"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_quantised_modules_without_a_matrix_are_named_with_the_reason(name):
    make, reason = UNREAD[name]
    views, unread = read_layers(nn.ModuleDict({name: make()}))
    assert views == []
    assert [item.name for item in unread] == [name]
    assert reason in unread[0].reason


def test_quantised_attention_is_read_by_its_projections():
    attention = torch.ao.nn.quantizable.MultiheadAttention(8, 2).eval()
    attention.qconfig = quantization.default_qconfig
    model = quantization.convert(quantization.prepare(nn.Sequential(attention)))
    views, unread = read_layers(model)
    assert {view.name for view in views} == {f"0.{part}" for part in ("out_proj", "linear_Q", "linear_K", "linear_V")}
    assert unread == []


def test_a_quantised_qkv_beside_heads_is_still_three_matrices():
    block = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    block.num_heads = 2
    views = read_layers(dynamic(nn.Sequential(block))).views
    assert [(view.name, view.kind) for view in views] == [
        (f"0.qkv.{part}", "Linear (part of fused qkv, quantised)") for part in "qkv"
    ]


def test_audits_of_weights_measure_quantised_layers_and_certify_nothing():
    model = dynamic(dense())
    audit = brittle.audit(model, input_shape=(1, 4, 4))
    assert [layer.kind for layer in audit.layers] == ["Linear (quantised)"] * 2
    for layer, view in zip(audit.layers, read_layers(model).views, strict=True):
        assert math.isclose(layer.filter_norm_2, float(torch.linalg.matrix_norm(view.weight.double(), 2)))
    assert [norm.lipschitz.upper for norm in audit.norms] == [None, None]
    assert audit.parameters == 16 * 8 + 8 + 8 * 3 + 3
    assert any("no sound rule" in item.reason for item in audit.not_measured)


def test_packed_weights_are_in_the_fingerprint():
    def fingerprint(seed):
        torch.manual_seed(seed)
        return brittle.audit(dynamic(nn.Sequential(nn.Linear(4, 3))), input_shape=(4,)).signature.weights

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)


def test_a_gradient_attack_alone_on_a_network_without_gradients_is_an_error_of_one_line():
    for attack in (brittle.apgd, brittle.pgd):
        with pytest.raises(InputError, match="differentiable operations"):
            attack(dynamic(dense()), torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64), eps=0.1, p=2)


# --- other ways to keep a matrix ----------------------------------------------------------------------------


class Quantised(Tensor):
    """A tensor type as torchao's: whole numbers and a scale, and hardly any operation."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    def dequantize(self):
        return self.whole * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].whole, args[0].scale)
        if function is torch.ops.aten.t.default:
            return args[0].dequantize().t()
        raise NotImplementedError(function)


def with_own_type():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    whole = torch.randint(-128, 128, (3, 4), dtype=torch.int8)
    model[0].weight = nn.Parameter(Quantised(whole, torch.rand(3, 1)), requires_grad=False)
    return model.eval()


def test_weights_of_a_quantised_tensor_type_are_read_in_real_numbers():
    model = with_own_type()
    (view,), unread = read_layers(model)
    assert unread == []
    assert view.kind == "Linear (quantised)"
    assert torch.equal(view.weight, model[0].weight.dequantize())
    with pytest.raises(NoRule, match=r"0\.weight: a quantised Quantised"):
        trace(model, (4,))
    with pytest.raises(InputError, match=r"expected weights of real numbers; got Quantised in '0'"):
        chosen_layers(model, ["0"])
    audit = brittle.audit(model, input_shape=(4,))
    other = copy.deepcopy(audit.signature.weights)
    model[0].weight.scale[0] *= 2
    assert brittle.audit(model, input_shape=(4,)).signature.weights != other


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("whole", torch.randint(-8, 8, (3, 4), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(3))
        self.table = torch.rand(2, 2)

    def forward(self, x):
        return x @ (self.whole * self.scales[:, None]).T


class Removed(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        del self.weight
        self.packed = torch.zeros(2, 3, dtype=torch.int8)


def test_a_linear_layer_without_its_weight_is_named():
    views, unread = read_layers(nn.Sequential(Removed(), nn.Linear(2, 2)))
    assert [view.name for view in views] == ["1"]
    assert [(item.name, item.reason) for item in unread] == [("0", "weight is a NoneType, not a tensor")]


def test_matrices_in_buffers_and_attributes_are_named():
    views, unread = read_layers(nn.Sequential(Buffered(), nn.ReLU()))
    assert views == []
    assert [(item.name, item.reason) for item in unread] == [("0", "Buffered: no rule to read table, whole")]


def test_frozen_torchscript_is_named():
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()))
    views, unread = read_layers(script)
    assert views == []
    assert ["constants of its code" in item.reason for item in unread] == [True]
