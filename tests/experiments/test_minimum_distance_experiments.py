"""Experiments on interpolating classifiers: distances against brute force, closed forms, and what claims ask."""

import math

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from brittle.data.load import MEAN_STD
from brittle.errors import InputError
from brittle.experiments import (
    exponential_points,
    feature_mnist,
    feature_photographs,
    feature_training,
    gaussian_centres,
    judge,
)
from brittle.experiments.experiment import fingerprint
from brittle.experiments.point_networks import Box, attacked_radii, chain, margin_gradients
from brittle.models import build_model, save_state


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def verdicts(experiment, table):
    return [str(judge(claim, table, "small").verdict) for claim in experiment.CLAIMS]


# --- networks on points -------------------------------------------------------------------------------------


def test_a_network_behind_a_box_is_the_network_on_the_points():
    points, network = 7 * gaussian(20, 5), chain((5, 8, 3), relu=True, seed=1)
    box = Box.of(points)
    assert float(box.inputs.min()) >= 0
    assert float(box.inputs.max()) <= 1
    assert torch.allclose(box.behind(network)(box.inputs), network(points.float()), atol=1e-4)
    lengths = torch.cdist(box.inputs.double(), box.inputs.double()) * box.unit
    assert torch.allclose(lengths, torch.cdist(points, points), atol=1e-4)


def test_attacked_radii_of_a_linear_network_are_its_distances_to_the_boundary():
    points, labels = gaussian(6, 4), torch.zeros(6, dtype=torch.long)
    network = nn.Linear(4, 2, bias=False)
    network.weight.data = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0, 1.0, 1.0, 0.5]])
    box = Box.of(points)
    margins, gradients = margin_gradients(box.behind(network), box.inputs, labels, 1 - labels)
    exact = margins / gradients.norm(dim=1) * box.unit
    assert torch.allclose(exact, (points @ torch.tensor([1.0, 1, -2, 0]).double()) / 6**0.5, atol=1e-5)
    attacked = (
        attacked_radii(box.behind(network), box.inputs, labels, torch.tensor([[1], [0]]), largest=3.0, seed=0)
        * box.unit
    )
    right = exact > 0
    assert right.any()
    assert (attacked[right] >= exact[right] * (1 - 1e-4)).all()
    assert (attacked[right] <= exact[right] * 1.05).all()
    assert not attacked[~right].any()


# --- exponentially many points ------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 5, 8])
def test_half_distances_to_the_other_class_are_those_of_all_points(d):
    A, z = gaussian(d, d, seed=d), exponential_points.corners(d)
    apart = torch.cdist(z @ A.T, z @ A.T).masked_fill(z[:, -1:] == z[:, -1], math.inf).amin(1) / 2
    assert torch.allclose(exponential_points.half_distances(A, z), apart)
    sampled = exponential_points.sampled_half_distances(A, z, seed=0)
    assert (sampled >= apart * (1 - 1e-9)).all()


def test_a_linear_run_finds_the_closed_form_where_it_has_converged():
    """The radius is phi times the distance that changes the last coordinate alone."""
    job = {"network": "linear", "loss": "targets", "d": 6, "width": 100, "steps": 800, "batch": 8, "points": 8}
    row = exponential_points.run(**job, seed=2)
    assert row["valid"]
    assert row["cosine_2"] == pytest.approx(1, abs=0.01)
    assert row["cosine_1"] == pytest.approx(row["phi"], abs=0.05)
    assert row["radius"] == pytest.approx(row["exact_linear"], rel=0.15)
    assert row["radius"] <= row["optimal"] * 1.05  # a linear classifier with equal margins has no more
    assert row["optimal"] <= row["sampled"] * (1 + 1e-9)


def exponential_table(*, apart=0.0, growth=0.0, runs=20):
    """Linear runs whose mean lies ``apart`` from the published one, ReLU networks whose radius grows as d^growth."""
    rows = []
    for seed in range(runs):
        wave = 0.1 * math.sin(seed * 2.4)
        for d in (7, 12):
            phi = exponential_points.PUBLISHED["phi"] + wave
            row = {"network": "linear", "loss": "targets", "d": d, "seed": seed, "valid": True, "cosine_2": 0.995}
            cosine = exponential_points.PUBLISHED["cosine_1"] + wave + apart
            rows.append(row | {"phi": phi, "cosine_1": cosine, "difference": cosine - phi})
        rows.append(rows[-1] | {"loss": "labels", "cosine_1": 0.6 + wave})
        rows.append(rows[0] | {"valid": False, "seed": seed, "difference": 9.0, "cosine_1": 9.0})
        for d in (10, 20, 40):
            radii = {"radius": 2 * (1 + wave) * d**growth, "optimal": d**0.7, "sampled": float(d)}
            rows.append({"network": "relu", "loss": "labels", "d": d, "seed": seed, "valid": True} | radii)
    return pd.DataFrame(rows)


def test_claims_about_exponentially_many_points_tell_tables_apart():
    assert set(verdicts(exponential_points, exponential_table())) == {"reproduced"}
    far = verdicts(exponential_points, exponential_table(apart=0.4))
    assert far[:6] == ["opposite", "reproduced", "opposite", "reproduced", "opposite", "reproduced"]
    growing = verdicts(exponential_points, exponential_table(growth=1.2))
    assert growing[7:] == ["reproduced", "opposite", "opposite", "opposite"]
    few = exponential_table(runs=17)
    assert verdicts(exponential_points, few)[:2] == ["not testable at this scale"] * 2


# --- Gaussian centres ---------------------------------------------------------------------------------------


def simulated(law, *, draws=50):
    """Rows of the laws: as they are drawn, or with phi as if there were twice the free dimensions."""
    rows = []
    for seed in range(5):
        for d, share in ((8, 0.5), (8, 1.0), (32, 0.5), (32, 1.0)):
            row = {"d": d, "share": share, "hidden": 0, "draws": draws, "seed": seed}
            row |= gaussian_centres.run(d=d, share=share, hidden=0, draws=draws, seed=seed)
            rows.append(row if law else row | {"level_phi": 0.9, "level_radius": 0.1, "phi_squared": 0.9, "draws": 50})
    return rows


def networks(*, kept, linear_kept, power=0.0):
    """Rows of networks that keep a share of half the distance, as linear interpolants do or not."""
    return [
        {"d": d, "share": 1.0, "hidden": 1, "seed": seed, "centres": d, "cosine": kept, "phi": linear_kept}
        | {"kept": kept * d**power * (1 + 0.01 * seed), "linear_kept": linear_kept}
        for d in (20, 80)
        for seed in range(5)
    ]


def test_simulated_radii_of_gaussian_centres_obey_the_laws():
    table = pd.DataFrame(simulated(law=True) + networks(kept=0.05, linear_kept=0.05, power=-0.5))
    assert set(verdicts(gaussian_centres, table)) == {"reproduced"}


def test_claims_about_gaussian_centres_notice_other_laws_and_networks_that_do_not_collapse():
    table = pd.DataFrame(simulated(law=False, draws=2) + networks(kept=0.6, linear_kept=0.05))
    found = verdicts(gaussian_centres, table)
    assert found[:3] == ["opposite"] * 3
    assert found[6:8] == ["opposite"] * 2
    assert found[8] == "not reproduced"


def test_a_network_through_few_centres_interpolates_them_and_is_no_more_robust_than_the_nearest_one():
    row = gaussian_centres.run(d=6, share=0.5, hidden=1, seed=0, width=100, steps=600)
    assert row["accuracy"] == 1
    assert row["residual"] < 0.2
    assert 0 < row["cosine"] <= 1
    assert 0 < row["kept"] < 2  # at the nearest centre itself the answer is another
    assert row["linear_kept"] <= row["phi"] + 1e-9


# --- images -------------------------------------------------------------------------------------------------


def test_the_linear_interpolant_of_images_keeps_phi_and_attacks_find_its_radius():
    job = {"data": "digits", "classes": "own", "hidden": 0, "width": 0, "steps": 0, "points": 8, "seed": 1}
    row = feature_mnist.run(**job, n=12)
    assert row["formula"] < 1e-9
    assert row["residual_linear"] < 1e-9
    assert row["cosine"] == pytest.approx(row["phi"], abs=1e-5)
    assert row["linear_kept"] * (1 - 1e-4) <= row["kept"] <= row["linear_kept"] * 1.05
    assert feature_mnist.run(**job, n=30)["phi"] < row["phi"]


def image_table(*, gap, test):
    """Networks whose cosine lies ``gap`` above phi, and whose radius at test images is a share of the rule's."""
    rows = []
    for seed in range(3):
        for n, phi in ((10, 0.8), (100, 0.6 + 0.01 * seed), (700, 0.1 + 0.01 * seed)):
            base = {"n": n, "seed": seed, "phi": phi, "formula": 1e-9 * (1 + seed), "linear_kept": phi}
            rows.append(base | {"classes": "own", "hidden": 0, "cosine": phi, "kept": phi * (1.01 + 0.001 * seed)})
            rows.append(base | {"classes": "own", "hidden": 2, "cosine": phi + gap, "kept": phi + gap})
            radii = {"test_radius": test * (1 + 0.01 * seed), "test_neighbour": 1.0}
            rows.append(base | {"classes": "digit", "hidden": 2} | radii)
    return pd.DataFrame(rows)


def test_claims_about_images_compare_what_is_found_with_what_is_predicted():
    assert set(verdicts(feature_mnist, image_table(gap=0.05, test=0.5))) == {"reproduced"}
    other = verdicts(feature_mnist, image_table(gap=0.6, test=1.5))
    assert other[4] == other[7] == other[8] == "opposite"
    assert other[:4] == ["reproduced"] * 4


# --- photographs --------------------------------------------------------------------------------------------


def test_of_a_linear_network_the_way_predicts_what_the_attack_finds():
    """The gradient is the same everywhere, so both are the cosine at the image up to where the margin is 0."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
    network[1].weight.data = gaussian(3, 12, seed=6).float()
    ends = 0.4 + 0.2 * torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    classes = network(ends).topk(2).indices[0]
    if network(ends[1:])[0, classes[0]] > network(ends[1:])[0, classes[1]]:
        ends[1] = 1 - ends[1]
    w = (network[1].weight[classes[0]] - network[1].weight[classes[1]]).detach().double()
    exact = float(w @ ends[0].double().flatten() / w.norm() / (ends[0] - ends[1]).norm() * 2)
    told = feature_photographs.predict(network, ends, classes, points=7)
    way = (ends[0] - ends[1]).double().flatten()
    assert told["predicted"] == pytest.approx(exact, rel=1e-4)
    assert told["path_cosine"] == pytest.approx(float(w @ way / w.norm() / way.norm()), abs=1e-5)
    assert told["local_cosine"] == pytest.approx(abs(told["path_cosine"]), abs=1e-5)
    assert told["identity"] < 1e-3


def test_photographs_of_other_content_are_other_data_whatever_their_sizes(tmp_path):
    for name, size in (("cat", (9, 6)), ("dog", (5, 7))):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        Image.new("RGB", size, "red").save(tmp_path / "photographs" / name / "one.png")
    before = fingerprint("folder:photographs", tmp_path)
    assert before == fingerprint("folder:photographs", tmp_path)
    Image.new("RGB", (9, 6), "blue").save(tmp_path / "photographs" / "cat" / "one.png")
    assert fingerprint("folder:photographs", tmp_path) != before
    with pytest.raises(InputError, match="folder of images"):
        fingerprint("folder:none", tmp_path)


def test_a_network_of_the_users_is_read_from_its_architecture_and_weights(tmp_path):
    torch.manual_seed(0)
    network = build_model("resnet18-cifar", {"width": 4}, seed=3)
    save_state(network, tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 16, 16)
    loaded = feature_photographs.load_network("resnet18-cifar@weights.safetensors", images, tmp_path)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in MEAN_STD["imagenet"])
    assert torch.allclose(loaded(images), network.eval()((images - mean) / std), atol=1e-5)
    with pytest.raises(InputError, match="ARCH@FILE"):
        feature_photographs.load_network("resnet18-cifar", images, tmp_path)


def test_claims_about_photographs_are_asked_of_their_own_folder():
    rows = [
        {"network": "a", "data": data, "seed": seed, "within": within + 0.01 * seed, "found_median": found}
        | {"path_mean": found / 2, "identity_median": 0.01 + 0.001 * seed}
        for data, within, found in ((feature_photographs.ALL, 0.9, 0.06), (feature_photographs.OF_THE_PAPER, 0.1, 0.9))
        for seed in range(3)
    ]
    found = verdicts(feature_photographs, pd.DataFrame(rows))
    assert found == ["reproduced", "opposite", "reproduced", "reproduced", "reproduced"]


# --- training -----------------------------------------------------------------------------------------------


def training_table(sign):
    """Networks whose direction is lost over training and layers, and kept by attacks; or, at sign -1, the opposite."""
    rows = []
    for seed in range(3):
        for attacked in (False, True):
            cosine = [0.4 + 0.01 * seed, 0.4 - 0.1 * sign, 0.4 - 0.2 * sign * (1 + 0.1 * seed) + 0.5 * sign * attacked]
            row = {"epoch": [1, 2, 4], "cosine": cosine, "ratio": cosine, "adversarial": attacked, "seed": seed}
            rows.append(row | {"first_layer": [0.7] * 3, "last_hidden": [0.7 - 0.2 * sign * (1 + 0.1 * seed)] * 3})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "reproduced"), (-1, "opposite")])
def test_claims_about_training_compare_the_last_epoch_with_and_without_attack(sign, verdict):
    assert set(verdicts(feature_training, training_table(sign))) == {verdict}
