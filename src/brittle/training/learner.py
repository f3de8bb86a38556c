"""The network that is trained, with all that its steps need and change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.borrow import frozen
from brittle.random_streams import seed_of
from brittle.training.adversarial import add_shared, ascend_shared, perturb_first
from brittle.training.batches import Batches
from brittle.training.distillation import distilled_cross_entropy
from brittle.training.hosts import Host
from brittle.training.interventions.assembly import bind_constraints, bind_penalties
from brittle.training.jobs import Job
from brittle.training.optimizers import OPTIMIZERS
from brittle.training.recipe import Adversary
from brittle.training.snapshots import Tensors, optimizer_tensors, restore_optimizer, under_prefix, with_prefix
from brittle.training.streams import step_stream

SMALLEST_BATCH = 8
"""A last batch of fewer samples is left out: batch norms need some, however many processes share it."""


class Learner:
    """A copy of a job's network on the device where it is trained.

    Attributes:
        module: The network.
        batches: Its training samples.
        shared: The perturbation ``(1, ...)`` of a universal adversary, the same in every process; None without one.
    """

    def __init__(self, host: Host, job: Job) -> None:
        self.host, self.recipe = host, job.recipe
        inputs, labels = (tensor.to(host.device) for tensor in job.samples)
        self.batches = Batches.of(
            inputs, labels, self.recipe.batch_size, fewest=max(SMALLEST_BATCH, 2 * host.world),
            seed=self.recipe.seed, crop=self.recipe.crop, flip=self.recipe.flip,
        )  # fmt: skip
        self.module = copy.deepcopy(job.model).to(host.device).train()  # of several processes each needs its own
        for parameter in self.module.parameters():
            parameter.grad = None
        self._layout = _quicker_layout(self.module, inputs)
        is_universal = self.recipe.adversary is not None and self.recipe.adversary.universal
        self.shared = torch.zeros_like(inputs[:1], memory_format=torch.contiguous_format) if is_universal else None
        self.teacher = copy.deepcopy(job.interventions.teacher)
        if self.teacher is not None:
            self.teacher.to(host.device).eval()
        self.penalties = bind_penalties(self.module, self.recipe, job.interventions)
        self.constraints = bind_constraints(self.module, self.recipe, job.interventions)
        self._optimizer = self._make_optimizer()
        self._wrapped, self._wrapped_optimizer = host.prepare(self.module, self._optimizer)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("model: expected parameters to train; got none that require gradients")
        return OPTIMIZERS[self.recipe.optimizer](
            trained,
            lr=self.recipe.lr,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
            fused=all(parameter.is_floating_point() for parameter in trained),
        )

    def start(self) -> None:
        """Let the first weights satisfy the constraints, but for those with a state: they count steps."""
        for constraint in self.constraints:
            if not hasattr(constraint, "state_dict"):
                constraint()

    def step(self, rows: Tensor, epoch: int, number: int, lr: float) -> Tensor:
        """One step of the optimiser on a batch, of which every process takes its share.

        Args:
            rows: The batch, the same in every process.
            epoch: From 0.
            number: Of the step within the epoch, from 0.
            lr: Learning rate.

        Returns:
            ``(4,)``, of this process: sums over its samples of the loss and of what was right, the penalty as its
            share of such a sum, and the number of samples.
        """
        host, adversary = self.host, self.recipe.adversary
        self._seed(seed_of(self.recipe.seed, step_stream(epoch, number)))
        mine = rows[host.rank :: host.world]
        x, y = self.batches.take(mine, epoch)
        x = x.contiguous(memory_format=self._layout)
        taught = self._taught(x)
        if adversary is not None:
            attacked = round(adversary.ratio * len(rows))
            attacked = len(range(host.rank, attacked, host.world))  # of the whole batch's first ones, this process's
            x = self._attack(adversary, x, y, mine, epoch, attacked)
        for group in self._wrapped_optimizer.param_groups:
            group["lr"] = lr
        self._wrapped_optimizer.zero_grad(set_to_none=True)
        logits = self._wrapped(x)
        loss = distilled_cross_entropy(logits, y, taught, self.recipe.distill, self.recipe.temperature)
        penalty = sum((penalty() for penalty in self.penalties), loss.new_zeros(()))
        # Processes' gradients are averaged, so each scales its sum as if the whole batch were like its share.
        host.backward(loss * (host.world / len(rows)) + penalty)
        self._wrapped_optimizer.step()
        for constraint in self.constraints:
            constraint()
        with torch.no_grad():
            right = (logits.argmax(1) == y).sum()
            share = len(rows) / host.world
            return torch.stack((loss.detach(), right, penalty.detach() * share, loss.new_tensor(len(y))))

    def _attack(self, adversary: Adversary, x: Tensor, y: Tensor, rows: Tensor, epoch: int, count: int) -> Tensor:
        """The batch with its first ``count`` inputs attacked; a shared perturbation takes its steps on these before."""
        model, precision = self.module, self.recipe.precision
        if self.shared is None:
            return perturb_first(model, x, y, adversary, self.batches.keys[rows], epoch, count, precision=precision)
        self.shared = ascend_shared(
            model, x[:count], y[:count], self.shared, adversary, total=self.host.total, precision=precision
        )
        return torch.cat([add_shared(x[:count], self.shared, adversary), x[count:]])

    def _taught(self, x: Tensor) -> Tensor | None:
        """The teacher's logits on inputs that are not attacked; None without one."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            logits = self.teacher(x)
        assert isinstance(logits, Tensor)
        return logits

    def train_mode(self) -> None:
        """Put the network into training mode, as the wrapper sees it."""
        self._wrapped.train()

    def _seed(self, seed: int) -> None:
        """Seed what dropout draws from, on the CPU and on the device."""
        torch.default_generator.manual_seed(seed)
        if self.host.device.type == "cuda":
            torch.cuda.default_generators[self.host.device.index or 0].manual_seed(seed)

    def drift(self) -> float | None:
        """How far off the oldest reused gradient of a penalty was when it was last renewed; None without such."""
        drifts = [getattr(penalty, "drift", None) for penalty in self.penalties]
        return max((drift.gradient for drift in drifts if drift is not None), default=None)

    def tensors(self) -> Tensors:
        """All that the next step depends on, by name."""
        tensors = with_prefix("model", self.module.state_dict()) | optimizer_tensors(self._optimizer)
        if self.shared is not None:
            tensors["adversary.shared"] = self.shared
        for name, intervention in self._remembering():
            tensors |= with_prefix(name, intervention.state_dict())
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`tensors` was taken.

        Raises:
            KeyError, RuntimeError, ValueError: The tensors are not those of such a network.
        """
        self.module.load_state_dict(under_prefix("model", tensors))
        restore_optimizer(self._optimizer, tensors)
        if self.shared is not None:
            self.shared = tensors["adversary.shared"].to(self.host.device)
        for name, intervention in self._remembering():
            intervention.load_state_dict(under_prefix(name, tensors))

    def _remembering(self) -> Iterator[tuple[str, Any]]:
        """The interventions that depend on the calls before, by name."""
        for kind, interventions in (("penalty", self.penalties), ("constraint", self.constraints)):
            for number, intervention in enumerate(interventions):
                if hasattr(intervention, "state_dict"):
                    yield f"{kind}.{number}", intervention


def _quicker_layout(model: nn.Module, inputs: Tensor) -> torch.memory_format:
    """channels_last for images of a network with convolutions that takes them so: a third quicker on CPUs and GPUs.

    A network that views its features in another shape without a copy refuses them.
    """
    if inputs.dim() != 4 or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return torch.contiguous_format
    with frozen(model), torch.no_grad(), suppress(RuntimeError):
        model(inputs[:2].contiguous(memory_format=torch.channels_last))
        return torch.channels_last
    return torch.contiguous_format
