"""The masked form of a compressed network, as AdversarialPruningBenchmark takes it (Piras et al. 2024).

Its networks have every filter of the uncompressed architecture, zeros where filters were removed, and no
normalisation of their inputs, which lie in [0, 1]. A file is a checkpoint of torch.save with the key ``state_dict``;
the names of its ResNet-18 are those of github.com/kuangliu/pytorch-cifar.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from brittle.errors import InputError
from brittle.models.architectures.resnet import BasicBlock, CifarResNet
from brittle.models.borrow import unwrapped
from brittle.models.normalize import Normalize
from brittle.storage.files import replacing

ENDINGS = (".pt", ".pth")


def export_masked(model: nn.Module, path: str | Path) -> None:
    """Write the weights of a masked network, zeros included, for the uncompressed architecture.

    Args:
        model: The network with zeros where units were removed, as :func:`brittle.compression.mask_units` makes it; only
            read. A CIFAR ResNet-18 gets the benchmark's names; of others the names are their own.
        path: The file, ending in ``.pt`` or ``.pth``, written whole or not at all.

    Raises:
        InputError: Another ending, or a network that normalises its inputs: the benchmark's do not, and no weights of
            theirs compute the same, since a mean that is subtracted before a padded convolution is not zero at the
            border.
        OSError: Writing failed.
    """
    path, network = Path(path), unwrapped(model)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"path: expected an ending of {' or '.join(ENDINGS)}; got {path}")
    if isinstance(network, nn.Sequential) and len(network) == 2 and isinstance(network[0], Normalize):
        mean, std = network[0].mean, network[0].std
        if not (bool((mean == 0).all()) and bool((std == 1).all())):
            raise InputError(
                "model: expected a network of inputs in [0, 1] as they are, trained with --mean 0,0,0 --std 1,1,1; got "
                f"one that normalises by mean {mean.tolist()} and std {std.tolist()}"
            )
        network = network[1]
    renamed = isinstance(network, CifarResNet) and isinstance(network.layer1[0], BasicBlock)
    state = {
        benchmark_name(name) if renamed else name: tensor.detach().cpu().clone()
        for name, tensor in network.state_dict().items()
    }
    with replacing(path) as beside:
        torch.save({"state_dict": state}, beside)


def benchmark_name(name: str) -> str:
    """The benchmark's name of a tensor of :func:`brittle.models.architectures.resnet.resnet18_cifar`.

    >>> benchmark_name("layer2.0.downsample.1.weight"), benchmark_name("fc.bias")
    ('layer2.0.shortcut.1.weight', 'linear.bias')
    """
    return re.sub(r"^fc\.", "linear.", name.replace(".downsample.", ".shortcut."))
