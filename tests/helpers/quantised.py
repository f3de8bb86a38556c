"""Networks of torch.ao in eight bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao import quantization

from helpers.networks import few, mlp


def dynamic(model: nn.Module, kinds=(nn.Linear,), dtype: torch.dtype = torch.qint8) -> nn.Module:
    """Weights in eight bits, inputs rounded anew for every batch."""
    return quantization.quantize_dynamic(model, set(kinds), dtype=dtype)


def static(model: nn.Module, x: Tensor) -> nn.Module:
    """Weights and results in eight bits, with ranges as these inputs show them."""
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    ready = quantization.prepare(model)
    ready(x)
    return quantization.convert(ready)


def static_digits() -> nn.Module:
    """The trained network of the digits, static."""
    return static(nn.Sequential(quantization.QuantStub(), mlp(), quantization.DeQuantStub()).eval(), few(200)[0])
