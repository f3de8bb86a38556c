"""ResNets for CIFAR whose shortcuts are slices and zeros (option A) are bounded, certified and audited as any other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle
from brittle.bounds.relaxation.certify import margin_bounds, read_relaxation
from brittle.bounds.sensitivity import jacobian_norms
from brittle.evaluation import Threat
from helpers.networks import seeded, uniform, untouched

SHAPE = (3, 8, 8)


class Block(nn.Module):
    """Two convolutions with batch norms beside a shortcut without weights."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.width = (after - before) // 2 if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        zeros = (0, 0, 0, 0, self.width, self.width) if self.width else ()
        out += F.pad(x[:, :, ::2, ::2], zeros, "constant", 0) if zeros else x
        return F.relu(out)


class ResNet(nn.Module):
    """He et al. 2016, section 4.2, narrow and of two blocks, as third parties write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layers = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def test_an_option_a_resnet_gets_bounds_certificates_and_an_audit(capfd):
    net, x = seeded(ResNet), uniform(0, 6, *SHAPE)
    with torch.no_grad():
        net.train()(uniform(1, 64, *SHAPE))  # statistics of their own
        y = net.eval()(x).argmax(1)
    with untouched(net):
        audit = brittle.audit(net, (x, y), Threat("fast", steps=5), honesty=False)
        margins = margin_bounds(read_relaxation(net, SHAPE), x, y, eps=1e-3, p=math.inf)
    assert (margins > 0).any()
    for p in (2, math.inf):
        norm = audit.norm(p)
        assert norm.lipschitz.lower <= norm.lipschitz.upper
        assert float(jacobian_norms(net, x, p).max()) <= norm.lipschitz.upper
        assert norm.certified is not None
        assert dict(norm.lipschitz.arguments)["product of norms"] > norm.lipschitz.upper
    assert not [item for item in audit.not_measured if "certified" in item.name]
    assert capfd.readouterr() == ("", "")
