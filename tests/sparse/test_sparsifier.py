from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline import models
from pipeline.errors import ConfigError, IntegrityError, NumericsError
from pipeline.sparse.flops import layer_macs
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.masks import mask_digest, pack_mask, unpack_mask
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, SCOPES

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2),
}


def network() -> nn.Module:
    return models.build("cifar_resnet8", num_classes=10, args={"width": 8, "stem_stride": 2}, seed=3)  # 4 channels last crash oneDNN


def make(method: str = "rigl", scope: str = "layer", optimizer: str = "sgd", **options: Any) -> tuple[nn.Module, Any, Sparsifier]:
    model = network().to(memory_format=torch.channels_last)
    opt = OPTIMIZERS[optimizer](model.parameters())
    strategy = dataclasses.replace(METHODS[method], scope=scope)
    return model, opt, Sparsifier(model, opt, strategy, density=0.2, seed=0, **options)


def one_step(model: nn.Module, opt: Any, sparsifier: Sparsifier, *, seed: int, drop: float | None = None) -> Any:
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
def test_inactive_weights_and_their_optimiser_state_are_zero_after_every_step(method: str, scope: str, optimizer: str) -> None:
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
        weight.grad = torch.where(weight != 0, 1e3, weight.grad)  # what is active has by far the largest gradient: it all regrows
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


def test_rigl_grows_where_the_dense_gradient_is_largest_and_set_does_not_look() -> None:
    for method, has_grown in (("rigl", True), ("set", False)):
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


def test_restored_state_goes_on_bit_for_bit_and_dirt_is_found() -> None:
    model, opt, sparsifier = make("set", macs=layer_macs(network(), (3, 28, 28)))
    for step in range(3):
        one_step(model, opt, sparsifier, seed=step, drop=0.3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), sparsifier.masks, sparsifier.ever_active, sparsifier.numbers()))
    one_step(model, opt, sparsifier, seed=9, drop=0.3)

    model2, opt2, sparsifier2 = make("set", macs=layer_macs(network(), (3, 28, 28)))
    model2.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    sparsifier2.restore(*saved[2:])
    one_step(model2, opt2, sparsifier2, seed=9, drop=0.3)
    assert sparsifier2.history_digest == sparsifier.history_digest
    assert sparsifier2.numbers() == sparsifier.numbers()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), model2.state_dict().values(), strict=True))

    with torch.no_grad():
        weight = next(iter(sparsifier2.weights.values()))
        weight += 1
    with pytest.raises(IntegrityError, match=r"stem.*mask is 0"):
        sparsifier2.restore(sparsifier2.masks, sparsifier2.ever_active, sparsifier2.numbers())


def test_sparse_weights_are_found_by_module_type() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(4, 4), nn.Linear(4, 2))
    assert list(sparse_weights(model)) == ["0.weight", "3.weight"]
    assert list(sparse_weights(model, ["3.*"])) == ["0.weight"]
    with pytest.raises(ConfigError, match=r"no convolution or linear weight matches 'fc.weight'"):
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
    assert pack_mask(mask).tolist() == [0b00011001, 0b1]  # logical order 1 0 0 1 1 0 0 0 | 1, first weight in the lowest bit
    assert torch.equal(unpack_mask(pack_mask(mask), (3, 3)), mask)
