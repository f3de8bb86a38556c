"""Learning from a teacher: robust soft labels, as ARD (Goldblum et al. 2020) and RSLAD (Zi et al. 2021) take them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distilled_cross_entropy(
    logits: Tensor, y: Tensor, taught: Tensor | None, weight: float, temperature: float
) -> Tensor:
    r"""``(1 - w) CE(s, y) + w T^2 KL(softmax(t / T) || softmax(s / T))``, summed over the samples.

    The gradient of the second term in the logits s is ``w T (softmax(s / T) - softmax(t / T))``; T^2 keeps its size
    when T grows (Hinton, Vinyals & Dean 2015). With s on attacked inputs and t on clean ones the teacher's confidence
    is what the network learns to keep under attack.

    Args:
        logits: s, ``(N, classes)``.
        y: Labels ``(N,)``.
        taught: t, the teacher's logits ``(N, classes)``, a constant; None: the cross-entropy alone.
        weight: w, from 0 to 1.
        temperature: T, above 0.

    Returns:
        Scalar in nats.
    """
    if taught is None:
        return F.cross_entropy(logits, y, reduction="sum")
    own, target = F.log_softmax(logits / temperature, 1), F.log_softmax(taught / temperature, 1)
    distance = F.kl_div(own, target, reduction="sum", log_target=True)
    return (1 - weight) * F.cross_entropy(logits, y, reduction="sum") + weight * temperature**2 * distance
