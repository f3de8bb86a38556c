"""One training loop for every intervention; interrupted, it goes on bit for bit where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brittle.data.load import Data
from brittle.errors import InputError
from brittle.models.borrow import frozen
from brittle.models.checkpoints import save_state
from brittle.training.history import (
    Callback,
    EpochRow,
    LayerRow,
    Moment,
    lipschitz_products,
    measure_layers,
    write_history,
)
from brittle.training.hosts import Host, check_devices, launch
from brittle.training.interventions.assembly import Interventions
from brittle.training.jobs import Job, Samples, make_job
from brittle.training.learner import Learner
from brittle.training.recipe import Recipe
from brittle.training.snapshots import read_snapshot, remove_snapshot, under_prefix, with_prefix, write_snapshot
from brittle.training.validation import validate

WEIGHTS = "weights.safetensors"
"""The file of the selected weights in a run's folder."""
REPORT_SECONDS = 0.2
"""Least time between two calls of the callback within an epoch."""
STATE_SECONDS = 60.0
"""Least time between two states written within an epoch."""
VOTE_STEPS = 20
"""Steps after which several processes ask each other whether it is time for a state: asking costs a broadcast."""


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
    data: Data | Samples,
    recipe: Recipe | None = None,
    *,
    validation: Data | Samples | None = None,
    interventions: Interventions | None = None,
    folder: str | Path | None = None,
    devices: str | Sequence[str] = "cpu",
    callback: Callback | None = None,
) -> Training:
    r"""Train a copy of a network.

    Minimised is the mean cross-entropy, or its mixture with the distance from a teacher
    (:func:`brittle.training.distillation.distilled_cross_entropy`), plus every penalty times its strength; after
    every step of the optimiser, and once before the first (but for those that count steps, as shrinkages), the
    constraints are applied. The order of the samples, crops, attacks and dropout follow from the recipe's seed alone,
    so on the CPU a run that was interrupted, even killed, and is started again on its folder ends with bit for bit
    the weights of an uninterrupted one.

    Args:
        model: The network to start from, inputs ``(N, ...)`` in [0, 1] to logits ``(N, classes)``; left bit-equal.
        data: Training samples, or inputs and labels.
        recipe: Everything that decides the result; the defaults of :class:`Recipe` without one.
        validation: Samples to select the weights by, in place of the recipe's share of the training samples.
        interventions: Further penalties and constraints, functions of your own, and the teacher of a recipe with
            ``distill``.
        folder: Where the history (``history.csv``, ``layers.csv``, both as Parquet too), the weights
            (``weights.safetensors``) and, until the end, the state to go on from are kept; None keeps nothing. What a
            finished training left there is replaced. Functions of ``interventions`` are not compared with the state's.
        devices: ``cpu``, ``cuda`` or ``cuda:N``. Several, as ``("cuda:0", "cuda:1")`` or ``("cpu", "cpu")``: one
            process each, which share every batch (Lightning Fabric, extra ``multi``); gradients are those of the
            whole batch, batch norms see a process's own share.
        callback: Called with a :class:`Moment` a few times a second and at the end of every epoch.

    Returns:
        The trained copy and its history.

    Raises:
        InputError: Data that are no labelled inputs in [0, 1], a model that cannot run on them, an unknown penalty or
            constraint, a teacher that is missing, not wanted, or of other inputs or classes, a folder that holds the
            state of another training, or a loss that is no longer finite.
        MissingExtra: Lightning is needed and not installed.
        OSError: Writing to the folder failed, or it was removed meanwhile.
    """
    recipe = recipe or Recipe()
    names = check_devices(devices, recipe)
    job = make_job(model, data, recipe, validation=validation, interventions=interventions, folder=folder)
    return run_job(job, devices=names, callback=callback)


def run_job(job: Job, *, devices: Sequence[str], callback: Callback | None = None) -> Training:
    """Run what :func:`brittle.training.jobs.make_job` and :func:`brittle.training.hosts.check_devices` have checked."""
    return launch(_run_on_host, job, devices=devices, precision=job.recipe.precision, callback=callback)


def _run_on_host(host: Host, job: Job, callback: Callback | None) -> Training:
    """The training, in each of its processes."""
    with torch.random.fork_rng(devices=[host.device] if host.device.type == "cuda" else []):
        return _Loop(host, job, callback).run()


@dataclass
class _Standing:
    """How a training stands; written into its state as it is, so that a field of another name breaks old states.

    Attributes:
        epoch: Epochs that are over.
        step: Steps of the current epoch that are done.
        waited: Epochs without a better validation accuracy.
        best: Validation accuracy and negative loss of the best weights.
        best_epoch: After which epoch they were taken.
        seconds: That the steps of the current epoch took.
        epochs: One row an epoch.
        layers: One row a layer and measurement.
    """

    epoch: int = 0
    step: int = 0
    waited: int = 0
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    seconds: float = 0.0
    epochs: list[EpochRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    @staticmethod
    def read(plain: Mapping[str, Any]) -> _Standing:
        """The inverse of ``dataclasses.asdict``, through JSON."""
        standing = _Standing(**plain)
        counts = standing.epoch, standing.step, standing.waited, standing.best_epoch
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"expected counts; got {counts}")
        if len(standing.epochs) != standing.epoch:
            raise ValueError(f"expected {standing.epoch} rows; got {len(standing.epochs)}")
        standing.best = None if standing.best is None else (standing.best[0], standing.best[1])
        standing.epochs = [EpochRow(**row) for row in plain["epochs"]]
        standing.layers = [LayerRow(**row) for row in plain["layers"]]
        return standing


class _Loop:
    """The epochs of a training in one process: steps, validation, selection, reports and states."""

    def __init__(self, host: Host, job: Job, callback: Callback | None) -> None:
        self.host, self.job, self.callback = host, job, callback
        self.learner = Learner(host, job)
        self.steps = len(self.learner.batches)
        self.validation = job.validation and (job.validation[0].to(host.device), job.validation[1].to(host.device))
        self.standing = _Standing()
        self.best_weights: dict[str, Tensor] = {}
        self.sums = torch.zeros(4, dtype=torch.float64, device=host.device)  # of this epoch, see Learner.step
        self.saved_at = time.monotonic()
        self.folder = None if host.rank else job.folder  # where this process writes
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder_status = self.folder.stat()

    def run(self) -> Training:
        """All epochs that are left, then the selected weights."""
        self._resume()
        recipe, standing = self.job.recipe, self.standing
        patience = None if self.job.validation is None else recipe.patience
        if standing.epoch == standing.step == 0:
            self.learner.start()
        while standing.epoch < recipe.epochs and (patience is None or standing.waited < patience):
            self._run_epoch()
            self._end_epoch()
        return self._finish()

    def _run_epoch(self) -> None:
        """The steps of the current epoch that are left, with reports and states between them."""
        recipe, standing, learner = self.job.recipe, self.standing, self.learner
        started, seconds_before, reported_at = time.monotonic(), standing.seconds, 0.0
        learner.train_mode()
        for number, rows in enumerate(learner.batches.order(standing.epoch)):
            if number < standing.step:
                continue  # done before an interruption
            lr = recipe.rate(standing.epoch * self.steps + number, recipe.epochs * self.steps)
            self.sums += learner.step(rows, standing.epoch, number, lr)
            standing.step = number + 1
            now = time.monotonic()
            standing.seconds = seconds_before + now - started
            if now - reported_at > REPORT_SECONDS:
                reported_at = now
                self._report()
            # Several processes each add their part to a state, so they have to agree on when; one can ask every step.
            may_save = self.job.folder is not None and (self.host.world == 1 or number % VOTE_STEPS == 0)
            if may_save and self.host.agree_on(time.monotonic() - self.saved_at > STATE_SECONDS):
                self._save(self.host.total(self.sums) / self.host.world)

    def _end_epoch(self) -> None:
        """Validate, measure, select, report, and write history and state."""
        standing, recipe, started = self.standing, self.job.recipe, time.monotonic()
        loss, right, penalty, samples = self.host.total(self.sums).tolist()
        self._check_finite({"loss": loss + penalty, **self._named_weights()})
        validated: tuple[float | None, float | None, float | None] = (None, None, None)
        if self.validation is not None:
            validated = validate(self.learner.module, self.validation, recipe, self.learner.shared)
            self._check_finite({"validation loss": validated[0] or 0.0})
        epoch, products = standing.epoch + 1, dict[str, float | None]()
        due = recipe.measure_every and (epoch % recipe.measure_every == 0 or epoch == recipe.epochs)
        if due and self.host.rank == 0:
            with frozen(self.learner.module):
                standing.layers += measure_layers(self.learner.module, epoch)
                products = lipschitz_products(self.learner.module, self.learner.batches.inputs.shape[1:])
        row = EpochRow(
            epoch=epoch,
            steps=epoch * self.steps,
            lr=recipe.rate(epoch * self.steps - 1, recipe.epochs * self.steps),
            loss=loss / samples,
            penalty=penalty / samples,
            accuracy=right / samples,
            validation_loss=validated[0],
            validation_accuracy=validated[1],
            validation_robust=validated[2],
            seconds=standing.seconds + time.monotonic() - started,
            samples_per_second=samples / max(standing.seconds, 1e-9),
            drift=self.learner.drift(),
            **products,
        )
        self._report()
        standing.epochs.append(row)
        self._select(row)
        standing.epoch, standing.step, standing.seconds = epoch, 0, 0.0
        self._report(row)
        self.sums.zero_()
        if self.folder is not None:
            self._check_folder(self.folder)
            write_history(self.folder, standing.epochs, standing.layers)
            self._save(self.sums)

    def _select(self, row: EpochRow) -> None:
        """Keep the weights if they are the best so far; every process agrees with the first."""
        standing, recipe = self.standing, self.job.recipe
        better = True
        if row.validation_accuracy is not None and row.validation_loss is not None:
            accuracy = row.validation_accuracy
            if recipe.adversary is not None and row.validation_robust is not None:
                accuracy += recipe.adversary.ratio * (row.validation_robust - accuracy)  # the mixture it trains on
            score, best = self.host.agree_on((accuracy, -row.validation_loss)), standing.best
            standing.waited = 0 if best is None or score[0] > best[0] else standing.waited + 1
            if best is None or score > best:
                standing.best = score
            else:
                better = recipe.select == "last"
        if better:
            standing.best_epoch = row.epoch
            state = self.learner.module.state_dict()
            self.best_weights = {name: tensor.detach().clone() for name, tensor in state.items()}

    def _report(self, row: EpochRow | None = None) -> None:
        """Tell the callback where training is, with the epoch's row once it is over."""
        standing = self.standing
        loss, right, _, samples = self.sums.tolist()
        self._check_finite({"loss": loss})
        if self.callback is None:
            return
        speed = samples * self.host.world / max(standing.seconds, 1e-9)
        self.callback(
            Moment(
                epoch=standing.epoch + (row is None),
                epochs=self.job.recipe.epochs,
                step=standing.step,
                steps=self.steps,
                loss=loss / max(samples, 1.0),
                accuracy=right / max(samples, 1.0),
                samples_per_second=speed if row is None else row.samples_per_second,
                row=row,
            )
        )

    def _named_weights(self) -> dict[str, Tensor]:
        return {f"weight {name}": weight.detach() for name, weight in self.learner.module.named_parameters()}

    def _check_finite(self, values: Mapping[str, float | Tensor]) -> None:
        """Raise where training has diverged, before anything of it is kept."""
        for name, value in values.items():
            if not bool(torch.isfinite(torch.as_tensor(value)).all()):
                what = f"a {name} of {value}" if isinstance(value, float) else f"a {name} that is not finite"
                raise InputError(
                    f"lr: expected finite numbers; got {what} after step {self.standing.step} of epoch "
                    f"{self.standing.epoch + 1}: try a smaller learning rate than {self.job.recipe.lr:g}, or weaker "
                    "penalties"
                )

    def _save(self, sums: Tensor) -> None:
        """Write the state to go on from, with each process's share of this epoch's sums."""
        if self.folder is None:
            return
        self._check_folder(self.folder)
        self._check_finite(self._named_weights())
        tensors = {**self.learner.tensors(), **with_prefix("best", self.best_weights), "sums": sums}
        facts = {"identity": self.job.identity, "progress": dataclasses.asdict(self.standing)}
        # One number more an epoch than it has steps: the state after its last step is not that after the epoch.
        write_snapshot(self.folder, tensors, facts, self.standing.epoch * (self.steps + 1) + self.standing.step)
        self.saved_at = time.monotonic()

    def _check_folder(self, folder: Path) -> None:
        """Raise where the folder has been removed: made anew, it would lack what was written before."""
        if not folder.is_dir() or not os.path.samestat(folder.stat(), self.folder_status):
            raise FileNotFoundError(errno.ENOENT, "expected the run's folder; it was removed meanwhile", str(folder))

    def _resume(self) -> None:
        """Take over the state in the folder, if there is one of this very training."""
        snapshot = None if self.job.folder is None else read_snapshot(self.job.folder)
        if snapshot is None:
            return
        tensors, facts = snapshot
        try:
            self.learner.load_tensors(tensors)
            best = under_prefix("best", tensors)
            self.best_weights = {name: tensor.to(self.host.device) for name, tensor in best.items()}
            self.sums.copy_(tensors["sums"])
            self.standing = _Standing.read(facts["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise InputError(
                f"folder: expected a state that fits this training, or --overwrite; got {self.job.folder} ({error})"
            ) from error

    def _finish(self) -> Training:
        """Write the selected weights; only then the state may go."""
        model = copy.deepcopy(self.learner.module).cpu().eval()
        model.load_state_dict(self.best_weights)
        for parameter in model.parameters():
            parameter.grad = None
        if self.folder is not None:
            self._check_folder(self.folder)
            save_state(model, self.folder / WEIGHTS)
            remove_snapshot(self.folder)
        standing = self.standing
        return Training(model, standing.best_epoch, tuple(standing.epochs), tuple(standing.layers))
