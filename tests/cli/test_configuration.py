"""Options from a file: the command line wins over --set, which wins over the file; a run makes itself again."""

import pytest
import torch

import brittle
from brittle.cli.commands import run
from brittle.cli.configuration import defaults
from brittle.data.load import load_data
from brittle.errors import InputError
from brittle.evaluation import Threat
from brittle.results import AttackResult
from brittle.training.runs import run_config
from helpers import audits
from helpers.command_line import commands, one_line

COMMANDS = commands()


@pytest.fixture
def written(tmp_path):
    """A file of options with this text."""

    def write(text, name="options.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def train_options(written, text, *entries):
    return defaults(COMMANDS["train"], written(text), entries)


def test_values_are_as_on_the_command_line(written):
    read = train_options(
        written, "data: digits\nflip: true\narch_arg: {width: 8, bias: false}\nmean: [0.1, 0.2]\nlr: 1e-2"
    )
    assert read == {
        "data": "digits", "flip": True, "arch_arg": ["width=8", "bias=false"], "mean": "0.1,0.2", "lr": "1e-2"
    }  # fmt: skip
    audit = defaults(COMMANDS["audit"], written("p: [.inf, 2]\neps: {inf: 8/255}\nmodel: net.pt\npreset: fast"), ())
    assert audit == {"p": "inf,2", "eps": ["inf=8/255"], "model": "net.pt", "attacks": "fast"}


def test_one_entry_is_set_anew_and_the_others_stay(written):
    text = "penalty: {l1: 0.1, nuclear_norm: 0.2}"
    assert train_options(written, text, "penalty.l1=0.3")["penalties"] == ["l1=0.3", "nuclear_norm=0.2"]
    listed = "penalty: [l1=0.1, nuclear_norm=0.2]"
    assert train_options(written, listed, "penalty.l1=0.3")["penalties"] == ["l1=0.3", "nuclear_norm=0.2"]
    assert train_options(written, text, "penalty=l1=0.3")["penalties"] == ["l1=0.3"]
    assert train_options(written, "lr: 0.1", "adversarial.inf=8/255")["adversarial"] == "inf=8/255"


BAD = {
    "near": ("epoch: 3", (), "epoch.*did you mean epochs"),
    "far": ("zzzzz: 3", (), "zzzzz.*the options are"),
    "near in set": ("lr: 1", ("epoch=3",), "set: .*did you mean epochs"),
    "no value": ("lr: 1", ("lr",), "set: expected NAME=VALUE"),
    "entry of a plain option": ("lr: 1", ("lr.x=1",), "lr"),
    "mapping for a plain option": ("lr: {x: 1}", (), "lr"),
    "two budgets": ("adversarial: {inf: 0.1, 2: 0.5}", (), "one entry"),
    "list": ("- 1", (), "names of options"),
    "no YAML": ("a: [", (), "YAML"),
    "a tag that makes objects": ("a: !!python/object/apply:os.getcwd []", (), "YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_says_so(case, written):
    text, entries, message = BAD[case]
    with pytest.raises(InputError, match=message):
        train_options(written, text, *entries)


def test_no_file(tmp_path, capsys):
    assert run(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    one_line(capsys, "none.yaml")


def test_a_value_that_an_option_does_not_take_is_shown(written, capsys):
    assert run(["train", "--config", str(written("data: digits\nepochs: many"))]) == 2
    one_line(capsys, "--epochs", "many")


def test_a_run_is_made_again_from_its_own_configuration(written, tmp_path, capsys):
    text = (
        "data: digits\nlimit: 60\nwidth: 6\ndepth: 3\nepochs: 2\nrank: 3\nmeasure-every: 0\nlayers: model.1,model.3\n"
        "penalty: {l1: 0.001}\nfrobenius: initial\nadversarial: {2: 1/2}\nattack-steps: 1\n"
    )
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--config", str(written(text)), "--set", "penalty.l1=0.002", "--epochs", "1", "-q"]
    assert run(["train", *arguments, "-o", str(first)]) == 0
    made = run_config(first)
    assert (made.recipe.epochs, made.recipe.penalties, made.recipe.adversary.eps) == (1, {"l1": 0.002}, 0.5)
    assert run(["train", "--config", str(first / "config.json"), "-q", "-o", str(second)]) == 0
    assert run_config(second) == made
    assert (second / "weights.safetensors").read_bytes() == (first / "weights.safetensors").read_bytes()
    assert capsys.readouterr().err == ""
    assert run(["audit", str(first), "--config", str(first / "config.json"), "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, "a run of brittle train")


def test_a_result_is_repeated_on_another_network(tmp_path, capsys):
    train = ["train", "--data", "digits", "--limit", "60", "--width", "6", "--epochs", "1", "--measure-every", "0"]
    assert run([*train, "-q", "-o", str(tmp_path / "run")]) == 0
    common = ["attack", str(tmp_path / "run"), "--limit", "8", "-q"]
    asked = ["--preset", "fast", "--p", "inf", "--eps", "1/100", "--steps", "3", "--restarts", "2", "--seed", "4"]
    assert run([*common, *asked, "-o", str(tmp_path / "first")]) == 0
    assert run([*common, "--config", str(tmp_path / "first" / "attack.json"), "-o", str(tmp_path / "second")]) == 0
    first, second = (
        AttackResult.from_json((tmp_path / name / "attack.json").read_text()) for name in ("first", "second")
    )
    assert second == first


def test_an_audit_says_how_it_is_repeated(tmp_path):
    net, data = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), load_data("digits", limit=8)
    found = brittle.audit(net, data, Threat("fast", steps=2, restarts=2, seed=3), p=2, eps=0.25, honesty=False)
    found.save(tmp_path / "audit.json")
    assert defaults(COMMANDS["audit"], tmp_path / "audit.json", ()) == {
        "p": "2", "eps": ["2=0.25"], "seed": "3", "input_shape": "1,8,8", "attacks": "fast", "steps": "2",
        "restarts": "2", "tighten": "0",
    }  # fmt: skip


def test_a_result_of_other_attacks_is_not_repeated(tmp_path):
    audits.full().save(tmp_path / "audit.json")
    with pytest.raises(InputError, match="names no preset"):
        defaults(COMMANDS["audit"], tmp_path / "audit.json", ())
