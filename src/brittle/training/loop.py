"""One training loop for every intervention; interrupted, it goes on bit for bit where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.data.load import Data
from brittle.errors import InputError
from brittle.models.borrow import frozen
from brittle.models.checkpoints import save_state
from brittle.random_streams import generator
from brittle.training.adversarial import adversarial, mixed
from brittle.training.batches import Batches
from brittle.training.history import (
    EpochRow,
    LayerRow,
    epoch_row,
    layer_row,
    lipschitz,
    measured_layers,
    write_history,
)
from brittle.training.hosts import Host, Tell, check_host, launched
from brittle.training.interventions.assembly import Penalty, named_constraint, named_penalties, optimizer_of
from brittle.training.interventions.nuclear import RefreshedNuclearNorm
from brittle.training.interventions.proximal import Shrinkage
from brittle.training.jobs import Constraint, Job, prepared
from brittle.training.recipe import Recipe
from brittle.training.snapshots import (
    Tensors,
    optimizer_tensors,
    read_snapshot,
    remove_snapshot,
    restore_optimizer,
    under_prefix,
    with_prefix,
    write_snapshot,
)

WEIGHTS = "weights.safetensors"
STEP_SEEDS, VALIDATION_KEYS = 1 << 40, 4
FEWEST = 8
"""A last batch of fewer samples is left out: batch norms need some, however many processes share it."""
SPOKEN = 0.2
"""Seconds between two reports of progress."""
SAVED = 60.0
"""Seconds between two states written within an epoch."""
TOGETHER = 20
"""Steps after which several processes ask each other whether that time has come."""


@dataclass(frozen=True)
class Moment:
    """How far a training is.

    Attributes:
        epoch: The current one, from 1.
        epochs: At most.
        step: Steps of this epoch that are done.
        steps: Steps an epoch.
        loss: Mean training loss of this epoch so far, in nats.
        accuracy: Share of its samples that were right, as they were used.
        samples_per_second: Training samples.
        row: The epoch's row, once it is over.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    samples_per_second: float
    row: EpochRow | None = None


@dataclass(frozen=True, eq=False)
class Training:
    """A trained network and how it got there.

    Attributes:
        model: The network with the selected weights, on the CPU, in evaluation mode.
        epoch: After which epoch they were taken, from 1.
        epochs: One row an epoch.
        layers: One row a layer and measurement.
    """

    model: nn.Module
    epoch: int
    epochs: tuple[EpochRow, ...]
    layers: tuple[LayerRow, ...]


def train(
    model: nn.Module,
    data: Data | tuple[Tensor, Tensor],
    recipe: Recipe | None = None,
    *,
    validation: Data | tuple[Tensor, Tensor] | None = None,
    penalties: Sequence[tuple[Penalty, float]] = (),
    constraints: Sequence[Constraint] = (),
    folder: str | Path | None = None,
    device: str = "cpu",
    processes: int = 1,
    tell: Tell | None = None,
) -> Training:
    r"""Train a copy of a network.

    Minimised is the mean cross-entropy plus every penalty times its strength; after every step of the optimiser, and
    once before the first (but for shrinkages), the constraints are applied. The order of the samples, crops, attacks
    and dropout follow from the recipe's seed alone, so on the CPU a run that was interrupted, even killed, and is
    started again on its folder ends with bit for bit the weights of an uninterrupted one.

    Args:
        model: The network to start from, inputs ``(N, ...)`` in [0, 1] to logits ``(N, classes)``; left bit-equal.
        data: Training samples, or inputs and labels.
        recipe: Everything that decides the result; the defaults of :class:`Recipe` without one.
        validation: Samples to select the weights by, in place of the recipe's share of the training samples.
        penalties: Further penalties with their strengths, any function of the model to a scalar.
        constraints: Further constraints: functions of the model that return what is to be called after a step.
        folder: Where the history (``history.csv``, ``layers.csv``, both as Parquet too), the weights
            (``weights.safetensors``) and, until the end, the state to go on from are kept; None keeps nothing. What a
            finished training left there is replaced. ``penalties`` and ``constraints`` given here are not compared
            with those of the state.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        processes: Processes that share every batch (Lightning Fabric, extra ``multi``); gradients are those of
            the whole batch, batch norms see a process's own share. Give only functions that can be pickled.
        tell: Called with a :class:`Moment` a few times a second and at the end of every epoch.

    Returns:
        The trained copy and its history.

    Raises:
        InputError: Data that are no labelled inputs in [0, 1], a model that cannot run on them, an unknown penalty or
            constraint, a folder that holds the state of another training, or a loss that is no longer finite.
        MissingExtra: Lightning is needed and not installed.
    """
    job = prepared(
        model, data, recipe, validation=validation, penalties=penalties, constraints=constraints, folder=folder
    )
    check_host(processes, job.recipe.precision, job.recipe.batch_size)
    return run_job(job, device=device, processes=processes, tell=tell)


def run_job(job: Job, *, device: str = "cpu", processes: int = 1, tell: Tell | None = None) -> Training:
    """Run what :func:`brittle.training.jobs.prepared` has checked; arguments and result as :func:`train`."""
    return launched(_work, job, device=device, processes=processes, precision=job.recipe.precision, tell=tell)


@dataclass
class _Progress:
    """Where a training stands; goes into a state as it is."""

    epoch: int = 0
    step: int = 0
    waited: int = 0
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    seconds: float = 0.0
    epochs: list[EpochRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    @staticmethod
    def read(plain: dict[str, Any]) -> _Progress:
        found = _Progress(**plain)
        counts = found.epoch, found.step, found.waited, found.best_epoch
        if not all(isinstance(count, int) and count >= 0 for count in counts) or len(plain["epochs"]) != found.epoch:
            raise ValueError("its progress is no progress")
        found.best = None if found.best is None else (found.best[0], found.best[1])
        found.epochs = [epoch_row(row) for row in plain["epochs"]]
        found.layers = [layer_row(row) for row in plain["layers"]]
        return found


def _work(host: Host, job: Job, tell: Tell | None) -> Training:
    """The training, in each of its processes."""
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _Run(host, job, tell).through()


class _Run:
    """One training: model, optimiser and data where they are trained, and how far it is."""

    def __init__(self, host: Host, job: Job, tell: Tell | None) -> None:
        self.host, self.recipe, self.folder = host, job.recipe, job.folder
        self.tell = tell or (lambda moment: None)
        recipe, device = job.recipe, host.device
        self.identity = job.identity
        self.batches = Batches.of(
            job.inputs.to(device), job.labels.to(device), recipe.batch_size, fewest=max(FEWEST, 2 * host.world),
            seed=recipe.seed, crop=recipe.crop, flip=recipe.flip,
        )  # fmt: skip
        self.held = None if job.held is None else tuple(t.to(device) for t in job.held)
        self.module = copy.deepcopy(job.model).to(device).train()  # of several processes each needs its own
        for parameter in self.module.parameters():
            parameter.grad = None
        self.penalties = [*named_penalties(recipe), *job.penalties]
        named = [named_constraint(name, value, self.module, recipe) for name, value in recipe.constraints.items()]
        self.constraints = [*named, *(constraint(self.module) for constraint in job.constraints)]
        optimizer = optimizer_of(self.module, recipe)
        self.wrapped, self.optimizer = host.prepare(self.module, optimizer)
        self.plain_optimizer = optimizer
        self.progress, self.best = _Progress(), dict[str, Tensor]()
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, right, penalty, samples
        self.saved = time.monotonic()

    def through(self) -> Training:
        """All epochs that are left."""
        self._resume()
        if self.progress.epoch == self.progress.step == 0:
            for constraint in self.constraints:
                if not isinstance(constraint, Shrinkage):
                    constraint()
        steps = len(self.batches)
        while self.progress.epoch < self.recipe.epochs and not self._tired():
            self._epoch(steps)
            self._close(steps)
        return self._finish()

    def _tired(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.held is not None and self.progress.waited >= patience

    def _epoch(self, steps: int) -> None:
        progress, recipe, started, spoken = self.progress, self.recipe, time.monotonic(), 0.0
        before = progress.seconds
        self.wrapped.train()
        for number, rows in enumerate(self.batches.order(progress.epoch)):
            if number < progress.step:
                continue  # done before an interruption
            self._step(rows, recipe.rate(progress.epoch * steps + number, recipe.epochs * steps))
            progress.step = number + 1
            now = time.monotonic()
            progress.seconds = before + now - started
            if now - spoken > SPOKEN:
                spoken = now
                self._speak(steps)
            if self.folder is not None and self._due(number):
                self._save(self.host.total(self.sums) / self.host.world)

    def _due(self, number: int) -> bool:
        """Whether to write a state now: several processes have to agree, as each adds its part, and do so seldom."""
        if self.host.world > 1 and number % TOGETHER:
            return False
        return self.host.agreed(time.monotonic() - self.saved > SAVED)

    def _step(self, rows: Tensor, lr: float) -> None:
        recipe, host, epoch = self.recipe, self.host, self.progress.epoch
        self._seed(_step_seed(recipe.seed, epoch, self.progress.step))
        share = len(rows)
        mine = rows[host.rank :: host.world]
        x, y = self.batches.take(mine, epoch)
        if recipe.adversary is not None:
            first = round(recipe.adversary.ratio * share)
            first = len(range(host.rank, first, host.world))  # of the whole batch's first ones, this process's
            x = mixed(self.module, x, y, recipe.adversary, self.batches.keys[mine], epoch, first)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.wrapped(x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        penalty = sum((strength * of(self.module) for of, strength in self.penalties), loss.new_zeros(()))
        host.backward(loss * (host.world / share) + penalty)
        self.optimizer.step()
        for constraint in self.constraints:
            constraint()
        with torch.no_grad():
            right = (logits.argmax(1) == y).sum()
            self.sums += torch.stack(
                (loss.detach(), right, penalty.detach() * (share / host.world), loss.new_tensor(len(y)))
            )

    def _seed(self, seed: int) -> None:
        """Seed what dropout draws from, on the CPU and on the device."""
        torch.default_generator.manual_seed(seed)
        if self.host.device.type == "cuda":
            torch.cuda.default_generators[self.host.device.index or 0].manual_seed(seed)

    def _speak(self, steps: int, row: EpochRow | None = None) -> None:
        loss, right, _, samples = self.sums.tolist()
        self._check_finite("loss", loss)
        count = max(samples, 1.0)
        rate = row.samples_per_second if row else samples * self.host.world / max(self.progress.seconds, 1e-9)
        epoch = self.progress.epoch + (row is None)
        self.tell(Moment(epoch, self.recipe.epochs, self.progress.step, steps, loss / count, right / count, rate, row))

    def _check_finite(self, what: str, value: float | Tensor) -> None:
        """Raise where training has diverged, before anything of it is kept."""
        if not bool(torch.isfinite(torch.as_tensor(value)).all()):
            found = value if isinstance(value, float) else "no longer finite"
            raise InputError(
                f"lr: the {what} is {found} after step {self.progress.step} of epoch {self.progress.epoch + 1}; "
                f"expected a finite one: try a smaller learning rate than {self.recipe.lr:g}, or weaker penalties"
            )

    def _check_weights(self) -> None:
        for name, weight in self.module.named_parameters():
            self._check_finite(f"weight {name}", weight.detach())

    def _close(self, steps: int) -> None:
        """End an epoch: validation, measurements, selection, state."""
        progress, recipe, started = self.progress, self.recipe, time.monotonic()
        loss, right, penalty, samples = self.host.total(self.sums).tolist()
        self._check_finite("loss", loss + penalty)
        self._check_weights()
        trained = progress.seconds
        scores = self._validate()
        self._check_finite("validation loss", scores[0] or 0.0)
        epoch, last = progress.epoch + 1, progress.epoch + 1 == recipe.epochs
        bounds: dict[str, float | None] = {}
        if recipe.measure_every and self.host.rank == 0 and (epoch % recipe.measure_every == 0 or last):
            with frozen(self.module):
                progress.layers += measured_layers(self.module, epoch)
                bounds = lipschitz(self.module, self.batches.inputs.shape[1:])
        row = EpochRow(
            epoch, epoch * steps, recipe.rate(epoch * steps - 1, recipe.epochs * steps),
            loss / samples, penalty / samples, right / samples, *scores,
            trained + time.monotonic() - started, samples / max(trained, 1e-9), self._drift(), **bounds,
        )  # fmt: skip
        self._speak(steps)
        progress.epochs.append(row)
        self._select(row)
        progress.epoch, progress.step, progress.seconds = epoch, 0, 0.0
        self._speak(steps, row)
        self.sums.zero_()
        if self.folder is not None and self.host.rank == 0:
            write_history(self.folder, progress.epochs, progress.layers)
            self._save(self.sums)

    def _select(self, row: EpochRow) -> None:
        """Keep the weights if they are the best so far; every process agrees with the first."""
        progress, adversary = self.progress, self.recipe.adversary
        better = True
        if row.validation_accuracy is not None and row.validation_loss is not None:
            accuracy = row.validation_accuracy
            if adversary is not None and row.validation_robust is not None:
                accuracy += adversary.ratio * (row.validation_robust - accuracy)
            score, best = self.host.agreed((accuracy, -row.validation_loss)), progress.best
            progress.waited = 0 if best is None or score[0] > best[0] else progress.waited + 1
            if best is None or score > best:
                progress.best = score
            elif self.recipe.select == "best":
                better = False
        if better:
            progress.best_epoch = row.epoch
            self.best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def _validate(self) -> tuple[float | None, float | None, float | None]:
        """Loss, accuracy, and accuracy under the training attack, of the samples held out."""
        if self.held is None:
            return None, None, None
        x, y = self.held
        adversary = self.recipe.adversary
        keys = torch.randint(2**62, (len(y),), generator=generator(self.recipe.seed, VALIDATION_KEYS)).to(y.device)
        loss, right, robust = 0.0, 0, 0
        with frozen(self.module):
            for rows in torch.arange(len(y), device=y.device).split(max(256, self.recipe.batch_size)):
                with torch.no_grad():
                    logits = self.module(x[rows])
                    loss += float(F.cross_entropy(logits, y[rows], reduction="sum"))
                stands = logits.argmax(1) == y[rows]
                right += int(stands.sum())
                if adversary is not None:
                    attacked = adversarial(self.module, x[rows], y[rows], adversary, keys[rows])
                    with torch.no_grad():
                        robust += int((stands & (self.module(attacked).argmax(1) == y[rows])).sum())
        return loss / len(y), right / len(y), None if adversary is None else robust / len(y)

    def _save(self, sums: Tensor) -> None:
        """Write the state to go on from, with each process's share of this epoch's sums."""
        if self.host.rank or self.folder is None:
            return
        self._check_weights()
        tensors: Tensors = {
            **with_prefix("model", self.module.state_dict()),
            **with_prefix("best", self.best),
            **optimizer_tensors(self.plain_optimizer),
            "sums": sums,
        }
        for name, counting in self._counting():
            tensors |= with_prefix(name, counting.state_dict())
        facts = {"identity": self.identity, "progress": dataclasses.asdict(self.progress)}
        write_snapshot(self.folder, tensors, facts, self.progress.epoch * (len(self.batches) + 1) + self.progress.step)
        self.saved = time.monotonic()

    def _drift(self) -> float | None:
        """How far the oldest reused nuclear gradient was off."""
        drifts = [penalty.drift for penalty, _ in self.penalties if isinstance(penalty, RefreshedNuclearNorm)]
        return max((drift.gradient for drift in drifts if drift is not None), default=None)

    def _counting(self) -> Iterator[tuple[str, RefreshedNuclearNorm | Shrinkage]]:
        """The interventions that depend on the calls before, by name."""
        for number, (penalty, _) in enumerate(self.penalties):
            if isinstance(penalty, RefreshedNuclearNorm):
                yield f"penalty.{number}", penalty
        for number, constraint in enumerate(self.constraints):
            if isinstance(constraint, Shrinkage):
                yield f"constraint.{number}", constraint

    def _resume(self) -> None:
        """Take over the state in the folder, if there is one of this very training."""
        found = None if self.folder is None else read_snapshot(self.folder)
        if found is None:
            return
        tensors, facts = found
        try:
            self.module.load_state_dict(under_prefix("model", tensors))
            self.best = {name: tensor.to(self.host.device) for name, tensor in under_prefix("best", tensors).items()}
            restore_optimizer(self.plain_optimizer, tensors)
            self.sums.copy_(tensors["sums"])
            for name, counting in self._counting():
                counting.load_state_dict(under_prefix(name, tensors))
            self.progress = _Progress.read(facts["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise InputError(
                f"folder: {self.folder} holds a state that does not fit this training ({error}); train anew with "
                "--overwrite"
            ) from error

    def _finish(self) -> Training:
        model = copy.deepcopy(self.module).cpu().eval()
        model.load_state_dict(self.best)
        for parameter in model.parameters():
            parameter.grad = None
        if self.folder is not None and self.host.rank == 0:
            save_state(model, self.folder / WEIGHTS)
            remove_snapshot(self.folder)
        progress = self.progress
        return Training(model, progress.best_epoch, tuple(progress.epochs), tuple(progress.layers))


def _step_seed(seed: int, epoch: int, step: int) -> int:
    return generator(seed, STEP_SEEDS + (epoch << 24) + step).initial_seed()
