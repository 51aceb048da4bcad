from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline import models
from pipeline.errors import ConfigError, IntegrityError, NumericsError
from pipeline.schedules import cubic
from pipeline.sparse.exploration import density_of_layers
from pipeline.sparse.flops import layer_macs
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.masks import mask_digest, pack_mask, pack_masks, unpack_mask
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, SCOPES, Strategy
from pipeline.sparse.strategy import method as changed
from pipeline.sparse.timing import DueUpdate, timetable
from tests.support.emulated_gpu import EmulatedGpu

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2),
}


def network() -> nn.Module:
    return models.build(
        "cifar_resnet8", num_classes=10, args={"width": 8, "stem_stride": 2}, seed=3
    )  # 4 channels last crash oneDNN


def make(
    method: str = "rigl", scope: str = "layer", optimizer: str = "sgd", **options: Any
) -> tuple[nn.Module, Any, Sparsifier]:
    model = network().to(memory_format=torch.channels_last)
    opt = OPTIMIZERS[optimizer](model.parameters())
    strategy = dataclasses.replace(METHODS[method], scope=scope)
    return model, opt, Sparsifier(model, opt, strategy, density=0.2, seed=0, **options)


def one_step(
    model: nn.Module, opt: Any, sparsifier: Sparsifier, *, seed: int, drop: DueUpdate | float | None = None
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(8, 3, 28, 28, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    opt.zero_grad()
    cross_entropy(model(images), labels).backward()
    sparsifier.before_step(drop)
    opt.step()
    return sparsifier.after_step()


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_inactive_weights_and_their_optimiser_state_are_zero_after_every_step(
    method: str, scope: str, optimizer: str
) -> None:
    model, opt, sparsifier = make(method, scope, optimizer)
    num_active = sum(int(mask.sum()) for mask in sparsifier.masks.values())
    for step in range(8):
        before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        update = one_step(model, opt, sparsifier, seed=step, drop=0.4 if step % 2 else None)
        assert (update is not None) == bool(step % 2)
        assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == num_active
        for name, weight in sparsifier.weights.items():
            inactive = ~sparsifier.masks[name]
            new = sparsifier.masks[name] & ~before[name]
            states = [s for s in opt.state[weight].values() if isinstance(s, torch.Tensor) and s.shape == weight.shape]
            assert len(states) == (1 if optimizer == "sgd" else 2)
            for tensor in (weight.detach(), *states):
                assert not tensor[inactive].any(), name
                assert not tensor[new].any(), name  # newly grown weights start at 0, without momentum
        if update is not None:
            assert update.num_new == sum(int((sparsifier.masks[n] & ~before[n]).sum()) for n in before)
            assert update.num_new > 0


def test_a_weight_pruned_and_regrown_at_once_keeps_value_and_momentum() -> None:
    model, opt, sparsifier = make("rigl")
    one_step(model, opt, sparsifier, seed=0)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 28, 28, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    opt.zero_grad()
    cross_entropy(model(images), labels).backward()
    for weight in sparsifier.weights.values():
        weight.grad = torch.where(
            weight != 0, 1e3, weight.grad
        )  # what is active has by far the largest gradient: it all regrows
    sparsifier.before_step(0.5)
    opt.step()
    weights = {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}
    momenta = {name: opt.state[weight]["momentum_buffer"].clone() for name, weight in sparsifier.weights.items()}
    update = sparsifier.after_step()
    assert update is not None
    assert update.num_new == 0
    for name, weight in sparsifier.weights.items():
        assert torch.equal(weight, weights[name])
        assert torch.equal(opt.state[weight]["momentum_buffer"], momenta[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("regrown", "restarted"), [("kept", []), ("zero", [1, 2]), ("zero_density", [1])]
)  # the case of test_update.test_what_restarts_by_hand
def test_a_weight_that_restarts_has_neither_value_nor_optimiser_state(
    regrown: str, restarted: list[int], optimizer: str
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 1, bias=False))
    shadow = torch.optim.swa_utils.AveragedModel(model)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    opt = kind(model.parameters(), lr=0.0, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    strategy = dataclasses.replace(METHODS["granet"], regrown=regrown)
    counts = optimizer == "adamw"
    sparsifier = Sparsifier(model, opt, strategy, density=5 / 6, seed=0, shadows=[shadow], own_step_counts=counts)
    weight = sparsifier.weights["1.weight"]
    (free,) = (~sparsifier.masks["1.weight"]).flatten().nonzero().flatten().tolist()
    places = [place for place in range(6) if place != free]  # those of 5, 1, −3, 4 and 2
    with torch.no_grad():
        for held in (weight, shadow.module[1].weight):
            held[0, places] = torch.tensor([5.0, 1.0, -3.0, 4.0, 2.0])
    weight.grad = torch.zeros(1, 6)
    weight.grad[0, places] = torch.tensor([0.5, 9.0, 8.0, 7.0, 0.25])
    sparsifier.before_step(DueUpdate(0.5, 4 / 6))
    opt.step()
    update = sparsifier.after_step()
    assert update is not None and (update.num_new, update.num_active) == (0, 4)
    active = [places[i] for i in (0, 1, 2, 3)]
    assert sparsifier.masks["1.weight"].flatten().nonzero().flatten().tolist() == sorted(active)
    values = [0.0 if i in restarted else value for i, value in enumerate([5.0, 1.0, -3.0, 4.0])]
    states = [s for s in opt.state[weight].values() if isinstance(s, torch.Tensor) and s.shape == weight.shape]
    for held in (weight, shadow.module[1].weight):
        assert held[0, active].tolist() == values
    assert len(states) == (2 if optimizer == "adamw" else 1)
    for state in states:
        assert [bool(value) for value in state[0, active]] == [i not in restarted for i in range(4)]
    if counts:  # a weight that restarts counts its own steps from here, as a new one
        grown_at = sparsifier.state_dict()["tensors"]["grown_at/1.weight"][0]
        assert grown_at[active].tolist() == [int(i in restarted) for i in range(4)]


def test_rigl_grows_where_the_dense_gradient_is_largest_and_set_does_not_look() -> None:
    for method, has_grown in (("rigl", True), ("set_itop", False)):
        model, opt, sparsifier = make(method)
        name, weight = next(iter(sparsifier.weights.items()))
        target = int((~sparsifier.masks[name].flatten()).nonzero()[5])
        one_step(model, opt, sparsifier, seed=0)
        opt.zero_grad()
        cross_entropy(model(torch.randn(4, 3, 28, 28)), torch.tensor([0, 1, 2, 3])).backward()
        logical = torch.zeros(weight.numel())
        logical[target] = 1e6
        weight.grad = logical.view(weight.shape).to(memory_format=torch.channels_last)
        sparsifier.before_step(0.01)
        opt.step()
        sparsifier.after_step()
        assert bool(sparsifier.masks[name].flatten()[target]) == has_grown


def test_r_s_starts_at_the_density_and_never_falls() -> None:
    model, opt, sparsifier = make("set")
    values = [sparsifier.r_s]
    assert values[0] == pytest.approx(sparsifier.density)
    for step in range(4):
        one_step(model, opt, sparsifier, seed=step, drop=0.5)
        values.append(sparsifier.r_s)
    assert values == sorted(values)
    assert values[-1] > 1.5 * values[0]


def test_a_gradient_that_is_not_finite_at_an_inactive_weight_changes_nothing() -> None:
    model, opt, sparsifier = make("rigl")
    digest = mask_digest(sparsifier.masks)
    opt.zero_grad()
    cross_entropy(model(torch.randn(4, 3, 28, 28)), torch.tensor([0, 1, 2, 3])).backward()
    name, weight = next(iter(sparsifier.weights.items()))
    assert weight.grad is not None
    weight.grad[(~sparsifier.masks[name]).nonzero(as_tuple=True)[0][0]] = float("nan")
    with pytest.raises(NumericsError, match="stem"):
        sparsifier.before_step(0.3)
    assert mask_digest(sparsifier.masks) == digest
    assert sparsifier.update_index == 0


def test_every_method_keeps_its_counts_and_its_zeros() -> None:
    for name, row in METHODS.items():
        masks = "random" if row.initial == "random" else "magnitude"  # any will do; test_initial.py has their own
        model, opt, sparsifier = make(name, check_every=1, masks=masks)  # every step checks digest, counts and zeros
        num_active = sum(int(mask.sum()) for mask in sparsifier.masks.values())
        for step in range(4):
            update = one_step(model, opt, sparsifier, seed=step, drop=0.3 if step % 2 else None)
            assert (update is None) == (step % 2 == 0 or row.grow is None)
        assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == num_active


def test_snfs_grows_where_the_average_of_dense_gradients_is_largest() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 1, bias=False))
    opt = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sparsifier = Sparsifier(model, opt, METHODS["snfs"], density=1 / 3, seed=0)
    weight, inactive = (
        sparsifier.weights["1.weight"],
        (~sparsifier.masks["1.weight"]).flatten().nonzero().flatten().tolist(),
    )
    gradients = torch.zeros(3, 6)
    gradients[:, inactive[0]] = torch.tensor([1.0, 1.0, 0.0])  # average 0.1·(0.9² + 0.9) = 0.171
    gradients[:, inactive[1]] = torch.tensor(
        [0.0, 0.0, 1.5]
    )  # average 0.1·1.5 = 0.15, yet the largest gradient of the last step
    for step in range(3):
        weight.grad = gradients[step].view(1, 6).clone()
        sparsifier.before_step(0.5 if step == 2 else None)
        opt.step()
        update = sparsifier.after_step()
    assert sparsifier.average["1.weight"].flatten()[inactive[0]].item() == pytest.approx(0.171)
    assert update is not None
    assert update.num_new == 1
    assert bool(sparsifier.masks["1.weight"].flatten()[inactive[0]])
    assert sorted(sparsifier.state_dict()["tensors"]) == ["average/1.weight"]


def test_granet_lands_on_its_density_by_global_pruning_and_regrows_within_layers() -> None:
    model = network()
    opt = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, opt, METHODS["granet"], density=0.5, seed=0)
    total = sum(mask.numel() for mask in sparsifier.masks.values())
    schedule = cubic(0.5, 0.1, 0, 6)
    counts = []
    for step in range(8):
        images, labels = torch.randn(8, 3, 28, 28), torch.randint(0, 10, (8,))
        opt.zero_grad()
        cross_entropy(model(images), labels).backward()
        assert sparsifier.before_step(DueUpdate(0.3, schedule(step + 1)))
        opt.step()
        update = sparsifier.after_step()
        assert update is not None
        assert update.num_active == round(schedule(step + 1) * total)
        counts.append(update.num_active)
    assert counts == sorted(counts, reverse=True)
    assert counts[5] == counts[7] == round(0.1 * total)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_resumed_goes_on_with_the_same_bits(name: str) -> None:
    """After the fourth of eight steps; where the density moves it does so before and after."""
    row = METHODS[name]
    strategy = changed(name, update_interval="1 steps", density_from="1 steps", density_until="6 steps")
    updates = timetable(strategy, 9, density=0.2, steps_per_epoch=4)

    def parts() -> tuple[nn.Module, Any, Sparsifier]:
        model = network()
        opt = OPTIMIZERS["sgd"](model.parameters())
        masks: Any = "random" if row.initial == "random" else "magnitude"
        density = row.initial_density or 0.2
        return model, opt, Sparsifier(model, opt, strategy, density=density, seed=0, masks=masks)

    def train(stopped: tuple[nn.Module, Any, Sparsifier], steps: range) -> None:
        for step in steps:
            one_step(*stopped, seed=step, drop=updates.at(step))

    straight, resumed = parts(), parts()
    train(straight, range(4))
    for old, new in zip(straight, resumed, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    train(straight, range(4, 8))
    train(resumed, range(4, 8))
    assert straight[2].numbers() == resumed[2].numbers()
    states = [[*of.state_dict().values(), *own.ever_active.values()] for of, _, own in (straight, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    if row.structure == "none":
        assert sum(int(mask.sum()) for mask in straight[2].masks.values()) == round(0.2 * 19_608)


def test_gmp_only_prunes_and_acdc_is_dense_and_sparse_in_turn() -> None:
    for name, densities in (("gmp", [0.712, 0.424, 0.28]), ("acdc", [1.0, 0.28, 1.0, 1.0, 0.28])):
        model = network()
        opt = OPTIMIZERS["sgd"](model.parameters())
        sparsifier = Sparsifier(model, opt, name, density=1.0, seed=0)
        total = sum(mask.numel() for mask in sparsifier.masks.values())
        for step, density in enumerate(densities):
            before = sparsifier.masks
            one_step(model, opt, sparsifier, seed=step, drop=DueUpdate(0.0, density))
            assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == round(density * total)
            for n, mask in sparsifier.masks.items():
                if density < 1:
                    assert not (mask & ~before[n]).any()
                assert not sparsifier.weights[n][mask & ~before[n]].any()  # what comes back starts at 0
                assert not opt.state[sparsifier.weights[n]]["momentum_buffer"][mask & ~before[n]].any()
        assert sparsifier.r_s == 1


def test_a_rising_density_only_adds_when_nothing_is_pruned() -> None:
    strategy = dataclasses.replace(METHODS["rigl"], prune="none")
    model = network()
    opt = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, opt, strategy, density=0.1, seed=0)
    before = sparsifier.masks
    cross_entropy(model(torch.randn(8, 3, 28, 28)), torch.randint(0, 10, (8,))).backward()
    sparsifier.before_step(DueUpdate(0.5, 0.2))
    opt.step()
    sparsifier.after_step()
    assert sparsifier.density == pytest.approx(0.2, abs=1e-4)
    assert all(not (before[name] & ~mask).any() for name, mask in sparsifier.masks.items())


def test_random_unfired_prefers_what_was_never_active() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 1, bias=False))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, opt, Strategy("random_unfired"), density=0.2, seed=0)
    rates = [sparsifier.r_s]
    for _ in range(9):  # 10 of 20 are replaced each time: 20 + 10, 20 + 20, …
        sparsifier.weights["1.weight"].grad = torch.ones(1, 100)
        sparsifier.before_step(0.5)
        opt.step()
        sparsifier.after_step()
        rates.append(sparsifier.r_s)
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert density_of_layers(sparsifier.ever_active) == {"1.weight": 1.0}


def test_an_update_may_take_the_place_of_the_optimiser_step() -> None:
    model, opt, _ = make()
    sparsifier = Sparsifier(model, opt, dataclasses.replace(METHODS["rigl"], replaces_step=True), density=0.2, seed=0)
    cross_entropy(model(torch.randn(8, 3, 28, 28)), torch.randint(0, 10, (8,))).backward()
    assert sparsifier.before_step()
    assert sparsifier.after_step() is None
    assert not sparsifier.before_step(0.3)
    assert sparsifier.after_step() is not None


def test_a_step_that_is_not_finite_keeps_the_update_due() -> None:
    model, opt, sparsifier = make("set_itop", skip_nonfinite=True)
    digest = mask_digest(sparsifier.masks)
    weight = next(iter(sparsifier.weights.values()))
    cross_entropy(model(torch.randn(8, 3, 28, 28)), torch.randint(0, 10, (8,))).backward()
    assert weight.grad is not None
    weight.grad[0, 0, 0, 0] = float("inf")
    assert not sparsifier.before_step(0.3)  # a GradScaler would skip optimizer.step()
    assert sparsifier.after_step() is None
    assert (mask_digest(sparsifier.masks), sparsifier.steps, sparsifier.update_index) == (digest, 0, 0)
    update = one_step(
        model, opt, sparsifier, seed=1
    )  # an ordinary step by the caller's count: the update is made up for
    assert update is not None
    assert (update.drop_fraction, sparsifier.steps) == (0.3, 1)


def test_a_moving_average_of_the_weights_follows_the_masks() -> None:
    model = network()
    shadow = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    opt = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, opt, METHODS["set_itop"], density=0.2, seed=0, shadows=[shadow])
    averaged = dict(shadow.module.named_parameters())
    for step in range(4):
        one_step(model, opt, sparsifier, seed=step, drop=0.3 if step % 2 else None)
        if step % 2 == 0:
            shadow.update_parameters(model)
        for name, mask in sparsifier.masks.items():
            assert not averaged[name][~mask].any()


def test_a_check_finds_a_flipped_mask_bit_and_a_pruned_weight_that_came_back() -> None:
    model, opt, sparsifier = make(check_every=3)
    name, mask = next(iter(sparsifier.masks.items()))
    where = tuple(index[0] for index in (~mask).nonzero(as_tuple=True))
    one_step(model, opt, sparsifier, seed=2)  # the first step is always checked
    sparsifier.weights[name].data[where] = 0.5
    assert one_step(model, opt, sparsifier, seed=0) is None  # not yet checked
    sparsifier.weights[name].data[where] = 0.5
    with pytest.raises(IntegrityError, match=r"stem.weight has non-zero values .* \(check after step 3\); do: do not"):
        one_step(model, opt, sparsifier, seed=1)
    sparsifier.weights[name].data[where] = 0.0
    mask[where] = True
    with pytest.raises(IntegrityError, match=r"the mask of stem.weight has changed since update 0, without an update"):
        sparsifier.check()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_own_step_counts_make_a_grown_weight_step_as_in_a_run_of_its_own(kind: Any) -> None:
    def quadratic(parameter: Tensor, step: int) -> Tensor:
        return ((parameter - 1) ** 2 * (1 + step)).sum()

    options = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1}
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    opt = kind(model.parameters(), **options)
    sparsifier = Sparsifier(model, opt, METHODS["set_itop"], density=0.5, seed=0, own_step_counts=True)
    ((name, weight),) = sparsifier.weights.items()
    for step in range(20):
        if step == 19:
            opt.state[weight]["step"].fill_(5000)  # late in the run
        opt.zero_grad()
        quadratic(weight, step).backward()
        sparsifier.before_step(0.5 if step == 19 else None)
        opt.step()
        before = sparsifier.masks[name].clone()
        sparsifier.after_step()
    new = sparsifier.masks[name] & ~before
    assert int(new.sum()) >= 1
    alone = nn.Parameter(torch.zeros_like(weight))  # the same weights from 0 in a run that starts now
    reference = kind([alone], **options)
    plain = copy.deepcopy((model, opt.state_dict()))
    for step in range(20, 30):
        opt.zero_grad()
        quadratic(weight, step).backward()
        sparsifier.before_step()
        opt.step()
        sparsifier.after_step()
        reference.zero_grad()
        quadratic(alone, step).backward()
        reference.step()
        assert torch.allclose(weight[new], alone[new], rtol=1e-5, atol=0)
    shared = plain[0][0].weight  # without the correction the first step is about three learning rates
    uncorrected = kind(plain[0].parameters(), **options)
    uncorrected.load_state_dict(plain[1])
    quadratic(shared, 20).backward()
    shared.grad.mul_(sparsifier.masks[name])
    uncorrected.step()
    assert shared[new].abs().mean().item() > 3 * options["lr"]  # type: ignore[operator]


def test_a_grown_weight_warms_up_by_hand() -> None:
    """With a gradient of 1 each step of Adam is one learning rate long; SMET's rises by a quarter of it."""
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    sparsifier = Sparsifier(model, opt, "set_itop", density=0.5, seed=0, own_step_counts=True, own_step_warmup=4)
    ((name, weight),) = sparsifier.weights.items()
    first = sparsifier.masks[name].clone()
    with torch.no_grad():
        weight.mul_(0)
    found = []
    for step in range(6):
        weight.grad = torch.ones_like(weight)
        sparsifier.before_step(0.5 if step == 0 else None)
        opt.step()
        sparsifier.after_step()
        new, old = sparsifier.masks[name] & ~first, sparsifier.masks[name] & first
        found.append((weight[new].tolist()[0], weight[old].tolist()[0]))
    assert [grown for grown, _ in found] == pytest.approx([0.0, -0.025, -0.075, -0.15, -0.25, -0.35])
    assert [kept for _, kept in found] == pytest.approx([-0.1 * step for step in range(1, 7)])


def test_own_step_counts_are_for_adam() -> None:
    with pytest.raises(ConfigError, match="expected Adam or AdamW, got SGD"):
        make(own_step_counts=True)


def test_restored_state_goes_on_bit_for_bit_and_dirt_is_found() -> None:
    model, opt, sparsifier = make("set", macs=layer_macs(network(), (3, 28, 28)))
    for step in range(3):
        one_step(model, opt, sparsifier, seed=step, drop=0.3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), sparsifier.state_dict()))
    one_step(model, opt, sparsifier, seed=9, drop=0.3)

    model2, opt2, sparsifier2 = make("set", macs=layer_macs(network(), (3, 28, 28)))
    model2.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    sparsifier2.load_state_dict(saved[2])
    one_step(model2, opt2, sparsifier2, seed=9, drop=0.3)
    assert sparsifier2.history_digest == sparsifier.history_digest
    assert sparsifier2.numbers() == sparsifier.numbers()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), model2.state_dict().values(), strict=True)
    )

    with torch.no_grad():
        weight = next(iter(sparsifier2.weights.values()))
        weight += 1
    with pytest.raises(IntegrityError, match=r"stem.*mask is 0"):
        sparsifier2.load_state_dict(sparsifier2.state_dict())


def test_sparse_weights_are_found_by_module_type() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(4, 4), nn.Linear(4, 2))
    assert list(sparse_weights(model)) == ["0.weight", "3.weight"]
    assert list(sparse_weights(model, ["3.*"])) == ["0.weight"]
    with pytest.raises(ConfigError, match=r"none of the 2 weights that can be sparse matches 'fc.weight'"):
        sparse_weights(model, ["fc.weight"])


def test_flops_add_up_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10, bias=False))
    assert layer_macs(model, (3, 2, 2)) == {"1.weight": 120}
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, opt, METHODS["rigl"], density=0.25, seed=0, macs={"1.weight": 120})
    assert sparsifier.flops is not None
    for drop in (None, 0.5):
        model(torch.randn(1, 3, 2, 2)).sum().backward()
        sparsifier.before_step(drop)
        opt.step()
        sparsifier.after_step()
    # f_S = 2·30 = 60, f_D = 240. An ordinary step: 3·60; one with RigL's dense gradient: 2·60 + 240.
    assert sparsifier.flops.spent == 180 + 360


def test_packed_masks_round_trip() -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert pack_mask(mask).tolist() == [
        0b00011001,
        0b1,
    ]  # logical order 1 0 0 1 1 0 0 0 | 1, first weight in the lowest bit
    assert torch.equal(unpack_mask(pack_mask(mask), (3, 3)), mask)
    with EmulatedGpu():
        on_device = pack_masks({"": mask.to("cuda"), "full": torch.ones(16, dtype=torch.bool, device="cuda")})
    assert torch.equal(on_device[""], pack_mask(mask)) and on_device["full"].tolist() == [255, 255]
