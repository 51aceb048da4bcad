"""One rank of tests/engine/test_engines.py.

It trains the same small networks in every engine and writes their states.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.command_line import leave
from pipeline.config.load import load_config
from pipeline.config.schema import TrainConfig
from pipeline.distributed import group, session
from pipeline.distributed.session import Stopwatch
from pipeline.engine.build import build_engine
from pipeline.engine.deepspeed_engine import ShardedDeepSpeedEngine
from pipeline.engine.protocol import Engine
from pipeline.errors import RunError
from pipeline.plan import build_plan
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

BATCH = 16
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    "stage 0": {"engine": "deepspeed", "zero_stage": 0},
    "stage 1": {"engine": "deepspeed", "zero_stage": 1},
}


def network(*, has_batchnorm: bool = True) -> nn.Sequential:
    """Make a network whose sizes no number of ranks divides, so that ZeRO cuts through weights."""
    torch.manual_seed(5)
    norm: list[nn.Module] = [nn.BatchNorm2d(13)] if has_batchnorm else []
    layers = [
        nn.Conv2d(3, 13, 3, 2),
        *norm,
        nn.ReLU(),
        nn.Conv2d(13, 17, 3, 2),
        nn.ReLU(),
        nn.Conv2d(17, 9, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(81, 10))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 16, 16, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


def share(step: int) -> tuple[Tensor, Tensor]:
    """Return this rank's share of the batch of a step."""
    size = BATCH // session.world_size()
    images, labels = (part[session.rank() * size :][:size] for part in batch(step))
    return images, labels


def engine_of(name: str, *, has_batchnorm: bool = True, **changes: Any) -> Engine:
    return build_engine(
        network(has_batchnorm=has_batchnorm), TrainConfig(**{"global_batch": BATCH, **ENGINES[name], **changes})
    )


def flat(tensors: Iterator[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def weights(engine: Engine) -> Tensor:
    return flat(parameter for parameter in engine.model.parameters())


def gradients(engine: Engine) -> Tensor:
    return flat(parameter.grad for parameter in engine.model.parameters() if parameter.grad is not None)


def digests(engine: Engine) -> dict[str, int]:
    """Digest the weights, and each kind of optimiser state over all parameters."""
    states = [engine.state_of(parameter) for parameter in engine.model.parameters()]
    keys = sorted({key for state in states for key in state})  # under Muon, matrices have others than the rest
    kinds = {key: flat(state[key] for state in states if key in state) + 0.0 for key in keys}  # −0 becomes 0
    return {key: session.digest(tensor) for key, tensor in {"weights": weights(engine) + 0.0, **kinds}.items()}


# -- what a gradient is


def gradients_against_float64(name: str, **changes: Any) -> dict[str, Any]:
    """Compare the gradients of the second step with one float64 pass.

    The second step would show leftovers of the first one. Returns them with the largest error.
    """
    engine = engine_of(name, has_batchnorm=False, **changes)
    engine.backward(*share(0), lr=0.1)
    engine.step()
    reference = network(has_batchnorm=False).double()
    with torch.no_grad():
        for own, other in zip(reference.parameters(), engine.model.parameters(), strict=True):
            own.copy_(other)
    _, top1, _ = engine.backward(*share(1), lr=0.1)
    images, labels = batch(1)
    logits = reference(images.double())
    cross_entropy(logits, labels).backward()
    expected, found = flat(p.grad for p in reference.parameters() if p.grad is not None), gradients(engine)
    is_in_memory_format = all(p.grad is not None and p.grad.stride() == p.stride() for p in engine.model.parameters())
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    of_ranks = sum(numbers[0] for numbers in session.gather_numbers(top1.double().view(1))) / session.world_size()
    is_top1 = of_ranks == (logits.argmax(dim=1) == labels).double().mean().item()
    return {
        "error": error,
        "top-1 is that of the batch": is_top1,
        "digest": session.digest(found),
        "has the weights' strides": is_in_memory_format,
    }


def clipped_step(name: str) -> dict[str, float]:
    """Take a step of plain gradient descent at learning rate 1, with half of the gradient masked.

    The change of the weights is then the gradient that was used.
    """
    engine = engine_of(name, has_batchnorm=False, clip_norm=0.01, momentum=0.0, weight_decay=0.0, accumulation=2)
    *_, norm = engine.backward(*share(0), lr=1.0)
    seen = torch.linalg.vector_norm(gradients(engine)).item()
    for parameter in engine.model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_((torch.arange(parameter.numel()).view(parameter.shape) % 2).to(parameter.grad))
    masked = gradients(engine)
    before = weights(engine)
    engine.step()
    moved = before - weights(engine)
    cosine = cosine_similarity(moved, masked, dim=0).item()
    return {"reported": norm.item(), "seen": seen, "moved": torch.linalg.vector_norm(moved).item(), "cosine": cosine}


def skipped_steps(name: str) -> list[dict[str, int]]:
    """Take steps 0, 2 and 3: with step 1 skipped between, with a step 1 whose gradients are NaN, and without step 1."""
    results = []
    for steps in ((0, 1, 2, 3), (0, -1, 2, 3), (0, 2, 3)):
        engine = engine_of(name, has_batchnorm=False, accumulation=2)
        for step in steps:
            images, labels = share(abs(step))
            engine.backward(images * float("nan") if step == -1 else images, labels, lr=0.1)
            if step == 1:
                engine.skip_step()
            elif step == -1:
                engine.step(torch.ones(()))
            else:
                engine.step()
        results.append(digests(engine))
    return results


# -- training with masks


def sparsifier_of(engine: Engine, method: str, **settings: Any) -> Sparsifier:
    return Sparsifier(
        engine.model,
        engine.optimizer,
        METHODS[method],
        density=0.2,
        seed=0,
        fragments=engine.fragments,
        shadows=[engine.average.module] if engine.average is not None else [],
        **settings,
    )


def train(name: str, method: str, **changes: Any) -> list[dict[str, Any]]:
    """Train 24 steps with an update after every fourth; returns digests after each step."""
    engine = engine_of(name, **changes)
    sparsifier = sparsifier_of(engine, method, check_every=1)
    history: list[dict[str, Any]] = []
    for step in range(24):
        engine.backward(*share(step), lr=0.1 if engine.optimizer.defaults.get("momentum") else 0.003)
        if sparsifier.before_step(0.3 if step % 4 == 3 else None):
            engine.step()
        else:
            engine.skip_step()
        sparsifier.after_step()
        history.append({**digests(engine), "masks": mask_digest(sparsifier.masks)})
    return history


def averaged(name: str) -> dict[str, Any]:
    """Train 8 steps with a moving average and two updates, which replace the step.

    Returns digests of the network after each step and of the average at the end, and whether the
    average is the recurrence in float64 and differs from the network.
    """
    engine = engine_of(name, ema_decay=0.75)
    sparsifier = sparsifier_of(engine, "rigl", check_every=1)
    assert engine.average is not None
    averages = _floating(engine.average.module)
    expected = {key: tensor.double() for key, tensor in _floating(engine.model).items()}
    history = []
    for step in range(8):
        engine.backward(*share(step), lr=0.1)
        if sparsifier.before_step(0.3 if step % 4 == 3 else None):
            engine.step()
            expected = {key: 0.75 * expected[key] + 0.25 * now for key, now in _floating(engine.model).items()}
        else:
            engine.skip_step()
        sparsifier.after_step()
        expected |= {key: expected[key] * mask for key, mask in sparsifier.masks.items()}
        history.append({**digests(engine), "masks": mask_digest(sparsifier.masks)})
    return {
        "history": history,
        "average": session.digest(flat(averages[key] + 0.0 for key, _ in engine.model.named_parameters())),
        "is_right": max(float((averages[key] - value).abs().max()) for key, value in expected.items()) < 1e-6,
        "num_pruned_nonzero": sum(int(averages[key][~mask].count_nonzero()) for key, mask in sparsifier.masks.items()),
        "is_apart": float((flat(iter(averages.values())) - flat(iter(_floating(engine.model).values()))).norm()) > 0.1,
    }


def _floating(network: nn.Module) -> dict[str, Tensor]:
    """Return weights and BatchNorm statistics."""
    return {key: tensor for key, tensor in network.state_dict().items() if tensor.is_floating_point()}


def pruned_weights_that_are_not_zero(*, has_fragments: bool) -> dict[str, Any]:
    """Count them before and after each of three steps, of which the second has an update.

    Also returns what the Sparsifier reports after the first step and when it is asked at the end.
    """
    engine = engine_of("stage 1")
    fragments = engine.fragments if has_fragments else (lambda parameter: [])
    sparsifier = Sparsifier(
        engine.model, engine.optimizer, METHODS["rigl"], density=0.2, seed=0, fragments=fragments, check_every=0
    )
    history: list[int] = []
    found: list[str] = []
    for step in range(3):
        engine.backward(*share(step), lr=0.1)
        sparsifier.before_step(0.3 if step == 1 else None)
        history.append(_num_alive_where_pruned(sparsifier))
        engine.step()
        history.append(_num_alive_where_pruned(sparsifier))
        found.append(_refused(sparsifier.after_step))
    return {"history": history, "first": found[0], "check": _refused(sparsifier.check)}


def _num_alive_where_pruned(sparsifier: Sparsifier) -> int:
    return sum(
        int(torch.count_nonzero(weight.detach()[~sparsifier.masks[name]]))
        for name, weight in sparsifier.weights.items()
    )


# -- checkpoints


def resumed(folder: Path, saved_by: str, loaded_by: str, **changes: Any) -> list[dict[str, Any]]:
    """Take five steps, save, take three more; load in a fresh engine, and take three more there."""
    overrides = [
        "data.train=t",
        "data.val=v",
        "plan.reference_batch=16",
        f"train.global_batch={BATCH}",
        "train.zero_stage=0",
    ]
    config = load_config("fashion_mnist_s90", overrides)
    checkpoints = Checkpoints(
        folder / f"{saved_by} {loaded_by} {changes}", config, build_plan(config, steps_per_epoch=100), data_digest=""
    )
    results = []
    for name, start in ((saved_by, 0), (loaded_by, 5)):
        torch.compiler.reset()  # a compiled network is compiled again, as in a new process
        engine = engine_of(name, **changes)
        sparsifier = Sparsifier(
            engine.model, engine.optimizer, METHODS["set"], density=0.2, seed=0, fragments=engine.fragments
        )
        if start:
            assert checkpoints.load(engine, sparsifier, resume="auto").step == start
        for step in range(start, 8):
            engine.backward(*share(step), lr=0.01)
            sparsifier.before_step(0.3 if step % 3 == 2 else None)
            engine.step()
            sparsifier.after_step()
            if step == 4 and not start:
                checkpoints.save(5, engine, sparsifier, tracker_run="")
        checkpoints.finish()  # the next engine loads what a thread may still be writing
        results.append({**digests(engine), "masks": mask_digest(sparsifier.masks)})
    return results


# -- torch.compile


def compiled_gradient(**changes: Any) -> dict[str, Any]:
    """Compare gradient and loss of a compiled network with those of the same network without compiling."""
    found = []
    for is_compiled in (False, True):
        engine = engine_of("torch", compile=is_compiled, **changes)
        loss, top1, _ = engine.backward(*share(0), lr=0.1)
        found.append((gradients(engine), loss.item(), top1.item()))
    (eager, *numbers), (other, *other_numbers) = found
    return {
        "names": [name for name, _ in engine.model.named_parameters()],
        "error": ((eager - other).abs().max() / eager.abs().max()).item(),
        "loss": max(row[0] for row in session.gather_numbers((loss - numbers[0]).abs().double().view(1))),
        "top-1 is equal": numbers[1] == other_numbers[1],
        "digest": session.digest(other),
    }


# -- what is refused


class _WithHooks(ShardedDeepSpeedEngine):
    """Like a DeepSpeed version that removes gradients during the backward pass."""

    def _zero_settings(self) -> dict[str, Any]:
        settings = super()._zero_settings()
        return settings | {"zero_optimization": settings["zero_optimization"] | {"contiguous_gradients": True}}


def synchronisations(**changes: Any) -> list[int]:
    """Count how often DeepSpeed makes the host wait for its device in each of five steps of two micro-batches."""
    from deepspeed.accelerator import get_accelerator

    engine, accelerator = engine_of("stage 0", accumulation=2, **changes), get_accelerator()
    gc.collect()  # the engines of before wait for the device when they are destroyed
    real = accelerator.synchronize
    calls: list[int] = []
    counts: list[int] = []
    accelerator.synchronize = lambda *_: calls.append(1)
    try:
        for step in range(5):
            engine.backward(*share(step), lr=0.1)
            engine.step()
            counts.append(sum(calls))
            calls.clear()
    finally:
        accelerator.synchronize = real
    return counts


def an_unused_layer() -> Engine:
    model = network()
    model.append(nn.Identity())
    model[-1].extra = nn.Linear(2, 2)
    engine = build_engine(model, TrainConfig(global_batch=BATCH, **ENGINES["stage 1"]))
    engine.backward(*share(0), lr=0.1)
    return engine


def stride_of_a_narrow_convolution(name: str) -> tuple[int, ...]:
    model = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.Flatten(), nn.Linear(8, 2))
    engine = build_engine(model, TrainConfig(global_batch=BATCH, **ENGINES[name]))
    convolution: nn.Conv2d = next(each for each in engine.model.modules() if isinstance(each, nn.Conv2d))
    return convolution.stride


def _refused(action: Callable[[], object]) -> str:
    try:
        action()
    except RunError as error:
        return f"{error.code} {error.what}"
    return ""


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    with group.join():
        for name in ENGINES:
            for accumulation in (1, 2, 4):
                results[f"gradient {name} {accumulation}"] = gradients_against_float64(name, accumulation=accumulation)
            results[f"gradient {name} bf16"] = gradients_against_float64(name, accumulation=2, precision="bf16")
            results[f"clipped {name}"] = clipped_step(name)
            results[f"stride {name}"] = stride_of_a_narrow_convolution(name)
            results[f"skipped {name}"] = skipped_steps(name)
            for method in ("set", "rigl"):
                for accumulation in (1, 2):
                    for precision in ("fp32", "bf16"):
                        case = f"{name} {method} {accumulation} {precision}"
                        results[case] = train(name, method, accumulation=accumulation, precision=precision)
            results[f"{name} contiguous"] = train(name, "rigl", channels_last=False)
            results[f"{name} clipped"] = train(name, "rigl", clip_norm=0.5, nesterov=True)
            results[f"{name} averaged"] = averaged(name)
            results[f"{name} adamw"] = train(name, "rigl", optimizer="adamw", weight_decay=0.1)
            if name != "stage 1":
                results[f"{name} muon"] = train(name, "rigl", optimizer="muon", weight_decay=0.1, accumulation=2)
        results["masked with fragments"] = pruned_weights_that_are_not_zero(has_fragments=True)
        results["masked without"] = pruned_weights_that_are_not_zero(has_fragments=False)
        for optimizer in ("sgd", "adamw"):
            for saved_by, loaded_by in (("stage 1", "stage 1"), ("stage 0", "stage 1"), ("stage 1", "stage 0")):
                results[f"resumed {optimizer} {saved_by} {loaded_by}"] = resumed(
                    folder, saved_by, loaded_by, optimizer=optimizer
                )
        for saved_by, loaded_by in (("stage 0", "torch"), ("torch", "stage 0")):
            results[f"resumed muon {saved_by}"] = resumed(folder, saved_by, loaded_by, optimizer="muon")
        results["compiled"] = compiled_gradient()
        for case, changes in {"torch": {}, "ddp": {"engine": "ddp"}, "stage 0": {}, "stage 1": {}}.items():
            results[f"{case} compiled"] = train(case.replace("ddp", "torch"), "rigl", compile=True, **changes)
        results["compiled twice"] = resumed(folder, "torch", "torch", compile=True)
        results["synchronisations"] = synchronisations()
        timed = {"timers": {"throughput": {"enabled": True, "synchronized": True}}}
        results["synchronisations, timed"] = synchronisations(deepspeed=timed)
        results["unknown"] = _refused(
            lambda: _WithHooks(network(), TrainConfig(global_batch=BATCH, **ENGINES["stage 1"]), Stopwatch())
        )
        results["unused"] = _refused(an_unused_layer().step)
        results["mlflow"] = "mlflow" in sys.modules  # DeepSpeed's autotuner would import it
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
