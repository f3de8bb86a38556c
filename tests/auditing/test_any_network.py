"""Networks in whatever form they come are audited with the numbers of the plain module."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import brittle
from brittle.errors import InputError
from brittle.evaluation import Threat, attack
from brittle.results import Audit
from helpers.networks import few, mlp, untouched

QUICK = Threat(partial(brittle.apgd, steps=3))
X, Y = few(24)


class Answering(nn.Module):
    """The digits network with its logits somewhere in the answer."""

    def __init__(self, answer):
        super().__init__()
        self.inner, self.answer = mlp(), answer

    def forward(self, x):
        return self.answer(self.inner(x))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


ANSWERS = {
    "object": (lambda z: Output(z), "Output.logits"),
    "dictionary": (lambda z: {"loss": None, "logits": z}, "dict.logits"),
    "tuple": (lambda z: (z, z.exp()), "in the tuple"),
    "after None": (lambda z: [None, z], "in the list"),
}


def judged(result):
    """What a threat found, without what depends on names."""
    return [(e.clean_correct, e.robust_correct, e.n, e.chance) for e in result.evaluations]


@pytest.fixture(scope="module")
def plain():
    return judged(attack(mlp(), (X, Y), QUICK, honesty=False))


@pytest.mark.parametrize("form", ANSWERS)
def test_logits_are_found_in_the_answer_and_the_result_says_where(form, plain):
    answer, where = ANSWERS[form]
    net = Answering(answer)
    with untouched(net):
        result = attack(net, (X, Y), QUICK, honesty=False)
    assert judged(result) == plain
    assert result.signature.settings["logits"] == where
    assert result.model == "Answering"


def test_an_answer_without_logits_is_refused_with_what_it_holds():
    with pytest.raises(InputError, match=r"expected a tensor of logits .* got dict of out, aux"):
        attack(Answering(lambda z: {"out": z, "aux": z}), (X, Y), QUICK)


def test_a_network_whose_answer_holds_logits_is_audited_under_its_own_names():
    net = Answering(ANSWERS["object"][0])
    audit = brittle.audit(net, (X, Y), QUICK, p=2, honesty=False)
    assert [layer.name for layer in audit.layers] == [layer.name for layer in brittle.audit(net).layers]
    assert [response.layer for response in audit.norm(2).responses] == [layer.name for layer in audit.layers]
    assert audit.norm(2).lipschitz.upper == brittle.audit(mlp(), p=2).norm(2).lipschitz.upper


def test_a_transformer_of_hugging_face_needs_no_wrapping():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=10,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config)
    batches = [{"pixel_values": X[:16], "labels": Y[:16]}, {"pixel_values": X[16:], "labels": Y[16:]}]
    with untouched(net):
        result = attack(net, batches, QUICK, honesty=False)
    wrapped = attack(brittle.models.Logits(net).eval(), (X, Y), QUICK, honesty=False)
    assert judged(result) == judged(wrapped)
    assert result.signature.settings["logits"] == "ImageClassifierOutput.logits"
    assert result.signature.settings["batches"] == "dictionaries: pixel_values as inputs, labels as labels"


def test_a_function_is_audited_but_for_what_it_does_not_show(plain):
    net = mlp()

    def answers(x):
        return net(x)

    audit = brittle.audit(answers, (X, Y), QUICK, honesty=False)
    assert [(norm.evaluation.clean_correct, norm.evaluation.robust_correct) for norm in audit.norms] == [
        row[:2] for row in plain
    ]
    assert audit.model == "answers"
    assert audit.layers == ()
    assert audit.parameters == 0
    reasons = {item.name: item.reason for item in audit.not_measured}
    assert {"layers", "certified ℓ₂ bound"} <= reasons.keys()
    assert "function" in reasons["layers"]
    assert audit.norm(2).lipschitz.lower > 0
    assert "weights none" in audit.signature.line
    assert Audit.from_json(audit.to_json()) == audit


def test_a_function_of_numpy_is_attacked_by_queries():
    weights = [tensor.numpy() for tensor in (mlp()[1].weight.detach(), mlp()[1].bias.detach())]

    def answers(x):
        return x.numpy().reshape(len(x), -1) @ weights[0].T + weights[1]

    audit = brittle.audit(answers, (X.numpy().astype(np.float64), Y.numpy()), Threat("fast"), p=2, honesty=False)
    assert [name.partition("(")[0] for name in audit.norm(2).evaluation.attacks] == ["square"]
    assert {"local gradient norms", "layers"} <= {item.name for item in audit.not_measured}


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_has_the_numbers_of_its_network(dynamic, plain):
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    program = torch.export.export(mlp(), (X[:3],), dynamic_shapes=shapes)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    assert judged(attack(program, (X, Y), QUICK, honesty=False)) == plain
    assert judged(attack(program.module(), (X, Y), QUICK, honesty=False)) == plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())


def test_what_cannot_be_called_is_refused():
    with pytest.raises(InputError, match="model: expected a network, or a function from inputs to logits; got str"):
        attack("net.pt", (X, Y), QUICK)


def test_networks_whose_answers_hold_logits_are_compared():
    pair = [Answering(ANSWERS["object"][0]), mlp()]
    result = brittle.compare(pair, (X, Y), QUICK, p=2)
    assert result.networks[0].evaluations[0].robust_correct == result.networks[1].evaluations[0].robust_correct
    assert result.networks[0].size.macs == result.networks[1].size.macs


def test_weights_by_name_are_audited_as_the_layers_that_their_shapes_show(tmp_path):
    net = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 5), embedding=nn.Embedding(6, 2))
    )
    state = net.state_dict()
    audit, whole = brittle.audit(state), brittle.audit(net)
    assert [layer.name for layer in audit.layers] == ["conv", "head"]
    for layer, known in zip(audit.layers, whole.layers, strict=True):
        assert layer.singular_values == known.singular_values
        assert layer.row_error == known.row_error
    assert audit.layers[1].operator_norm(2) == whole.layers[1].operator_norm(2)
    assert audit.layers[0].operator_norm(2) is None  # stride and padding are not among the weights
    assert {"norm", "embedding", "ℓ₂ operator norm of conv", "certified ℓ∞ bound", "clean and robust accuracy"} <= {
        item.name for item in audit.not_measured
    }
    assert audit.signature.weights == whole.signature.weights
    assert Audit.from_json(audit.to_json()) == audit
    brittle.write_report(audit, tmp_path / "report.html")
    with pytest.raises(InputError, match="data: expected none beside weights by name"):
        brittle.audit(state, (X, Y))
    with pytest.raises(InputError, match="expected only dense tensors by name"):
        brittle.audit({"epoch": 3, **state})


class Rows(Dataset):
    """Samples as dictionaries."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"image": X[index], "label": int(Y[index])}


class HuggingRows:
    """A data set of Hugging Face's library: no class of torch's, but read by a loader."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"img": X[index].numpy(), "label": int(Y[index])}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


DATA = {
    "arrays": (X.numpy(), Y.numpy()),
    "arrays of double": (X.numpy().astype(np.float64), Y.tolist()),
    "a dictionary": {"pixel_values": X, "labels": Y},
    "a data set of dictionaries": Rows(),
    "a loader of them": DataLoader(Rows(), batch_size=5),
    "a data set of Hugging Face": HuggingRows(),
    "batches of arrays": [(X[:9].numpy(), Y[:9].numpy()), (X[9:].numpy(), Y[9:].numpy())],
}


@pytest.mark.parametrize("form", DATA)
def test_samples_in_any_form_are_the_same_samples(form):
    evaluation = brittle.evaluate(mlp(), DATA[form], QUICK, eps=0.1, honesty=False)
    assert evaluation == brittle.evaluate(mlp(), (X, Y), QUICK, eps=0.1, honesty=False)
    assert evaluation.n == 24


BAD_DATA = {
    "no inputs": ([{"audio": X, "label": Y}], "expected dictionaries with one of pixel_values.*got audio, label"),
    "bytes": (((X * 255).byte(), Y), "expected a floating tensor.*divide bytes by 255"),
    "lists": ([{"image": X.tolist(), "label": Y}], r"got list; a data set of Hugging Face needs .with_format"),
    "words": ((np.array(["a"]), Y[:1]), "expected inputs as a tensor"),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_samples_that_cannot_be_read_are_refused(fault):
    data, message = BAD_DATA[fault]
    with pytest.raises(InputError, match=message):
        brittle.evaluate(mlp(), data, QUICK, eps=0.1)


def test_images_that_make_no_batch_are_refused_with_the_remedy():
    pillow = pytest.importorskip("PIL.Image")

    class Pictures(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return pillow.new("L", (8, 8)), 0

    with pytest.raises(InputError, match="ToTensor"):
        brittle.evaluate(mlp(), Pictures(), QUICK, eps=0.1)
