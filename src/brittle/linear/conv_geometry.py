"""How a convolution module walks over its input, read from the module without guessing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from brittle.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution walks over its input; one entry per spatial axis.

    Attributes:
        stride: Steps.
        padding: Entries added (before, after).
        dilation: Distances between taps.
        groups: Groups of channels.
        mode: ``zeros``, ``circular``, ``reflect`` or ``replicate``.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    mode: str = "zeros"

    @staticmethod
    def of(module: nn.Module) -> ConvGeometry:
        """The geometry of a stock ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``."""
        if not isinstance(module, CONVOLUTIONS):
            raise InputError(f"module: expected a Conv1d, Conv2d or Conv3d; got {type(module).__name__}")
        padding = module.padding
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            widths = tuple((total // 2, total - total // 2) for total in totals)
        else:
            before = [0] * len(module.kernel_size) if padding == "valid" else padding
            widths = tuple((int(width), int(width)) for width in before)
        return ConvGeometry(
            tuple(module.stride), widths, tuple(module.dilation), module.groups, mode=module.padding_mode
        )

    def spans(self, kernel: Sequence[int]) -> list[int]:
        """Distance between a kernel's first and last tap, per axis."""
        return [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]

    def size_after(self, kernel: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the result on an input of this size; below 1 where the kernel does not fit."""
        axes = zip(size, self.padding, self.spans(kernel), self.stride, strict=True)
        return tuple((n + sum(pad) - span - 1) // step + 1 for n, pad, span, step in axes)

    def check_size(self, kernel: Sequence[int], size: Sequence[int]) -> None:
        """Raise unless the kernel and the padding fit an input of this size.

        Raises:
            InputError: They do not.
        """
        if len(size) != len(kernel):
            raise InputError(f"size: expected {len(kernel)} numbers, one an axis; got {tuple(size)}")
        widest = [max(pair) + (self.mode == "reflect") for pair in self.padding]
        if self.mode in ("reflect", "circular") and any(w > n for w, n in zip(widest, size, strict=True)):
            raise InputError(f"size: expected an input that {self.mode} padding fits; got {tuple(size)}")
        padded = [n + sum(pad) for n, pad in zip(size, self.padding, strict=True)]
        if any(n <= span for n, span in zip(padded, self.spans(kernel), strict=True)):
            raise InputError(f"size: expected an input at least as large as the kernel; got {tuple(size)}")

    # --- the convolution as rows of a circular one ----------------------------------------------------------------

    def embeds(self, kernel: Sequence[int]) -> bool:
        """Whether the operator's rows are distinct rows of a circular convolution."""
        if self.mode == "zeros":
            return True
        fits = all(sum(pad) <= span for pad, span in zip(self.padding, self.spans(kernel), strict=True))
        return self.mode == "circular" and fits

    def size_free(self, kernel: Sequence[int]) -> bool:
        """Whether counts per pixel and symbols bound the operator on images of every size."""
        return self.embeds(kernel) and (self.mode == "zeros" or max(self.stride) == 1)

    def torus(self, size: Sequence[int], *, polyphase: bool) -> tuple[list[int], ConvGeometry]:
        """Points per axis of the torus that holds an image, and how the convolution whose symbol is taken walks."""
        walk = self if polyphase else replace(self, stride=tuple(1 for _ in self.stride))
        axes = list(zip(size, self.padding, walk.stride, strict=True))
        if self.mode == "circular":
            return [n // s for n, _, s in axes], walk
        if polyphase:
            return [-(-(n + sum(pad)) // s) + 1 for n, pad, s in axes], walk
        return [n + max(pad) for n, pad, _ in axes], walk

    def coarse_grid(self, kernel: Sequence[int], oversampling: int) -> list[int]:
        """Points per axis at which the symbol is sampled for images of any size."""
        degrees = [span // s for span, s in zip(self.spans(kernel), self.stride, strict=True)]
        return [max(oversampling * degree, 1) for degree in degrees]


def is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this kind and computes what the kind's own ``forward`` computes, without hooks."""
    methods = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    plain = all(getattr(type(module), name, None) is getattr(kind, name) for name in methods)
    return isinstance(module, kind) and plain and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether forward hooks may change what the module reads or yields."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def conv_geometry(module: nn.Module) -> ConvGeometry | None:
    """The geometry of a convolution module; None when its ``forward`` is not understood.

    A subclass with a ``forward`` of its own (static "same" padding, for example) is understood when tracing shows
    that it pads its input with zeros and convolves it with its own weight.
    """
    if any(is_stock(module, kind) for kind in CONVOLUTIONS):
        return ConvGeometry.of(module)
    if has_hooks(module):
        return None
    try:
        nodes = list(fx.Tracer().trace(module).nodes)
    except Exception:  # tracing runs the user's forward, which may raise anything; then nothing is known of it
        return None
    steps = [node for node in nodes if node.op.startswith("call")]
    padding = _zero_padding(module, steps[0]) if steps else None
    convolutions = steps if padding is None else steps[1:]
    if len(convolutions) != 1 or convolutions[0].target not in _FUNCTIONAL:
        return None
    chain = [node for node in nodes if node.op == "placeholder"][:1] + steps + [nodes[-1]]
    if any(not later.args or later.args[0] is not earlier for earlier, later in itertools.pairwise(chain)):
        return None
    return _traced_geometry(convolutions[0], padding or (), _FUNCTIONAL[convolutions[0].target])


_FUNCTIONAL: dict[object, int] = {
    F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3
}  # fmt: skip


def _zero_padding(module: nn.Module, node: fx.Node) -> tuple[int, ...] | None:
    """Widths (last axis first) added by a node that only pads with zeros; None for any other node."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        if isinstance(child, nn.Identity):
            return ()
        if isinstance(child, nn.ZeroPad1d | nn.ZeroPad2d | nn.ZeroPad3d):
            return tuple(child.padding)
    if node.target is F.pad and len(node.args) == 2:
        constant = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
        widths = node.args[1]
        if constant and isinstance(widths, tuple | list) and all(isinstance(width, int) for width in widths):
            return tuple(width for width in widths if isinstance(width, int))
    return None


def _traced_geometry(node: fx.Node, widths: tuple[int, ...], axes: int) -> ConvGeometry | None:
    """The geometry of a traced functional convolution of the module's own weight; None if anything is variable."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight = call.get("weight")
    if not isinstance(weight, fx.Node) or (weight.op, weight.target) != ("get_attr", "weight"):
        return None
    steps = [
        _per_axis(call.get(name, default), axes) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    groups = call.get("groups", 1)
    if None in steps or not isinstance(groups, int):
        return None
    stride, inner, dilation = (step or () for step in steps)
    if min(widths, default=0) < 0 or len(widths) > 2 * axes:
        return None
    outer = [*widths, *[0] * (2 * axes - len(widths))]
    before, after = outer[0::2][::-1], outer[1::2][::-1]
    padding = tuple((b + i, a + i) for b, a, i in zip(before, after, inner, strict=True))
    return ConvGeometry(stride, padding, dilation, groups)


def _per_axis(value: object, axes: int) -> tuple[int, ...] | None:
    values = value if isinstance(value, tuple | list) else (value,) * axes
    return tuple(v for v in values if isinstance(v, int)) if all(isinstance(v, int) for v in values) else None
