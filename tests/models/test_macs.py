"""Multiply-accumulates against closed forms and torch's own count; parameters and bytes against the file."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import brittle
from brittle.compression import channel_costs, channel_groups, remove_units
from brittle.errors import InputError
from brittle.models.macs import layer_macs, network_size
from helpers.networks import convnet, narrow_resnet18, seeded, uniform, untidy, untouched


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(7, 5), (7,), 7 * 5),
        (nn.Linear(7, 5, bias=False), (11, 7), 11 * 7 * 5),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 7), 5 * 4 * 8 * 3 * 9),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), 9 * 6 * 9),
        (nn.Conv2d(6, 4, (1, 3), groups=2, dilation=2), (6, 5, 9), 25 * 4 * 3 * 3),
        (nn.Conv3d(2, 3, 2), (2, 3, 3, 3), 8 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (3, 4, 4), 0),
    ],
)
def test_layers_take_what_their_formula_says(module, shape, expected):
    assert sum(layer_macs(module, torch.zeros(3, *shape)).values()) == expected


def test_attention_counts_its_four_projections():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, x):
            memory = x.new_zeros(len(x), 5, 6)
            return self.attention(x, key=memory, value=memory[..., :4])[0]

    expected = 3 * 8 * 8 + 5 * 6 * 8 + 5 * 4 * 8 + 3 * 8 * 8
    assert layer_macs(seeded(Crossed), uniform(0, 2, 3, 8)) == {"attention": expected}


@pytest.mark.parametrize("make", [convnet, narrow_resnet18], ids=["convnet", "resnet"])
def test_whole_networks_agree_with_torchs_own_count(make):
    net = make().eval()
    x = uniform(1, 1, 1, 8, 8) if make is convnet else uniform(1, 1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert 2 * network_size(net, x).macs == counter.get_total_flops()


@pytest.mark.parametrize("arch", ["resnet18-cifar", "vgg16"])
def test_what_plans_count_is_what_is_reported(arch):
    """Plans know a network's cost as a function of its units; here all of them are there, and a part of them."""
    net, x = brittle.build_model(arch, {"width": 4}), uniform(1, 2, 3, 16, 16)
    groups = channel_groups(net, x)
    kept = {group.name: torch.arange(group.units // 2 + 1) for group in groups.groups}
    for counts, network in (({}, net), ({n: len(k) for n, k in kept.items()}, remove_units(net, groups, kept, x))):
        size = network_size(network, x)
        assert channel_costs(net, groups.groups, x, "macs").total(counts) == size.macs
        assert channel_costs(net, groups.groups, x, "parameters").total(counts) == size.parameters


def test_a_layer_that_is_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    assert layer_macs(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(1, 4)) == {"0": 2 * 16}


def test_shared_parameters_count_once_and_bytes_are_those_of_the_file(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    size = network_size(net)
    assert size.parameters == 16 + 4 + 8 + 4
    assert size.macs is None
    brittle.save_state(net, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    assert size.bytes == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_the_network_comes_back_as_it_was():
    net = untidy()
    with untouched(net):
        network_size(net, uniform(2, 4, 1, 8, 8))
    with untouched(net), pytest.raises(InputError, match="x: expected samples that the network can run on"):
        network_size(net, uniform(2, 4, 3, 8, 8))
    with pytest.raises(InputError, match="at least one sample"):
        network_size(net, torch.zeros(0, 1, 8, 8))
