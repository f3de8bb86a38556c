"""Batches: every sample once an epoch, and crops and flips that depend on seed, sample and epoch alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brittle.training.batches import Batches, crop, mirror
from helpers.matrices import quick
from helpers.networks import generator, uniform


def batches(n=40, size=8, seed=0, shape=(1, 3, 4), **options):
    x = uniform(5, n, *shape, low=0.1, high=1.0)  # no pixel is zero, and no two are equal
    return Batches.of(x, torch.arange(n), size, seed=seed, **options)


def slowly_cropped(image, down, across, padding):
    """The window by loops: pixels outside of the image are zero."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        row, column = i + down - padding, j + across - padding
        if 0 <= row < height and 0 <= column < width:
            out[c, i, j] = image[c, row, column]
    return out


@quick
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5), st.integers(0, 10**6))
def test_every_sample_once_an_epoch(n, size, epoch, seed):
    served = batches(n, size, seed)
    order = served.order(epoch)
    assert sorted(torch.cat(order).tolist()) == list(range(n))
    assert len(order) == len(served)
    assert all(len(rows) == size for rows in order[:-1])
    assert 1 <= len(order[-1]) <= size


@quick
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 12), st.integers(0, 10**6))
def test_a_small_last_batch_is_left_out_unless_it_is_the_only_one(n, size, fewest, seed):
    served = batches(n, size, seed, fewest=fewest)
    order, every = served.order(1), batches(n, size, seed).order(1)
    assert len(order) == len(served) >= 1
    assert all(torch.equal(a, b) for a, b in zip(order, every, strict=False))
    assert all(len(rows) >= min(fewest, size) for rows in order[1:])
    assert len(every) - len(order) in (0, 1)
    if len(order) < len(every):
        assert len(every[-1]) < fewest


def test_the_order_depends_on_seed_and_epoch_alone():
    def orders(seed):
        return [torch.cat(batches(seed=seed).order(epoch)).tolist() for epoch in range(3)]

    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = orders(0)
        torch.manual_seed(2)
        assert orders(0) == first
    assert len({str(order) for order in first + orders(1)}) == 6


def test_orders_are_uniform():
    """Each of five samples comes first in about a fifth of 1000 epochs (standard deviation 13)."""
    served = batches(5, 5)
    firsts = torch.tensor([int(served.order(epoch)[0][0]) for epoch in range(1000)])
    assert (firsts.bincount(minlength=5) - 200).abs().max() < 60


def test_the_global_random_state_stays():
    before = torch.get_rng_state()
    served = batches(crop=1, flip=True)
    served.take(served.order(0)[0], 0)
    assert torch.equal(before, torch.get_rng_state())


def test_without_augmentation_samples_are_as_they_are():
    served = batches()
    rows = torch.tensor([3, 1, 3])
    x, y = served.take(rows, 7)
    assert torch.equal(x, served.inputs[rows])
    assert y.tolist() == [3, 1, 3]


@quick
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 2), st.integers(0, 10**6))
def test_crops_are_windows_of_the_padded_images(padding, height, width, channels, seed):
    x = torch.rand(6, channels, height, width, generator=generator(seed))
    corners = torch.randint(2 * padding + 1, (6, 2), generator=generator(seed + 1))
    found = crop(x, corners, padding)
    for image, (down, across), window in zip(x, corners.tolist(), found, strict=True):
        assert torch.equal(window, slowly_cropped(image, down, across, padding))


def test_mirroring_is_left_to_right():
    x = uniform(0, 4, 2, 3, 5)
    which = torch.tensor([True, False, True, False])
    found = mirror(x, which)
    for image, turned, result in zip(x, which.tolist(), found, strict=True):
        expected = torch.stack([image[:, :, j] for j in (range(4, -1, -1) if turned else range(5))], dim=2)
        assert torch.equal(result, expected)


def variant(image, seen, padding, flip):
    """Which corner and mirroring made ``seen``: exactly one does, by brute force."""
    sides = range(2 * padding + 1)
    found = [
        (down, across, flipped)
        for flipped in ((False, True) if flip else (False,))
        for down, across in itertools.product(sides, sides)
        if torch.equal(seen, slowly_cropped(image.flip(2) if flipped else image, down, across, padding))
    ]
    assert len(found) == 1, "no augmentation of the image, or ambiguous"
    return found[0]


def test_augmentations_are_uniform_and_independent():
    """All 18 pairs of corner and mirroring, each about as often: chi-square with 17 degrees, 99.9 % below 41."""
    served = batches(60, 60, crop=1, flip=True)
    counts = dict.fromkeys(itertools.product(range(3), range(3), (False, True)), 0)
    per_sample = []
    for epoch in range(12):
        x, _ = served.take(torch.arange(60), epoch)
        seen = [variant(image, result, 1, True) for image, result in zip(served.inputs, x, strict=True)]
        for found in seen:
            counts[found] += 1
        per_sample.append(seen)
    expected = 60 * 12 / 18
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 41
    assert all(len(set(seen)) > 1 for seen in zip(*per_sample, strict=True))  # epochs differ for every sample
    assert all(len(set(seen)) > 1 for seen in per_sample)  # samples differ in every epoch


def test_half_of_the_images_are_mirrored():
    """Of 4000 draws 2000 with standard deviation 32."""
    served = batches(1000, 100, shape=(1, 1, 2), flip=True)
    share = [
        float((served.take(torch.arange(1000), epoch)[0] != served.inputs).any(3).float().mean())
        for epoch in (0, 1, 2, 3)
    ]
    assert sum(share) / 4 == pytest.approx(0.5, abs=0.04)
    assert len(set(share)) > 1


def test_a_sample_is_augmented_alike_in_every_batch():
    served = batches(crop=2, flip=True)
    rows = torch.tensor([7, 0, 33, 12, 7])
    whole, _ = served.take(rows, 3)
    for place, row in enumerate(rows.tolist()):
        assert torch.equal(served.take(torch.tensor([row]), 3)[0][0], whole[place])
    assert torch.equal(served.take(rows.flip(0), 3)[0].flip(0), whole)
    assert not torch.equal(served.take(rows, 4)[0], whole)
    assert not torch.equal(batches(seed=1, crop=2, flip=True).take(rows, 3)[0], whole)


def test_the_order_does_not_depend_on_augmentation():
    plain, augmented = batches().order(2), batches(crop=1, flip=True).order(2)
    assert all(torch.equal(a, b) for a, b in zip(plain, augmented, strict=True))
