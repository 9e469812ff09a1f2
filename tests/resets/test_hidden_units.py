"""Recycling, penalties and plasticity injection in plain torch modules, against loops and formulas written out here."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fire_llm import Penalties, PlasticityInjection, Recycling, UserError, inject_plasticity_
from fire_llm.resets import ReDo


class Net(nn.Module):
    """Two convolutions with a norm between, a flattened map of 2 x 2, two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(20, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.gelu(self.fc1(x.flatten(1))))


HIDDEN = [("conv1", "bn1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")]
EAGER = {
    "redo": {"every": 2, "threshold": 0.9},
    "continual_backprop": {"rate": 0.05, "decay": 0.9, "maturity": 1},
    "snr": {"eta": 0.9},
}
"""Options with which a few steps recycle some units and leave others."""


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for p in model.bn1.parameters():
            p.add_(0.3 * torch.randn(6))
    return model


def images(seed=0, count=16):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(model, recycling, optimizer, steps, first=0):
    model.train()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images(step)), torch.arange(16) % 3).backward()
        optimizer.step()
        recycling.step(optimizer)


def unit_activations(model, x):
    """Return what each reader reads, the units of a layer last, by the modules that write and read them."""
    seen = {}

    def hook(name, move):
        def listen(_, inputs):
            seen[name] = move(inputs[0])

        return listen

    moves = {"conv2": lambda t: t.permute(0, 2, 3, 1), "fc1": lambda t: t.view(-1, 5, 4).permute(0, 2, 1)}
    hooks = [model.get_submodule(n).register_forward_pre_hook(hook(n, moves.get(n, lambda t: t))) for n in
             ("conv2", "fc1", "fc2")]  # fmt: skip
    with torch.no_grad():
        model(x)
    for one in hooks:
        one.remove()
    return seen


def test_redo_recycles_the_channels_and_units_whose_mean_over_positions_is_small():
    """What is due by the definition is what loses its outgoing weights, and nothing else does."""
    model = net()
    before = copy.deepcopy(model)
    seen = unit_activations(copy.deepcopy(model).train(), images())
    recycling = Recycling(model, "redo", hidden=HIDDEN, every=1, threshold=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.train()(images())
    due = {}
    for reader, h in seen.items():
        score = h.abs().flatten(0, -2).mean(0)
        due[reader] = set((score <= 0.9 * score.mean()).nonzero().flatten().tolist())
    assert recycling.step(optimizer) == sum(map(len, due.values())) == recycling.recycled > 3
    gone = {
        "conv2": {i for i in range(6) if not model.conv2.weight[:, i].any()},
        "fc1": {i for i in range(5) if not model.fc1.weight[:, 4 * i : 4 * i + 4].any()},
        "fc2": {i for i in range(8) if not model.fc2.weight[:, i].any()},
    }
    assert gone == due
    kept = [i for i in range(6) if i not in due["conv2"]]
    assert torch.equal(model.conv1.weight[kept], before.conv1.weight[kept])
    rows = sorted(due["conv2"])
    assert not torch.isclose(model.conv1.weight[rows], before.conv1.weight[rows]).any()
    assert not torch.isclose(model.conv1.bias[rows], before.conv1.bias[rows]).any()
    assert torch.equal(model.bn1.weight[rows], torch.ones(len(rows))) and not model.bn1.bias[rows].any()
    assert torch.equal(model.bn1.running_var[rows], torch.ones(len(rows))) and not model.bn1.running_mean[rows].any()
    assert torch.equal(model.bn1.weight[kept], before.bn1.weight[kept]) and model.bn1.running_mean[kept].all()
    assert torch.equal(model.fc2.bias, before.fc2.bias)


def test_the_network_changes_by_what_the_units_put_out_and_by_nothing_else():
    model = net().eval()
    silenced, state = copy.deepcopy(model), torch.get_rng_state()
    for name, columns in (("conv2", [1, 4]), ("fc1", [*range(8, 12)]), ("fc2", [0, 7])):
        with torch.no_grad():
            silenced.get_submodule(name).weight[:, columns] = 0
    recycling = Recycling(model, "snr", hidden=HIDDEN)
    stale = {number: torch.tensor(units) for number, units in enumerate(([1, 4], [2], [0, 7]))}
    recycling._work.renew(stale, 1, torch.optim.SGD(model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        torch.testing.assert_close(model(images()), silenced(images()), rtol=0, atol=1e-6)


def test_rows_are_drawn_as_the_modules_draw_them_by_seed_step_and_layer():
    def draw(seed, step):
        model = nn.Sequential(nn.Conv1d(4, 600, 5), nn.ReLU(), nn.Conv1d(600, 2, 1))
        nn.init.constant_(model[0].weight, 9.0)
        recycling = Recycling(model, "redo", hidden=[("0", "2")], seed=seed)
        recycling._work.renew({0: torch.arange(500)}, step, torch.optim.SGD(model.parameters()))
        assert (model[0].weight[500:] == 9).all()
        return model[0].weight.detach()[:500]

    rows, bound = draw(1, 3), 1 / (4 * 5) ** 0.5  # uniform, of the fan-in
    assert float(rows.abs().max()) <= bound and float(rows.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
    assert torch.equal(rows, draw(1, 3))
    assert not torch.isclose(rows, draw(2, 3)).all(1).any() and not torch.isclose(rows, draw(1, 4)).all(1).any()


@pytest.mark.parametrize("method", EAGER)
def test_moments_are_cleared_and_a_resumed_loop_ends_as_one_that_was_not_cut_off(method):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recycling = Recycling(model, method, hidden=HIDDEN, seed=3, **EAGER[method])
    train(model, recycling, optimizer, 5)
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict(), recycling.state_dict()])
    train(model, recycling, optimizer, 5, first=5)
    assert 0 < int(states[2]["recycled"]) < recycling.recycled

    again = net(seed=9)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed = Recycling(again, method, hidden=HIDDEN, seed=3, **EAGER[method])
    for part, state in zip((again, other, resumed), states, strict=True):
        part.load_state_dict(state)
    train(again, resumed, other, 5, first=5)
    assert resumed.recycled == recycling.recycled
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    moment = optimizer.state[model.conv2.weight]["exp_avg"]
    assert moment[:, 2].any()
    recycling._work.renew({0: torch.tensor([2])}, 10, optimizer)
    assert not moment[:, 2].any() and moment[:, 1].any() and not model.conv2.weight[:, 2].any()
    assert not optimizer.state[model.bn1.weight]["exp_avg_sq"][2] and optimizer.state[model.bn1.weight]["exp_avg_sq"][1]


@pytest.mark.parametrize(
    ("frozen", "stay"),
    [
        (("bn1",), {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"}),
        (("bn1.weight", "conv1.bias"), {"bn1.weight", "conv1.bias"}),
    ],
)
def test_what_is_frozen_stays(frozen, stay):
    model = net()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    model.train()(images())
    before = copy.deepcopy(model.state_dict())
    recycling = Recycling(model, "redo", hidden=HIDDEN[:1])
    recycling._work.renew({0: torch.arange(6)}, 1, torch.optim.SGD(model.parameters()))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    whole = {"conv1.weight", "conv1.bias", "conv2.weight"}
    assert moved == (whole | {f"bn1.{key}" for key in ("weight", "bias", "running_mean", "running_var")}) - stay


def test_what_is_measured_in_evaluation_does_not_count_and_hooks_can_be_taken_out():
    model = net()
    recycling = Recycling(model, {"method": "redo", "every": 1, "threshold": 0.0}, hidden=HIDDEN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.eval()(images())
    with pytest.raises(UserError, match=r"'redo': no token passed the module of 'conv1 → conv2'.*training mode"):
        recycling.step(optimizer)
    recycling.remove()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_transformer_layer_is_judged_by_all_its_tokens():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).train()
    x = torch.randn(3, 5, 8)
    recycling = Recycling(model, "redo", hidden=[("linear1", "linear2")], every=1, threshold=0.5)
    seen = []
    hook = model.linear2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(x)
    hook.remove()
    oracle = ReDo(16, threshold=0.5)
    oracle.observe(seen[0])
    assert recycling.step(torch.optim.SGD(model.parameters())) == int(oracle.pop_stale(torch.ones(16)).sum()) > 0


def refused(match, **given):
    options = {"method": "redo", "hidden": HIDDEN, **given}
    with pytest.raises(UserError, match=match):
        Recycling(options.pop("model", net()), options.pop("method"), **options)


def test_what_does_not_fit_is_refused_by_name():
    refused(r"no module 'conv3'.*Did you mean", hidden=[("conv1", "conv3")])
    refused("no layer is named", hidden=[])
    refused("hidden: None is not allowed", hidden=None)
    refused(r"hidden: \(0, 1\) is not allowed", hidden=[(0, 1)])
    refused("one method is wanted here, and 2 are given", method=["redo", "snr"])
    refused("one method is wanted here, and 0 are given", method=[])
    refused("'conv1' is not allowed", hidden=["conv1"])
    refused("'bn1' is a BatchNorm2d: units are written", hidden=[("bn1", "conv2")])
    refused("'fc2' reads 8 inputs, and not the 5 units", hidden=[("conv2", "fc2")])
    refused("'fc1' reads 20 inputs, and not the 8 units", hidden=[("fc1", "fc1")])
    refused("'bn1' .*between the two.* 5 units", hidden=[("conv2", "bn1", "fc1")])
    refused("'conv1' writes units of two layers", hidden=[("conv1", "conv2"), ("conv1", "bn1", "conv2")])
    refused("'fire' acts on weights, once", method="fire")
    refused("roles: not read here", roles=("mlp",))
    refused("threshold: .* not allowed", threshold=-1.0)
    frozen = net()
    frozen.conv1.requires_grad_(False)
    refused("'conv1' is frozen", model=frozen)
    grouped = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    refused("in 2 groups", model=grouped, hidden=[("0", "1")])
    normed = net()
    nn.utils.parametrizations.weight_norm(normed.fc1)
    refused("weight of 'fc1' is computed at each pass", model=normed)


class Keyworded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(input=self.a(x).relu()))


def test_a_reader_may_be_called_by_keyword():
    recycling = Recycling(model := Keyworded(), "redo", hidden=[("a", "b")], every=1, threshold=1.0)
    model(torch.randn(5, 4))
    assert recycling.step(torch.optim.SGD(model.parameters())) > 0


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a", "c"), ("b", "c")])
def test_units_of_tied_weights_are_refused(one, other):
    model = Keyworded()
    model.get_submodule(other).weight = model.get_submodule(one).weight
    model.alias = model.a  # the same module under another name is none
    refused(rf"'{one}\.weight' and '{other}\.weight' are one weight", model=model, hidden=[("a", "b")])


def test_the_moment_of_a_single_weight_is_cleared_too():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    recycling, optimizer = Recycling(model, "redo", hidden=[("0", "1")]), torch.optim.Adam(model.parameters())
    model(torch.ones(2, 1)).sum().backward()
    optimizer.step()
    recycling._work.renew({0: torch.tensor([0])}, 1, optimizer)
    for p in (model[0].weight, model[0].bias, model[1].weight):
        assert not optimizer.state[p]["exp_avg"].any() and optimizer.state[p]["step"] == 1


# ---- penalties


@pytest.mark.parametrize("given", ["l2_init", "parseval", ["l2_init", {"method": "parseval", "scale": 1.0}]])
def test_penalties_add_the_gradient_of_what_autograd_adds(given):
    model, initial = net().double(), net(seed=5).double()
    names = [given] if isinstance(given, str) else ["l2_init", "parseval"]
    scale = 2.0 if isinstance(given, str) else 1.0

    def loss():
        return F.cross_entropy(model(images().double()), torch.arange(16) % 3)

    penalty = 0.0
    for name in names:
        if name == "l2_init":
            pairs = zip(model.parameters(), initial.parameters(), strict=True)
            penalty = penalty + 1e-3 * sum(((p - q.detach()) ** 2).sum() for p, q in pairs)
        else:
            for module in (model.conv1, model.conv2, model.fc1, model.fc2):
                w = module.weight.flatten(1)
                gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
                penalty = penalty + 1e-3 * ((gram - scale * torch.eye(len(gram))) ** 2).sum()
    wanted = torch.autograd.grad(loss() + penalty, [*model.parameters()])
    penalties = Penalties(model, given, initial=initial, layout="modules")
    loss().backward()
    penalties.add_()
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-9)


def test_sparse_gradients_are_added_to_as_dense_ones():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model, initial = (nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 2)) for _ in range(2))
        penalties = Penalties(model, "l2_init", initial=initial, layout="modules")
        for _ in range(2):
            model(torch.tensor([1, 3, 3])).sum().backward()
            penalties.add_()
        found.append([p.grad.clone() for p in model.parameters()])
    for dense, other in zip(*found, strict=True):
        torch.testing.assert_close(dense, other)


def test_penalties_refuse_what_is_none_and_initial_weights_that_are_missing():
    with pytest.raises(UserError, match=r"the initial 'conv1\.weight' is on the meta device"):
        Penalties(net(), "l2_init", initial=net().to("meta"), layout="modules")
    with pytest.raises(UserError, match="'fire' acts on weights, once"):
        Penalties(net(), "fire", layout="modules")
    with pytest.raises(UserError, match="'l2_init' needs the run's initial weights"):
        Penalties(net(), "l2_init", layout="modules")


# ---- plasticity injection


def test_injection_computes_what_the_network_did_and_trains_the_new_head_alone():
    model = net()
    before, state = copy.deepcopy(model)(images()).detach(), torch.get_rng_state()
    old = copy.deepcopy(model.fc2)
    injected = inject_plasticity_(model, "fc2", seed=4)
    assert isinstance(model.fc2, PlasticityInjection) and torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(model.eval()(images()), net().eval()(images()))
    torch.testing.assert_close(model.train()(images()).detach(), before, rtol=0, atol=1e-5)
    assert float(injected.new.weight.detach().abs().max()) <= 8**-0.5 and not torch.equal(
        injected.new.weight, old.weight
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(images()), torch.arange(16) % 3).backward()
    optimizer.step()
    assert torch.equal(injected.old.weight, old.weight)
    assert not torch.equal(injected.new.weight, injected.drawn.weight) and model.fc1.weight.grad.any()
    x = torch.randn(2, 8)
    by_hand = F.linear(x, old.weight + injected.new.weight - injected.drawn.weight)
    torch.testing.assert_close(injected(x) - injected(torch.zeros(2, 8)), by_hand)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.again = self.head

    def forward(self, tokens):
        return self.head(self.words(tokens))


def test_a_tied_head_is_untied_and_its_embedding_learns():
    model, tokens = Tied(), torch.arange(7)
    before = model(tokens).detach()
    with pytest.warns(UserWarning, match=r"'head' shares 'words\.weight' with the rest of the model"):
        injected = inject_plasticity_(model, "head")
    assert model.again is model.head is injected
    torch.testing.assert_close(model(tokens).detach(), before)
    model(tokens).square().sum().backward()
    assert model.words.weight.grad.any() and not injected.old.weight.requires_grad
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(model.words.weight, injected.old.weight)


def test_a_second_injection_freezes_the_head_that_learned():
    model = net()
    first = inject_plasticity_(model, "fc2", seed=1)
    with torch.no_grad():
        first.new.weight.add_(1)
    before = model(images()).detach()
    second = inject_plasticity_(model, "fc2", seed=2)
    torch.testing.assert_close(model(images()).detach(), before)
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert second.old is first and trained == {"new.weight", "new.bias"}


def test_a_head_that_returns_no_tensor_is_told():
    model = nn.ModuleDict({"head": nn.LSTM(3, 3)})
    with pytest.raises(UserError, match="this LSTM returns a tuple"):
        inject_plasticity_(model, "head")(torch.zeros(1, 1, 3))


def test_injection_refuses_what_it_cannot_draw():
    for name, match in (("head", "names no module"), ("", "names no module")):
        with pytest.raises(UserError, match=match):
            inject_plasticity_(net(), name)
    model = nn.ModuleDict({"head": nn.ReLU()})
    with pytest.raises(UserError, match="'head' cannot be drawn again: it has no parameters"):
        inject_plasticity_(model, "head")


def test_an_optimizer_is_held_against_the_model_once() -> None:
    class Watched(list):
        """Count how often an optimizer's groups are gone through."""

        times = 0

        def __iter__(self):
            Watched.times += 1
            return super().__iter__()

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    recycling = Recycling(model, "redo", hidden=[("0", "2")], every=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups = Watched(optimizer.param_groups)
    for _ in range(3):
        recycling.step(optimizer)
    assert Watched.times == 1
    with pytest.raises(UserError, match="it trains none of the weights"):
        recycling.step(torch.optim.SGD(nn.Linear(2, 2).parameters()))
