"""A run's folder: from it alone the very network comes back, and what is no run is refused."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch import nn

import brittle
from brittle.compression.rebuild import rebuilt
from brittle.data.load import Data, load_data
from brittle.errors import InputError
from brittle.training import Adversary, Recipe
from brittle.training.runs import (
    CONFIG,
    RunConfig,
    RunRequest,
    build_network,
    load_run,
    run_config,
    train_run,
)
from helpers.networks import digits, untouched
from helpers.trainings import Interrupted, stopped_in

SHORT = Recipe(epochs=1, batch_size=32, lr=0.01, measure_every=0)


def samples(n=80):
    return load_data("digits", split="train", limit=n)


def images(channels=3, side=32, classes=7, n=4):
    x = torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0))
    return Data("npz:somewhere.npz", x, torch.arange(n) % classes, classes, {math.inf: 0.1, 2.0: 0.5})


def logits(network):
    with torch.no_grad():
        return network.eval()(digits("test")[0][:30])


REQUESTS = {
    "fcn": RunRequest("fcn", {"width": 16, "depth": 3}, recipe=SHORT),
    "pairs": RunRequest("fcn", {"width": 16, "depth": 3}, rank=4, recipe=SHORT),
    "pairs, a share": RunRequest("fcn", {"width": 16, "depth": 4}, rank=0.25, recipe=SHORT),
    "one pair": RunRequest(
        "fcn", {"width": 16, "depth": 4}, rank=2, recipe=dataclasses.replace(SHORT, layers=("model.3",))
    ),
    "resnet, pairs": RunRequest("resnet18-cifar", {"width": 2}, rank=0.5, recipe=SHORT),
    "vit, heads": RunRequest("vit", {"width": 12, "depth": 2, "heads": 4, "patch_size": 4}, recipe=SHORT),
    "statistics": RunRequest("fcn", {"width": 8, "bias": True}, statistics=((0.2,), (0.7,)), recipe=SHORT),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_very_network_is_built_again(name, tmp_path):
    result = train_run(REQUESTS[name], samples(), tmp_path)
    network, config = load_run(tmp_path)
    assert torch.equal(logits(network), logits(result.model))
    assert str(network) == str(result.model)
    assert not any(module.training for module in network.modules())
    assert config == run_config(tmp_path)
    assert config.recipe == REQUESTS[name].recipe
    assert (config.arch, config.classes, config.input_shape) == (REQUESTS[name].arch, 10, (1, 8, 8))
    assert bool(config.ranks) == (REQUESTS[name].rank is not None)
    other = rebuilt(config)
    assert str(other) == str(network)
    assert not torch.equal(logits(other), logits(network))
    assert {n: tuple(t.shape) for n, t in other.state_dict().items()} == {
        n: tuple(t.shape) for n, t in network.state_dict().items()
    }


def test_heads_are_no_shape_and_matter():
    """Another number of heads has the same weights and other logits: only the configuration tells."""
    config = build_network(REQUESTS["vit, heads"], samples())[1]
    assert config.arguments["heads"] == 4
    changed = dataclasses.replace(config, arguments={**config.arguments, "heads": 2})
    assert not torch.allclose(logits(rebuilt(config)), logits(rebuilt(changed)), atol=1e-4)


def test_the_configuration_says_all(tmp_path):
    recipe = Recipe(
        epochs=1,
        penalties={"l1": 1e-4},
        constraints={"frobenius": None, "spectral_cap": 3.0},
        adversary=Adversary(0.1, steps=1),
        layers=("model.1",),
        milestones=(0.3, 0.9),
        schedule="step",
        patience=4,
        measure_every=0,
    )
    request = RunRequest(
        "fcn", {"width": 16}, data_root=tmp_path / "data", limit=80, image_size=(8, 8), recipe=recipe, start=None
    )
    train_run(request, samples(), tmp_path / "run")
    found = run_config(tmp_path / "run")
    assert found.recipe == recipe
    assert found.recipe.adversary.p == math.inf
    assert (found.data, found.data_root, found.limit, found.image_size) == (
        "digits",
        str(tmp_path / "data"),
        80,
        (8, 8),
    )
    assert found.mean == (0.3049,)
    assert found.std == (0.3758,)
    assert found.version == brittle.__version__
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    ("arch", "given", "fitted"),
    [
        ("fcn", {}, {"in_features": 3 * 32 * 32, "classes": 7}),
        ("resnet18-cifar", {"width": 4}, {"in_channels": 3, "classes": 7}),
        ("vgg16", {"width": 4}, {"in_channels": 3, "classes": 7}),
        ("wide-resnet101-2", {"width": 2}, {"in_channels": 3, "classes": 7}),
        ("vit", {"width": 12, "depth": 1, "heads": 2}, {"in_channels": 3, "classes": 7, "image_size": 32}),
        ("torchvision:resnet18", {}, {"num_classes": 7}),
    ],
)
def test_arguments_follow_from_the_data(arch, given, fitted):
    if arch.startswith("torchvision"):
        pytest.importorskip("torchvision")
    data = images()
    network, config = build_network(RunRequest(arch, given), data)
    assert config.arguments == given | fitted
    with torch.no_grad():
        assert network.eval()(data.inputs).shape == (4, 7)
    assert torch.allclose(network.normalize.mean, data.inputs.mean((0, 2, 3)), atol=1e-5)


def test_greyscale_images_have_one_channel():
    data = images(channels=1)
    for arch in ("fcn", "resnet18-cifar", "vgg16", "vit"):
        network, _ = build_network(RunRequest(arch, {"width": 12}), data)
        with torch.no_grad():
            assert network.eval()(data.inputs).shape == (4, 7)


def test_arguments_that_are_given_win():
    assert build_network(RunRequest("fcn", {"width": 4, "classes": 12}), samples())[1].arguments["classes"] == 12


def test_the_seed_draws_the_weights():
    def first(seed):
        return build_network(RunRequest("fcn", {"width": 4}, recipe=Recipe(seed=seed)), samples())[0].model[1].weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_global_state_stays(tmp_path):
    with untouched(None):
        train_run(REQUESTS["pairs"], samples(), tmp_path)
        load_run(tmp_path)


# Fine-tuning


@pytest.mark.parametrize("whole", [True, False], ids=["with its normalisation", "the architecture alone"])
def test_fine_tuning_starts_from_a_file(whole, tmp_path):
    net = brittle.build_model("fcn", {"in_features": 64, "width": 16}, seed=5)
    whole_net = nn.Sequential()
    whole_net.add_module("normalize", brittle.Normalize((0.3049,), (0.3758,)))
    whole_net.add_module("model", net)
    brittle.save_state(whole_net if whole else net, tmp_path / "w.safetensors")
    request = RunRequest("fcn", {"width": 16}, start=tmp_path / "w.safetensors", recipe=SHORT)
    network, config = build_network(request, samples())
    assert torch.equal(network.model[1].weight, net[1].weight)
    assert torch.equal(logits(network), logits(whole_net))
    assert config.start == str(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["fcn", "pairs", "vit, heads", "statistics"])
def test_fine_tuning_starts_from_a_run(name, tmp_path):
    result = train_run(REQUESTS[name], samples(), tmp_path / "first")
    request = RunRequest(
        REQUESTS[name].arch, statistics=REQUESTS[name].statistics, start=tmp_path / "first", recipe=SHORT
    )
    network, _ = build_network(request, samples())
    assert torch.equal(logits(network), logits(result.model))
    tuned = train_run(request, samples(), tmp_path / "second")
    assert torch.equal(logits(load_run(tmp_path / "second")[0]), logits(tuned.model))
    assert not torch.equal(logits(tuned.model), logits(result.model))
    assert torch.equal(logits(load_run(tmp_path / "first")[0]), logits(result.model))


def test_a_run_is_fine_tuned_at_a_low_rank(tmp_path):
    """The pairs start as the best approximation of the trained layer (Eckart & Young 1936)."""
    full = train_run(REQUESTS["fcn"], samples(), tmp_path).model
    network, config = build_network(RunRequest("fcn", start=tmp_path, rank=3, recipe=SHORT), samples())
    assert config.ranks
    assert set(config.ranks.values()) == {3}
    for name in config.ranks:
        W = full.get_submodule(name).weight.detach().double()
        first, second = network.get_submodule(name)
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        best = (U[:, :3] * sigma[:3]) @ Vh[:3]
        torch.testing.assert_close((second.weight @ first.weight).double(), best, rtol=0, atol=1e-5)


def test_a_run_of_another_kind_is_not_fine_tuned(tmp_path):
    train_run(REQUESTS["fcn"], samples(), tmp_path)
    for request in (
        RunRequest("resnet18-cifar", start=tmp_path),
        RunRequest("fcn", start=tmp_path, statistics=((0.0,), (1.0,))),
    ):
        with pytest.raises(InputError, match="fine_tune"):
            build_network(request, samples())


def test_other_arguments_than_those_of_the_run_are_refused(tmp_path):
    train_run(REQUESTS["fcn"], samples(), tmp_path)
    with pytest.raises(InputError):
        build_network(RunRequest("fcn", {"width": 99}, start=tmp_path), samples())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    net = brittle.build_model("fcn", {"in_features": 64, "width": 8})
    brittle.save_state(net, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"state: expected the model\'s names and shapes; got shapes: "):
        build_network(RunRequest("fcn", {"width": 16}, start=tmp_path / "w.safetensors"), samples())
    with pytest.raises(InputError, match="got nothing there"):
        build_network(RunRequest("fcn", start=tmp_path / "missing.safetensors"), samples())


# Folders that are none


def test_what_is_no_run_is_refused(tmp_path):
    for call in (load_run, run_config):
        with pytest.raises(InputError, match=CONFIG):
            call(tmp_path)


def test_a_folder_may_be_given_as_text(finished):
    (network, config), (same, other) = load_run(finished), load_run(str(finished))
    assert config == other == run_config(str(finished))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True))


def test_a_run_calls_no_function_that_its_user_has_not_named(finished, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from pathlib import Path\nfrom brittle import build_model\n\n\n"
        "def network(**arguments):\n"
        f"    Path({str(tmp_path / 'called')!r}).touch()\n"
        "    return build_model('fcn', arguments)\n"
    )
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = json.loads((folder / CONFIG).read_text()) | {"arch": "theirs:network"}
    (folder / CONFIG).write_text(json.dumps(config))
    for arch in (None, "theirs:other", "fcn"):
        with pytest.raises(InputError, match=r"^arch: .* theirs:network"):
            load_run(folder, arch=arch)
    with pytest.raises(InputError, match=r"^arch: .* theirs:network"):
        train_run(RunRequest(start=folder, recipe=SHORT), samples(), tmp_path / "other")
    assert not (tmp_path / "called").exists()
    network, _ = load_run(folder, arch="theirs:network")
    assert (tmp_path / "called").exists()
    assert torch.equal(logits(network), logits(load_run(finished, arch="fcn")[0]))


def test_an_unfinished_run_is_refused(tmp_path):
    train_run(REQUESTS["fcn"], samples(), tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(InputError, match="not finished"):
        load_run(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_run(REQUESTS["pairs"], samples(), folder)
    return folder


def test_a_configuration_that_is_written_back_as_it_was_is_read(finished, tmp_path):
    """The control of the tests below."""
    config = json.loads((finished / CONFIG).read_text())
    network, _ = load_run(hostile(finished, tmp_path, json.dumps(config)))
    assert torch.equal(logits(network), logits(load_run(finished)[0]))


def hostile(finished, folder, text):
    (folder / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)
    (folder / "weights.safetensors").write_bytes((finished / "weights.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": None},
        {"arch": "nothing"},
        {"arch": "os:getcwd"},
        {"arch": "torchvision:nothing"},
        {"arch": 3},
        {"arguments": {"width": "wide"}},
        {"arguments": {"width": 1e300}},
        {"arguments": {"width": float("nan")}},
        {"arguments": {"nothing": 1}},
        {"arguments": []},
        {"mean": [float("nan")]},
        {"mean": [0.1, 0.2]},
        {"std": [0.0]},
        {"std": [float("inf")]},
        {"ranks": {"model.1": 5}},
        {"ranks": {"model.1": -1}},
        {"ranks": {"model.77": 4}},
        {"ranks": {"model.1": "x"}},
        {"ranks": {}},
        {"classes": "ten"},
        {"input_shape": [1, "a"]},
        {"recipe": {"lr": float("nan")}},
        {"recipe": {"lr": -1}},
        {"recipe": {"epochs": 0}},
        {"recipe": {"adversary": {"eps": -1}}},
        {"recipe": 3},
        {"recipe": None},
        {"image_size": [8]},
    ],
    ids=json.dumps,
)
def test_a_hostile_configuration_is_refused(change, finished, tmp_path):
    config = json.loads((finished / CONFIG).read_text())
    with pytest.raises(InputError):
        load_run(hostile(finished, tmp_path, json.dumps(config | change)))


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(RunConfig)])
def test_a_configuration_without_a_required_field_is_refused(key, finished, tmp_path):
    config = json.loads((finished / CONFIG).read_text())
    del config[key]
    required = key in ("arch", "arguments", "mean", "std", "ranks", "input_shape", "classes", "data", "schema_version")
    folder = hostile(finished, tmp_path, json.dumps(config))
    if required:
        with pytest.raises(InputError, match=key):
            load_run(folder)
    else:
        load_run(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", b"\xff\xfe", "{}", "[" * 100_000], ids=lambda text: str(text)[:9]
)
def test_a_configuration_that_is_none_is_refused(text, finished, tmp_path):
    with pytest.raises(InputError):
        load_run(hostile(finished, tmp_path, text))


def test_weights_that_are_truncated_are_refused(finished, tmp_path):
    folder = hostile(finished, tmp_path, (finished / CONFIG).read_bytes())
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="safetensors"):
        load_run(folder)


# Going on


TWO = RunRequest("fcn", {"width": 16}, recipe=dataclasses.replace(SHORT, epochs=2))


def test_an_interrupted_run_goes_on(tmp_path):
    with pytest.raises(Interrupted):
        train_run(TWO, samples(), tmp_path / "a", callback=stopped_in(2))
    moments = []
    train_run(TWO, samples(), tmp_path / "a", callback=moments.append)
    train_run(TWO, samples(), tmp_path / "b")
    assert {moment.epoch for moment in moments} == {2}
    for name in ("weights.safetensors", CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_refused_run_leaves_the_configuration(tmp_path):
    with pytest.raises(Interrupted):
        train_run(TWO, samples(), tmp_path, callback=stopped_in(2))
    before = (tmp_path / CONFIG).read_bytes()
    with pytest.raises(InputError, match="another recipe"):
        train_run(dataclasses.replace(TWO, recipe=dataclasses.replace(TWO.recipe, lr=0.5)), samples(), tmp_path)
    assert (tmp_path / CONFIG).read_bytes() == before
