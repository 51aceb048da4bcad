"""Schema of the configuration: one dataclass per section, one field per key. Does not import torch.

A field declares everything about its key with :func:`pipeline.config.keys.key`. Durations are
strings with a unit, such as ``4000 steps``, ``512000 samples`` or ``90 epochs``; ``pipeline.plan``
converts them to steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.keys import LENGTH_UNIT, REQUIRED, key, keys_of
from pipeline.config.timetables import TIMETABLES
from pipeline.errors import ConfigError
from pipeline.sparse.strategy import DENSITY_SCHEDULES, INITIAL, METHODS, REGROWN, SCOPES, Strategy, method
from pipeline.superposition.rules import RULES

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
NAME_RULE = "up to 64 lower-case letters, digits, '_', '.' or '-', starting with a letter or digit"
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
COEFFICIENTS = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
)  # from the command of the Lottery Pools authors
GROW = ("gradient", "momentum", "random", "random_unfired")
# The keys that a user may pass on: DeepSpeed ignores unknown keys silently, and batch sizes,
# optimiser, precision and stage are derived from the rest of the configuration.
DEEPSPEED_KEYS = (
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
)


@dataclass
class ModelConfig:
    """The network."""

    name: str = key("resnet50", "network: a model of pipeline.models or torchvision, or timm/NAME")
    num_classes: int = key(
        0,
        "number of outputs, equal to the number of classes in the data set; 0: taken from the data set",
        unit="classes",
        at_least=0,
    )
    args: dict[str, Any] = key({}, "keyword arguments for the function that builds the network")
    from_ticket: str = key(
        "",
        "ticket to start from, with its weights and masks: a file, a run, a URL or a name of the zoo; empty: none",
        neutral="",
        is_path=True,
    )
    from_state: str = key(
        "",
        "state_dict to start from, of torchvision, timm or your own: .safetensors, or a file of torch.save without "
        "code; the initial masks are the largest weights of each layer; empty: none",
        neutral="",
        is_path=True,
    )
    new_head: bool = key(
        False,
        "with from_ticket or from_state: the last layer starts anew, for another number of classes",
        neutral=False,
    )


@dataclass
class DataConfig:
    """The data sets, and how images are loaded and augmented."""

    loader: str = key(
        "ffcv",
        "ffcv: read .beton files; folder: read a folder with one subfolder of images per class, without ffcv",
        choices=("ffcv", "folder"),
    )
    train: str = key(REQUIRED, "training set: a .beton file or a folder", may_change=True, is_path=True)
    val: str = key(
        REQUIRED, "validation set, on which tickets are evaluated; .beton or folder", may_change=True, is_path=True
    )
    train_samples: int = key(
        0,
        "size of the training set, for --print-plan and --check on a machine without it; ignored if the set exists",
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
        0.08, "smallest area of a random resized crop", unit="fraction of the image", above=0, at_most=1
    )
    flip: bool = key(True, "flip training images horizontally at random")
    train_resolution: int = key(224, "height and width of training images", unit="pixels", above=0)
    first_resolution: int = key(
        0,
        "progressive resizing: resolution until epoch ramp_from, then growing linearly to train_resolution; 0: off",
        unit="pixels",
        at_least=0,
    )
    ramp_from: int = key(
        0, "progressive resizing: epoch where the resolution starts to grow", unit="epochs", at_least=0
    )
    ramp_until: int = key(0, "progressive resizing: epoch where it reaches train_resolution", unit="epochs", at_least=0)
    mixup: float = key(0.0, "alpha of the Beta distribution of mixup; 0: no mixup", at_least=0, at_most=100)
    eval_resolution: int = key(224, "height and width of validation images", unit="pixels", above=0)
    eval_ratio: float = key(
        0.875,
        "side of the centre crop, divided by the shorter side of the image, such as 224/256 = 0.875",
        above=0,
        at_most=1,
    )
    eval_resize: str = key(
        "area",
        "how validation images are resized; area: the mean of the area that a pixel covers, as in training; "
        "torchvision: antialiased bilinear, the pixels of torchvision's Resize and CenterCrop, for published weights",
        choices=("area", "torchvision"),
        neutral="area",
    )
    mean: list[float] = key(
        list(IMAGENET_MEAN), "mean of red, green and blue, subtracted from every image", unit="0–255 scale"
    )
    std: list[float] = key(
        list(IMAGENET_STD), "standard deviation of red, green and blue, which images are divided by", unit="0–255 scale"
    )
    order: str = key(
        "random",
        "order of the training images; quasi_random, for sets larger than memory: shuffled within a window that "
        "moves through the file",
        choices=("random", "quasi_random"),
    )
    window_mb: int = key(4096, "size of the window of the quasi_random order", unit="MiB", above=0)
    num_workers: int = key(
        8,
        "loader threads per rank; at most its share of a CPU quota",
        unit="threads",
        above=0,
        at_most=1024,
        may_change=True,
    )
    batch_timeout_seconds: float = key(
        120.0, "longest wait for a batch before the run ends with an error", unit="seconds", above=0, may_change=True
    )
    verify: bool = key(True, "check the structure of the data files at every start", may_change=True)
    stage: str = key(
        "",
        "folder on the local disk of each node, to which .beton files are copied once before use; empty: no copy",
        may_change=True,
        is_path=True,
    )


@dataclass
class TrainConfig:
    """Engine, optimiser and batch size."""

    engine: str = key(
        "deepspeed",
        "what runs the backward pass and the optimiser step; ddp: DistributedDataParallel",
        choices=("deepspeed", "torch", "ddp"),
    )
    reduction: str = key(
        "packed",
        "gradients that ranks exchange on ordinary steps; packed: those of active weights only; dense: all",
        choices=("packed", "dense"),
    )
    wire: str = key(
        "fp32", "type in which gradients are sent; fp32: unchanged; bf16: rounded", choices=("fp32", "bf16")
    )
    bucket_mb: float = key(25.0, "size of a bucket of gradients sent together, before packing", unit="MiB", above=0)
    zero_stage: int = key(
        0,
        "ZeRO stage, 0 or 1; 1 divides the optimiser state among the ranks and needs engine deepspeed",
        may_change=True,
    )
    global_batch: int = key(1024, "samples per optimiser step, over all ranks", unit="samples", above=0)
    accumulation: int = key(1, "micro-batches per step on each rank (gradient accumulation)", above=0)
    precision: str = key("fp32", "type of the network's computation", choices=("fp32", "bf16"))
    compile: bool = key(
        False,
        "compile the forward and backward pass with torch.compile in the first steps, which takes about a minute and a "
        "C++ compiler; other last bits, docs/gpu.md says what stays equal",
        neutral=False,
    )
    channels_last: bool = key(True, "keep images and activations in channels-last memory format")
    optimizer: str = key(
        "sgd",
        "optimiser; muon: torch.optim.Muon for matrices (not embeddings, not convolutions), AdamW for all else, with "
        "the learning rate, schedule and weight_decay of AdamW (arXiv 2502.16982); torch's weight decay for it is 0.1",
        choices=("sgd", "adamw", "muon"),
    )
    momentum: float = key(0.9, "sgd: momentum", at_least=0, at_most=0.999999)
    muon_momentum: float = key(
        0.95,
        "muon: momentum of Muon, which is Nesterov's; torch's default",
        at_least=0,
        at_most=0.999999,
        neutral=0.95,
    )
    nesterov: bool = key(False, "sgd: use Nesterov momentum")
    betas: list[float] = key([0.9, 0.999], "adamw, muon: decay rates of AdamW's two moments")
    eps: float = key(1e-8, "adamw, muon: term added to AdamW's denominator", above=0, at_most=1)
    weight_decay: float = key(1e-4, "weight decay", at_least=0, at_most=1)
    weight_decay_on_norm: bool = key(False, "apply weight decay to biases and normalisation parameters too")
    clip_norm: float | None = key(
        None, "clip the gradient of the active weights to this norm; null: no clipping", above=0
    )
    label_smoothing: float = key(0.0, "label smoothing", at_least=0, at_most=0.999999)
    ema_decay: float = key(
        0.0,
        "decay of a moving average of the weights, updated after every step, such as 0.999; 0: no average",
        at_least=0,
        at_most=0.999999,
        neutral=0.0,
    )
    device: str = key(
        "auto",
        "what every rank computes on; auto: a GPU where the machine has one, and an error where it cannot be used",
        choices=("auto", "cuda", "cpu"),
        may_change=True,
    )
    backend: str = key(
        "auto",
        "library for communication between ranks; auto: nccl on GPUs, gloo on CPUs; with gloo, ranks may share a GPU",
        choices=("auto", "nccl", "gloo"),
        may_change=True,
    )
    tf32: str = key(
        "convolutions",
        "GPU: float32 operations that round their inputs to TF32; all: convolutions and matrix products",
        choices=("none", "convolutions", "all"),
        neutral="convolutions",
    )
    cudnn_benchmark: bool = key(
        True,
        "GPU: cuDNN measures its algorithms for each shape and takes the fastest, which may round differently from run "
        "to run; off with train.deterministic",
        may_change=True,
    )
    threads_per_rank: int = key(
        0,
        "CPU threads per rank; 0: `OMP_NUM_THREADS`, or else an equal share of the node's usable CPUs",
        unit="threads",
        at_least=0,
        at_most=1024,
        may_change=True,
    )
    deterministic: bool = key(
        False,
        "use deterministic GPU operations, which are slower, so that equal inputs give equal bits; on a CPU they "
        "always do",
        may_change=True,
    )
    profile: list[int] = key(
        [],
        "record these steps with torch.profiler, such as [20, 30] for steps 20 to 29 of the run, and write a trace of "
        "rank 0 into output_dir; []: none",
        may_change=True,
    )
    portable: bool = key(
        False,
        "CPU: use only instructions that every x86-64 processor with AVX2 has, for bits that depend less on the "
        "processor; docs/verification.md says what was measured",
        may_change=True,
    )
    collective_timeout_seconds: float = key(
        300.0,
        "longest wait for the other ranks before the run ends with an error",
        unit="seconds",
        above=0,
        may_change=True,
    )
    deepspeed: dict[str, Any] = key({}, f"keys passed to deepspeed.initialize; allowed: {', '.join(DEEPSPEED_KEYS)}")


@dataclass
class SparsityConfig:
    """The method (a row of ``pipeline.sparse.strategy.METHODS``), and settings that replace those of the row."""

    method: str = key("rigl_itop", "sparse training method", choices=tuple(METHODS))
    density: float = key(0.1, "fraction of the weights of sparse layers that are active", above=0, at_most=1)
    dense_layers: list[str] = key(
        [], "patterns for the names of weights that stay dense, such as fc.weight or 'layer1.*'"
    )
    prune: str | None = key(
        None, "criterion for weights to prune; null: set by the method", choices=("magnitude", "sign_aware", "none")
    )
    grow: str | None = key(None, "criterion for weights to grow; null: set by the method", choices=GROW)
    grow_share: float | None = key(
        None,
        "fraction of new weights chosen by grow; the rest are chosen by grow_rest; null: set by the method",
        above=0,
        at_most=1,
    )
    grow_rest: str | None = key(None, "second grow criterion, see grow_share; null: set by the method", choices=GROW)
    scope: str | None = key(
        None, "group of weights that are ranked together; null: set by the method", choices=tuple(SCOPES)
    )
    distribution: str | None = key(
        None,
        "how the density is distributed over layers; null: set by the method",
        choices=("erk", "er", "uniform", "uniform_dense_first"),
    )
    initial: str | None = key(
        None,
        "which weights are active at first: random, or those with the highest scores over all layers; null: set by the "
        "method",
        neutral=None,
        choices=tuple(INITIAL),
    )
    structure: str | None = key(
        None,
        "pattern of active weights: none, fan_in, N:M (such as 2:4) or block HxW (such as block 4x4); null: set by "
        "the method",
    )
    min_salient: float | None = key(
        None,
        "with structure fan_in: number of salient weights below which an output dies, as a fraction of the fan-in of "
        "its layer; 0: none dies; null: set by the method",
        neutral=None,
        at_least=0,
        at_most=1,
    )
    min_active: int | None = key(
        None,
        "fewest active weights that a ranking across layers leaves in a layer; null: set by the method",
        unit="weights",
        at_least=0,
    )
    regrown: str | None = key(
        None,
        "value and optimiser state of a weight that the same update prunes and regrows; null: set by the method",
        neutral=None,
        choices=tuple(REGROWN),
    )
    replaces_step: bool | None = key(
        None, "whether a topology update replaces the optimiser step; null: set by the method"
    )
    initial_density: float | None = key(
        None,
        "density at the start, which follows a schedule to density; null: set by the method",
        above=0,
        at_most=1,
    )
    density_schedule: str | None = key(
        None,
        "how the density moves; cubic: along a cubic curve; alternating: between initial_density and density, for one "
        "update_interval each; null: set by the method",
        neutral=None,
        choices=tuple(DENSITY_SCHEDULES),
    )
    density_from: str | None = key(
        None, "when the density starts to change; null: set by the method", unit=LENGTH_UNIT, at_least=0
    )
    density_until: str | None = key(
        None, "when the density reaches its final value; null: set by the method", unit=LENGTH_UNIT, above=0
    )
    own_step_counts: bool = key(
        False, "adamw: count the steps of bias correction for each weight from the step at which it grew"
    )
    own_step_warmup: int = key(
        0,
        "with own_step_counts: steps over which the learning rate of a weight rises after it grew (SMET); 0: none",
        unit="steps",
        at_least=0,
        neutral=0,
    )
    check_every: int = key(
        10,
        "steps from one check of masks and weights to the next; 0: only after the first step",
        unit="steps",
        at_least=0,
        may_change=True,
    )


@dataclass
class LrConfig:
    """A learning-rate schedule, stated for ``plan.reference_batch``."""

    schedule: str = key("constant", "shape of the schedule", choices=("constant", "step", "cosine", "triangular"))
    value: float = key(0.1, "learning rate: its first value, or its peak in a triangular schedule", at_least=0)
    low: float = key(0.0, "cosine, triangular: lowest learning rate", at_least=0)
    warmup: str = key(
        "0 epochs",
        "length of the warm-up, which raises the rate once per epoch: value·(epoch + 1)/(warmup + 1)",
        unit=LENGTH_UNIT,
        at_least=0,
    )
    milestones: list[str] = key([], "step: times at which the rate is multiplied by factor", unit=LENGTH_UNIT, above=0)
    factor: float = key(0.1, "step: factor by which the rate is multiplied at each milestone", at_least=0)


@dataclass
class PhaseConfig:
    """One phase of the plan."""

    length: str = key("100 epochs", "length of the phase", unit=LENGTH_UNIT, above=0)
    lr: LrConfig = key(LrConfig, "learning-rate schedule")
    update_interval: str | None = key(
        None,
        "interval between topology updates, ΔT; null: in exploration set by the method, in refinement no updates",
        unit=LENGTH_UNIT,
        above=0,
    )
    drop_schedule: str | None = key(
        None,
        "schedule of the drop fraction; null: set by the method",
        choices=("constant", "cosine", "rigl_cosine", "linear", "stairs"),
    )
    drop_fraction: float | None = key(
        None,
        "fraction of the active weights that the first update replaces; null: set by the method",
        at_least=0,
        at_most=1,
    )
    drop_end: float | None = key(
        None, "drop fraction at the end of the phase; null: set by the method", at_least=0, at_most=1
    )
    opening_drop: float | None = key(
        None,
        "drop fraction of the large update at the start of a refinement phase; null: no such update",
        above=0,
        at_most=1,
    )
    ticket: bool = key(True, "save a ticket at the end of the phase")


@dataclass
class PlanConfig:
    """The phases of the run, written for ``reference_batch``; :mod:`pipeline.plan` states the scaling rule."""

    timetable: str = key("itop", "which phases the run has", choices=tuple(TIMETABLES))
    reference_batch: int = key(
        128, "batch size for which learning rates and lengths in steps are written", unit="samples", above=0
    )
    exploration: PhaseConfig = key(PhaseConfig, "the first phase")
    refinement: PhaseConfig | None = key(None, "each of the phases after exploration; null: none")
    num_refinements: int = key(0, "number of refinement phases", unit="phases", at_least=0, at_most=999)
    dense_reference: str = key(
        "",
        "length of the dense run with which training FLOPs are compared; empty: the length of this run",
        unit=LENGTH_UNIT,
        above=0,
    )


@dataclass
class EvaluationConfig:
    """How tickets are evaluated and superposed."""

    batch: int = key(256, "samples per batch on each rank", unit="samples", above=0)
    flip: bool = key(False, "average the predictions for each image and its horizontal flip")
    superposition: str = key("mean", "rule that combines the tickets into one network", choices=tuple(RULES))
    beta: float = key(0.5, "moving: weight of each new ticket in the moving average", above=0, at_most=1)
    coefficients: list[float] = key(list(COEFFICIENTS), "interpolation: weights of a new ticket to try")
    ticket_weights: list[float] = key([], "weight of each superposed ticket, in order of index; empty: all equal")
    with_exploration: bool = key(True, "superpose the ticket of exploration too, not only those of refinement phases")
    held_out: str = key(
        "",
        ".beton file or folder of held-out images, by which tickets.select and the superpositions interpolation and "
        "greedy_soup choose; not the set that is evaluated",
        is_path=True,
    )
    held_out_images: int | None = key(
        None, "number of held-out images to use, evenly spaced over the file; null: all", unit="images", above=0
    )
    every: str = key(
        "1 epoch",
        "interval between evaluations of the network during training, on data.val; there is one at the end of each "
        "phase as well; never: none",
        unit=LENGTH_UNIT,
        words=("never",),
        above=0,
        neutral="never",
    )
    every_images: int = key(
        0,
        "number of images of these evaluations, the same every time, evenly spaced over data.val; 0: all",
        unit="images",
        at_least=0,
        neutral=0,
    )
    prune_scope: str = key(
        "global",
        "weights that are ranked together when the superposed network is pruned to the density",
        choices=("global", "layer"),
    )
    prune_every: bool = key(True, "prune to the density after every ticket, as the authors do; false: once at the end")
    recalibration_batch: int = key(
        256,
        "BatchNorm recalibration: samples per batch, whatever the number of ranks",
        unit="samples",
        above=1,
    )
    recalibration_batches: int = key(
        100,
        "BatchNorm recalibration: number of batches; 0: none, the statistics of the last ticket are kept",
        unit="batches",
        at_least=0,
    )


@dataclass
class TicketsConfig:
    """How tickets are saved, and which are kept. The report covers the tickets that are kept."""

    dtype: str = key(
        "fp32",
        "type of the parameters in a ticket file; bf16: rounded, in half the space",
        choices=("fp32", "bf16"),
    )
    weights: str = key(
        "network",
        "weights that a ticket holds; average: the moving average of train.ema_decay",
        choices=("network", "average"),
        neutral="network",
    )
    select: str = key(
        "last",
        "state of a phase that becomes its ticket; best: the first with the highest top-1 on evaluation.held_out, of "
        "those after every evaluation.every and after the last step; both: the last, and the best in tickets/best",
        choices=("last", "best", "both"),
        neutral="last",
    )
    keep: int | None = key(None, "number of newest tickets to keep; null: all", unit="tickets", above=0)
    keep_first: bool = key(True, "keep the first ticket too, because superposition starts from it")
    copy_to: str = key(
        "",
        "URL to copy every ticket to, such as s3://bucket/run/tickets (any kind that fsspec supports); empty: none",
        may_change=True,
        is_path=True,
    )


@dataclass
class CheckpointConfig:
    """How often checkpoints are saved, and how many are kept."""

    every: str = key(
        "1 epoch", "interval between checkpoints; one is saved with each ticket as well", unit=LENGTH_UNIT, above=0
    )
    keep: int = key(2, "number of newest checkpoints to keep", unit="checkpoints", above=0)
    keep_every: int = key(
        0,
        "keep every N-th checkpoint too, counted in steps of checkpoint.every from the start of the run, as the start "
        "of a segment that python -m launchers.verify can run again; 0: none",
        unit="checkpoints",
        at_least=0,
    )


@dataclass
class TrackingConfig:
    """Where metrics are recorded. ``metrics.jsonl`` in ``output_dir`` is always written, except by backend ``none``."""

    backend: str = key(
        "mlflow", "where metrics are recorded; jsonl: in metrics.jsonl only", choices=("mlflow", "jsonl", "none")
    )
    uri: str = key(
        "",
        "URI of the MLflow server; empty: the variable MLFLOW_TRACKING_URI, or else mlflow.db in the parent folder of "
        "output_dir",
        is_path=True,
    )
    experiment: str = key(
        "", "name of the MLflow experiment; empty: the variable MLFLOW_EXPERIMENT_NAME, or else ticketworks"
    )
    run_name: str = key("", "name of the run in MLflow; empty: the value of name")
    log_every_steps: int = key(
        50,
        "steps from one record of metrics and line of the log to the next (a terminal has a live line)",
        unit="steps",
        above=0,
    )
    required: bool = key(False, "end with an error if the server cannot be reached at the start")
    system_every_seconds: float = key(
        30.0,
        "seconds from one record of processor, memory, network and GPUs to the next; 0: none",
        unit="seconds",
        at_least=0,
    )


@dataclass
class Config:
    """Everything a run depends on."""

    name: str = key(REQUIRED, f"name of the run: {NAME_RULE}", may_change=True)
    seed: int = key(0, "seed of all random numbers", at_least=0, at_most=2**63 - 1)
    imports: list[str] = key(
        [],
        "packages to import before anything is checked, which register parts of your own (docs/own-parts.md): names "
        "of modules, or of entry points of the group ticketworks",
        neutral=[],
    )
    output_dir: str = key("runs/${name}", "folder for everything that the run writes", may_change=True, is_path=True)
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
    """Return the row of the method in ``METHODS``, with the settings that the configuration replaces."""
    names = {entry.name for entry in dataclasses.fields(Strategy)}
    return method(sparsity.method, **{key: value for key, value in vars(sparsity).items() if key in names})


@contextlib.contextmanager
def named_as_keys(section: str, schema: type) -> Iterator[None]:
    """Turn the argument in an error of the ``with`` block, ``density: …``, into its key, ``sparsity.density: …``."""
    try:
        yield
    except ConfigError as error:
        if error.what.partition(":")[0] not in {entry.name for entry in dataclasses.fields(schema)}:
            raise
        raise ConfigError(f"{section}.{error.what}", do=error.do) from None
