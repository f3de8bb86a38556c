"""Networks by name: our own, torchvision's, timm's, or any function that returns an ``nn.Module``."""

from __future__ import annotations

import copy
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from brittle.errors import InputError, MissingExtra, one_line
from brittle.models.architectures.fcn import fcn, fcn_arguments
from brittle.models.architectures.resnet import resnet18_cifar, resnet_arguments, wide_resnet101_2
from brittle.models.architectures.vgg import vgg16, vgg16_arguments
from brittle.models.architectures.vit import vit, vit_arguments
from brittle.models.hugging_face import build_from_config, is_snapshot
from brittle.models.isolation import isolated_globals
from brittle.models.zoo import zoo_names

Builder = Callable[..., nn.Module]
READS_WEIGHTS = {
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
}
"""Arguments of torchvision and timm that would fetch or read weights."""
MOST, DEEPEST = 2**24, 2**12
"""Of every size, and of layers: more is a slip of the pen that would take all memory, or minutes to build."""


def build_model(
    arch: str,
    arguments: Mapping[str, object] | None = None,
    state: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    most: int | None = None,
) -> nn.Module:
    """Build a freshly initialised network on the CPU; nothing is downloaded and no weights are read.

    Swin transformers come from timm and fit small images with smaller patches and windows: for 32 x 32 pixels
    ``build_model("timm:swin_tiny_patch4_window7_224", {"img_size": 32, "patch_size": 2, "window_size": 4})``.
    torchvision's have no such arguments; they take 32 x 32 pixels, but pad all four of their stages, of 8 x 8 down
    to 1 x 1 tokens, to windows of 7 x 7.

    Args:
        arch: A name in ``ARCHITECTURES``, ``torchvision:NAME`` (a classification model), ``timm:NAME``, ``hf:FOLDER``
            (what its ``config.json`` describes, see :mod:`brittle.models.hugging_face`), or ``module:function``,
            looked up in the current directory first.
        arguments: Keyword arguments of the builder.
        state: Weights that the network is to hold later. For our own networks the arguments left out follow from
            their shapes; for all others it is not used.
        seed: Seeds the initialisation. The global random state and default dtype stay as they were.
        most: Most numbers that its parameters may have: a tensor with which they become more is refused before memory
            is taken for it. None for any number.

    Returns:
        The network, in training mode unless its builder says otherwise; of ``module:function`` a copy of what that
        returns, where it can be copied.

    Raises:
        InputError: An unknown name, an import that fails, arguments the builder refuses, a result that is no
            ``nn.Module``, a ``state`` that is not one of the named network, or more numbers than ``most``.
        MissingExtra: torchvision, timm or transformers is needed and not installed.

    >>> build_model("fcn", {"depth": 2}, {"1.weight": torch.ones(5, 4), "3.weight": torch.ones(3, 5)})[1]
    Linear(in_features=4, out_features=5, bias=False)
    """
    given = dict(arguments or {})
    build = _find_builder(arch, given)
    if state is not None:
        given = complete_arguments(arch, given, state)
    for name, value in given.items():
        largest = DEEPEST if name == "depth" else MOST
        if isinstance(value, int) and value > largest:
            raise InputError(f"{arch}: expected {name} of at most {largest}; got {value}")
    try:
        with isolated_globals(seed), _Bounded(arch, most) if most is not None else nullcontext():
            model = build(**given)
    except InputError:
        raise
    except Exception as error:  # the builder may be anyone's: whatever it raises, these arguments did not suit it
        raise InputError(
            f"{arch}: expected arguments that it can be built with; got {given}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{arch}: expected an nn.Module; got {type(model).__name__}")
    if runs_code(arch):  # the function may return one network again and again, into which weights are loaded
        with suppress(Exception):  # a module may say itself how it is copied
            model = copy.deepcopy(model)
    return model


def complete_arguments(arch: str, arguments: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, object]:
    """All arguments with which an architecture is built without its weights at hand.

    Args:
        arch: As :func:`build_model`.
        arguments: Those that were given.
        state: Weights that the others follow from.
    """
    inferred = INFERENCES[arch](state) if arch in INFERENCES else {}
    return {**inferred, **arguments}


def runs_code(arch: str) -> bool:
    """Whether an architecture is ``module:function``, which imports and calls code that is not ours."""
    return arch not in ARCHITECTURES and arch.partition(":")[0] not in ("torchvision", "timm", "hf")


def check_trusted(arch: str | None, asked: str | None, made: str) -> None:
    """Raise unless the architecture that a folder names is one of ours, or the function that its user has named.

    A folder from elsewhere could name any function, so none is called that the caller has not named.

    Args:
        arch: What the folder names.
        asked: What its user names; None for nothing.
        made: For the message: which folder is made of it, as in "runs/1 is a run".

    Raises:
        InputError: The folder names a function and ``asked`` is None, or ``asked`` is something else.
    """
    if asked not in (None, arch):
        raise InputError(f"arch: expected {arch}, of which {made}, or none; got {asked}")
    if asked is None and arch is not None and runs_code(arch):
        raise InputError(f"arch: expected {arch}, of which {made} and which is called, if you trust it; got none")


class _Bounded(TorchFunctionMode):
    """Inside, tensors may be made of so many numbers altogether."""

    MAKERS = torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn
    """What modules make their parameters with."""

    def __init__(self, arch: str, most: int) -> None:
        super().__init__()
        self.arch, self.most, self.made = arch, most, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.MAKERS:
            alike = {key: value for key, value in kwargs.items() if key not in ("generator", "out")}
            self.made += func(*args, **alike | {"device": "meta"}).numel()  # a tensor there takes no memory
            if self.made > self.most:
                raise InputError(f"{self.arch}: expected a network of at most {self.most} numbers; got one of more")
        return func(*args, **kwargs)


def _find_builder(arch: str, arguments: Mapping[str, object]) -> Builder:
    """What makes the network of that name: ours, of a library, or a function of the user's."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    source, colon, name = arch.partition(":")
    if not (source and colon and name):
        raise InputError(
            f"arch: expected one of {', '.join(ARCHITECTURES)}, torchvision:NAME, timm:NAME, hf:FOLDER or "
            f"module:function; got {arch!r}{_suggest_architecture(arch)}"
        )
    if is_snapshot(arch):
        return lambda **values: build_from_config(arch, values)
    if source not in ("torchvision", "timm"):
        return _import_builder(source, name)
    if refused := sorted(READS_WEIGHTS & set(arguments)):
        raise InputError(f"{arch}: expected no weights, which come from a file; got {', '.join(refused)}")
    return _zoo_builder(source, name)


def _zoo_builder(source: str, name: str) -> Builder:
    """A builder of torchvision or timm that reads no weights."""
    try:
        zoo = importlib.import_module(source)
    except ImportError:
        raise MissingExtra(source, "vision", f"the architecture {source}:{name}") from None
    if source == "torchvision":
        # Only classification models: the others fetch the weights of a backbone unless told not to.
        names = zoo.models.list_models(module=zoo.models)
        if name not in names:
            raise InputError(
                f"arch: expected a classification model of torchvision; got {name!r}{_suggest(name, names)}"
            )
        return partial(zoo.models.get_model, name, weights=None)
    if not zoo.is_model(name):  # true for hf-hub:... and local-dir:..., which would read from elsewhere
        raise InputError(f"arch: expected a model of timm; got {name!r}{_suggest(name, zoo.list_models())}")
    return partial(zoo.create_model, name, pretrained=False)


def _import_builder(module: str, function: str) -> Builder:
    """A function of a module, which may stand in the folder that Python was started in."""
    here = os.getcwd()
    importlib.invalidate_caches()  # the module may be younger than the last look into its folder
    sys.path.insert(0, here)
    try:
        with isolated_globals(0):  # scripts set seeds and dtypes at their top
            imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"arch: expected a module {module} that can be imported; got {one_line(error)}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(here)
    builder = getattr(imported, function, None)
    if not callable(builder):
        hint = _suggest(function, [name for name, value in vars(imported).items() if callable(value)])
        raise InputError(f"arch: expected a function of {module}; got {function!r}, which it does not have{hint}")
    return builder


def _suggest_architecture(name: str) -> str:
    """The forms in which libraries build a network of that name; where there are none, names of ours like it."""
    forms = [f"{source}:{name}" for source in ("torchvision", "timm") if name in zoo_names(source)]
    return f"; did you mean {' or '.join(forms)}?" if forms else _suggest(name, ARCHITECTURES)


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names))
    return f"; did you mean {' or '.join(close)}?" if close else ""


ARCHITECTURES: dict[str, Builder] = {
    "fcn": fcn,
    "resnet18-cifar": resnet18_cifar,
    "wide-resnet101-2": wide_resnet101_2,
    "vgg16": vgg16,
    "vit": vit,
}
INFERENCES: dict[str, Callable[[Mapping[str, Tensor]], dict[str, object]]] = {
    "fcn": fcn_arguments,
    "resnet18-cifar": partial(resnet_arguments, arch="resnet18-cifar"),
    "wide-resnet101-2": partial(resnet_arguments, arch="wide-resnet101-2"),
    "vgg16": vgg16_arguments,
    "vit": vit_arguments,
}
"""For our own networks, the arguments that follow from the shapes of their weights."""
