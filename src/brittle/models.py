"""Networks by name: two of our own, torchvision's, timm's, or any function that returns an ``nn.Module``."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

import torch
from torch import Tensor, nn

from brittle.errors import InputError, MissingExtra

Builder = Callable[..., nn.Module]
FORBIDDEN = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
"""Arguments of torchvision and timm that would fetch or read weights."""


class Normalize(nn.Module):
    r"""Per-channel normalisation as the first layer, so that attacks see inputs in [0, 1].

    .. math:: y_{n,c,\dots} = (x_{n,c,\dots} - \mathrm{mean}_c) / \mathrm{std}_c

    Attributes:
        mean: Buffer ``(C,)``, in units of the input.
        std: Buffer ``(C,)``, in units of the input, positive.

    >>> Normalize([0.5], [0.25])(torch.tensor([[1.0]]))
    tensor([[2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take one mean and one standard deviation per channel.

        Raises:
            InputError: They differ in number, there is none, one is not finite, or a ``std`` is not positive.
        """
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise InputError(f"mean and std must hold one number per channel; got {len(mean)} and {len(std)}")
        self.channels = len(mean)
        self.register_buffer("mean", torch.tensor([float(v) for v in mean]))
        self.register_buffer("std", torch.tensor([float(v) for v in std]))
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise InputError(f"mean must be finite and std finite and positive; got {list(mean)} and {list(std)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, ...)``; raises RuntimeError for another number of channels."""
        last = torch.unflatten(x.movedim(1, -1), -1, (self.channels,))  # refuses to broadcast one channel to C
        return torch.movedim((last - self.mean) / self.std, -1, 1)


def fcn(
    in_features: int = 784, width: int = 400, depth: int = 3, classes: int = 10, bias: bool = False
) -> nn.Sequential:
    """Build a fully connected ReLU network: flatten, ``depth - 1`` hidden layers, linear head.

    Args:
        in_features: Numbers in one input, after flattening.
        width: Neurons of each hidden layer.
        depth: Linear layers, the head included.
        classes: Logits.
        bias: Whether the linear layers have biases; the networks of arXiv 2507.17725 have none.

    Returns:
        A plain sequence that maps ``(N, ...)`` to logits ``(N, classes)``.

    Raises:
        InputError: A size is not a positive integer.

    >>> [type(layer).__name__ for layer in fcn(depth=2)]
    ['Flatten', 'Linear', 'ReLU', 'Linear']
    """
    _check_sizes(in_features=in_features, width=width, depth=depth, classes=classes)
    sizes = [in_features, *[width] * (depth - 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes, bias=bias))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation and a shortcut (He et al. 2016), ``(N, C, H, W)``."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H/stride, W/stride)``, rounded up."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.downsample(x))
        return out


class CifarResNet18(nn.Module):
    """ResNet-18 for small images: a 3 x 3 stem with stride 1, no max pooling; see :func:`resnet18_cifar`."""

    def __init__(self, classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to logits ``(N, classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1))


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
    _check_sizes(classes=classes, width=width, in_channels=in_channels)
    return CifarResNet18(classes, width, in_channels)


def build_model(
    arch: str,
    arguments: Mapping[str, object] | None = None,
    state: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """Build a freshly initialised network on the CPU; nothing is downloaded and no weights are read.

    Args:
        arch: A name in ``ARCHITECTURES``, ``torchvision:NAME`` (a classification model), ``timm:NAME``, or
            ``module:function``, looked up in the current directory first.
        arguments: Keyword arguments of the builder.
        state: Weights that the network is to hold later. For our own networks the arguments left out follow from
            their shapes; for all others it is not used.
        seed: Seeds the initialisation. The global random state and default dtype stay as they were.

    Returns:
        The network, in training mode unless its builder says otherwise.

    Raises:
        InputError: An unknown name, an import that fails, arguments the builder refuses, a result that is no
            ``nn.Module``, or a ``state`` that is not one of the named network.
        MissingExtra: torchvision or timm is needed and not installed.

    >>> build_model("fcn", {"depth": 2}, {"1.weight": torch.ones(5, 4), "3.weight": torch.ones(3, 5)})[1]
    Linear(in_features=4, out_features=5, bias=False)
    """
    given = dict(arguments or {})
    build = _find_builder(arch, given)
    if state is not None and arch in INFERENCES:
        given = {**INFERENCES[arch](state), **given}
    try:
        with _own_globals(seed):
            model = build(**given)
    except InputError:
        raise
    except Exception as error:  # the builder may be anyone's: whatever it raises, these arguments did not suit it
        raise InputError(f"{arch} cannot be built with the arguments {given}: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{arch} must return an nn.Module; got {type(model).__name__}")
    return model


def _find_builder(arch: str, arguments: Mapping[str, object]) -> Builder:
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    source, colon, name = arch.partition(":")
    if not (source and colon and name):
        raise InputError(
            f"arch must be one of {', '.join(ARCHITECTURES)}, torchvision:NAME, timm:NAME or module:function; "
            f"got {arch!r}{_suggestion(arch, ARCHITECTURES)}"
        )
    if source not in ("torchvision", "timm"):
        return _imported(source, name)
    if refused := sorted(FORBIDDEN & set(arguments)):
        raise InputError(f"{arch} is built without weights, which come from a file; remove {', '.join(refused)}")
    return _torchvision_builder(name) if source == "torchvision" else _timm_builder(name)


def _torchvision_builder(name: str) -> Builder:
    try:
        import torchvision
    except ImportError:
        raise MissingExtra("torchvision", "vision", f"the architecture torchvision:{name}") from None
    # Only classification models: the others fetch the weights of a backbone unless told not to.
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(f"torchvision has no classification model {name!r}{_suggestion(name, names)}")
    return lambda **arguments: torchvision.models.get_model(name, weights=None, **arguments)


def _timm_builder(name: str) -> Builder:
    try:
        import timm
    except ImportError:
        raise MissingExtra("timm", "vision", f"the architecture timm:{name}") from None
    if not timm.is_model(name):  # true for hf-hub:... and local-dir:..., which would read from elsewhere
        raise InputError(f"timm has no model {name!r}{_suggestion(name, timm.list_models())}")
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


def _imported(module: str, function: str) -> Builder:
    here = os.getcwd()
    importlib.invalidate_caches()  # the module may be younger than the last look into its folder
    sys.path.insert(0, here)
    try:
        with _own_globals(0):  # scripts set seeds and dtypes at their top
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"arch {module}:{function}: importing it failed: {_reason(error)}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(here)
    builder = getattr(found, function, None)
    if not callable(builder):
        hint = _suggestion(function, [name for name, value in vars(found).items() if callable(value)])
        raise InputError(f"arch {module}:{function}: {module} has no function {function!r}{hint}")
    return builder


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names))
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _reason(error: BaseException) -> str:
    """Describe an error of foreign code in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _own_globals(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers inside and put back, at the end, all random states and the default dtype."""
    dtype = torch.get_default_dtype()
    devices = range(len(torch.cuda.default_generators))  # none before CUDA is in use
    try:
        with torch.random.fork_rng(devices=devices), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
            yield
    finally:
        torch.set_default_dtype(dtype)


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{name} must be a positive integer; got {size!r}")


def _fcn_arguments(state: Mapping[str, Tensor]) -> dict[str, object]:
    found = {int(m[1]): state[m[0]] for m in (re.fullmatch(r"(\d+)\.weight", key) for key in state) if m}
    weights = [found[index] for index in sorted(found)]
    if not found or sorted(found) != list(range(1, 2 * len(found), 2)) or any(w.ndim != 2 for w in weights):
        raise InputError(f"state is not one of fcn: expected matrices 1.weight, 3.weight, ...; {_got(state)}")
    return {
        "in_features": weights[0].shape[1],
        "width": weights[0].shape[0],
        "depth": len(weights),
        "classes": weights[-1].shape[0],
        "bias": "1.bias" in state,
    }


def _resnet18_arguments(state: Mapping[str, Tensor]) -> dict[str, object]:
    stem, head = state.get("conv1.weight"), state.get("fc.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 2:
        expected = "a kernel conv1.weight and a matrix fc.weight"
        raise InputError(f"state is not one of resnet18-cifar: expected {expected}; {_got(state)}")
    return {"classes": head.shape[0], "width": stem.shape[0], "in_channels": stem.shape[1]}


def _got(state: Mapping[str, Tensor]) -> str:
    shapes = [f"{key} {tuple(tensor.shape)}" for key, tensor in list(state.items())[:3]]
    return f"got {', '.join(shapes) or 'nothing'}{', ...' if len(state) > 3 else ''}"


ARCHITECTURES: dict[str, Builder] = {"fcn": fcn, "resnet18-cifar": resnet18_cifar}
INFERENCES: dict[str, Callable[[Mapping[str, Tensor]], dict[str, object]]] = {
    "fcn": _fcn_arguments,
    "resnet18-cifar": _resnet18_arguments,
}
"""For our own networks, the arguments that follow from the shapes of their weights."""
