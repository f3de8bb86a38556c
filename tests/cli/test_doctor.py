"""What ``brittle doctor`` finds, and how it says what is missing."""

import dataclasses
import json
import struct

from brittle.cli.commands import run
from brittle.cli.doctor import Extra, checkup_lines, examine, installed


def test_versions_devices_and_data_sets(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 2, 28, 28) + bytes(2 * 28 * 28))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 2) + bytes([1, 2]))
    found = examine(tmp_path)
    assert found.data["mnist"] == "found"
    assert "nothing is downloaded" in found.data["cifar10"]
    assert "cpu" in found.devices
    assert found.threads >= 1
    assert found.torch_error is None
    assert found.packages["torch"] == installed("torch") is not None


def test_what_is_missing_comes_with_the_command_that_installs_it():
    extra = Extra({"timm": "1.0", "torchvision": installed("no-package-of-that-name")}, "pip install 'brittle[vision]'")
    found = dataclasses.replace(examine(None), extras={"vision": extra})
    assert "  vision: timm 1.0; missing torchvision: pip install 'brittle[vision]'" in [*checkup_lines(found)]


def test_the_findings_as_json(capsys):
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["brittle"]
    assert document["data"] == {}
