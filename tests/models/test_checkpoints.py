"""Weights in files: exact round trips, and nothing that runs code."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from brittle.errors import InputError
from brittle.models.build import build_model, fcn, resnet18_cifar
from brittle.models.checkpoints import fill, read_state, save_state
from helpers.hostile import Hostile
from helpers.networks import seeded


class Wrapper(nn.Module):
    """A model whose names all begin as if DataParallel had wrapped it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


STATE = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor([1, 2]), "d": torch.ones((), dtype=torch.float16)}

# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "model", "shape"),
    [
        ("fcn", fcn(12, 7, 3, 4), (2, 3, 2, 2)),
        ("fcn", fcn(12, 5, 1, 4, bias=True), (2, 12)),
        ("resnet18-cifar", resnet18_cifar(3, 4, 1), (2, 1, 8, 8)),
    ],
)
def test_a_saved_model_comes_back_without_a_word_about_its_sizes(tmp_path, arch, model, shape):
    model(torch.rand(shape))  # moves the running statistics, where there are any
    save_state(model, tmp_path / "new" / "model.safetensors")
    state = read_state(tmp_path / "new" / "model.safetensors")
    again = build_model(arch, state=state, seed=99)
    fill(again, state)
    assert same(again.state_dict(), model.state_dict())
    x = torch.rand(shape)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_tied_and_strided_tensors_are_saved_under_each_name(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model[0].register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    save_state(model, tmp_path / "m.safetensors")
    state = read_state(tmp_path / "m.safetensors")
    assert sorted(state) == ["0.turned", "0.weight", "1.weight"]
    fill(model, state)
    assert torch.equal(state["0.turned"], model[0].turned)


def test_saving_leaves_no_other_file_and_replaces(tmp_path):
    for value in (1.0, 2.0):
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, value)
        save_state(model, tmp_path / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert read_state(tmp_path / "m.safetensors")["weight"] == 2


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    save_state(nn.Linear(1, 1), tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()

    def fails(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_state(nn.Linear(1, 1), tmp_path / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_saving_under_another_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"path: expected the ending \.safetensors; got .*m\.pt"):
        save_state(nn.Linear(1, 1), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_a_state_beside_tensors_cannot_be_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"epoch": 3}

    with pytest.raises(InputError, match="the state of Extra: expected only dense tensors by name; got dict"):
        save_state(Extra(1, 1), tmp_path / "m.safetensors")


# --- read_state: what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m"])
def test_torch_files_of_any_ending(tmp_path, options, name):
    assert same(read_state(saved(tmp_path / name, OrderedDict(STATE), **options)), STATE)


@pytest.mark.parametrize("name", ["m.safetensors", "M.SAFETENSORS"])
def test_safetensors_files(tmp_path, name):
    safetensors.torch.save_file(STATE, tmp_path / name)
    state = read_state(tmp_path / name)
    assert same(dict(sorted(state.items())), STATE)


def test_parameters_come_back_as_plain_tensors(tmp_path):
    state = read_state(saved(tmp_path / "m.pt", {"w": nn.Parameter(torch.ones(2))}))
    assert type(state["w"]) is torch.Tensor
    assert not state["w"].requires_grad


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"model_state_dict": s},
        lambda s: {"state_dict_ema": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"state_dict": s, "state_dict_ema": {"a": torch.zeros(1)}},
        lambda s: {"model": "resnet18", "state_dict": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    ],
)
def test_wrapped_states_are_unwrapped(tmp_path, wrap):
    assert same(read_state(saved(tmp_path / "m.pt", wrap(STATE))), STATE)


def test_names_that_only_look_wrapped_are_kept(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1), "model": torch.ones(1)}
    assert same(read_state(saved(tmp_path / "m.pt", state)), state)


def test_a_model_with_a_part_called_module_survives_the_round_trip(tmp_path):
    model, again = (Wrapper(build_model("fcn", {"in_features": 4, "width": 3}, seed=s)) for s in (0, 1))
    save_state(model, tmp_path / "m.safetensors")
    fill(again, read_state(tmp_path / "m.safetensors"))
    assert same(again.state_dict(), model.state_dict())
    fill(again, model.state_dict())


# --- read_state: what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict, tensors by name; got list"),
        (torch.ones(2), "expected a state dict, tensors by name; got Tensor"),
        ({}, "expected a state dict, tensors by name; got an empty dict"),
        ({"state_dict": {}}, "got an empty dict"),
        ({"a": torch.ones(1), "epoch": 3}, "only dense tensors by name; got int under 'epoch'"),
        ({0: torch.ones(1)}, "got Tensor under 0"),
        ({"a": torch.eye(2).to_sparse()}, "only dense tensors"),
        ({"a": torch.ones(3), "w": torch.tensor([1.0, float("nan")])}, "got 1 NaN or infinite ones of 2 in 'w'"),
        ({"w": torch.tensor([1.0, float("inf"), -float("inf")]).half()}, "got 2 NaN or infinite ones of 3 in 'w'"),
        ({"w": torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)}, "got 1 NaN or infinite ones of 2 in 'w'"),
    ],
)
def test_contents_are_checked(tmp_path, content, message):
    path = saved(tmp_path / "m.pt", content)
    with pytest.raises(InputError, match=message) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def test_a_state_that_contains_itself_is_refused(tmp_path):
    for way in ("model", "state_dict"):
        content: dict[str, object] = {"w": torch.ones(2)}
        content[way] = {"model": content} if way == "state_dict" else content
        with pytest.raises(InputError, match=f"only dense tensors by name; got dict under '{way}'"):
            read_state(saved(tmp_path / "m.pt", content))


def test_tensors_that_claim_more_values_than_they_store_are_refused(tmp_path):
    for tensor in (
        torch.ones(1).expand(2**32),
        torch.ones(3, 1).expand(3, 4),
        torch.ones(9).as_strided((8, 8), (1, 0)),
    ):
        with pytest.raises(InputError, match=r"expected tensors that store all their values; got shape .* under 'w'"):
            read_state(saved(tmp_path / "m.pt", {"w": tensor}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(tmp_path):
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        with pytest.raises(InputError):
            read_state(saved(tmp_path / "m.pt", {"w": nested}))


def test_archives_that_grow_in_memory_are_not_unpacked(tmp_path):
    torch.save({"w": torch.zeros(10**7)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for info in whole.infolist():
            bomb.writestr(info.filename, whole.read(info), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"uncompressed; got members of 4\d{7} bytes in a file of \d{5}$"):
        read_state(tmp_path / "bomb.pt")


@pytest.mark.timeout(20)
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.pt")
    with pytest.raises(InputError, match="got no regular file there"):
        read_state(tmp_path / "m.pt")


def refused(path: Path) -> str:
    with pytest.raises(InputError, match="code is never unpickled") as caught:
        read_state(path)
    message = str(caught.value)
    assert str(path) in message
    assert "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"state_dict": {"w": torch.ones(1)}, "extra": h}])
def test_hostile_checkpoints_are_not_run(tmp_path, options, wrap):
    trace = tmp_path / "trace"
    path = saved(tmp_path / "m.pt", wrap(Hostile(trace)), **options)
    assert ".mkdir" in refused(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it was a weapon


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["m.pkl", "m.safetensors"])
def test_hostile_pickles_are_not_run(tmp_path, protocol, name):
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps(Hostile(trace), protocol=protocol))
    with pytest.raises(InputError, match=name):
        read_state(tmp_path / name)
    assert not trace.exists()


def test_whole_modules_are_refused(tmp_path):
    assert "Linear" in refused(saved(tmp_path / "m.pt", nn.Linear(1, 1)))


def test_torchscript_is_refused(tmp_path, recwarn):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "m.pt")
    recwarn.clear()
    assert "TorchScript" in refused(tmp_path / "m.pt")
    assert not recwarn.list


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: b"hello world\n", lambda c: c[: len(c) // 2], lambda c: c[9:]]
)
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_broken_files(tmp_path, damage, name):
    path = tmp_path / name
    state = {"w": torch.ones(500)}
    torch.save(state, path) if name == "m.pt" else safetensors.torch.save_file(state, path)
    path.write_bytes(damage(path.read_bytes()))
    expected = r"(whole checkpoint of torch\.save|plain tensors)" if name == "m.pt" else "whole safetensors file"
    with pytest.raises(InputError, match=rf"{name}: .*{expected}") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


def test_wrong_endings(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "m.pt")
    refused(tmp_path / "m.pt")
    saved(tmp_path / "m.safetensors", STATE)
    with pytest.raises(InputError, match="expected a whole safetensors file"):
        read_state(tmp_path / "m.safetensors")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt: expected a file of weights .*; got nothing there"):
        read_state(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"expected a file of weights .*; got a folder there"):
        read_state(tmp_path)


# --- fill ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_fill_keeps_the_models_dtype(kind):
    model, state = fcn(4, 3, 2, 2).to(kind), fcn(4, 3, 2, 2).state_dict()
    fill(model, state)
    assert all(p.dtype == kind for p in model.parameters())
    assert all(torch.equal(p, state[name].to(kind)) for name, p in model.named_parameters())


def test_fill_copies():
    model, state = nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    fill(model, state)
    state["weight"].zero_()
    assert (model.weight == 1).all()
    assert model.weight.requires_grad


def test_old_checkpoints_without_batch_counters_fill_a_model():
    """As ``load_state_dict(strict=True)`` takes them: torch's batch norms count batches only since version 0.4.1."""
    model, state = (seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), seed) for seed in (0, 1))
    model[1].num_batches_tracked.fill_(7)
    old = {f"module.{key}": tensor for key, tensor in state.state_dict().items() if "num_batches" not in key}
    fill(nn.DataParallel(model), old)
    fill(model, {key.removeprefix("module."): tensor for key, tensor in old.items()})
    assert same(model.state_dict(), state.state_dict() | {"1.num_batches_tracked": torch.tensor(7)})


FITTING = fcn(4, 3, 6, 2).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"3.weight": None}, r"missing: 3\.weight$"),
        (dict.fromkeys(FITTING), r"missing: 1\.weight, 3\.weight, 5\.weight and 3 more$"),
        ({"x": torch.ones(1)}, r"unexpected: x$"),
        (dict.fromkeys("xyz", torch.ones(1)), r"unexpected: x, y, z$"),
        ({"1.weight": torch.ones(4, 3)}, r"shapes: 1\.weight expected \(3, 4\), got \(4, 3\)$"),
        ({"1.weight": torch.ones(3, 4, dtype=torch.complex64)}, r"real and complex mixed: 1\.weight"),
        (
            {"1.weight": torch.full((3, 4), float("nan"))},
            r"state: expected finite weights; got 12 NaN or infinite ones of 12 in '1\.weight'",
        ),
        (
            {"1.weight": torch.full((3, 4), 1e300, dtype=torch.float64)},
            r"got 12 NaN or infinite ones of 12 in '1\.weight'",
        ),
        (
            {"11.weight": None, "y": torch.ones(1), "1.weight": torch.ones(1)},
            r"missing: 11.*; unexpected: y; shapes: 1\.",
        ),
    ],
)
def test_fill_refuses_and_leaves_the_model_untouched(change, message):
    model = fcn(4, 3, 6, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {k: v for k, v in {**FITTING, **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        fill(model, state)
    assert same(model.state_dict(), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["meta", "quantised"])
def test_tensors_without_plain_values_are_refused(kind, tmp_path):
    tensor = torch.empty(2, 3, device="meta")
    if kind == "quantised":
        tensor = torch.quantize_per_tensor(torch.rand(2, 3), 0.1, 0, torch.qint8)
    torch.save({"w": tensor}, tmp_path / "w.pt")
    with pytest.raises(InputError):
        read_state(tmp_path / "w.pt")


def test_a_length_that_lies_takes_no_memory(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"\x80\x02X\xff\xff\xff\x7f.")  # text of 2 GB, as checkpoints were once written
    tracemalloc.start()
    with pytest.raises(InputError, match=r"net\.pt: expected"):
        read_state(tmp_path / "net.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
