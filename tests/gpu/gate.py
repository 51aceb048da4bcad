"""The parts of a run that the gate trains on the emulated GPU and on the CPU, and what it measures there."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.config.load import load_config
from pipeline.config.schema import DataConfig, TrainConfig
from pipeline.data.loaders import EvalLoader, TrainLoader
from pipeline.distributed import session
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.engine.torch_engine import place_model
from pipeline.evaluation.batchnorm import average_buffers, recalibrate
from pipeline.evaluation.predict import Networks, predict
from pipeline.evaluation.score import score
from pipeline.plan import build_plan
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, Strategy, contradictions
from pipeline.training.evaluation import kept_random_state
from tests.support.emulated_gpu import DEVICE, Count, EmulatedGpu, GpuError

STRUCTURES = ("none", "fan_in", "2:4", "block 4x4")
BATCH, SIDE, CLASSES = 8, 12, 10  # the batch is that of all ranks
CHECK_EVERY, UPDATE_AT, NUM_STEPS = 3, 4, 6  # steps count from 0, and the sparsifier's checks from 1
KINDS = {2: "check", 3: "step", UPDATE_AT: "update"}  # of which the step is an example
# With this mean and deviation normalising rounds nothing, so that both devices train on the same pixels.
EXACT = {"mean": [128.0] * 3, "std": [64.0] * 3}
DATA = DataConfig(train="ring", val="ring", train_resolution=SIDE, eval_resolution=SIDE, **EXACT)


@dataclass(frozen=True)
class Cell:
    """One way to train. ``reason`` says why it cannot be; empty: it can."""

    name: str
    strategy: Strategy
    density: float = 0.5
    settings: dict[str, Any] = field(default_factory=dict)  # of TrainConfig
    own_step_counts: bool = False

    @property
    def reason(self) -> str:
        return "; ".join(contradictions(self.strategy, self.density))


def cell_of(method: str, structure: str | None = None, **changes: Any) -> Cell:
    """Return the cell of a method, with a structure and other changes of its row."""
    if structure is not None:
        changes["structure"] = structure
    if structure == "2:4":
        changes["distribution"] = "uniform"
    if structure == "block 4x4":
        changes["prune"] = "magnitude"
    strategy = dataclasses.replace(METHODS[method], **changes)
    density = 1.0 if method == "dense" else strategy.initial_density or 0.5
    return Cell(", ".join([method, *([structure] if structure else changes.values())]), strategy, density)


# what chooses its masks by a score at first trains as ``static`` does
TRAINED = [name for name, row in METHODS.items() if row.initial == "random"]
TABLE = {cell.name: cell for cell in itertools.starmap(cell_of, itertools.product(TRAINED, STRUCTURES))}
FURTHER = {
    cell.name: cell
    for cell in (
        cell_of("rigl", scope="global"),
        cell_of("set_itop", scope="global_normalised"),
        cell_of("rigl_itop", scope="global_prune"),
        cell_of("rigl_itop", regrown="zero"),
        Cell("adamw", METHODS["rigl"], settings={"optimizer": "adamw"}),
        Cell("adamw, own steps", METHODS["set_itop"], settings={"optimizer": "adamw"}, own_step_counts=True),
        Cell("muon", METHODS["rigl"], settings={"optimizer": "muon"}),
        Cell("clipped", METHODS["rigl"], settings={"clip_norm": 0.1}),
        Cell("accumulated, averaged", METHODS["rigl"], settings={"accumulation": 2, "ema_decay": 0.9}),
        Cell("whole gradients", METHODS["rigl"], settings={"reduction": "dense"}),
    )
}
CELLS = TABLE | FURTHER
# Every method and every structure once or twice, and what differs on the way to a step.
SAMPLE = (
    *("dense, none", "set, none", "set_itop, 2:4", "srigl, fan_in", "rigl, block 4x4", "snfs, none", "granet, none"),
    *(
        "mixed, none",
        "dsr, none",
        "rigl, global",
        "rigl_itop, zero",
        "adamw, own steps",
        "clipped",
        "accumulated, averaged",
    ),
)
SAMPLE_OF_TWO_RANKS = ("set, none", "rigl, block 4x4", "snfs, none", "adamw, own steps", "clipped")

# How often the host may wait for the device, at most. An ordinary step: never; what ranks agree on is read
# one step later, by an event. A check of masks and weights: for its outcome on all ranks. An update: for what
# ranks agree on, and for the numbers of weights in old and new masks, on two ranks also for what they compare.
WAITS = {1: {"step": 0, "check": 1, "update": 7}, 2: {"step": 0, "check": 1, "update": 8}}
EVENTS = 1
WAITS_OF_A_SNAPSHOT = 2  # for the copies of what differs between ranks, and of all else
# Further waits of an update, by part of a cell's name: SRigL counts salient weights, a mix of growth what is
# left for its second part, and regrowth at 0 needs a second pruning.
MORE_IN_AN_UPDATE = {"srigl": 6, "mixed": 1, "zero": 2}
# Operations of the device in a step of the small network, on one rank and on two: what packs and unpacks a bucket of
# gradients takes the place of what masks them.
OPERATIONS = {"step": 68, "check": 94, "update": 224}
MORE_OPERATIONS_IN_AN_UPDATE = {"srigl": 97, "zero": 22}
# (no layer of DSR, which is uniform, is dense: one more is masked)
MORE_OPERATIONS = {"snfs": 6, "dsr": 1, "own steps": 110, "clipped": 25, "accumulated": 50}


def over_budget(cell: Cell, counts: dict[str, Count], *, num_ranks: int) -> list[str]:
    """Return a line for every kind of step that waits more often, or asks for more operations, than it may."""
    found = []
    more_waits, more_operations = (
        sum(table.get(part, 0) for part in cell.name.split(", ")) for table in (MORE_IN_AN_UPDATE, MORE_OPERATIONS)
    )
    for kind, count in counts.items():
        waits = WAITS[num_ranks][kind] + (more_waits if kind == "update" else 0)
        if len(count.waits) > waits:
            found.append(
                f"{cell.name}: {kind}: {len(count.waits)} waits, {waits} allowed: {'; '.join(map(str, count.waits))}"
            )
        if len(count.events) > EVENTS:
            found.append(f"{cell.name}: {kind}: {len(count.events)} waits for events, {EVENTS} allowed")
        more_in_an_update = sum(MORE_OPERATIONS_IN_AN_UPDATE.get(part, 0) for part in cell.name.split(", "))
        operations = OPERATIONS[kind] + more_operations + (more_in_an_update if kind == "update" else 0)
        if count.num_operations > operations:
            found.append(f"{cell.name}: {kind}: {count.num_operations} operations, {operations} allowed")
    return found


def differences(cell: Cell, one: Trained, other: Trained) -> list[str]:
    """Return a line for what differs between the CPU and the emulated device: masks by a bit, weights by a rounding."""
    largest = float((one.weights - other.weights).abs().max())
    return [f"{cell.name}: other masks"] * (one.history != other.history) + [
        f"{cell.name}: weights differ by {largest}"
    ] * (not largest < 1e-6)


def network() -> nn.Sequential:
    """Make a small network. Its first layer, whose sizes no structure divides, stays dense with a structure."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Linear(12, CLASSES, bias=False),
    )


def batch(step: int, device: str) -> tuple[Tensor, Tensor]:
    """Return this rank's share of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    here = slice(session.rank() * BATCH // session.world_size(), (session.rank() + 1) * BATCH // session.world_size())
    return images[here].to(device), labels[here].to(device)


class Trainer:
    """The training loop of launchers/train.py, as far as a device has to do with it."""

    def __init__(self, cell: Cell) -> None:
        config = TrainConfig(engine="torch", global_batch=BATCH, bucket_mb=0.01, **cell.settings)
        self.engine: Engine = build_engine(network(), config)
        self.ranks = session.Session()
        self.cell = cell
        self.sparsifier = Sparsifier(
            self.engine.model,
            self.engine.optimizer,
            cell.strategy,
            density=cell.density,
            seed=0,
            dense_layers=[] if cell.strategy.structure == "none" else ["0.weight", "10.weight"],
            on_masks=self.engine.use_masks,
            shadows=[] if self.engine.average is None else [self.engine.average.module],
            check_every=CHECK_EVERY,
            own_step_counts=cell.own_step_counts,
        )

    def step(self, step: int, images: Tensor, labels: Tensor) -> bool:
        """Take one step and return whether to go on; an update is due after step ``UPDATE_AT``."""
        update = 0.3 if step == UPDATE_AT and self.cell.strategy.grow is not None else None
        dense = self.sparsifier.needs_dense_gradient(update)
        loss, _, norm = self.engine.backward(images, labels, lr=0.05, dense=dense)
        goes_on = self.ranks.agree_to_go_on(loss, norm, step, at_once=update is not None)
        if self.sparsifier.before_step(update, is_finite=True, is_masked=self.engine.masks_gradients):
            self.engine.step(self.ranks.is_bad)
        else:
            self.engine.skip_step()
        self.sparsifier.after_step()
        return goes_on

    def weights(self) -> Tensor:
        """Return all weights, in order, on the CPU: [n]."""
        return torch.cat([weight.detach().cpu().contiguous().view(-1) for weight in self.engine.model.parameters()])


@dataclass
class Trained:
    """What training in a cell left, and what each kind of step asked of the device."""

    history: str  # digest over the masks after every update
    weights: Tensor
    counts: dict[str, Count]  # by kind of step; empty on the CPU


@contextlib.contextmanager
def on(device: str) -> Iterator[EmulatedGpu | None]:
    """Train on ``cpu`` or on the emulated ``cuda`` inside the block, in a session of gloo or without one."""
    if device == "cpu":
        yield None
        return
    with EmulatedGpu() as gpu, session.entered(device):
        yield gpu


def train(cell: Cell, device: str) -> Trained:
    """Train in ``cell`` on ``cpu`` or on the emulated ``cuda``."""
    counts: dict[str, Count] = {}
    with on(device) as gpu:
        trainer = Trainer(cell)
        for step in range(NUM_STEPS):
            images, labels = batch(step, device)
            with contextlib.nullcontext(Count()) if gpu is None else gpu.counting() as count:
                trainer.step(step, images, labels)
            if gpu is not None and step in KINDS:
                counts[KINDS[step]] = count
        return Trained(trainer.sparsifier.history_digest, trainer.weights(), counts)


class Ring:
    """A source of images that, as ffcv does, writes into its buffers again after the call that follows."""

    path, num_samples, timeout_seconds = Path("ring"), 64, 1.0
    num_slots = 5

    def blocks(self) -> NDArray[np.int64]:
        return np.arange(self.num_samples)

    def switch_to(self, path: Path) -> None:
        pass

    def batches(
        self, order: NDArray[np.int64], *, batch: int, key: int, resolution: int, reads_ahead: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        buffers = torch.zeros(self.num_slots, batch, resolution, resolution, 3, dtype=torch.uint8)
        labels = torch.zeros(self.num_slots, batch, 1, dtype=torch.int64)
        num_batches, num_made = -(-len(order) // batch), 0
        for index in range(num_batches):
            while num_made <= min(index + self.num_slots - 1, num_batches - 1):  # while batch ``index`` is handed out
                ids = torch.from_numpy(np.resize(order[num_made * batch :][:batch], batch))
                buffers[num_made % self.num_slots] = ids.view(-1, 1, 1, 1).to(torch.uint8)
                labels[num_made % self.num_slots] = ids.view(-1, 1) % CLASSES
                num_made += 1
            size = min(batch, len(order) - index * batch)
            slot = index % self.num_slots
            yield buffers[slot, :size].permute(0, 3, 1, 2), labels[slot, :size]


def loader(device: str, **settings: Any) -> TrainLoader:
    """Return a loader of the ring's images for training on ``device``."""
    at = DEVICE if device == "cuda" else torch.device("cpu")
    data = settings.pop("data", DATA)
    settings = {"global_batch": BATCH, "seed": 0, "num_classes": CLASSES, "channels_last": True, **settings}
    return TrainLoader(Ring(), data, device=at, **settings)


def eval_loader(device: str) -> EvalLoader:
    """Return a loader of the ring's images for evaluation on ``device``."""
    at = DEVICE if device == "cuda" else torch.device("cpu")
    return EvalLoader(Ring(), DATA, batch=BATCH, num_images=22, device=at, channels_last=True)


# -- what happens between steps


def rest_of_a_run(folder: Path, device: str) -> dict[str, Any]:
    """Save, resume, recalibrate, evaluate and predict; return numbers that must be the same on both devices."""
    config = load_config(
        "fashion_mnist_s90", ["data.train=t", "data.val=v", "train.engine=torch", "plan.reference_batch=8"]
    )
    plan, cell = build_plan(config, steps_per_epoch=100), FURTHER["accumulated, averaged"]
    with on(device) as gpu:
        trainer, images = Trainer(cell), loader(device)
        with Checkpoints(folder, config, plan, data_digest="d") as saving:
            for step, given in images.steps(0, NUM_STEPS):
                if step == UPDATE_AT:
                    with contextlib.nullcontext(Count()) if gpu is None else gpu.counting() as count:
                        saving.save(step, trainer.engine, trainer.sparsifier, tracker_run="")
                    waits = [
                        wait for wait in count.waits if "broadcast_text" not in wait.place
                    ]  # a name, once in a run
                    if len(waits) > WAITS_OF_A_SNAPSHOT:
                        raise GpuError(f"a snapshot: {'; '.join(map(str, waits))}")
                trainer.step(step, *given)
        resumed = Trainer(cell)
        start = Checkpoints(folder, config, plan, data_digest="d").load(
            resumed.engine, resumed.sparsifier, resume="auto"
        )
        for step, given in images.steps(start.step, NUM_STEPS):
            resumed.step(step, *given)
        straight, again = trainer.weights(), resumed.weights()
        model = resumed.engine.model
        state = {**model.state_dict(), **average_buffers(model)}
        evaluated = Networks([place_model(network(), TrainConfig())])
        evaluated.models[0].load_state_dict(state)
        validation = eval_loader(device)
        with kept_random_state():
            scores = score(evaluated, validation, num_classes=CLASSES)
        num_images = recalibrate(evaluated.models[0], images.micro_batches(batch=8, num_batches=4, seed=1))
        predicted = predict(evaluated, validation, num_classes=CLASSES)
    return {
        "resumed at": start.step,
        "resumed bit for bit": torch.equal(straight, again),
        "images": num_images,
        "top-1": scores[0].top1,
        "nll": round(scores[0].nll, 4),
        "predictions": None if predicted is None else [round(float(p), 4) for p in predicted[0].flatten()[:40]],
        "labels": None if predicted is None else predicted[1].tolist(),
    }
