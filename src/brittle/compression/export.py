"""Networks in forms that run without Brittle: torch.export and ONNX, written only if they compute the same."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from brittle.errors import InputError, MissingExtra, one_line
from brittle.models.borrow import copy_unshared, unwrapped, zero_like
from brittle.storage.files import replacing

TOLERANCE = 1e-4
"""By how much outputs may differ, relative to the largest output."""
Run = Callable[[Tensor], Tensor]


def export_program(model: nn.Module, x: Tensor, path: str | Path) -> float:
    """Write a network as a program of ``torch.export``; ``torch.export.load(path).module()`` runs it.

    Args:
        model: Left bit-equal; exported in evaluation mode, on the CPU, in its own type.
        x: Samples ``(N, ...)``, at least one; the program takes any number of samples of this shape.
        path: The file, ending in ``.pt2``.

    Returns:
        The largest difference to the network's outputs on ``x``, relative to the largest output; at most
        :data:`TOLERANCE`.

    Raises:
        InputError: Another ending, no sample, a network that torch.export cannot follow for every number of samples,
            or outputs that differ; nothing is written.
        OSError: Writing failed.
    """

    def write(network: nn.Module, example: Tensor, beside: Path) -> None:
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=_any_number()), beside)

    def read(beside: Path) -> Run:
        return torch.export.load(beside).module()

    return _export(model, x, Path(path), ".pt2", write, read)


def export_onnx(model: nn.Module, x: Tensor, path: str | Path) -> float:
    """Write a network as ONNX, with inputs ``x`` and outputs ``logits``; what it computes is checked by onnxruntime.

    Args:
        model: As :func:`export_program`.
        x: Likewise.
        path: The file, ending in ``.onnx``.

    Returns:
        As :func:`export_program`.

    Raises:
        MissingExtra: A package of the extra ``export`` is not installed.
        InputError: As :func:`export_program`, or an operation that ONNX or onnxruntime does not have.
        OSError: Writing failed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtra(package, "export", "ONNX") from None
    import onnxruntime

    def write(network: nn.Module, example: Tensor, beside: Path) -> None:
        torch.onnx.export(
            network, (example,), str(beside), input_names=["x"], output_names=["logits"], dynamo=True,
            dynamic_shapes=_any_number(), external_data=False, verbose=False,
        )  # fmt: skip

    def read(beside: Path) -> Run:
        session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(session.run(None, {"x": inputs.numpy()})[0])

    return _export(model, x, Path(path), ".onnx", write, read)


def relative_gap(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference of outputs, relative to the largest expected one; infinite for another shape or NaN."""
    if outputs.shape != expected.shape:
        return float("inf")
    gap = (outputs.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300)
    return float(gap.nan_to_num(torch.inf))


def _any_number() -> tuple[dict[int, object]]:
    """That the first axis of the input has any length."""
    return ({0: torch.export.Dim("samples")},)


def _export(
    model: nn.Module,
    x: Tensor,
    path: Path,
    ending: str,
    write: Callable[[nn.Module, Tensor, Path], None],
    read: Callable[[Path], Run],
) -> float:
    """Write, read again, and compare on all samples and on the first alone; the file appears only if all is well."""
    if path.suffix.lower() != ending:
        raise InputError(f"path: expected the ending {ending}; got {path}")
    if len(x) == 0:
        raise InputError("x: expected at least one sample; got none")
    network = copy_unshared(unwrapped(model), model).cpu().eval().requires_grad_(False)
    x = x.to(zero_like(network))
    try:
        with torch.no_grad():
            expected = network(x)
    except Exception as error:  # of the user's network: whatever it raises, this input does not suit it
        raise InputError(f"x: expected samples that the network can run on; got {one_line(error)}") from error
    with replacing(path) as beside:
        try:
            with warnings.catch_warnings(), torch.no_grad():  # of what the exporters will do one day
                warnings.simplefilter("ignore")
                write(network, torch.cat([x, x])[:2], beside)  # of one sample alone, a fixed number would be made
                run = read(beside)
                gap = max(relative_gap(run(x), expected), relative_gap(run(x[:1]), expected[:1]))
        except OSError:
            raise
        except Exception as error:  # whatever the exporters raise, they could not follow this network
            raise InputError(f"model: expected a network that {ending} can hold; got {one_line(error):.400}") from error
        if gap > TOLERANCE:
            raise InputError(
                f"model: expected a network whose outputs {ending} keeps within {TOLERANCE:g} of the largest; got "
                f"{gap:.2g} on {len(x)} samples"
            )
    return gap
