"""Measure installable packages for sparse training beside ours: ``python -m benchmarks.peers``.

All run on the same network. rigl-torch 0.5.2 masks weights and momenta after every optimiser step
and the gradient in a hook, and updates by full top-k sorts. sparsimony 0.1.0 masks by
parametrisation (in every forward and backward pass) and updates by top-k.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.support.bars import Options, Results, bar, in_turn, options
from benchmarks.support.workload import DENSITY, DROP_FRACTION, Setup, Workload
from pipeline import models
from pipeline.sparse.layers import sparse_weights

# sparsimony declares numpy 1 and would downgrade ours; it runs with numpy 2.
INSTALL = "python3 -m pip --python .venv/bin/python install --no-deps rigl-torch==0.5.2 sparsimony==0.1.0"


class RigLTorch:
    """The scheduler of rigl-torch, on a network of its own."""

    def __init__(self, workload: Workload) -> None:
        module: Any = importlib.import_module("rigl_torch.RigL")
        self.model = models.build(workload.name)
        self.gradients = [gradient.clone() for gradient in workload.gradients]
        self.optimizer = _optimizer(self.model)
        self.scheduler = module.RigLScheduler(
            self.model,
            self.optimizer,
            dense_allocation=DENSITY,
            T_end=10**9,
            delta=2,
            alpha=DROP_FRACTION,
            ignore_linear_layers=False,
        )
        hooks = zip(self.scheduler.W, self.scheduler.backward_hook_objects, strict=True)
        self.hooks = {id(weight): hook for weight, hook in hooks if hook is not None}

    def backward(self) -> None:
        """Rounds what its hooks add to a backward pass."""
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            hook = self.hooks.get(id(parameter))
            parameter.grad = hook(gradient) if hook else gradient

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def prepare_update(self) -> None:
        """Make its next call an update, with the dense gradients that its hooks keep."""
        assert self.scheduler()
        self.backward()

    def update(self) -> None:
        assert not self.scheduler()


class Sparsimony:
    """The RigL of sparsimony, on a network of its own."""

    def __init__(self, workload: Workload) -> None:
        rigl, distributions, schedulers = (
            importlib.import_module(f"sparsimony.{name}")
            for name in ("dst.rigl", "distributions.base", "schedulers.base")
        )
        self.model = models.build(workload.name)
        sparse = {id(weight): name for name, weight in sparse_weights(self.model).items()}
        gradients = zip(self.model.parameters(), workload.gradients, strict=True)
        self.gradients = {
            sparse[id(parameter)]: gradient for parameter, gradient in gradients if id(parameter) in sparse
        }
        self.optimizer = _optimizer(self.model)
        self.sparsifier: Any = rigl.RigL(
            scheduler=schedulers.ConstantScheduler(DROP_FRACTION, t_end=10**9, delta_t=2),
            distribution=distributions.ERKDistribution(),
            optimizer=self.optimizer,
            sparsity=1 - DENSITY,
            init_method=None,
        )
        self.sparsifier.prepare(self.model, [{"tensor_fqn": name} for name in self.gradients])
        modules = dict(self.model.named_modules())
        self.modules = [modules[name.removesuffix(".weight")] for name in self.gradients]

    def forward_and_backward(self) -> None:
        """Rounds what its parametrisations add to a forward and a backward pass."""
        self.optimizer.zero_grad()
        masked: list[Tensor] = [module.weight for module in self.modules]  # type: ignore[misc]
        torch.autograd.backward(masked, list(self.gradients.values()))

    def step(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()

    def prepare_update(self) -> None:
        """Make its next call an update, with the dense gradients that its parametrisations keep."""
        assert not self.sparsifier.step()
        self.forward_and_backward()

    def update(self) -> None:
        assert self.sparsifier.step()


class Peer(Protocol):
    """What is measured of each package."""

    def step(self) -> None: ...
    def prepare_update(self) -> None: ...
    def update(self) -> None: ...


PEERS: dict[str, tuple[str, Callable[[Workload], Peer]]] = {
    "rigl-torch": ("rigl_torch", RigLTorch),
    "sparsimony": ("sparsimony", Sparsimony),
}


def _optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)


def measure(model: str, given: Options, results: Results) -> None:
    """Measure each installed package: its step (masking and optimiser) / ours, its update / ours."""
    for name, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not installed; do: {INSTALL}", flush=True)
            continue
        workload = Workload.named(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer, ours = make(workload), Setup(workload)
            steps = [in_turn(peer.step, ours.sparse_step, rounds=given.rounds) for _ in range(given.runs)]
            results.add(bar(f"{name} step / ours", steps))

            def prepare(peer: Peer = peer, ours: Setup = ours) -> None:
                peer.prepare_update()
                ours.refresh()

            updates = [in_turn(peer.update, ours.update, rounds=1, prepare=prepare) for _ in range(given.runs)]
            results.add(bar(f"{name} update / ours", updates))


def main() -> None:
    given = options(__doc__, ("peers",), models=("resnet50",), quick_model="cifar_resnet20")
    results = Results()
    measure(given.models[0], given, results)
    results.write(given.json)


if __name__ == "__main__":
    main()
