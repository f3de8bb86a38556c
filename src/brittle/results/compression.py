"""What was taken out of a network, and what it cost before and after."""

from __future__ import annotations

from dataclasses import dataclass, field

from brittle._version import __version__
from brittle.results.size import NetworkSize

SCHEMA_VERSION = 1
REMOVALS = ("filters", "ranks", "weights")
"""What may be removed."""
TARGETS = ("parameters", "macs", "latency", "filters")
"""What a ratio may be a share of."""


@dataclass(frozen=True)
class CompressionRequest:
    """What was asked for.

    Attributes:
        remove: ``filters``, ``ranks`` or ``weights``.
        allocate: How the amount was divided among the layers.
        score: What ranked the units of a layer; where the planner chose, those of its candidate that won.
        target: What the ratio is a share of: ``parameters``, ``macs``, ``latency`` or ``filters``.
        ratio: Share of the target that was to go, from 0 to 1.
        seed: Of whatever was drawn at random.
    """

    remove: str
    allocate: str
    score: str
    target: str
    ratio: float
    seed: int = 0


@dataclass(frozen=True)
class GroupCut:
    """Units of one kind that can only go together: filters, neurons, heads or singular directions.

    Attributes:
        name: Of the group, as a rule that of the layer that yields the units.
        before: Units in the network as it was.
        after: Units that are left.
        removed: Their indices in the network as it was, rising; () where units have none, as singular directions.
    """

    name: str
    before: int
    after: int
    removed: tuple[int, ...] = ()


@dataclass(frozen=True)
class CompressionRecipe:
    """What a compressed network was made of; ``recipe.json`` of its folder.

    The network is built by name, low-rank pairs are put in (``ranks``), and its modules get other sizes (``sizes``).

    Attributes:
        asked: What was asked for.
        arch: As :func:`brittle.build_model` takes it; None for a network that no function is known to build, which
            cannot be saved.
        arguments: Of the architecture.
        mean: Per channel, of the ``Normalize`` that is the network's first module; () where there is none.
        std: Likewise.
        input_shape: Of one sample.
        classes: Number of classes.
        before: What the network cost before.
        after: What it costs now.
        groups: What was removed where.
        share: Of the target that went; None where it was not told.
        candidate: Which of the planner's candidates it is; None without a planner.
        whole: Why units of other layers could not go, by the layer's name.
        repair: What was done afterwards, a step each.
        warnings: What should be known of it, a sentence each.
        seconds: That planning, repair and fine-tuning took, by these names.
        zeros: Share of the weights of all layers that are zero, where single weights were removed; else 0.
        ranks: Rank by name of every layer that is a low-rank pair.
        sizes: By name of every module whose sizes are not the architecture's own, these by name: numbers, or the
            shape of a tensor.
        data: What was planned with, as :func:`brittle.load_data` takes it; None for none, or for data in memory.
        data_root: Where it lay; None for none.
        image_size: ``(height, width)`` to which the images of a folder were resized; None for none.
        start: File or folder of the network as it was; None for one in memory.
        version: Of Brittle.
        schema_version: Of this document.
    """

    asked: CompressionRequest
    arch: str | None
    arguments: dict[str, object]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, ...]
    classes: int
    before: NetworkSize
    after: NetworkSize
    groups: tuple[GroupCut, ...] = ()
    share: float | None = None
    candidate: str | None = None
    whole: dict[str, str] = field(default_factory=dict)
    repair: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    zeros: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, dict[str, int | tuple[int, ...]]] = field(default_factory=dict)
    data: str | None = None
    data_root: str | None = None
    image_size: tuple[int, int] | None = None
    start: str | None = None
    version: str = __version__
    schema_version: int = SCHEMA_VERSION
