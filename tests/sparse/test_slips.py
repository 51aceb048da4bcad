"""What a loop of one's own forgets is named, and a right loop is left alone."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipeline.errors import ConfigError, IntegrityError
from pipeline.sparse import METHODS, Sparsifier, timetable
from pipeline.sparse.request import TopologyUpdate

SCALED = "the gradients were unscaled .*between before_step and the optimiser step"
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class Loop:
    """A user's loop, with the slips as options."""

    def __init__(self, optimizer: str = "sgd", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier = Sparsifier(self.model, self.optimizer, "rigl", density=0.5, seed=0, **options)
        self.scaler = torch.amp.GradScaler("cpu")

    def step(
        self, drop: float | None = None, *, unscale: bool = True, after: bool = True, clip: float | None = None
    ) -> TopologyUpdate | None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.randn(4, 8)).square().sum()).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
        if self.sparsifier.before_step(drop):
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.sparsifier.after_step() if after else None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_right_loop_is_left_alone(optimizer: str) -> None:
    loop = Loop(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            loop.step(0.3 if step % 2 else None, clip=1e-3)  # divides the gradient by a large number that is no scale
    assert (loop.sparsifier.steps, loop.sparsifier.update_index) == (6, 3)


def test_a_step_without_after_step_is_named_at_the_next_before_step() -> None:
    loop = Loop()
    loop.step()
    loop.step(after=False)
    with pytest.raises(
        ConfigError, match=r"after_step was not called after optimiser step 2; do: call sparsifier.after_step"
    ):
        loop.step()


def test_a_step_that_was_given_up_needs_no_after_step() -> None:
    loop = Loop()
    loop.sparsifier.before_step(0.3)  # and the caller does not step
    loop.step()
    assert (loop.sparsifier.steps, loop.sparsifier.update_index) == (1, 0)


def test_a_step_that_was_refused_needs_no_after_step() -> None:
    loop = Loop()
    loop.sparsifier.before_step()
    with pytest.raises(ConfigError, match=r"drop fraction: expected 0 to 1, got 2"):
        loop.sparsifier.before_step(2)
    loop.optimizer.step()  # without the Sparsifier
    loop.step()
    assert loop.sparsifier.steps == 1


def test_restoring_a_state_begins_anew() -> None:
    loop = Loop()
    loop.step()
    state = loop.sparsifier.state_dict()
    loop.step(after=False)
    loop.sparsifier.load_state_dict(state)
    loop.step()
    assert loop.sparsifier.steps == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_grad_scaler_without_unscale_is_named_at_the_first_step(optimizer: str) -> None:
    loop = Loop(optimizer)
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    with pytest.raises(ConfigError, match=SCALED + r".*do: call scaler.unscale_\(optimizer\) before"):
        loop.step(unscale=False)
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))  # before it was taken


def test_a_grad_scaler_whose_first_steps_overflow_is_named_at_the_first_that_is_taken() -> None:
    loop = Loop()
    weight = loop.model[0].weight
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    loop.step(unscale=False)  # the scaler takes no step
    hook.remove()
    with pytest.raises(ConfigError, match=SCALED):
        loop.step(unscale=False)


def test_an_optimiser_that_outlives_its_sparsifier_is_free() -> None:
    loop = Loop()
    loop.sparsifier.before_step()
    del loop.sparsifier
    for parameter in loop.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loop.optimizer.step()
    loop.sparsifier = Sparsifier(loop.model, loop.optimizer, METHODS["set_itop"], density=0.5, seed=0)
    loop.step(0.3)
    assert loop.sparsifier.update_index == 1


def test_an_averaged_model_that_is_no_shadow_is_named_at_the_first_update() -> None:
    loop = Loop()
    average = AveragedModel(loop.model)
    loop.step()
    average.update_parameters(loop.model)
    with pytest.warns(
        UserWarning, match=r"an AveragedModel of this model is not among the Sparsifier's shadows"
    ) as caught:
        loop.step(0.3)
    assert caught[0].filename == __file__
    average.update_parameters(loop.model)
    with pytest.raises(IntegrityError, match=r"0\.weight of this copy has non-zero values where its mask is 0"):
        loop.sparsifier.check_shadow(average)
    loop.sparsifier.check_shadow(loop.model)
    with pytest.raises(ConfigError, match=r"shadows: 2\.weight is missing from one"):
        loop.sparsifier.check_shadow(nn.Sequential(nn.Linear(8, 16)))


def test_an_averaged_model_among_shadows_is_not_warned_of() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))  # of shapes that no other test has
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "set_itop", density=0.5, seed=0, shadows=[average])
    model(torch.randn(2, 7)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.before_step(0.3)
        optimizer.step()
        average.update_parameters(model)
        assert sparsifier.after_step() is not None
    sparsifier.check_shadow(average)


def test_the_loops_of_the_docstring_run() -> None:
    text = inspect.getdoc(Sparsifier) or ""
    plain, scaled, parallel = (textwrap.dedent(part.strip("\n").split("\n\n")[0]) for part in text.split("::\n")[1:4])
    loop = Loop()
    names: dict[str, Any] = {
        "Sparsifier": Sparsifier,
        "timetable": timetable,
        "torch": torch,
        "model": loop.model,
        "optimizer": loop.optimizer,
        "loader": [(torch.randn(4, 8), torch.randint(0, 8, (4,)))] * 400,
        "num_steps": 400,
        "loss_function": nn.functional.cross_entropy,
        "DistributedDataParallel": lambda model: model,
    }
    exec(plain, names)
    assert (names["sparsifier"].steps, names["sparsifier"].update_index) == (400, 2)  # after 100 and 200; 300 = T_end
    exec(parallel, names)
    names |= {"scaler": torch.amp.GradScaler("cpu"), "step": 99, "loss": loop.model(torch.ones(1, 8)).sum()}
    exec(scaled, names)
    assert names["sparsifier"].update_index == 1
