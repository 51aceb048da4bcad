"""The configuration's schema: one dataclass per section, and the tables of allowed values. Nothing here imports torch.

Lengths of time are strings with a unit, ``4000 steps``, ``512000 samples`` or ``90 epochs``;
``pipeline.plan`` turns them into steps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pipeline.sparse.strategy import METHODS, SCOPES, Strategy, method
from pipeline.superposition.rules import RULES

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
LENGTH = re.compile(r"(\d+(?:\.\d+)?) (steps?|samples?|epochs?)")
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
COEFFICIENTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # Lottery Pools, the authors' command


@dataclass
class ModelConfig:
    """Which network; ``args`` are keyword arguments of its builder (``pipeline.models``)."""

    name: str = "resnet50"
    num_classes: int = 1000
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """FFCV files, or folders of images, and what happens to an image on its way into the network."""

    loader: str = (
        "ffcv"  # folder: train and val are folders of class folders, as torchvision's ImageFolder; no ffcv is needed
    )
    train: str = "???"
    val: str = "???"
    train_samples: int = 0  # for --print-plan and --check where the file is not at hand; a file that exists decides
    augmentation: str = "random_resized_crop"
    min_scale: float = 0.08  # smallest area of a random resized crop
    flip: bool = True
    train_resolution: int = 224
    first_resolution: int = (
        0  # progressive resizing: up to epoch ramp_from, then linearly to train_resolution at epoch ramp_until; 0: none
    )
    ramp_from: int = 0
    ramp_until: int = 0
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    eval_resolution: int = 224
    eval_ratio: float = 0.875  # side of the centre crop over the shorter side: 224/256
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))  # on the 0–255 scale
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    # quasi_random: for sets larger than memory, shuffled in a window of window_mb that moves
    # through the file
    order: str = "random"
    window_mb: int = 4096
    num_workers: int = 8  # per rank
    batch_timeout_seconds: float = 120.0
    verify: bool = True  # structure of the files, at every start
    stage: str = (
        ""  # a folder on each node's own disk that the files are copied to, once, before they are opened; empty: none
    )


@dataclass
class TrainConfig:
    """Engine and optimiser."""

    engine: str = "deepspeed"
    reduction: str = (
        "packed"  # on ordinary steps only gradients of active weights travel between ranks; dense: all, always
    )
    wire: str = "fp32"  # what gradients travel in: as they are, or rounded to bf16
    bucket_mb: float = 25.0  # gradients, MiB before packing, that travel together
    zero_stage: int = 0  # of engine deepspeed; 1: each rank keeps the optimiser state of a part of the network
    global_batch: int = 1024  # samples per optimiser step, over all ranks
    accumulation: int = 1  # micro-batches per step and rank
    precision: str = "fp32"
    channels_last: bool = True
    optimizer: str = "sgd"
    momentum: float = 0.9  # sgd, here and below
    nesterov: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adamw, here and below
    eps: float = 1e-8
    weight_decay: float = 1e-4
    weight_decay_on_norm: bool = False  # also on biases and normalisation parameters
    clip_norm: float | None = None  # largest norm of the gradient of the active weights
    label_smoothing: float = 0.0
    threads_per_rank: int = 0  # 0: an equal share of the node's cores
    deterministic: bool = (
        False  # on a GPU: the same bits from the same inputs, which costs time; a CPU gives them anyway
    )
    collective_timeout_seconds: float = 300.0
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed through to deepspeed.initialize


@dataclass
class SparsityConfig:
    """The method (``pipeline.sparse.strategy.METHODS``) and what is to differ from its row of the table."""

    method: str = "rigl_itop"
    density: float = 0.1
    dense_layers: list[str] = field(default_factory=list)  # name patterns of layers left alone by everything
    prune: str | None = None  # null: as the method has it, here and below
    grow: str | None = None
    grow_share: float | None = None
    grow_rest: str | None = None
    scope: str | None = None
    distribution: str | None = None
    structure: str | None = None
    min_active: int | None = None
    replaces_step: bool | None = None
    initial_density: float | None = (
        None  # falls (or rises) to ``density`` by a cubic schedule, from ``density_from`` to ``density_until``
    )
    density_from: str | None = None
    density_until: str | None = None
    own_step_counts: bool = False  # AdamW: bias correction of every weight by the steps since it grew
    check_every: int = 10  # steps between two checks of masks and weights; 0: none


@dataclass
class LrConfig:
    """A learning-rate schedule at the plan's reference batch."""

    schedule: str = "constant"
    value: float = 0.1  # the high value of a triangular schedule
    low: float = 0.0  # triangular only
    warmup: str = "0 epochs"  # a staircase: value·(epoch + 1)/(warm-up + 1)
    milestones: list[str] = field(default_factory=list)  # steps only: where the rate is multiplied by ``factor``
    factor: float = 0.1


@dataclass
class PhaseConfig:
    """One row of the plan."""

    length: str = "100 epochs"
    lr: LrConfig = field(default_factory=LrConfig)
    update_interval: str | None = None  # ΔT; null: the method's own in exploration, no updates in refinement
    drop_schedule: str | None = None  # null: the method's own, here and below
    drop_fraction: float | None = None  # p0
    drop_end: float | None = None  # η
    opening_drop: float | None = None  # drop fraction of the update that opens a refinement phase
    ticket: bool = True


@dataclass
class PlanConfig:
    """The timetable. Recipes are written for ``reference_batch``: see :mod:`pipeline.plan` for the one scaling rule."""

    timetable: str = "itop"
    reference_batch: int = 128
    exploration: PhaseConfig = field(default_factory=PhaseConfig)
    refinement: PhaseConfig | None = None
    num_refinements: int = 0
    dense_reference: str = ""  # length of the dense run that training FLOPs are compared with; empty: this run's length


@dataclass
class EvaluationConfig:
    """What happens to the tickets."""

    batch: int = 256  # samples per rank and batch
    flip: bool = False  # average the predictions for each image and its mirror image
    superposition: str = "mean"
    beta: float = 0.5  # of the moving rule
    coefficients: list[float] = field(
        default_factory=lambda: list(COEFFICIENTS)
    )  # of the interpolation rule: what is tried
    ticket_weights: list[float] = field(
        default_factory=list
    )  # one for each ticket that is superposed, by index; empty: all equal
    with_exploration: bool = True  # superpose the end of exploration too, or only the tickets of refinement phases
    held_out: str = (
        ""  # .beton file that the rules interpolation and greedy_soup choose with; never the one that is evaluated
    )
    held_out_images: int | None = None  # only so many of its images, evenly spread; null: all
    prune_scope: str = "global"
    prune_every: bool = True  # prune back after every ticket (the authors), or once at the end
    recalibration_batch: int = 256  # samples of one micro-batch, whatever the number of ranks
    recalibration_batches: int = 100


@dataclass
class TicketsConfig:
    """How tickets are kept. The report is about those that are."""

    dtype: str = "fp32"  # of the parameters in the file; bf16: rounded, two bytes each instead of four
    keep: int | None = None  # the last so many; null: all
    keep_first: bool = True  # and the first, which superposition starts from
    copy_to: str = (
        ""  # a URL that fsspec knows, such as s3://bucket/run/tickets: every ticket is put there too; empty: nowhere
    )


@dataclass
class CheckpointConfig:
    """How often the state of the run is saved, and how many states are kept."""

    every: str = "1 epoch"
    keep: int = 2


@dataclass
class TrackingConfig:
    """Where metrics go. ``metrics.jsonl`` in the run's folder is always written (backend ``none`` excepted)."""

    backend: str = "mlflow"
    uri: str = ""  # empty: SQLite in the run's folder
    experiment: str = "ticketworks"
    run_name: str = ""  # empty: the configuration's name
    log_every_steps: int = 50
    required: bool = False  # is a dead server at the start fatal?


@dataclass
class Config:
    """Everything a run depends on."""

    name: str = "???"
    seed: int = 0
    output_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tickets: TicketsConfig = field(default_factory=TicketsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def strategy_of(sparsity: SparsityConfig) -> Strategy:
    """The method's row of the table with what the configuration changes."""
    names = {entry.name for entry in dataclasses.fields(Strategy)}
    return method(sparsity.method, **{key: value for key, value in vars(sparsity).items() if key in names})


GROW = ("gradient", "momentum", "random", "random_unfired")
CHOICES: dict[str, tuple[str, ...]] = {
    "data.loader": ("ffcv", "folder"),
    "data.order": ("random", "quasi_random"),
    "data.augmentation": ("random_resized_crop", "pad_crop_flip", "none"),
    "train.engine": ("deepspeed", "torch", "ddp"),
    "train.reduction": ("packed", "dense"),
    "train.wire": ("fp32", "bf16"),
    "train.optimizer": ("sgd", "adamw"),
    "train.precision": ("fp32", "bf16"),
    "sparsity.method": tuple(METHODS),
    "sparsity.prune": ("magnitude", "sign_aware", "none"),
    "sparsity.grow": GROW,
    "sparsity.grow_rest": GROW,
    "sparsity.scope": tuple(SCOPES),
    "sparsity.distribution": ("erk", "er", "uniform", "uniform_dense_first"),
    "plan.timetable": ("dense", "static", "itop", "edst", "sup_tickets"),
    "plan.exploration.lr.schedule": ("constant", "step", "cosine", "triangular"),
    "plan.refinement.lr.schedule": ("constant", "step", "cosine", "triangular"),
    "plan.exploration.drop_schedule": ("constant", "cosine", "rigl_cosine", "linear"),
    "plan.refinement.drop_schedule": ("constant", "cosine", "rigl_cosine", "linear"),
    "tickets.dtype": ("fp32", "bf16"),
    "evaluation.superposition": tuple(RULES),
    "evaluation.prune_scope": ("global", "layer"),
    "tracking.backend": ("mlflow", "jsonl", "none"),
}
# (lowest, highest) allowed
RANGES: dict[str, tuple[str, float]] = {
    "model.num_classes": (">1", math.inf),
    "data.train_samples": (">=0", math.inf),
    "data.min_scale": (">0", 1),
    "data.train_resolution": (">0", math.inf),
    "data.eval_resolution": (">0", math.inf),
    "data.first_resolution": (">=0", math.inf),
    "data.ramp_from": (">=0", math.inf),
    "data.ramp_until": (">=0", math.inf),
    "data.mixup": (">=0", 100),
    "data.window_mb": (">0", math.inf),
    "data.eval_ratio": (">0", 1),
    "data.num_workers": (">0", 1024),
    "data.batch_timeout_seconds": (">0", math.inf),
    "train.global_batch": (">0", math.inf),
    "train.accumulation": (">0", math.inf),
    "train.bucket_mb": (">0", math.inf),
    "train.momentum": (">=0", 0.999999),
    "train.eps": (">0", 1),
    "train.clip_norm": (">0", math.inf),
    "train.weight_decay": (">=0", 1),
    "train.label_smoothing": (">=0", 0.999999),
    "train.threads_per_rank": (">=0", 1024),
    "train.collective_timeout_seconds": (">0", math.inf),
    "sparsity.density": (">0", 1),
    "sparsity.min_active": (">=0", math.inf),
    "sparsity.grow_share": (">0", 1),
    "sparsity.initial_density": (">0", 1),
    "sparsity.check_every": (">=0", math.inf),
    "plan.reference_batch": (">0", math.inf),
    "plan.num_refinements": (">=0", 999),
    "tickets.keep": (">0", math.inf),
    "evaluation.held_out_images": (">0", math.inf),
    "evaluation.batch": (">0", math.inf),
    "evaluation.beta": (">0", 1),
    "evaluation.recalibration_batch": (">1", math.inf),
    "evaluation.recalibration_batches": (">0", math.inf),
    "checkpoint.keep": (">0", math.inf),
    "tracking.log_every_steps": (">0", math.inf),
    "seed": (">=0", 2**63 - 1),
    **{f"plan.{phase}.drop_fraction": (">=0", 1) for phase in ("exploration", "refinement")},
    **{f"plan.{phase}.drop_end": (">=0", 1) for phase in ("exploration", "refinement")},
    **{f"plan.{phase}.opening_drop": (">0", 1) for phase in ("exploration", "refinement")},
    **{
        f"plan.{phase}.lr.{key}": (">=0", math.inf)
        for phase in ("exploration", "refinement")
        for key in ("value", "low", "factor")
    },
}
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
# Keys that may change between a run and its resumption without changing what is computed.
INCIDENTAL = (
    "name",
    "output_dir",
    "data.train",
    "data.val",
    "data.train_samples",
    "data.num_workers",
    "data.batch_timeout_seconds",
    "data.verify",
    "tickets.copy_to",
    "data.stage",
    "train.zero_stage",
    "sparsity.check_every",
    "train.threads_per_rank",
    "train.deterministic",
    "train.collective_timeout_seconds",
    "evaluation",
    "checkpoint",
    "tracking",
)
