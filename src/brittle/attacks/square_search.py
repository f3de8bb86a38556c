"""The Square attack (Andriushchenko et al. 2020): random search over windows of the image, without gradients."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.losses import margins
from brittle.attacks.packing import State, run
from brittle.attacks.pool import Pool, check_count
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import lp_norm, per_sample
from brittle.models.borrow import Model, frozen
from brittle.models.forward import check_logits
from brittle.progress import Progress
from brittle.random_streams import stream_keys, uniform

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After which of 10,000 queries the share of changed pixels is halved."""
TINY = 1e-12
"""Added to norms that are divided by, as in the authors' implementation."""


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    queries: int = 5000,
    p_init: float = 0.8,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Square attack (Andriushchenko et al. 2020): random windows, kept when they lower the margin; no gradients.

    The margin is ``s_y - max_{j != y} s_j``. p = inf: starts from vertical stripes of ``+-eps``; a query puts a
    window to ``+eps`` or ``-eps``, one random sign a channel. p = 2: starts from a grid of two-signed pyramids; a
    query moves the perturbation's energy from one window into a pyramid added to another. A window covers a share of
    the pixels that falls from ``p_init`` in nine halvings, at fixed shares of the queries. Agrees with AutoAttack's
    implementation from equal random numbers, but here every sample has its own, and windows reach the last row and
    column.

    Inputs ``(N, C, H, W)`` are images; where a square window does not fit an oblong image, it is longer on the other
    axis. All other inputs, ``(N, D)`` among them, are taken as images of one row of D values: windows are ``1 x s``.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; only evaluated, need not be differentiable; left
            bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        p: Norm of the budget: 2 or inf.
        queries: Points tried after the start, at least 1; a sample that survives costs ``queries + 2`` forward
            passes: of itself, of the start and of these.
        p_init: Share of the pixels in the first window, above 0, at most 1.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random numbers.
        ids: Integers ``(N,)`` that name the samples (their positions by default); a sample's random numbers depend
            on ``seed``, its id and the query alone.
        batch_size: Most samples at once (all by default); broken ones leave, and waiting ones take their place.
        progress: Called with ``("square", samples done, their number)``.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met (``x`` itself where that is one), or else the point
        of smallest margin.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(queries, "queries")
    check_count(batch_size, "batch_size")
    if not 0 < p_init <= 1:
        raise InputError(f"p_init: expected a share above 0, at most 1; got {p_init}")
    pool = Pool.of(x, y, eps, p, bounds, None, ids)
    _, _, height, width = _images(pool.x).shape
    search = _Square(model, pool, seed, Windows.of(queries, p_init, height, width, p))
    with frozen(model), torch.no_grad():
        run(search, len(x), batch_size, x.device, progress)
    return pool.examples()


@dataclass(frozen=True)
class Windows:
    """Sizes of the windows, query by query.

    Attributes:
        phase: ``(queries + 1,)``: how often the share has been halved before each query; the last entry is unused.
        sizes: ``(phases, 2)``: height and width of the windows, in pixels.
    """

    phase: Tensor
    sizes: Tensor

    @staticmethod
    def of(queries: int, p_init: float, height: int, width: int, p: float) -> Windows:
        """Windows of ``p_init / 2^phase`` of the pixels; p = 2: odd sides of at least 3 where they fit."""
        # AutoAttack's rounding: the query's number out of 10,000, rounded down
        phase = [bisect.bisect_left(HALVINGS, int(query / queries * 10000)) for query in range(queries + 1)]
        sizes = []
        for halvings in range(max(phase) + 1):
            area = p_init / 2**halvings * height * width
            rows = min(math.sqrt(area), height)  # of the most nearly square window of that area
            columns = min(area / rows, width)
            rows = min(area / columns, height)
            sides = ((rows, height), (columns, width))
            if p == 2:
                sizes.append([min(max(round(side), 3) // 2 * 2 + 1, most) for side, most in sides])
            else:
                sizes.append([max(round(side), 1) for side, _ in sides])
        return Windows(torch.tensor(phase), torch.tensor(sizes))

    def pyramids(self) -> Tensor:
        """Upright and lying pyramids of all sizes, zero-padded to ``(phases, 2, rows, columns)``, in float64."""
        rows, columns = self.sizes.amax(0).tolist()
        table = torch.zeros(len(self.sizes), 2, rows, columns, dtype=torch.float64)
        for entry, (height, width) in zip(table, self.sizes.tolist(), strict=True):
            for lying in (False, True):
                entry[int(lying), :height, :width] = _pyramid(height, width, lying=lying)
        return table


class _Square:
    """The random search as a packed search; points are changed as images ``(n, C, H, W)``, a pixel row of all."""

    name = "square"

    def __init__(self, model: Model, pool: Pool, seed: int, windows: Windows) -> None:
        self.model, self.pool = model, pool
        device = pool.x.device
        self.phase, self.sizes = windows.phase.to(device), windows.sizes.to(device)
        self.queries = len(windows.phase) - 1
        self.keys = stream_keys(seed, pool.names).to(device)
        if pool.p == 2:
            self.pyramids = windows.pyramids().flatten(0, 1).to(pool.x)

    def begin(self, rows: Tensor) -> State:
        state = self.pool.begin(rows) | {"key": self.keys[rows], "step": torch.zeros_like(rows)}
        losses = torch.full(rows.shape, math.inf, dtype=torch.float64, device=rows.device)
        best = self._start_linf(state) if math.isinf(self.pool.p) else self._start_l2(state)
        return state | {"best": best.reshape(state["x"].shape), "best_loss": losses}

    def measure(self, state: State) -> tuple[Tensor, Tensor]:
        x, y = state["x"], state["y"]
        logits = self.model(x)
        if bool((state["step"] == 0).any()):
            check_logits(logits, x, y)
        return margins(logits, y).double(), logits.argmax(1) != y

    def advance(self, state: State, measured: tuple[Tensor, Tensor]) -> Tensor:
        losses, wrong = measured
        x, step, best = state["x"], state["step"], state["best"]
        is_clean = step == 0  # the sample itself was measured, and "best" already holds the start
        accepted = (wrong | ((losses < state["best_loss"]) & ~is_clean)).nonzero()[:, 0]
        best[accepted], state["best_loss"][accepted] = x[accepted], losses[accepted]
        done = wrong | (step > self.queries)
        following = self._next_linf(state) if math.isinf(self.pool.p) else self._next_l2(state)
        state["x"], fresh = following.reshape(x.shape), is_clean.nonzero()[:, 0]
        state["x"][fresh] = best[fresh]
        step += 1
        return done

    def finish(self, rows: Tensor, state: State, done: Tensor) -> None:
        self.pool.finish(rows, state["best"][done])

    def _start_linf(self, state: State) -> Tensor:
        """The start for p = inf: columns at the box's lower or upper end."""
        low, high = _images(state["low"]), _images(state["high"])
        n, channels, _, width = low.shape
        signs = uniform(state["key"], state["step"], channels * width) < 0.5
        return torch.where(signs.view(n, channels, 1, width), low, high)

    def _next_linf(self, state: State) -> Tensor:
        """The next points for p = inf: a window of the best point at the box's lower or upper end."""
        low, high, best = (_images(state[name]) for name in ("low", "high", "best"))
        draws = uniform(state["key"], state["step"], 2 + low.shape[1])
        _, sizes = self._windows(state)
        window = _Window.of(draws[:, :2], sizes, best)
        values = torch.where(draws[:, 2:, None] < 0.5, window.patches(low), window.patches(high))
        return window.write_(best.clone(memory_format=torch.contiguous_format), values)

    def _start_l2(self, state: State) -> Tensor:
        """The start for p = 2: pyramids side by side, about five an axis."""
        clean = _images(state["clean"])
        n, channels, height, width = clean.shape
        tiles = [max(side // 5, 1) for side in (height, width)]
        first = [max(side - 5 * tile, 0) // 2 for side, tile in zip((height, width), tiles, strict=True)]
        down, across = ((side - at) // t for side, at, t in zip((height, width), first, tiles, strict=True))
        draws = uniform(state["key"], state["step"], down * across * (1 + channels)).view(n, 1 + channels, down, across)
        lying = (draws[:, :1] < 0.5)[..., None, None]
        blocks = torch.where(lying, _pyramid(*tiles, lying=True).to(clean), _pyramid(*tiles, lying=False).to(clean))
        blocks = blocks * _signs(draws[:, 1:])[..., None, None].to(clean)  # (n, C, down, across, rows, columns)
        delta = torch.zeros(clean.shape, dtype=clean.dtype, device=clean.device)
        end = first[0] + down * tiles[0], first[1] + across * tiles[1]
        delta[:, :, first[0] : end[0], first[1] : end[1]] = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return self._scale_(delta, state)

    def _next_l2(self, state: State) -> Tensor:
        """The next points for p = 2: a pyramid into one window, with its energy, another's and what is left over."""
        delta = (_images(state["best"]) - _images(state["clean"])).contiguous()
        channels = delta.shape[1]
        draws = uniform(state["key"], state["step"], 5 + channels)
        phase, sizes = self._windows(state)
        into, out_of = (_Window.of(draws[:, pair : pair + 2], sizes, delta) for pair in (0, 2))
        spare = (state["eps"].square() - lp_norm(delta, 2).square()).clamp_min(0) / channels
        old = into.read(delta)
        energy = _energy(old)
        into.write_(delta, torch.zeros_like(old))  # so that the windows' common pixels count once
        new_energy = spare[:, None, None] + energy + _energy(out_of.read(delta))
        out_of.write_(delta, torch.zeros_like(old))
        new = into.cut(self.pyramids, 2 * phase + (draws[:, 4] < 0.5)) * _signs(draws[:, 5:, None]).to(delta)
        new = new + old / (TINY + energy.sqrt())
        into.write_(delta, new * (new_energy.sqrt() / (TINY + _energy(new).sqrt())))
        return self._scale_(delta, state)

    def _windows(self, state: State) -> tuple[Tensor, Tensor]:
        """Phases ``(n,)`` and window sizes ``(n, 2)`` of the points to try next."""
        phase = self.phase[(state["step"] - 1).clamp_min(0)]
        return phase, self.sizes[phase]

    def _scale_(self, delta: Tensor, state: State) -> Tensor:
        """In place, the points of the budget's sphere in the directions ``delta``, clipped to the bounds."""
        length = per_sample(state["eps"] / (lp_norm(delta, 2) + TINY), delta)
        return delta.mul_(length).add_(_images(state["clean"])).clamp_(*self.pool.bounds)


@dataclass(frozen=True)
class _Window:
    """One window of every image, each held in a patch of the size of the largest, with m pixels.

    Attributes:
        pixels: Where the patches lie in the images, ``(n, 1, m)``, counted along the rows.
        inside: Which of these pixels lie in the windows, ``(n, 1, m)``.
        down: Rows ``(n, rows)`` of the patches, counted from the windows' first.
        along: Columns, likewise.
    """

    pixels: Tensor
    inside: Tensor
    down: Tensor
    along: Tensor

    @staticmethod
    def of(draws: Tensor, sizes: Tensor, images: Tensor) -> _Window:
        """Windows of the given ``sizes`` ``(n, 2)``, put anywhere in the images by ``draws`` ``(n, 2)`` in [0, 1)."""
        shape = torch.tensor(images.shape[2:], device=images.device)
        largest = sizes.amax(0)
        first = (draws * (shape - sizes + 1)).long()
        corner = torch.minimum(first, shape - largest)
        rows, columns = (
            corner[:, axis, None] + torch.arange(side, device=images.device)
            for axis, side in enumerate(largest.tolist())
        )
        down, along = rows - first[:, :1], columns - first[:, 1:]
        inside = ((down >= 0) & (down < sizes[:, :1]))[:, :, None] & ((along >= 0) & (along < sizes[:, 1:]))[:, None, :]
        pixels = (rows * images.shape[3])[:, :, None] + columns[:, None, :]
        return _Window(pixels.flatten(1)[:, None], inside.flatten(1)[:, None], down, along)

    def read(self, images: Tensor) -> Tensor:
        """The windows' values ``(n, C, m)``, zero outside of them."""
        return self.patches(images) * self.inside

    def write_(self, images: Tensor, values: Tensor) -> Tensor:
        """Set the windows' pixels in place; ``images`` are contiguous; returns them."""
        values = torch.where(self.inside, values, self.patches(images))
        images.flatten(2).scatter_(2, self.pixels.expand_as(values), values)
        return images

    def cut(self, patterns: Tensor, which: Tensor) -> Tensor:
        """Of ``patterns`` ``(k, rows, columns)`` the ``which`` ``(n,)``, from the windows' first corners on."""
        _, rows, columns = patterns.shape
        down, along = self.down.clamp(0, rows - 1), self.along.clamp(0, columns - 1)
        entries = ((which[:, None] * rows + down) * columns)[:, :, None] + along[:, None, :]
        return patterns.flatten()[entries.flatten(1)[:, None]] * self.inside

    def patches(self, images: Tensor) -> Tensor:
        """All values of the patches, ``(n, C, m)``."""
        return images.flatten(2).gather(2, self.pixels.expand(-1, images.shape[1], -1))


def _images(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` as it is, anything else as one row ``(N, 1, 1, D)``."""
    return x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)


def _signs(draws: Tensor) -> Tensor:
    """-1 or 1."""
    return 1 - 2 * (draws < 0.5).to(draws.dtype)


def _energy(values: Tensor) -> Tensor:
    """Sum of squares of each channel, ``(n, C, 1)``."""
    # One by one: so the zeros around a window, which depend on the others in the batch, change no rounding.
    return values.square().cumsum(2)[:, :, -1:]


def _pyramid(height: int, width: int, *, lying: bool) -> Tensor:
    """A pyramid upwards above (``lying``: left of) one downwards, of unit norm, ``(height, width)`` in float64.

    A window of one row or one column is split along it; one of a single pixel is -1.
    """
    if (lying and width > 1) or (height == 1 < width):
        return _pyramid(width, height, lying=False).T
    pair = torch.cat([_layers(height // 2, width), -_layers(height - height // 2, width)])
    return pair / pair.norm()


def _layers(height: int, width: int) -> Tensor:
    """Squares of side 2 k + 1 around the centre, of height ``1 / (k + 1)^2``, on top of each other; of unit norm."""
    most = max(height, width) // 2
    falling = torch.arange(1, most + 2, dtype=torch.float64).square().reciprocal()
    heights = falling.flip(0).cumsum(0).flip(0)  # at distance k from the centre: layers k and beyond
    down, along = ((torch.arange(side) - side // 2).abs() for side in (height, width))
    layers = heights[torch.maximum(down[:, None], along[None, :])]
    return layers / layers.norm().clamp_min(TINY)
