"""States on disk: exact, and whole whatever moment the process is killed at."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from brittle.errors import InputError
from brittle.training import snapshots
from brittle.training.snapshots import (
    STATE,
    optimizer_tensors,
    read_snapshot,
    remove_snapshot,
    restore_optimizer,
    under_prefix,
    with_prefix,
    write_snapshot,
)
from helpers.kills import at_every_operation
from helpers.networks import convnet, digits, generator, seeded


def state(n):
    return {"w": torch.full((3, 2), float(n)), "n": torch.tensor(n)}, {"n": n}


def whole(folder):
    """Which state the folder holds: tensors and facts are of one."""
    found = read_snapshot(folder)
    if found is None:
        return None
    tensors, facts = found
    n = facts["n"]
    assert sorted(tensors) == ["n", "w"]
    assert int(tensors["n"]) == n
    assert bool((tensors["w"] == n).all())
    return n


def test_a_state_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "half": torch.randn(4, generator=generator(0)).bfloat16(),
        "double": torch.tensor([0.1, -0.0, 1e-310, torch.inf], dtype=torch.float64),
        "nan": torch.tensor([torch.nan]),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).mT,
        "with.dots": torch.ones(1, requires_grad=True),
    }
    tensors["shared"] = tensors["scalar"]
    facts = {"x": 0.1 + 0.2, "deep": {"list": [1, None, "ü"]}, "tiny": 5e-324}
    write_snapshot(tmp_path / "new" / "folder", tensors, facts, 1)
    found, told = read_snapshot(tmp_path / "new" / "folder")
    assert {name: told[name] for name in facts} == facts
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        expected = tensor.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(found[name].flatten().view(torch.uint8), expected)


def test_no_state(tmp_path):
    assert read_snapshot(tmp_path) is None
    assert read_snapshot(tmp_path / "missing") is None
    remove_snapshot(tmp_path)


def test_a_later_state_replaces_an_earlier_one(tmp_path):
    (tmp_path / "state-notes.txt").write_text("the user's")
    for n in (1, 2, 10):
        write_snapshot(tmp_path, *state(n), n)
        assert whole(tmp_path) == n
        assert len(list(tmp_path.glob("state-*.safetensors"))) == 1
    remove_snapshot(tmp_path)
    assert read_snapshot(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["state-notes.txt"]


def test_killed_at_every_operation_of_a_write_a_whole_state_is_found(tmp_path):
    folder, seen = tmp_path / "0", []
    write_snapshot(folder, *state(1), 1)
    for number in at_every_operation(lambda: write_snapshot(folder, *state(2), 2)):  # noqa: B023 - called at once
        seen.append(whole(folder))
        write_snapshot(folder, *state(3), 3)
        assert whole(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == ["state-000000003.safetensors", STATE]
        folder = tmp_path / f"{number + 1}"
        write_snapshot(folder, *state(1), 1)
    assert seen == sorted(seen)  # once the new state is there it stays
    assert set(seen) == {1, 2}
    assert len(seen) > 6


def test_killed_at_every_operation_of_the_first_write_nothing_or_a_state_is_found(tmp_path):
    folder, seen = tmp_path / "0", []
    for number in at_every_operation(lambda: write_snapshot(folder, *state(2), 2)):  # noqa: B023 - called at once
        seen.append(whole(folder))
        folder = tmp_path / f"{number + 1}"
    assert set(seen) == {None, 2}


def test_killed_at_every_operation_of_a_removal_nothing_or_a_state_is_found(tmp_path):
    folder, seen = tmp_path / "0", []
    write_snapshot(folder, *state(1), 1)
    for number in at_every_operation(lambda: remove_snapshot(folder)):  # noqa: B023 - called at once
        seen.append(whole(folder))
        folder = tmp_path / f"{number + 1}"
        write_snapshot(folder, *state(1), 1)
    assert set(seen) == {None, 1}


def test_facts_that_json_cannot_hold_leave_the_state_before(tmp_path):
    write_snapshot(tmp_path, *state(1), 1)
    with pytest.raises(ValueError, match="JSON"):
        write_snapshot(tmp_path, {}, {"n": float("nan")}, 2)
    assert whole(tmp_path) == 1


def test_a_truncated_description_is_refused(tmp_path):
    write_snapshot(tmp_path, *state(1), 1)
    content = (tmp_path / STATE).read_bytes()
    for length in range(len(content.rstrip())):
        (tmp_path / STATE).write_bytes(content[:length])
        with pytest.raises(InputError, match="state"):
            read_snapshot(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"tensors": 3}',
        b'{"tensors": "state-7.safetensors"}',
        b'{"tensors": ""}',
        b"\xff\xfe\0",
    ],
)
def test_a_foreign_description_is_refused(tmp_path, content):
    write_snapshot(tmp_path, *state(1), 1)
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(InputError, match="state cannot be read"):
        read_snapshot(tmp_path)


def test_truncated_tensors_are_refused(tmp_path):
    write_snapshot(tmp_path, *state(1), 1)
    path = tmp_path / "state-000000001.safetensors"
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="state cannot be read"):
            read_snapshot(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="state cannot be read"):
        read_snapshot(tmp_path)


def test_no_file_outside_of_the_folder_is_read(tmp_path):
    folder = tmp_path / "run"
    write_snapshot(folder, *state(1), 1)
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (folder / STATE).write_text(json.dumps({"tensors": name, "n": 1}))
        with pytest.raises(InputError, match="state cannot be read"):
            read_snapshot(folder)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.01),
}


def steps(net, optimizer, count):
    x, y = digits("train")
    for number in range(count):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[number : number + 16]), y[number : number + 16]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name, tmp_path):
    net = convnet()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    steps(net, optimizer, 3)
    write_snapshot(tmp_path, with_prefix("model", net.state_dict()) | optimizer_tensors(optimizer), {}, 3)
    steps(net, optimizer, 3)
    tensors, _ = read_snapshot(tmp_path)
    other = convnet()
    other.load_state_dict(under_prefix("model", tensors))
    resumed = OPTIMIZERS[name](list(other.parameters()))
    restore_optimizer(resumed, tensors)
    steps(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    fresh = convnet()
    fresh.load_state_dict(under_prefix("model", tensors))
    steps(fresh, OPTIMIZERS[name](list(fresh.parameters())), 3)
    same = all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))
    assert same == (name == "plain sgd")  # without its state the others would go elsewhere


def test_the_options_of_an_optimizer_stay_its_own():
    net = seeded(lambda: nn.Linear(2, 2))
    old, new = (
        torch.optim.SGD(net.parameters(), 0.5, momentum=0.9),
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.3),
    )
    net(torch.ones(1, 2)).sum().backward()
    old.step()
    restore_optimizer(new, optimizer_tensors(old))
    assert new.param_groups[0]["lr"] == 0.1
    assert new.param_groups[0]["momentum"] == 0.3
    assert torch.equal(new.state[net.weight]["momentum_buffer"], old.state[net.weight]["momentum_buffer"])


def test_prefixes_are_taken_off_as_they_were_put_on():
    tensors = {"a": torch.zeros(1), "model.b": torch.ones(1)}
    mixed = with_prefix("model", tensors) | with_prefix("model2", {"c": torch.ones(2)}) | {"model": torch.ones(3)}
    found = under_prefix("model", mixed)
    assert list(found) == list(tensors)
    assert all(found[name] is tensor for name, tensor in tensors.items())


def test_the_file_names_are_those_that_are_documented(tmp_path):
    write_snapshot(tmp_path, *state(1), 12)
    assert snapshots.STATE == "state.json"
    assert (tmp_path / "state.json").is_file()
    assert len(list(tmp_path.glob("state-*.safetensors"))) == 1
