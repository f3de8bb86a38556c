"""The worst case: judged by the network itself whatever the private copy claims; counted, proven, a budget each."""

from __future__ import annotations

import functools
import logging
import math

import pytest
import torch
from torch import Tensor, nn

from brittle.attacks import apgd, apgd_targeted, fgsm, pgd, square
from brittle.errors import InputError
from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import WorstCase, correct, go_on, worst_case
from brittle.linear.norms import lp_norm
from brittle.models.borrow import frozen
from brittle.models.forward import Counted, logits_of
from brittle.models.network import Network, make_ready
from helpers.networks import convnet, few, linear, mlp, right, uniform, untouched

NORMS = [math.inf, 2]
EPS = {math.inf: 0.06, 2: 0.3}
STEPS = 9
SEARCH = functools.partial(apgd, steps=STEPS)
OWN = {
    "fgsm": fgsm,
    "pgd": functools.partial(pgd, steps=STEPS),
    "apgd": SEARCH,
    "targeted": functools.partial(apgd_targeted, steps=STEPS, targets=2),
    "square": functools.partial(square, queries=25),
}
N = 40


class Counter:
    """A network, as a plain callable, that counts and keeps the samples put through it."""

    def __init__(self, net) -> None:
        self.net, self.forwards, self.backwards = net, 0, 0
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Pass on."""
        if x.requires_grad and torch.is_grad_enabled():
            self.backwards += len(x)
        else:
            self.forwards += len(x)
        self.seen.append(x.detach().clone())
        return self.net(x)


def assert_honest(worst: WorstCase, net, x, y, eps, p, bounds=(0.0, 1.0)) -> None:
    """Everything that is reported, computed again from the examples."""
    eps = torch.as_tensor(eps, dtype=torch.float64).expand(len(x))
    with torch.no_grad():
        clean, attacked = net(worst.x), net(worst.x_adv)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if x.dtype == torch.float32 else {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(worst.clean_logits, clean, **tolerance)
    torch.testing.assert_close(worst.adversarial_logits, attacked, **tolerance)
    assert torch.equal(worst.clean_correct, clean.argmax(1) == y)
    assert torch.equal(worst.robust_correct, (clean.argmax(1) == y) & (attacked.argmax(1) == y))
    assert torch.equal(worst.attack >= 0, worst.clean_correct & ~worst.robust_correct)
    assert torch.equal(worst.restart >= 0, worst.attack >= 0)
    assert (lp_norm(worst.x_adv.double() - x.double(), p) <= eps * (1 + 1e-6) + 2**-23).all()
    assert float(worst.x_adv.min()) >= bounds[0]
    assert float(worst.x_adv.max()) <= bounds[1]


def same_verdicts(a: WorstCase, b: WorstCase) -> None:
    assert torch.equal(a.robust_correct, b.robust_correct)
    assert torch.equal(a.attack, b.attack)
    assert torch.equal(a.restart, b.restart)
    torch.testing.assert_close(a.x_adv, b.x_adv, atol=1e-9, rtol=0)


# --- a private copy that is wrong ------------------------------------------------------------------------------


def wrong_copies(net) -> dict[str, object]:
    """Copies that disagree with the network, some of which take samples for broken that are not."""
    shift = torch.linspace(-4, 4, 10, dtype=torch.float64)

    class Other(nn.Module):
        def forward(self, x):
            return -net(x)

    return {
        "reversed": Other(),
        "shifted": lambda x: net(x) + shift,
        "far too sure": lambda x: 50 * net(x),
        "rolled": lambda x: net(x).roll(1, 1),
        "another input": lambda x: net(1 - x),
    }


@pytest.mark.parametrize("batch_size", [7, 256])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("which", ["reversed", "shifted", "rolled", "another input"])
def test_a_wrong_copy_breaks_no_sample_that_the_network_does_not(which, p, batch_size):
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    copied = wrong_copies(net)[which]
    assert (right(net, x, y) & ~right(copied, x, y)).any()  # the copy is wrong where the network is right
    worst = worst_case(
        Network(net, copied), x, y, Threat((SEARCH,), p), EPS[p], execution=Execution(batch_size=batch_size)
    )
    assert_honest(worst, net, x, y, EPS[p], p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", OWN)
def test_samples_that_only_the_copy_takes_for_broken_are_attacked_on_the_network(name, p):
    """A copy that takes everything for broken costs passes but changes no verdict and no example."""
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    threat = Threat((OWN[name],), p)
    plain = worst_case(Network(net, net), x, y, threat, EPS[p])
    network = Counter(net)
    fooled = worst_case(Network(network, lambda x: -net(x)), x, y, threat, EPS[p])
    assert_honest(fooled, net, x, y, EPS[p], p)
    # The reversed copy is wrong at once on nearly all of them, so what is found is found on the network.
    surely = plain.clean_correct & ~right(lambda x: -net(x), x, y)
    assert int(surely.sum()) > 20
    assert torch.equal(fooled.robust_correct[surely], plain.robust_correct[surely])
    assert network.backwards > 0 or name == "square"


def test_doubtful_samples_have_the_verdicts_of_the_network_and_others_are_not_attacked_twice():
    """The copy is wrong about every second sample, told by a pixel; the others are left to the copy."""
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    x = x.clone()
    x[:, 0, 0, 0] = torch.arange(N) % 2 * 1.0
    eps = 0.06
    clean = right(net, x, y)

    def copied(x):
        logits = net(x)
        return torch.where((x[:, 0, 0, 0] > 0.5)[:, None], -logits, logits)

    network = Counter(net)
    threat = Threat((SEARCH,))
    worst = worst_case(Network(network, copied), x, y, threat, eps)
    reference = worst_case(Network(net, net), x, y, threat, eps)
    same_verdicts(worst, reference)
    odd = torch.arange(N) % 2 == 1
    doubted = int((odd & clean).sum())
    assert doubted > 5
    alone = Counter(net)
    SEARCH(alone, x[odd & clean], y[odd & clean], eps=eps, ids=torch.arange(N)[odd & clean])
    fell = int((odd & clean & ~reference.robust_correct).sum())
    # A sample that the copy's own point happens to break needs no second search.
    assert alone.backwards - fell * (STEPS + 1) <= network.backwards <= alone.backwards


def test_a_right_copy_leaves_no_search_to_the_network():
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    for p in NORMS:
        network = Counter(net)
        plain = worst_case(Network(net, net), x, y, Threat((SEARCH,), p), EPS[p])
        worst = worst_case(Network(network, lambda x: net(x)), x, y, Threat((SEARCH,), p), EPS[p])
        same_verdicts(worst, plain)
        assert network.backwards == 0
        clean = int(right(net, x, y).sum())
        assert network.forwards == N + clean  # the clean pass and the judgement of every example


def test_a_copy_that_sees_nothing_only_loses_the_attack():
    """Where the copy is right about everything and has no gradients, nothing breaks, and nothing is claimed."""
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)

    def blind(inputs):
        nearest = torch.cdist(inputs.detach().flatten(1), x.flatten(1)).argmin(1)
        return torch.eye(10, dtype=torch.float64)[y[nearest]] + 0 * inputs.flatten(1).sum(1, keepdim=True)

    worst = worst_case(Network(net, blind), x, y, Threat((SEARCH,)), 1e-3)
    assert_honest(worst, net, x, y, 1e-3, math.inf)


@pytest.mark.parametrize("p", NORMS)
def test_the_copy_with_folded_norms_finds_the_same(p):
    net = convnet(torch.float64)
    x, y = few(N, torch.float64)
    for attack in OWN.values():
        threat = Threat((attack,), p)
        with untouched(net):
            folded = worst_case(net, x, y, threat, EPS[p])
        same_verdicts(folded, worst_case(Network(net, net), x, y, threat, EPS[p]))
        assert_honest(folded, net, x, y, EPS[p], p)


# --- counters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("batch_size", [11, 256])
@pytest.mark.parametrize("name", OWN)
def test_counters_are_those_of_a_counting_network(name, batch_size, p):
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    threat = Threat((OWN[name],), p, restarts=2)
    counter = Counter(net)
    worst = worst_case(counter, x, y, threat, EPS[p], execution=Execution(batch_size=batch_size))
    asked = 1, 1  # passes by which a function is asked, once, whether it has gradients
    assert (worst.forwards, worst.backwards) == (counter.forwards - asked[0], counter.backwards - asked[1])
    assert worst.forwards > N
    model, copied = Counter(net), Counter(net)
    worst = worst_case(Network(model, copied), x, y, threat, EPS[p], execution=Execution(batch_size=batch_size))
    assert worst.forwards == model.forwards + copied.forwards
    assert worst.backwards == model.backwards + copied.backwards == counter.backwards - asked[1]
    assert model.backwards == 0


def test_counters_with_a_wrong_copy_and_several_attacks():
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    model, copied = Counter(net), Counter(lambda x: -net(x))
    worst = worst_case(Network(model, copied), x, y, Threat((fgsm, SEARCH, OWN["square"])), 0.06)
    assert worst.forwards == model.forwards + copied.forwards
    assert worst.backwards == model.backwards + copied.backwards
    assert model.backwards > 0
    assert copied.backwards > 0


def test_counters_by_hand():
    """Almost without budget nothing breaks: the clean pass, every step of every right sample, one judgement of each."""
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    clean = int(right(net, x, y).sum())
    assert 20 < clean < N
    worst = worst_case(Network(net, net), x, y, Threat((SEARCH,), restarts=3), 1e-9)
    assert worst.backwards == 3 * clean * (STEPS + 1)
    assert worst.forwards == N + 3 * clean
    copied = worst_case(net, x, y, Threat((SEARCH,), restarts=3), 1e-9)
    assert copied.backwards == worst.backwards
    assert copied.forwards == worst.forwards  # with nothing to fold, the attacks run on the network itself
    nobody = worst_case(net, x, (net(x).argmax(1) + 1) % 10, Threat((SEARCH,)), 0.1)
    assert (nobody.forwards, nobody.backwards) == (N, 0)


def test_counters_of_joined_batches_add_up():
    x, y = few(N, torch.float64)
    threat = Threat((SEARCH,))
    parts = [worst_case(mlp(torch.float64), x[i : i + 15], y[i : i + 15], threat, 0.06, ids=i) for i in (0, 15, 30)]
    whole, joined = worst_case(mlp(torch.float64), x, y, threat, 0.06), WorstCase.joined(parts)
    same_verdicts(joined, whole)
    assert (joined.forwards, joined.backwards) == (whole.forwards, whole.backwards)


def test_a_single_batch_is_joined_without_a_copy():
    worst = worst_case(mlp(), *few(4), Threat((SEARCH,)), 0.06)
    assert WorstCase.joined([worst]).x_adv.data_ptr() == worst.x_adv.data_ptr()


# --- proven samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["fgsm", "apgd", "targeted", "square", "custom"])
def test_proven_samples_are_never_attacked(attack):
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    attacked: list[int] = []

    def custom(model, x, y, *, eps, p, ids):
        attacked.extend(ids.tolist())
        return SEARCH(model, x, y, eps=eps, p=p, ids=ids)

    eps = 0.2
    chosen = {**OWN, "custom": custom}[attack]
    plain = worst_case(net, x, y, Threat((chosen,)), eps)
    attacked.clear()
    proven = torch.arange(N) % 3 == 0
    model, copied = Counter(net), Counter(net)
    worst = worst_case(Network(model, copied), x, y, Threat((chosen,), restarts=2), eps, proven=proven)
    assert torch.equal(worst.x_adv[proven], x[proven])
    assert torch.equal(worst.adversarial_logits[proven], worst.clean_logits[proven])
    assert (worst.attack[proven] == -1).all()
    assert torch.equal(worst.proven, proven)
    assert torch.equal(worst.robust_correct[proven], worst.clean_correct[proven])
    assert (plain.clean_correct & ~plain.robust_correct & proven).any()  # they would have broken
    first = worst.restart[~proven] < 1
    assert torch.equal(worst.robust_correct[~proven] & first, plain.robust_correct[~proven] & first)
    assert not set(attacked) & set(range(0, N, 3))
    # Every pass after the clean one is near a sample that is not proven.
    told = torch.cdist(torch.cat([*model.seen[1:], *copied.seen]).flatten(1), x.flatten(1), p=math.inf)
    near = told.amin(1) <= eps * (1 + 1e-6)
    owners = told.argmin(1)
    clear = near & ((told <= 1.01 * eps).sum(1) == 1)
    assert int(clear.sum()) > 20
    assert not proven[owners[clear]].any()


def test_when_all_is_proven_there_is_one_pass():
    x, y = few(N, torch.float64)
    worst = worst_case(mlp(torch.float64), x, y, Threat((SEARCH,)), 0.2, proven=torch.ones(N, dtype=torch.bool))
    assert (worst.forwards, worst.backwards) == (N, 0)
    assert torch.equal(worst.x_adv, x)
    assert torch.equal(worst.robust_correct, right(mlp(torch.float64), x, y))


# --- attacks of others -----------------------------------------------------------------------------------------


def test_other_attacks_get_the_users_own_module():
    net = convnet()
    given: list[object] = []

    def custom(model, x, y, *, eps, p):
        given.append(model)
        return x

    worst_case(net, *few(10), Threat((custom, SEARCH, functools.partial(custom)), restarts=2), 1e-4)
    assert len(given) == 4
    assert all(model is net for model in given)
    given.clear()
    worst_case(Network(net, lambda x: -net(x)), *few(10), Threat((custom,)), 1e-4)
    assert given == [net]


def test_another_attack_that_raises_leaves_the_model_as_it_was():
    def meddling(model, x, y, *, eps, p):
        model.train().requires_grad_(True)
        model(x)  # batch norms take note of it
        raise ZeroDivisionError

    net = convnet()
    with untouched(net), pytest.raises(ZeroDivisionError):
        worst_case(net, *few(10), Threat((SEARCH, meddling)), 1e-4)
    with frozen(net):
        ready = make_ready(net, few(10)[0], (0.0, 1.0))
        with untouched(net), pytest.raises(ZeroDivisionError):
            worst_case(ready, *few(10), Threat((meddling,)), 1e-4)


def test_the_packages_own_attacks_get_the_copy():
    net = mlp(torch.float64)
    x, y = few(10, torch.float64)
    for attack in (*OWN.values(), functools.partial(functools.partial(apgd, steps=4), rho=0.5)):
        copied = Counter(net)
        worst_case(Network(net, copied), x, y, Threat((attack,)), 0.01)
        assert copied.seen


def test_what_another_attack_does_to_a_module_does_not_reach_the_next():
    """One that leaves the module in training mode, and one of ours after it: as if it were alone."""

    class NoCopy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = convnet(torch.float64)

        def forward(self, x):
            return self.inner(x)

        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    def meddling(model, x, y, *, eps, p):
        model.train()
        return x

    net = NoCopy().eval()
    x, y = few(60, torch.float64)
    with untouched(net):
        alone = worst_case(net, x, y, Threat((SEARCH,)), 0.04)
        after = worst_case(net, x, y, Threat((meddling, SEARCH)), 0.04)
    assert 5 < int(alone.robust_correct.sum()) < 55
    assert torch.equal(alone.robust_correct, after.robust_correct)


# --- a budget for every sample ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", OWN)
def test_budgets_a_sample_are_separate_runs(name, p):
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    levels = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64) * EPS[p]
    which = torch.arange(N) % 4
    threat = Threat((OWN[name],), p, restarts=2)
    together = worst_case(net, x, y, threat, levels[which], execution=Execution(batch_size=7))
    assert_honest(together, net, x, y, levels[which], p)
    for level, eps in enumerate(levels.tolist()):
        rows = (which == level).nonzero()[:, 0]
        part = worst_case(net, x[rows], y[rows], threat, eps, ids=rows)
        assert torch.equal(part.robust_correct, together.robust_correct[rows])
        assert torch.equal(part.restart, together.restart[rows])
        torch.testing.assert_close(part.x_adv, together.x_adv[rows], atol=1e-9, rtol=0)


def test_budgets_a_sample_reach_other_attacks_and_are_checked():
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    budgets = torch.linspace(0.01, 0.05, N, dtype=torch.float64)
    clean = right(net, x, y)
    asked: list[Tensor] = []

    def beyond(model, x, y, *, eps, p, ids):
        asked.append(torch.as_tensor(eps))
        # Half of the budget, or the largest budget: admissible for the last sample alone.
        move = torch.where(ids % 2 == 0, 0.5 * budgets[ids], budgets.max())
        return (x + torch.where(x < 0.5, 1, -1) * move[:, None, None, None]).clamp(0, 1)

    worst = worst_case(net, x, y, Threat((beyond,)), budgets, execution=Execution(batch_size=16))
    torch.testing.assert_close(torch.cat(asked), budgets[clean])
    assert worst.rejected == int((clean & (torch.arange(N) % 2 == 1) & (torch.arange(N) < N - 1)).sum())
    assert_honest(worst, net, x, y, budgets, math.inf)
    for bad in (budgets[:-1], -budgets, torch.full((N,), math.inf)):
        with pytest.raises(InputError, match=r"^eps"):
            worst_case(net, x, y, Threat((SEARCH,)), bad)


@pytest.mark.parametrize("ids", [True, False])
def test_ids_name_the_samples(ids):
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    whole = worst_case(net, x, y, Threat((SEARCH,)), 0.06)
    rows = torch.arange(10, 25)
    part = worst_case(net, x[rows], y[rows], Threat((SEARCH,)), 0.06, ids=rows if ids else 10)
    torch.testing.assert_close(part.x_adv, whole.x_adv[rows], atol=1e-9, rtol=0)
    mixed = torch.arange(N).flip(0)
    turned = worst_case(net, x[mixed], y[mixed], Threat((SEARCH,)), 0.06, ids=mixed, execution=Execution(batch_size=6))
    torch.testing.assert_close(turned.x_adv, whole.x_adv[mixed], atol=1e-9, rtol=0)


# --- memory, logits that are none, progress --------------------------------------------------------------------


def small(net, most):
    """Memory runs out with more than ``most`` samples."""

    def model(x):
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x)

    return model


def test_out_of_memory_changes_no_verdict():
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    threat = Threat((SEARCH,))
    same_verdicts(worst_case(small(net, 7), x, y, threat, 0.06), worst_case(net, x, y, threat, 0.06))


def test_clean_logits_are_found_in_batches_that_fit(caplog):
    net = mlp(torch.float64)
    x, y = few(N, torch.float64)
    with caplog.at_level(logging.WARNING, logger="brittle.models.forward"):
        logits = logits_of(small(net, 7), x, y, 30)
    torch.testing.assert_close(logits, net(x).detach())
    assert len(caplog.records) == 3  # 30, 15, 8, and 4 fits
    with pytest.raises(torch.OutOfMemoryError):
        logits_of(small(net, 0), x, y)


def test_counted_counts_what_came_back():
    counted = Counted(small(mlp(), 7))
    x, _ = few(10)
    with pytest.raises(torch.OutOfMemoryError):
        counted(x)
    assert (counted.forwards, counted.backwards) == (0, 0)
    counted(x[:5])
    counted(x[:3].clone().requires_grad_())
    with torch.no_grad():
        counted(x[:2].clone().requires_grad_())
    assert (counted.forwards, counted.backwards) == (7, 3)


def test_correct_is_never_said_of_logits_that_are_not_finite():
    logits = torch.tensor([[1.0, 0.0], [math.inf, 0.0], [math.nan, 0.0], [1.0, -math.inf], [0.0, 1.0]])
    assert correct(logits, torch.zeros(5, dtype=torch.long)).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("batch_size", [7, 256])
def test_progress_rises_to_the_number_of_samples(batch_size):
    x, y = few(N, torch.float64)
    net = mlp(torch.float64)
    told: list[tuple[str, int, int | None]] = []
    for copied in (net, lambda x: -net(x)):
        told.clear()
        threat = Threat((SEARCH, fgsm, OWN["square"]), restarts=2)
        execution = Execution(batch_size=batch_size, progress=lambda *word: told.append(word))
        worst_case(Network(net, copied), x, y, threat, 0.06, execution=execution)
        assert {(stage, total) for stage, _, total in told} == {("ℓ∞ attack", N)}
        done = [done for _, done, _ in told]
        assert done == sorted(set(done))
        assert done[-1] == N
        assert len(done) > 5


def test_a_threat_of_a_single_attack_is_one_of_a_sequence():
    assert Threat(apgd) == Threat((apgd,)) == Threat([apgd])


@pytest.mark.parametrize("attacks", [(), [], ("apgd",), (apgd, None), 7])
def test_what_is_no_attack_makes_no_threat(attacks):
    with pytest.raises(InputError, match=r"^attacks: expected"):
        Threat(attacks)


def test_steps_belong_to_presets():
    assert Threat("standard", steps=7).steps == 7
    with pytest.raises(InputError, match=r"^steps: expected None"):
        Threat(apgd, steps=7)


@pytest.mark.parametrize("p", NORMS)
def test_inputs_that_rounding_left_outside_of_the_bounds_are_clipped_and_so_are_their_examples(p):
    net, x = linear(5, 12), uniform(1, 6, 12)
    x[:, ::2] = torch.tensor([1 + 2.0**-23, -(2.0**-25)]).repeat(3)
    y = net(x.clamp(0, 1)).argmax(1)
    worst = worst_case(net, x, y, Threat((functools.partial(pgd, steps=3),), p), 0.05)
    for values in (worst.x, worst.x_adv):
        assert bool(((values >= 0) & (values <= 1)).all())
    assert torch.equal(worst.x, x.clamp(0, 1))


# --- further attacks, where a trial came closer -----------------------------------------------------------------


def towards(share: float, seen: list[int]):
    """An attack that goes this share of the way to the other class of :func:`halves`, and notes whom it met."""

    def attack(model, x, y, *, eps, p, ids):
        seen.extend(ids.tolist())
        return x + share * eps

    return attack


def halves(x: Tensor) -> Tensor:
    """Two classes: whether the first pixel is above 0.5."""
    first = x.flatten(1)[:, :1]
    return torch.cat([0.5 - first, first - 0.5], 1)


def test_further_attacks_are_for_samples_on_which_the_trial_came_clearly_closer():
    x, y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)
    for trial, is_further in ((0.3, False), (0.41, False), (0.43, True), (0.6, True)):
        seen: list[int] = []
        attacks, further = (towards(0.4, []), towards(trial, [])), (towards(1.0, seen),)
        threat = Threat(attacks, further=further)
        worst = worst_case(halves, x, y, threat, 0.6)
        assert worst.misled.tolist() == [is_further] * 6
        assert seen == list(range(6)) * is_further
        assert worst.attack.tolist() == [2 if is_further else -1] * 6
        assert worst.robust_correct.tolist() == [not is_further] * 6
        assert threat.names == ["attack"] * 3


def test_further_attacks_leave_broken_and_proven_samples_alone():
    x, y = torch.tensor([[0.0], [0.3], [0.0], [0.7]]), torch.zeros(4, dtype=torch.long)
    seen: list[int] = []
    threat = Threat((towards(0.0, []), towards(0.5, [])), further=(towards(1.0, seen),), restarts=2)
    worst = worst_case(halves, x, y, threat, 0.6, proven=torch.tensor([False, False, True, False]))
    assert worst.attack.tolist() == [2, 1, -1, -1]  # by the further attack, by the trial, proven, wrong anyway
    assert worst.misled.tolist() == [True, True, False, False]
    assert seen == [0]


class Threshold(nn.Module):
    """``relu(x_0 - 0.3) > 0.15`` is class 1: from 0 it is 0.45 away, and no point with ``x_0 < 0.3`` has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        score = torch.relu(x.flatten(1)[:, 0] - 0.3)
        return torch.stack([torch.full_like(score, 0.15), score, torch.full_like(score, -9.0)], 1)


@pytest.mark.parametrize(("eps", "robust"), [(0.44, 12), (0.5, 0)])
def test_fast_breaks_what_gradients_alone_do_not(eps, robust):
    x, y = torch.zeros(12, 1, 6, 6), torch.zeros(12, dtype=torch.long)
    execution = Execution(certify=False)
    plain = [functools.partial(apgd, loss=loss) for loss in ("ce", "dlr")]
    for attacks, left in ((plain, 12), ("fast", robust)):
        e = evaluate(Threshold(), (x, y), Threat(attacks, p=2), eps=eps, execution=execution, honesty=False)
        assert e.robust_correct == left


# --- going on with all survivors ---------------------------------------------------------------------------------


def test_going_on_attacks_the_unproven_survivors_alone_and_keeps_what_is_worse():
    x, y = torch.tensor([[0.0], [0.3], [0.0], [0.7], [0.1]]), torch.zeros(5, dtype=torch.long)
    seen: list[int] = []
    threat = Threat((towards(0.5, []),), further=(towards(0.2, []), towards(0.7, seen)))
    before = worst_case(halves, x, y, threat.instead(threat.battery), 0.6, proven=torch.arange(5) == 2)
    assert before.attack.tolist() == [-1, 0, -1, -1, -1]
    after = go_on(halves, before, threat, 0.6)
    assert seen == [0, 4]
    assert after.attack.tolist() == [-1, 0, -1, -1, 2]  # 0.1 + 0.42 is past 0.5
    assert after.robust_correct.tolist() == [True, False, True, False, False]
    assert after.misled.tolist() == [True, False, False, False, True]
    torch.testing.assert_close(after.x_adv[:, 0], torch.tensor([0.42, 0.6, 0.0, 0.7, 0.52]))
    assert after.forwards > before.forwards
    assert before.attack.tolist() == [-1, 0, -1, -1, -1]  # what was given is left as it was
    assert before.x_adv[4] == pytest.approx(0.4)


def test_going_on_without_survivors_costs_nothing():
    x, y = torch.full((3, 1), 0.4), torch.zeros(3, dtype=torch.long)
    threat = Threat((towards(1.0, []),), further=(towards(1.0, []),))
    worst = worst_case(halves, x, y, threat.instead(threat.battery), 0.5)
    assert go_on(halves, worst, threat, 0.5) is worst


def test_pieces_of_a_worst_case_join_to_the_whole():
    x, y = few(10)
    whole = worst_case(mlp(), x, y, Threat(SEARCH), EPS[math.inf])
    joined = WorstCase.joined([whole.between(0, 4), whole.between(4, 10)])
    for name, values in vars(whole).items():
        if isinstance(values, Tensor):
            assert torch.equal(getattr(joined, name), values)
    assert (joined.forwards, joined.backwards) == (0, 0)


def test_other_attacks_of_the_same_attacker_run_alone():
    threat = Threat((apgd, pgd), p=2, restarts=3, bounds=(-1.0, 1.0), seed=4, further=(square,))
    assert threat.instead([fgsm]) == Threat((fgsm,), p=2, bounds=(-1.0, 1.0), seed=4)
