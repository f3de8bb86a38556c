"""Networks side by side: audited alike, on the same samples, with what each costs in size and time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from brittle.auditing.run import audit
from brittle.data.batches import DataLike, batches_of
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.models.borrow import device_of, frozen, unwrapped
from brittle.models.forward import logits_of
from brittle.models.intake import with_logits
from brittle.models.latency import latency
from brittle.models.macs import network_size
from brittle.progress import Progress, silent
from brittle.results import Audit, ComparedNetwork, Comparison, NotMeasured
from brittle.results.comparison import check_alike, paired_verdicts


def compare(
    models: Sequence[nn.Module | Audit],
    data: DataLike | None = None,
    threat: Threat = Threat("fast"),
    *,
    names: Sequence[str] | None = None,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    input_shape: Sequence[int] | None = None,
    execution: Execution = Execution(),
) -> Comparison:
    """Audit networks at the same settings, on the same samples, and put them beside the first.

    Every network gets a whole :func:`brittle.audit` with the same seeds. Samples are paired: which ones each network
    loses and wins, clean, under attack and proven, with exact McNemar tests. Layers stand side by side by name.
    Parameters, multiply-accumulates, bytes and, with data, the time of a pass are measured of all networks in one run.

    Args:
        models: At least two: networks (left bit-equal), and audits of other networks that were made before.
        data: As :func:`brittle.audit`, but read once for every network: no iterator. Without data only weights are
            compared.
        threat: As :func:`brittle.audit`.
        names: What to call them, all different; by default their class names or, of audits, the model's.
        p: As :func:`brittle.audit`.
        eps: As :func:`brittle.audit`.
        input_shape: As :func:`brittle.audit`.
        execution: As :func:`brittle.audit`; one folder to resume from serves all networks.

    Returns:
        The networks in their order. The order changes none of their numbers, only what they are compared with.

    Raises:
        InputError: As :func:`brittle.audit`; or networks with other inputs or numbers of classes than the first; audits
            of other data, norms or budgets; fewer than two networks; names that are not all different.
    """
    started = time.perf_counter()
    called, progress = _names_of(models, names), execution.progress or silent
    named = list(zip(called, models, strict=True))
    networks = {name: unwrapped(model) for name, model in named if isinstance(model, nn.Module)}
    sample = _first_sample(data) if networks else None
    networks = _check_classes(networks, sample)
    audits: list[tuple[str, Audit]] = []
    for name, given in named:
        if isinstance(given, nn.Module):
            told = replace(execution, progress=_told_of(name, progress))
            given = audit(given, data, threat, p=p, eps=eps, input_shape=input_shape, name=name, execution=told)
        audits.append((name, given))
        check_alike(audits)
    x = sample[0] if sample is not None else torch.zeros(1, *input_shape) if input_shape else None
    sizes = {name: network_size(network, x) for name, network in networks.items()}
    device = str(device_of(next(iter(networks.values())))) if networks else ""
    times = () if sample is None else latency(networks, sample[0].shape[1:], device=device, progress=progress)
    first = audits[0][1]
    compared = [
        ComparedNetwork(name, own, sizes.get(name), paired_verdicts(first.norms, own.norms) if number else ())
        for number, (name, own) in enumerate(audits)
    ]
    return Comparison(
        networks=tuple(compared),
        latency=times,
        not_measured=tuple(_missing(compared, with_times=bool(times))),
        seconds=time.perf_counter() - started,
    )


def _names_of(models: Sequence[nn.Module | Audit], names: Sequence[str] | None) -> list[str]:
    """A name for every network, all different."""
    if len(models) < 2:
        raise InputError(f"models: expected at least two networks; got {len(models)}")
    if kinds := [type(model).__name__ for model in models if not isinstance(model, nn.Module | Audit)]:
        raise InputError(f"models: expected networks (nn.Module) and audits; got {kinds[0]}")
    if names is not None:
        if len(names) != len(models) or len(set(names)) != len(names) or not all(names):
            raise InputError(f"names: expected {len(models)} different names; got {list(names)}")
        return list(names)
    found = [model.model if isinstance(model, Audit) else type(unwrapped(model)).__name__ for model in models]
    repeated = {name for name, count in Counter(found).items() if count > 1}
    return [f"{name} ({number})" if name in repeated else name for number, name in enumerate(found, 1)]


def _first_sample(data: DataLike | None) -> tuple[Tensor, Tensor] | None:
    """One sample and its label; None without data."""
    if data is None:
        return None
    if isinstance(data, Iterator):
        raise InputError(f"data: expected what can be read once for every network; got {type(data).__name__}")
    with torch.random.fork_rng(devices=[]):  # a loader that shuffles comes in the same order for every network
        x, y, _ = next(iter(batches_of(data, 1)), (None, None, None))
    if x is None or y is None or not len(x):
        raise InputError("data: expected at least one sample; got none")
    return x[:1], y[:1]


def _check_classes(networks: Mapping[str, nn.Module], sample: tuple[Tensor, Tensor] | None) -> dict[str, nn.Module]:
    """The networks as ones that answer with logits, where there is a sample to see that by.

    Raises:
        InputError: They cannot run on the data, or have different numbers of classes: before any is attacked.
    """
    if sample is None:
        return dict(networks)
    classes, answering = {}, {}
    for name, network in networks.items():
        x, y = (tensor.to(device_of(network)) for tensor in sample)
        with frozen(network):
            try:
                answering[name] = with_logits(network, x)[0]
                classes[name] = logits_of(answering[name], x, y).shape[1]
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
    if len(set(classes.values())) > 1:
        found = " and ".join(f"{count} ({name})" for name, count in classes.items())
        raise InputError(f"models: expected networks with the same number of classes; got {found}")
    return {name: network for name, network in answering.items() if isinstance(network, nn.Module)}


def _told_of(name: str, progress: Progress) -> Progress:
    """Progress whose stages begin with a network's name."""

    def told(stage: str, done: int, total: int | None) -> None:
        progress(f"{name}: {stage}", done, total)

    return told


def _missing(networks: Sequence[ComparedNetwork], *, with_times: bool) -> Iterator[NotMeasured]:
    """What of the comparison was not measured."""
    for network in networks[1:]:
        if not network.paired:
            reason = "an audit was read without its samples" if network.evaluations else "no data given"
            yield NotMeasured(f"samples that {network.name} loses and wins", reason)
    for network in networks:
        if network.size is None:
            yield NotMeasured(f"size and latency of {network.name}", "its audit was read, without the network")
        elif network.size.macs is None:
            yield NotMeasured(f"multiply-accumulates of {network.name}", "no data and no input_shape given")
    if not with_times:
        yield NotMeasured("latency", "no data given, or no network at hand")
