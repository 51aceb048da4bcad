"""Muon for matrices and AdamW for the rest are one optimiser, and each does what torch's own does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pipeline.config.schema import TrainConfig
from pipeline.engine.muon import MuonWithAdamW
from pipeline.engine.torch_engine import build_optimizer
from pipeline.errors import ConfigError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def configured(model: nn.Module) -> MuonWithAdamW:
    config = TrainConfig(optimizer="muon", weight_decay=0.1, betas=[0.8, 0.95], eps=1e-6)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, MuonWithAdamW)
    return optimizer


def step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def test_each_parameter_moves_as_under_torchs_own_optimiser() -> None:
    model, apart = network(), network()
    optimizer = configured(model)
    muon = torch.optim.Muon([apart[4].weight], momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decays = [([apart[0].weight], 0.1), ([apart[0].bias, apart[1].weight, apart[1].bias, apart[4].bias], 0.0)]
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    for index, lr in enumerate((0.1, 0.01, 0.02)):  # a schedule
        for each in (model, apart):
            give_gradients(each, index)
        step(optimizer, lr)
        step(muon, lr)
        step(adamw, lr)
    for own, other in zip(model.parameters(), apart.parameters(), strict=True):
        assert torch.equal(own, other)
    keys = {tuple(sorted(state)) for state in optimizer.state.values()}
    assert keys == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}


def test_an_update_of_a_matrix_is_of_adamws_size() -> None:
    """0.2·√(max(A, B)) times an orthogonal matrix: a root mean square of about 0.2 (arXiv 2502.16982, section 2.2)."""
    model = network()
    optimizer = configured(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = model[4].weight.detach().clone()
    give_gradients(model, 0)
    step(optimizer, 0.5)
    rms = float((model[4].weight.detach() - before).square().mean().sqrt()) / 0.5
    assert math.isclose(rms, 0.2, rel_tol=0.25)  # Newton and Schulz's singular values are from 0.7 to 1.2


def test_a_loaded_state_is_what_the_next_step_uses() -> None:
    model = network()
    optimizer = configured(model)
    give_gradients(model, 0)
    step(optimizer, 0.1)
    again = network()
    again.load_state_dict(model.state_dict())
    loaded = configured(again)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, stepper in ((model, optimizer), (again, loaded)):
        give_gradients(each, 1)
        step(stepper, 0.05)
    assert all(torch.equal(own, other) for own, other in zip(model.parameters(), again.parameters(), strict=True))
    assert len(loaded.state) == len(list(again.parameters()))


def test_an_embedding_is_no_matrix() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False))
    optimizer = configured(model)
    assert [group["params"] for group in optimizer.param_groups] == [[model[1].weight], [model[0].weight]]


def test_a_network_without_matrices_is_refused() -> None:
    message = "train.optimizer: 'muon' found no matrix in the network; do: set train.optimizer=adamw"
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Conv2d(3, 4, 3), TrainConfig(optimizer="muon"))
