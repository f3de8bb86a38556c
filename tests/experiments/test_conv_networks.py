"""What experiments on convolutional networks share: the stems, low-rank convolutions, and the filters' structure."""

import dataclasses

import pytest
import torch

from brittle.data.load import load_data
from brittle.errors import InputError
from brittle.experiments.conv_networks import (
    BUDGETS,
    build_convolutional,
    conv_recipe,
    filter_structure,
)
from brittle.models.layers import read_layers
from brittle.models.selection import chosen_layers


def images(n=4, classes=10):
    """Noise in three channels with labels of so many classes."""
    inputs = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    data = load_data("digits", limit=n)
    return dataclasses.replace(data, inputs=inputs, labels=torch.arange(n) % classes, classes=classes)


def test_the_large_stem_makes_torchvisions_network():
    """With torchvision's own modules as the second opinion: same names and shapes, and the same logits."""
    torchvision = pytest.importorskip("torchvision")
    data = images()
    ours = build_convolutional(data, width=64, rank=0, seed=3, stem="7x7").eval()
    with torch.device("meta"):
        theirs = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    theirs.load_state_dict(ours.model.state_dict(), assign=True)
    normal = ours.normalize(data.inputs)
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(ours(data.inputs), theirs(normal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_networks_follow_from_their_seed_alone_and_leave_the_global_one(stem):
    state = torch.get_rng_state()
    first, again, other = (
        build_convolutional(images(), width=4, rank=2, seed=seed, stem=stem).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.conv1.weight"], other["model.conv1.weight"])


def test_low_rank_spares_the_stem_and_the_head():
    """The paper's form: a k x k convolution into r channels with the layer's stride, then a 1 x 1 convolution."""
    whole = build_convolutional(images(), width=4, rank=0, seed=0, stem="7x7")
    network = build_convolutional(images(), width=4, rank=3, seed=0, stem="7x7")
    first, *convolutions = [view for view in read_layers(network).views if view.kind.startswith("Conv2d")]
    assert (first.kind, first.weight.shape) == ("Conv2d", (4, 3, 7, 7))
    assert len(convolutions) == 19
    assert {torch.linalg.matrix_rank(view.matrix).item() for view in convolutions} == {3}
    assert [layer.modules for layer in chosen_layers(network)] == [(v.module, v.output) for v in convolutions]
    assert [view.weight.shape for view in convolutions] == [v.weight.shape for v in read_layers(whole).views[1:-1]]
    assert network(images().inputs).shape == whole(images().inputs).shape == (4, 10)


def test_a_stem_that_an_architecture_does_not_have_is_refused():
    assert build_convolutional(images(), width=2, rank=0, seed=0, stem="3x3", arch="vgg16") is not None
    for stem in ("7x7", "5x5"):
        with pytest.raises(InputError, match=rf"^stem: expected 3x3, or 7x7 of .*; got '{stem}' of vgg16$"):
            build_convolutional(images(), width=2, rank=0, seed=0, stem=stem, arch="vgg16")


def test_structure_is_that_of_the_filters_between_stem_and_head_at_any_scale():
    """Ten filters of which one has all the weight, ten that are alike and orthogonal, and both times a number."""
    alone, alike = torch.zeros(10, 30), torch.eye(10, 30)
    alone[3, :4] = 2.0
    for scale in (1.0, 100.0):
        stem, last = torch.nn.Conv2d(1, 30, 3), torch.nn.Linear(10, 10)
        first, second = torch.nn.Conv2d(30, 10, 1), torch.nn.Conv2d(30, 10, 1)
        network = torch.nn.ModuleList([stem, first, second, last])
        first.weight.data, second.weight.data = scale * alone[:, :, None, None], scale * alike[:, :, None, None]
        structure = filter_structure(network)
        # One of ten kept: of the lonely filter nothing is lost, of equal ones nine tenths.
        assert structure["row_error"] == pytest.approx((0 + 0.9) / 2)
        assert structure["spectral_error"] == pytest.approx((0 + 0.9) / 2, abs=1e-6)
        assert structure["structure_inf"] == pytest.approx((8 / 4 + 1 / 10**0.5) / 2)
        assert structure["structure_2"] == pytest.approx((1 + 1 / 10**0.5) / 2)


def test_a_single_step_goes_beyond_the_budget_and_more_steps_are_the_recipes_own():
    assert conv_recipe(epochs=1, seed=0).adversary is None
    for norm, (p, eps) in BUDGETS.items():
        for pgd, length in ((1, 1.25 * eps), (10, 0.25 * eps)):
            recipe = conv_recipe(epochs=1, seed=0, pgd=pgd, norm=norm)
            assert (recipe.adversary.p, recipe.adversary.eps, recipe.adversary.ratio) == (p, eps, 0.5)
            assert (recipe.adversary.count, recipe.adversary.length) == (pgd, pytest.approx(length))
            assert (recipe.schedule, recipe.crop, recipe.flip) == ("cosine", 4, True)
