"""Residual networks in CIFAR form: torchvision's blocks and names, a 3 x 3 stem with stride 1, no max pooling."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from brittle.models.architectures.checks import check_sizes, kernel_and_head


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation and a shortcut (He et al. 2016), ``(N, C, H, W)``."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H/stride, W/stride)``, rounded up."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.downsample(x))
        return out


class WideBottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, the inner two twice as wide as in He et al. (2016): torchvision's form.

    The stride is in the 3 x 3 convolution; ``channels`` become ``2 channels`` inside and ``4 channels`` at the end.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        inside, out = 2 * channels, self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inside, inside, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inside, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(in_channels, out, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, 4 channels, H/stride, W/stride)``, rounded up."""
        inside = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        out: Tensor = self.relu3(self.bn3(self.conv3(inside)) + self.downsample(x))
        return out


class CifarResNet(nn.Module):
    """Stem, four stages of blocks, mean over the positions, linear head; from the second on, a stage halves the image.

    See :func:`resnet18_cifar` and :func:`wide_resnet101_2`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[WideBottleneck],
        blocks: tuple[int, int, int, int],
        classes: int,
        width: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, blocks[0], width, width, 1)
        self.layer2 = _stage(block, blocks[1], width * block.expansion, 2 * width, 2)
        self.layer3 = _stage(block, blocks[2], 2 * width * block.expansion, 4 * width, 2)
        self.layer4 = _stage(block, blocks[3], 4 * width * block.expansion, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to logits ``(N, classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock] | type[WideBottleneck], number: int, in_channels: int, channels: int, stride: int
) -> nn.Sequential:
    rest = [block(channels * block.expansion, channels, 1) for _ in range(number - 1)]
    return nn.Sequential(block(in_channels, channels, stride), *rest)


def resnet18_cifar(classes: int = 10, width: int = 64, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR form of ResNet-18 (He et al. 2016): four stages of two blocks, parameters named as torchvision's.

    Args:
        classes: Logits.
        width: Channels of the stem and the first stage; the next three have 2, 4 and 8 times as many.
        in_channels: Channels of the images.

    Returns:
        A network from ``(N, in_channels, H, W)`` to logits ``(N, classes)``; ``torch.fx`` can trace it.

    Raises:
        InputError: A size is not a positive integer.
    """
    check_sizes(classes=classes, width=width, in_channels=in_channels)
    return CifarResNet(BasicBlock, (2, 2, 2, 2), classes, width, in_channels)


def wide_resnet101_2(classes: int = 10, width: int = 64, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR form of torchvision's Wide ResNet-101-2 (Zagoruyko and Komodakis 2016).

    Four stages of 3, 4, 23 and 3 bottleneck blocks whose inner convolutions are twice as wide as ResNet-101's;
    parameters are named as torchvision's.

    Args:
        classes: Logits.
        width: Channels of the stem, torchvision's 64. Stage i = 0 ... 3 has ``2^i * 2 width`` channels inside its
            blocks and ``2^i * 4 width`` after them.
        in_channels: Channels of the images.

    Returns:
        A network from ``(N, in_channels, H, W)`` to logits ``(N, classes)``; ``torch.fx`` can trace it.

    Raises:
        InputError: A size is not a positive integer.
    """
    check_sizes(classes=classes, width=width, in_channels=in_channels)
    return CifarResNet(WideBottleneck, (3, 4, 23, 3), classes, width, in_channels)


def resnet_arguments(state: Mapping[str, Tensor], arch: str) -> dict[str, object]:
    """The arguments of either builder that fit the shapes in ``state``; raises InputError where none do."""
    stem, head = kernel_and_head(state, arch, "conv1.weight", "fc.weight")
    return {"classes": head.shape[0], "width": stem.shape[0], "in_channels": stem.shape[1]}
