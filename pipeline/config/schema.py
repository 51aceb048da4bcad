"""The configuration's schema: one dataclass per section, one field per key. Nothing here imports torch.

A field states all there is to know about its key: :func:`pipeline.config.keys.key`. Lengths of time
are strings with a unit, ``4000 steps``, ``512000 samples`` or ``90 epochs``; ``pipeline.plan`` turns
them into steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.keys import LENGTH_UNIT, REQUIRED, key, keys_of
from pipeline.errors import ConfigError
from pipeline.sparse.strategy import METHODS, SCOPES, Strategy, method
from pipeline.superposition.rules import RULES

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
COEFFICIENTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # Lottery Pools, the authors' command
GROW = ("gradient", "momentum", "random", "random_unfired")
# DeepSpeed takes unknown keys silently; batch sizes, optimiser, precision and stage are derived
# from the rest of the configuration.
DEEPSPEED_KEYS = (
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
)


@dataclass
class ModelConfig:
    """Which network."""

    name: str = key("resnet50", "network: a name of pipeline.models or torchvision, or timm/NAME")
    num_classes: int = key(
        0,
        "outputs of the network: as many as the data set has classes; 0: read that number from it",
        unit="classes",
        at_least=0,
    )
    args: dict[str, Any] = key({}, "keyword arguments of the network's builder")


@dataclass
class DataConfig:
    """The data, and what happens to an image on its way into the network."""

    loader: str = key(
        "ffcv",
        "ffcv reads .beton files; folder reads folders of class folders, without ffcv",
        choices=("ffcv", "folder"),
    )
    train: str = key(REQUIRED, "training set: a .beton file or a folder", may_change=True)
    val: str = key(REQUIRED, "validation set, which the report is about", may_change=True)
    train_samples: int = key(
        0,
        "size of the training set for --print-plan and --check where it is not at hand; a file that exists decides",
        unit="images",
        at_least=0,
        may_change=True,
    )
    augmentation: str = key(
        "random_resized_crop",
        "how a training image is cropped",
        choices=("random_resized_crop", "pad_crop_flip", "none"),
    )
    min_scale: float = key(
        0.08, "smallest area of a random resized crop", unit="share of the image", above=0, at_most=1
    )
    flip: bool = key(True, "mirror training images at random")
    train_resolution: int = key(224, "height and width of training images", unit="pixels", above=0)
    first_resolution: int = key(
        0,
        "progressive resizing: resolution up to epoch ramp_from, which then grows linearly to train_resolution; 0: none",
        unit="pixels",
        at_least=0,
    )
    ramp_from: int = key(0, "progressive resizing: where the resolution starts to grow", unit="epochs", at_least=0)
    ramp_until: int = key(0, "progressive resizing: where train_resolution is reached", unit="epochs", at_least=0)
    mixup: float = key(0.0, "alpha of mixup's Beta distribution; 0: no mixup", at_least=0, at_most=100)
    eval_resolution: int = key(224, "height and width of validation images", unit="pixels", above=0)
    eval_ratio: float = key(
        0.875, "side of the centre crop over the image's shorter side, such as 224/256", above=0, at_most=1
    )
    mean: list[float] = key(list(IMAGENET_MEAN), "subtracted from red, green and blue", unit="0–255 scale")
    std: list[float] = key(list(IMAGENET_STD), "red, green and blue are divided by this", unit="0–255 scale")
    order: str = key(
        "random",
        "order of the training images; quasi_random: for sets larger than memory, shuffled in a window that moves "
        "through the file",
        choices=("random", "quasi_random"),
    )
    window_mb: int = key(4096, "window of the quasi_random order", unit="MiB", above=0)
    num_workers: int = key(8, "loader threads of each rank", unit="threads", above=0, at_most=1024, may_change=True)
    batch_timeout_seconds: float = key(
        120.0, "longest wait for a batch, after which the run ends", unit="seconds", above=0, may_change=True
    )
    verify: bool = key(True, "check the structure of the files at every start", may_change=True)
    stage: str = key(
        "",
        "folder on each node's own disk that the files are copied to, once, before they are opened; empty: none",
        may_change=True,
    )


@dataclass
class TrainConfig:
    """Engine and optimiser."""

    engine: str = key("deepspeed", "what runs backward and the optimiser step", choices=("deepspeed", "torch", "ddp"))
    reduction: str = key(
        "packed",
        "gradients that travel between ranks on ordinary steps; packed: of active weights; dense: of all",
        choices=("packed", "dense"),
    )
    wire: str = key("fp32", "type that gradients travel in: as they are, or rounded to bf16", choices=("fp32", "bf16"))
    bucket_mb: float = key(25.0, "gradients, before packing, that travel together", unit="MiB", above=0)
    zero_stage: int = key(
        0,
        "0, or with engine deepspeed 1: each rank keeps the optimiser state of a part of the network",
        may_change=True,
    )
    global_batch: int = key(1024, "samples per optimiser step, over all ranks", unit="samples", above=0)
    accumulation: int = key(1, "micro-batches per step and rank", above=0)
    precision: str = key("fp32", "type that the network computes in", choices=("fp32", "bf16"))
    channels_last: bool = key(True, "keep images and activations in channels-last layout")
    optimizer: str = key("sgd", "optimiser", choices=("sgd", "adamw"))
    momentum: float = key(0.9, "momentum of sgd", at_least=0, at_most=0.999999)
    nesterov: bool = key(False, "Nesterov momentum of sgd")
    betas: list[float] = key([0.9, 0.999], "decay of the two moments of adamw")
    eps: float = key(1e-8, "added to the denominator of adamw", above=0, at_most=1)
    weight_decay: float = key(1e-4, "weight decay", at_least=0, at_most=1)
    weight_decay_on_norm: bool = key(False, "weight decay also on biases and normalisation parameters")
    clip_norm: float | None = key(
        None, "largest norm of the gradient of the active weights; null: no clipping", above=0
    )
    label_smoothing: float = key(0.0, "label smoothing", at_least=0, at_most=0.999999)
    threads_per_rank: int = key(
        0,
        "threads of each rank; 0: an equal share of the node's cores",
        unit="threads",
        at_least=0,
        at_most=1024,
        may_change=True,
    )
    deterministic: bool = key(
        False,
        "on a GPU: the same bits from the same inputs, which costs time; a CPU gives them anyway",
        may_change=True,
    )
    collective_timeout_seconds: float = key(
        300.0, "longest wait for the other ranks, after which the run ends", unit="seconds", above=0, may_change=True
    )
    deepspeed: dict[str, Any] = key({}, f"passed through to deepspeed.initialize: {', '.join(DEEPSPEED_KEYS)}")


@dataclass
class SparsityConfig:
    """The method (``pipeline.sparse.strategy.METHODS``), and what differs from its row of the table."""

    method: str = key("rigl_itop", "sparse training method", choices=tuple(METHODS))
    density: float = key(0.1, "share of the sparse layers' weights that are active", above=0, at_most=1)
    dense_layers: list[str] = key([], "name patterns of layers that stay dense, such as fc.weight or 'layer1.*'")
    prune: str | None = key(
        None, "prune criterion; null: the method's own", choices=("magnitude", "sign_aware", "none")
    )
    grow: str | None = key(None, "grow criterion; null: the method's own", choices=GROW)
    grow_share: float | None = key(
        None,
        "share of new weights that grow chooses, the rest by grow_rest; null: the method's own",
        above=0,
        at_most=1,
    )
    grow_rest: str | None = key(None, "second grow criterion; null: the method's own", choices=GROW)
    scope: str | None = key(
        None, "what prune and grow criteria rank together; null: the method's own", choices=tuple(SCOPES)
    )
    distribution: str | None = key(
        None,
        "how the density is distributed over layers; null: the method's own",
        choices=("erk", "er", "uniform", "uniform_dense_first"),
    )
    structure: str | None = key(
        None,
        "pattern of active weights: none, fan_in, N:M such as 2:4, block HxW such as block 4x4; null: the method's own",
    )
    min_active: int | None = key(
        None,
        "active weights that a ranking over all layers leaves in each; null: the method's own",
        unit="weights",
        at_least=0,
    )
    replaces_step: bool | None = key(
        None, "a topology update takes the place of the optimiser step; null: the method's own"
    )
    initial_density: float | None = key(
        None,
        "density at the start, which falls (or rises) to density by a cubic schedule; null: the method's own",
        above=0,
        at_most=1,
    )
    density_from: str | None = key(
        None, "start of the density schedule; null: the method's own", unit=LENGTH_UNIT, at_least=0
    )
    density_until: str | None = key(
        None, "end of the density schedule; null: the method's own", unit=LENGTH_UNIT, above=0
    )
    own_step_counts: bool = key(False, "adamw: bias correction of every weight by the steps since it grew")
    check_every: int = key(
        10, "steps between two checks of masks and weights; 0: no checks", unit="steps", at_least=0, may_change=True
    )


@dataclass
class LrConfig:
    """A learning-rate schedule, at the plan's reference batch."""

    schedule: str = key("constant", "form of the schedule", choices=("constant", "step", "cosine", "triangular"))
    value: float = key(0.1, "learning rate; of a triangular schedule the highest", at_least=0)
    low: float = key(0.0, "lowest learning rate of a cosine or triangular schedule", at_least=0)
    warmup: str = key(
        "0 epochs", "warm-up, a staircase of epochs: value·(epoch + 1)/(warmup + 1)", unit=LENGTH_UNIT, at_least=0
    )
    milestones: list[str] = key([], "step schedule: where the rate is multiplied by factor", unit=LENGTH_UNIT, above=0)
    factor: float = key(0.1, "step schedule: factor at each milestone", at_least=0)


@dataclass
class PhaseConfig:
    """One phase of the plan."""

    length: str = key("100 epochs", "length of the phase", unit=LENGTH_UNIT, above=0)
    lr: LrConfig = key(LrConfig, "learning-rate schedule")
    update_interval: str | None = key(
        None,
        "from one topology update to the next, ΔT; null: the method's own in exploration, no updates in refinement",
        unit=LENGTH_UNIT,
        above=0,
    )
    drop_schedule: str | None = key(
        None,
        "schedule of the drop fraction; null: the method's own",
        choices=("constant", "cosine", "rigl_cosine", "linear"),
    )
    drop_fraction: float | None = key(
        None,
        "share of the active weights that the first update replaces; null: the method's own",
        at_least=0,
        at_most=1,
    )
    drop_end: float | None = key(
        None, "drop fraction at the end of the phase; null: the method's own", at_least=0, at_most=1
    )
    opening_drop: float | None = key(
        None, "drop fraction of the update that opens a refinement phase; null: no opening update", above=0, at_most=1
    )
    ticket: bool = key(True, "close the phase with a ticket")


@dataclass
class PlanConfig:
    """The timetable. Recipes are written for ``reference_batch``; :mod:`pipeline.plan` states the scaling rule."""

    timetable: str = key("itop", "order of the phases", choices=("dense", "static", "itop", "edst", "sup_tickets"))
    reference_batch: int = key(
        128, "samples per step that learning rates and lengths in steps are written for", unit="samples", above=0
    )
    exploration: PhaseConfig = key(PhaseConfig, "the first phase")
    refinement: PhaseConfig | None = key(None, "every phase after it; null: none")
    num_refinements: int = key(0, "number of refinement phases", unit="phases", at_least=0, at_most=999)
    dense_reference: str = key(
        "",
        "length of the dense run that training FLOPs are compared with; empty: this run's length",
        unit=LENGTH_UNIT,
        above=0,
    )


@dataclass
class EvaluationConfig:
    """What happens to the tickets."""

    batch: int = key(256, "samples per rank and batch", unit="samples", above=0)
    flip: bool = key(False, "average the predictions for each image and its mirror image")
    superposition: str = key("mean", "rule that makes one network of the tickets", choices=tuple(RULES))
    beta: float = key(0.5, "share of each next ticket in the moving rule", above=0, at_most=1)
    coefficients: list[float] = key(list(COEFFICIENTS), "shares that the interpolation rule tries")
    ticket_weights: list[float] = key([], "one weight for each ticket that is superposed, by index; empty: all equal")
    with_exploration: bool = key(True, "superpose the ticket of exploration too, not only those of refinement phases")
    held_out: str = key(
        "",
        ".beton file that the rules interpolation and greedy_soup choose with; never the one that is evaluated",
    )
    held_out_images: int | None = key(
        None, "use only so many of its images, evenly spread; null: all", unit="images", above=0
    )
    prune_scope: str = key("global", "what pruning back to the density ranks together", choices=("global", "layer"))
    prune_every: bool = key(True, "prune back after every ticket (as the authors do), or once at the end")
    recalibration_batch: int = key(
        256, "samples of one micro-batch of BatchNorm recalibration, on any number of ranks", unit="samples", above=1
    )
    recalibration_batches: int = key(100, "batches of BatchNorm recalibration", unit="batches", above=0)


@dataclass
class TicketsConfig:
    """How tickets are kept. The report is about those that are kept."""

    dtype: str = key(
        "fp32",
        "type of the parameters in the file; bf16: rounded, two bytes each instead of four",
        choices=("fp32", "bf16"),
    )
    keep: int | None = key(None, "keep the last so many tickets; null: all", unit="tickets", above=0)
    keep_first: bool = key(True, "keep the first ticket too, which superposition starts from")
    copy_to: str = key(
        "",
        "URL that fsspec knows, such as s3://bucket/run/tickets, where every ticket is copied to; empty: none",
        may_change=True,
    )


@dataclass
class CheckpointConfig:
    """How often the state of the run is saved, and how many states are kept."""

    every: str = key("1 epoch", "from one checkpoint to the next; each ticket has one too", unit=LENGTH_UNIT, above=0)
    keep: int = key(2, "keep the last so many checkpoints", unit="checkpoints", above=0)


@dataclass
class TrackingConfig:
    """Where metrics go. ``metrics.jsonl`` in the run's folder is always written (backend ``none`` excepted)."""

    backend: str = key("mlflow", "where metrics are sent to", choices=("mlflow", "jsonl", "none"))
    uri: str = key("", "address of the MLflow server; empty: SQLite in the run's folder")
    experiment: str = key("ticketworks", "MLflow experiment")
    run_name: str = key("", "name of the run in MLflow; empty: the configuration's name")
    log_every_steps: int = key(50, "from one record to the next", unit="steps", above=0)
    required: bool = key(False, "end the run when the server cannot be reached at the start")


@dataclass
class Config:
    """Everything a run depends on."""

    name: str = key(REQUIRED, f"name of the run; matches {NAME.pattern}", may_change=True)
    seed: int = key(0, "seed of everything random", at_least=0, at_most=2**63 - 1)
    output_dir: str = key("runs/${name}", "the run's folder", may_change=True)
    model: ModelConfig = key(ModelConfig)
    data: DataConfig = key(DataConfig)
    train: TrainConfig = key(TrainConfig)
    sparsity: SparsityConfig = key(SparsityConfig)
    plan: PlanConfig = key(PlanConfig)
    tickets: TicketsConfig = key(TicketsConfig)
    evaluation: EvaluationConfig = key(EvaluationConfig, may_change=True)
    checkpoint: CheckpointConfig = key(CheckpointConfig, may_change=True)
    tracking: TrackingConfig = key(TrackingConfig, may_change=True)


KEYS = keys_of(Config)


def strategy_of(sparsity: SparsityConfig) -> Strategy:
    """The method's row of the table with what the configuration changes."""
    names = {entry.name for entry in dataclasses.fields(Strategy)}
    return method(sparsity.method, **{key: value for key, value in vars(sparsity).items() if key in names})


@contextlib.contextmanager
def named_as_keys(section: str, schema: type) -> Iterator[None]:
    """Within ``with``: an error about an argument, ``density: …``, names the key of the configuration that it comes from."""
    try:
        yield
    except ConfigError as error:
        if error.what.partition(":")[0] not in {entry.name for entry in dataclasses.fields(schema)}:
            raise
        raise ConfigError(f"{section}.{error.what}", do=error.do) from None
