"""Pruned weights stay exactly 0 under every optimiser: those that work weight by weight, and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, IntegrityError
from pipeline.sparse import Sparsifier, optimizers

timm_optim = pytest.importorskip("timm.optim")
Make = Callable[[nn.Module], torch.optim.Optimizer]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))


class Shampoo(torch.optim.Optimizer):
    """Shampoo (arXiv 1802.09568) in short: G times the inverse fourth roots of Σ GGᵀ and Σ GᵀG, kept in the state."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                grad, state, roots = weight.grad, self.state[weight], []
                for dim, size in enumerate(weight.shape):
                    held = state.setdefault(f"precond_{dim}", 1e-3 * torch.eye(size))
                    held += grad @ grad.T if dim == 0 else grad.T @ grad
                    values, vectors = torch.linalg.eigh(held)
                    roots.append(vectors @ torch.diag(values.clamp(min=1e-6) ** -0.25) @ vectors.T)
                weight.sub_(roots[0] @ grad @ roots[1], alpha=group["lr"])


class Soap(torch.optim.Optimizer):
    """SOAP (arXiv 2409.11321) in short, for rows only: Adam in the eigenbasis of Σ GGᵀ."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                grad, state = weight.grad, self.state[weight]
                if not state:
                    state |= {"GG": torch.zeros(len(grad), len(grad)), "exp_avg": torch.zeros_like(grad)}
                    state["exp_avg_sq"] = torch.zeros_like(grad)
                state["GG"] += grad @ grad.T
                basis = torch.linalg.eigh(state["GG"])[1]
                state["exp_avg"].lerp_(grad, 0.1)
                state["exp_avg_sq"].lerp_((basis.T @ grad).square(), 0.05)
                turned = basis.T @ state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
                weight.sub_(basis @ turned, alpha=group["lr"])


Soap.__name__ = "SOAP"  # by which its state is known


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682): the gradient is taken at y, between the iterate z and its average x."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for weight in group["params"]:
                state = self.state[weight]
                z = state.setdefault("z", weight.detach().clone())
                x = (weight - 0.1 * z) / 0.9
                z.sub_(weight.grad, alpha=group["lr"])
                weight.copy_(0.9 * x.lerp(z, 1 / group["k"]) + 0.1 * z)


class PrivateLookahead(torch.optim.Optimizer):
    """Lookahead (arXiv 1907.08610) whose slow weights are a copy from before there were masks."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base_optimizer = base
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step()
        weights = [p for group in self.param_groups for p in group["params"]]
        for slow, weight in zip(self.slow, weights, strict=True):
            slow.lerp_(weight, 0.5)
            weight.copy_(slow)


MOVING: dict[str, Make] = {
    "Muon": lambda m: torch.optim.Muon(m.parameters(), lr=0.02),
    "timm's Muon": lambda m: timm_optim.Muon(m.parameters(), lr=0.02),
    "Shampoo": lambda m: Shampoo(m.parameters()),
    "SOAP": lambda m: Soap(m.parameters()),
    "Lookahead": lambda m: PrivateLookahead(torch.optim.SGD(m.parameters(), lr=0.1)),
    "timm's Lookahead around Muon": lambda m: timm_optim.Lookahead(
        torch.optim.Muon(m.parameters(), lr=0.02), alpha=0.5, k=2
    ),
}
STAYING: dict[str, Make] = {
    "schedule-free": lambda m: ScheduleFree(m.parameters()),
    "timm's AdamP": lambda m: timm_optim.AdamP(m.parameters(), lr=0.01),
    **{
        each.__name__: lambda m, each=each: each(m.parameters(), lr=0.01)  # type: ignore[misc]
        for each in sorted(optimizers.KEEP_ZEROS, key=lambda each: each.__name__)
    },
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Sparsifier:
    """Six steps with two updates; after each, weights are 0 outside the masks, and as dense as asked."""
    sparsifier = Sparsifier(model, optimizer, "rigl", density=0.1, seed=0, check_every=0, **options)
    total = sum(weight.numel() for weight in sparsifier.weights.values())
    for step in range(6):
        model(torch.randn(8, 16)).square().mean().backward()
        assert sparsifier.before_step(0.5 if step in (1, 3) else None)
        optimizer.step()
        sparsifier.after_step()
        optimizer.zero_grad()
        for name, weight in sparsifier.weights.items():
            assert not bool(weight.detach()[~sparsifier.masks[name]].any()), (step, name)
            assert bool(torch.isfinite(weight).all())
        assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == round(0.1 * total)
    return sparsifier


@pytest.mark.parametrize("name", MOVING)
def test_a_mask_follows_what_moves_pruned_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = MOVING[name](model)
    assert not optimizers.keeps_zeros(optimizer)
    sparsifier = train(model, optimizer)
    assert all(not torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))
    for weight, mask in zip(sparsifier.weights.values(), sparsifier.masks.values(), strict=True):
        for state in optimizers.states_of(optimizer, weight):  # momentum, slow weights
            assert not bool(state[~mask].any())

    # and the first step is checked, whatever check_every is: here the optimiser is taken for one that needs no mask
    monkeypatch.setattr("pipeline.sparse.sparsifier.keeps_zeros", lambda _: True)
    model = network()
    optimizer = MOVING[name](model)
    message = r"has non-zero values where its mask is 0 \(check after step 1\); do: find out what changed it, "
    with pytest.raises(IntegrityError, match=message + type(optimizer).__name__):
        train(model, optimizer)


@pytest.mark.parametrize("name", STAYING)
def test_an_optimiser_that_works_weight_by_weight_needs_no_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sparse.sparsifier.keeps_zeros", lambda _: True)
    model = network()
    train(model, STAYING[name](model))


def test_state_in_other_coordinates_is_left_alone() -> None:
    """A mask of a square preconditioner, or of a second moment in an eigenbasis, would mean nothing."""
    model = network()
    weight = model[2].weight
    for optimizer, kept in ((Shampoo(model.parameters()), []), (Soap(model.parameters()), ["exp_avg"])):
        mask = train(model, optimizer).masks["2.weight"]
        state = optimizer.state[weight]
        shaped = {name for name, value in state.items() if value.shape == weight.shape}
        assert len(shaped) >= 2
        assert [id(each) for each in optimizers.states_of(optimizer, weight)] == [id(state[name]) for name in kept]
        assert all(bool(state[name][~mask].any()) for name in shaped - set(kept))


def test_a_sparsifier_that_is_not_at_work_masks_nothing() -> None:
    model = network()
    optimizer = MOVING["Muon"](model)
    first = Sparsifier(model, optimizer, "static", density=0.1, seed=0)
    second = Sparsifier(model, optimizer, "static", density=0.5, seed=1, dense_layers=[])
    model(torch.randn(8, 16)).square().mean().backward()
    second.before_step()
    optimizer.step()
    second.after_step()
    del first
    active = sum(int((weight != 0).sum()) for weight in model.parameters())
    assert active > 0.1 * sum(weight.numel() for weight in model.parameters())  # what the first would have left


def test_a_moving_average_made_in_a_hook_sees_masked_weights() -> None:
    """The mask follows within ``optimizer.step()``, before what comes after it."""
    model = network()
    optimizer = MOVING["Muon"](model)
    sparsifier = Sparsifier(model, optimizer, "static", density=0.1, seed=0)
    model(torch.randn(8, 16)).square().mean().backward()
    sparsifier.before_step()
    optimizer.step()
    for name, weight in sparsifier.weights.items():
        assert not bool(weight.detach()[~sparsifier.masks[name]].any())


class Plain:
    """An optimiser that is not torch's and has no hooks, as wrappers of other libraries are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.param_groups, self.state, self._inner = inner.param_groups, inner.state, inner
        self.zero_grad = inner.zero_grad

    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(torch.ones_like(weight), alpha=-0.01)


def test_an_optimiser_without_hooks_is_followed_by_after_step() -> None:
    model = network()
    train(model, Plain(torch.optim.SGD(model.parameters(), lr=0.1)))  # type: ignore[arg-type]


class FullBatchLBFGS(torch.optim.Optimizer):
    """As in packages that bring their own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [torch.optim.LBFGS, FullBatchLBFGS])
def test_lbfgs_is_refused_by_name_before_a_step(make: Callable[..., torch.optim.Optimizer], wrapped: bool) -> None:
    model = network()
    optimizer = make(model.parameters())
    if wrapped:
        optimizer = PrivateLookahead(optimizer)
    message = f"optimizer: {make.__name__} moves all weights many times in one step.*do: use another one, such as SGD"
    with pytest.raises(ConfigError, match=message):
        Sparsifier(model, optimizer, "rigl", density=0.1, seed=0)


def test_the_classes_of_torch_that_are_known_are_all_that_keep_zeros() -> None:
    left: set[Tensor | Any] = {torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Optimizer}
    every = {each for each in vars(torch.optim).values() if isinstance(each, type)} - left
    names = {each.__name__ for each in every - optimizers.KEEP_ZEROS}
    assert names <= {"Muon", "Adafactor"}  # Adafactor is followed: its state is not of the weight's shape
