"""Compressed networks on disk: the very network comes back, and whatever is none is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import brittle
from brittle.compression import load_compressed, save_compressed
from brittle.compression.folders import MODEL, RECIPE, read_recipe
from brittle.compression.rebuild import rebuilt
from brittle.compression.sizes import changed_sizes, resized
from brittle.errors import InputError
from brittle.results import GroupCut
from brittle.training import Recipe
from brittle.training.runs import CONFIG, RunRequest, build_network, load_run, train_run
from helpers.compressed import Kinds, attentive, dense, filled, recipe, small_fcn
from helpers.networks import digits, uniform, untidy, untouched

IMAGES = uniform(5, 3, 3, 16, 16)
PAIRS = {
    "fcn": ("fcn", {"in_features": 768, "width": 12}, {"in_features": 768, "width": 5}),
    "resnet": ("resnet18-cifar", {"width": 4}, {"width": 3}),
    "vgg": ("vgg16", {"width": 4}, {"width": 1}),
    "vit": ("vit", {"width": 12, "heads": 3, "image_size": 16}, {"width": 8, "heads": 2, "image_size": 16}),
    "mobilenet": (
        "torchvision:mobilenet_v2",
        {"inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]]},
        {"inverted_residual_setting": [[1, 8, 1, 1], [4, 16, 2, 2]]},
    ),
    "densenet": ("helpers.compressed:dense", {}, {"growth": 4, "start": 5}),
    "attention": ("helpers.compressed:attentive", {}, {"heads": 2}),
    "other kinds": ("helpers.compressed:Kinds", {"width": 4}, {"width": 3}),
}
"""An architecture, its arguments, and those of a smaller one, which stands for what is left of it."""


def logits(network, x=IMAGES):
    with torch.no_grad():
        return network.eval()(x)


@pytest.mark.parametrize("name", PAIRS)
def test_the_very_network_comes_back(name, tmp_path):
    arch, arguments, smaller = PAIRS[name]
    network = filled(brittle.build_model(arch, smaller, seed=7))
    code = ":" in arch and not arch.startswith("torchvision")
    with untouched(network):
        written = save_compressed(tmp_path, network, recipe(arch, arguments))
    again, config = load_run(tmp_path, arch=arch if code else None)
    assert torch.equal(logits(again), logits(network))
    assert logits(network).std() > 0
    assert [config.sizes, config.ranks] == [written.sizes, {}]
    assert written.sizes
    assert read_recipe(tmp_path) == written
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in network.parameters())


def test_neurons_and_ranks_together_come_back(tmp_path):
    network, asked = small_fcn()
    written = save_compressed(tmp_path, network, asked)
    assert written.ranks == {"model.3": 3}
    assert written.sizes["model.3.0"] == {"in_features": 9}
    again, _ = load_run(tmp_path)
    assert torch.equal(logits(again, digits()[0]), logits(network, digits()[0]))


def test_widths_that_follow_no_rule_come_back(tmp_path):
    """Channels removed at random by torch-pruning, coupled by residual sums."""
    import torch_pruning

    network = brittle.build_model("resnet18-cifar", {"width": 6, "classes": 5}, seed=1).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pruner = torch_pruning.pruner.BasePruner(
            network, IMAGES[:1], torch_pruning.importance.RandomImportance(), pruning_ratio=0.4, global_pruning=True,
            ignored_layers=[network.fc],
        )  # fmt: skip
        pruner.step()
    written = save_compressed(tmp_path, network, recipe("resnet18-cifar", {"width": 6, "classes": 5}))
    assert len({size["out_channels"] for size in written.sizes.values() if "out_channels" in size}) > 4
    assert torch.equal(logits(load_run(tmp_path)[0]), logits(network))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_weights_is_kept(dtype, tmp_path):
    network, asked = small_fcn()
    network, x = network.to(dtype), digits()[0][:9].to(dtype)
    save_compressed(tmp_path, network, asked)
    assert torch.equal(logits(load_compressed(tmp_path)[0], x), logits(network, x))


def test_tied_weights_stay_tied():
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    smaller = resized(tied, {n: {"in_features": 4, "out_features": 4} for n in "01"})
    assert smaller[0].weight is smaller[1].weight
    assert smaller[0].weight.shape == (4, 4)
    assert tied[0].weight.shape == (6, 6)


@pytest.mark.parametrize("make", [dense, attentive, lambda: Kinds(4)], ids=["dense", "attentive", "kinds"])
def test_nothing_differs_in_the_architecture_itself(make):
    assert changed_sizes(make(), make()) == {}
    with untouched(network := make()):
        again = resized(network, {})
    assert [*map(str, again.modules())] == [*map(str, network.modules())]


def test_saving_leaves_an_untidy_network_as_it_was(tmp_path):
    network = untidy()
    with untouched(network):
        save_compressed(tmp_path / "out", network, recipe("helpers.networks:convnet", {}))


# What cannot be saved


def test_a_network_that_nothing_builds_is_not_saved(tmp_path):
    network, asked = small_fcn()
    with pytest.raises(InputError, match=r"^arch: expected the name of an architecture, or module:function"):
        save_compressed(tmp_path, network, dataclasses.replace(asked, arch=None))
    assert not any(tmp_path.iterdir())


def _strided(net):
    net.model[3][0].register_buffer("extra", torch.ones(3))


def _parametrised(net):
    parametrize.register_parametrization(net.model[1], "weight", nn.Identity())


CHANGES = {
    "another module": lambda net: net.model.__setitem__(2, nn.Tanh()),
    "one more": lambda net: net.model.append(nn.ReLU()),
    "one less": lambda net: net.model.__delitem__(7),
    "a buffer": _strided,
    "a parametrisation": _parametrised,
    "no bias": lambda net: net.model.__setitem__(1, nn.Linear(64, 9, bias=False)),
    "larger": lambda net: net.model.__setitem__(1, nn.Linear(64, 13)),
    "a hook": lambda net: net.model[2].register_forward_hook(lambda _, __, output: 2 * output),
    "mixed types": lambda net: net.model[1].double(),
    "not finite": lambda net: net.model[1].weight.data.fill_(float("nan")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_network_that_could_not_be_built_again_is_not_saved(name, tmp_path):
    network, asked = small_fcn()
    save_compressed(tmp_path, network, asked)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    CHANGES[name](network)
    with pytest.raises(InputError):
        save_compressed(tmp_path, network, asked)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_attributes_that_decide_what_is_computed_are_compared(tmp_path):
    network = brittle.build_model("vgg16", {"width": 1})
    network.features[1].eps = 0.1
    with pytest.raises(InputError, match=r"another module 'features.1': eps 0.1"):
        save_compressed(tmp_path, network, recipe("vgg16", {"width": 2}))


@pytest.mark.parametrize("fails", [MODEL, RECIPE])
def test_a_folder_is_whole_or_absent(fails, tmp_path, monkeypatch):
    network, asked = small_fcn()
    save_compressed(tmp_path, network, asked)

    def full(*_, **__):
        raise OSError("disk full")

    target = "save_state" if fails == MODEL else "write_text"
    monkeypatch.setattr(f"brittle.compression.folders.{target}", full)
    with pytest.raises(OSError, match="disk full"):
        save_compressed(tmp_path, network, asked)
    with pytest.raises(InputError, match=r"holds no recipe\.json"):
        load_compressed(tmp_path)


# What is no compressed network


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_compressed(folder, *small_fcn())
    return folder


def changed(saved, folder, change):
    shutil.copy(saved / MODEL, folder / MODEL)
    (folder / RECIPE).write_text(json.dumps(json.loads((saved / RECIPE).read_text()) | change))
    return folder


def test_what_is_written_back_as_it_was_is_read(saved, tmp_path):
    """The control of the tests below."""
    network, _ = load_run(changed(saved, tmp_path, {}))
    assert torch.equal(logits(network, digits()[0][:5]), logits(load_run(saved)[0], digits()[0][:5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"model.1": {"out_features": -1}}}, r"model.1.out_features: expected at least 1 and at most 12"),
        ({"sizes": {"model.1": {"out_features": 0}}}, "expected at least 1 and at most 12; got 0"),
        ({"sizes": {"model.1": {"out_features": 2**60}}}, "expected at least 1 and at most 12"),
        ({"sizes": {"model.1": {"out_features": 2**70}}}, RECIPE),
        ({"sizes": {"model.1": {"out_features": 13}}}, "expected at least 1 and at most 12; got 13"),
        ({"sizes": {"model.1": {"out_features": [9]}}}, "expected at least 1 and at most 12"),
        ({"sizes": {"model.1": {"out_features": "many"}}}, RECIPE),
        ({"sizes": {"model.1": {"forward": 3}}}, "model.1: expected some of in_features, out_features; got 'forward'"),
        ({"sizes": {"model.1": {"weight": [2, 2]}}}, "expected some of in_features, out_features; got 'weight'"),
        ({"sizes": {"model.9": {"out_features": 3}}}, "got 'model.9', which the architecture does not have"),
        ({"sizes": {"normalize": {"channels": 2}}}, "normalize.channels: expected at least 1 and at most 1; got 2"),
        ({"sizes": {"normalize": {"mean": [2**40]}}}, "normalize.mean: expected at least 1 and at most"),
        ({"sizes": {}}, "state: expected the model's names and shapes"),
        ({"sizes": 3}, RECIPE),
        ({"ranks": {"model.3": 2**60}}, "rank: expected less than 12"),
        ({"ranks": {}}, "model.3"),
        ({"ranks": {"model.3": 4}}, "state: expected the model's names and shapes"),
        ({"arguments": {"width": 2**23}}, "fcn: expected a network of at most 1048576 numbers"),
        ({"arguments": {"width": 2**60}}, "expected width of at most"),
        ({"arch": "os:getcwd"}, "arch: expected os:getcwd, of which .* and which is called"),
        ({"arch": None}, "arch: expected the name of an architecture"),
        ({"arch": "fnc"}, "arch: expected fnc, of which .* and which is called"),
        ({"mean": [], "std": []}, "expected names of the model's modules"),
        ({"std": [0.0]}, "mean, std"),
        ({"zeros": 1.5}, "expected a share of zeros from 0 to 1; got 1.5"),
        ({"classes": 0}, "expected classes of at least 1"),
        ({"input_shape": [1, -8, 8]}, "expected an input_shape"),
        ({"groups": [{"name": "a", "before": 4, "after": 5}]}, "groups.0: expected 0 <= after <= before"),
        ({"groups": [{"name": "a", "before": 4, "after": 3, "removed": [4]}]}, "groups.0: expected removed units"),
        ({"groups": [{"name": "a", "before": 4, "after": 2, "removed": [1, 1]}]}, "groups.0: expected removed units"),
        ({"groups": [{"name": "a", "before": 4, "after": 2, "removed": [1]}]}, "groups.0: expected 2 removed units"),
        ({"before": {"parameters": -1, "macs": None, "bytes": 0}}, "before: expected numbers of at least 0"),
        ({"schema_version": 2}, "schema_version"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_hostile_recipe_is_refused(change, message, saved, tmp_path):
    with pytest.raises(InputError, match=message):
        load_run(changed(saved, tmp_path, change))


def test_groups_have_to_divide_channels():
    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.GroupNorm(4, 8), nn.MultiheadAttention(8, 4))
    for sizes in ({"0": {"groups": 3}}, {"1": {"num_channels": 6}}, {"2": {"num_heads": 3}}):
        with pytest.raises(InputError, match="to divide"):
            resized(net, sizes)


def test_a_folder_without_weights_is_refused(saved, tmp_path):
    (changed(saved, tmp_path, {}) / MODEL).unlink()
    with pytest.raises(InputError, match="expected a file of weights"):
        load_run(tmp_path)


def test_a_folder_of_both_kinds_is_refused(saved, tmp_path):
    (changed(saved, tmp_path, {}) / CONFIG).write_text("{}")
    with pytest.raises(InputError, match="a run or a compressed network"):
        load_run(tmp_path)


def test_one_folder_is_one_network(saved, tmp_path):
    with pytest.raises(InputError, match="expected one that is not a compressed network's"):
        train_run(RunRequest(recipe=SHORT), brittle.load_data("digits", limit=32), changed(saved, tmp_path, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, RECIPE]
    (tmp_path / RECIPE).rename(tmp_path / CONFIG)
    with pytest.raises(InputError, match="expected one that is not a training run's"):
        save_compressed(tmp_path, *small_fcn())


def test_no_function_is_called_that_the_user_has_not_named(tmp_path):
    arch = "helpers.compressed:Kinds"
    save_compressed(tmp_path, filled(Kinds(3)), recipe(arch, {"width": 4}))
    for asked in (None, "fcn", "helpers.compressed:dense"):
        with pytest.raises(InputError, match=f"^arch: expected {arch}"):
            load_run(tmp_path, arch=asked)


# Going on from it


SHORT = Recipe(epochs=1, batch_size=32, lr=0.01, measure_every=0)


def test_a_compressed_network_is_fine_tuned_and_comes_back(saved, tmp_path):
    data = brittle.load_data("digits", split="train", limit=64)
    request = RunRequest(start=saved, recipe=SHORT)
    network, config = build_network(request, data)
    assert torch.equal(logits(network, digits()[0]), logits(load_run(saved)[0], digits()[0]))
    tuned = train_run(request, data, tmp_path / "run")
    again, other = load_run(tmp_path / "run")
    assert torch.equal(logits(again, digits()[0]), logits(tuned.model, digits()[0]))
    assert other.sizes == config.sizes != {}
    assert not torch.equal(logits(again, digits()[0]), logits(network, digits()[0]))


def test_a_compressed_network_gets_lower_ranks(saved, tmp_path):
    """What was removed before stays removed where a layer becomes a pair."""
    data = brittle.load_data("digits", split="train", limit=64)
    request = RunRequest(start=saved, rank=2, recipe=dataclasses.replace(SHORT, layers=("model.1", "model.5")))
    tuned = train_run(request, data, tmp_path)
    again, config = load_run(tmp_path)
    assert config.ranks == {"model.1": 2, "model.3": 3, "model.5": 2}
    assert [len(again.model[place][1].weight) for place in (1, 3, 5)] == [9, 7, 12]
    assert torch.equal(logits(again, digits()[0]), logits(tuned.model, digits()[0]))


def test_a_recipe_says_what_was_removed(saved):
    assert read_recipe(saved).groups == (GroupCut("conv1", 4, 2, (0, 3)),)
    assert rebuilt(read_recipe(saved)).model[1].out_features == 9
