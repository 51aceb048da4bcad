"""Build the parts of a training run from its configuration: loaders, engine, sparsifier, tickets, final report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline import models, tracking
from pipeline.checkpoint.checkpoints import Checkpoints, Resumed
from pipeline.config.load import config_digest
from pipeline.config.schema import Config, SparsityConfig, named_as_keys, strategy_of
from pipeline.data.loaders import EvalLoader, TrainLoader, open_eval_loader, open_train_loader
from pipeline.datasets.sets import DataSets, data_digest
from pipeline.datasets.sidecar import BetonInfo
from pipeline.distributed import group, session
from pipeline.distributed.session import Session
from pipeline.engine import build
from pipeline.engine.protocol import Engine
from pipeline.engine.torch_engine import autocast_dtype, place_model
from pipeline.errors import IntegrityError
from pipeline.evaluation.batchnorm import average_buffers
from pipeline.evaluation.history import read_history
from pipeline.evaluation.members import check_weights
from pipeline.evaluation.networks import evaluation_setup
from pipeline.evaluation.publish import publish, say_where_tracked
from pipeline.evaluation.report import FurtherSets, Report, evaluate_tickets
from pipeline.evaluation.runs import TicketRun
from pipeline.plan import Plan
from pipeline.sparse.exploration import num_active
from pipeline.sparse.flops import layer_macs
from pipeline.sparse.select import key_of
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.terminal.live import line
from pipeline.tickets.best import BestTicket
from pipeline.tickets.store import Retention, TicketStore
from pipeline.tracking.system import monitored
from pipeline.tracking.tracker import Tracker
from pipeline.training.description import NOTE, describe_run, note
from pipeline.training.evaluation import NETWORK, NEVER, Evaluation
from pipeline.training.profiler import ProfileWindow
from pipeline.training.run_chain import open_run_chain
from pipeline.training.run_folder import RunFolder
from pipeline.training.selection import BEST, Selection, describe_tickets, make_ticket, ticket_network
from pipeline.training.shapes import superposed_tickets
from pipeline.training.start import FROM_SEED, Start, choose_masks, read_start
from pipeline.training.step_log import StepLog
from pipeline.training.stoppable import AgreedEvalLoader, StoppableEvalLoader, StoppableTrainLoader

logger = logging.getLogger(__name__)

NO_DIGEST = "0"  # of a data set that the run does not use


def open_session(config: Config) -> contextlib.AbstractContextManager[Session]:
    """Return the context of a session (device, process group, threads, arithmetic) as configured."""
    train = config.train
    return group.join(
        timeout_seconds=train.collective_timeout_seconds,
        threads_per_rank=train.threads_per_rank,
        is_deterministic=train.deterministic,
        on=train.device,
        backend=train.backend,
        tf32=train.tf32,
        cudnn_benchmark=train.cudnn_benchmark,
    )


@dataclass(frozen=True)
class Loaders:
    """The loaders of a training run, and the identity of its data."""

    train: TrainLoader
    val: EvalLoader
    train_info: BetonInfo
    val_info: BetonInfo
    data_digest: str  # see `data_digest`
    held_out_digest: str  # NO_DIGEST: there is no held-out set
    held_out: EvalLoader | None  # images to choose with: superpositions, the best state of a phase


def open_loaders(config: Config, sets: DataSets, *, max_val_samples: int | None = None) -> Loaders:
    """Open the loaders of this rank, after checking that all ranks have the same data and configuration.

    Each host may have its own copy of the files, and the copies may differ.

    Args:
        config: the configuration.
        sets: the verified data sets; ``sets.train`` must not be None.
        max_val_samples: maximum number of samples that are evaluated (for a dry run); None: all.

    Raises:
        IntegrityError: on every rank, when data sets or configurations differ between ranks.
    """
    assert sets.train is not None
    digest = data_digest(sets.train, config.data)
    _require_same_data(config, sets, digest)
    data, device, channels_last = config.data, session.device(), config.train.channels_last
    loaders = Loaders(
        open_train_loader(
            sets.train.path,
            data,
            global_batch=config.train.global_batch,
            seed=config.seed,
            device=device,
            channels_last=channels_last,
            num_classes=config.model.num_classes,
            autocast_dtype=autocast_dtype(config.train),
        ),
        open_eval_loader(
            sets.val.path, data, batch=config.evaluation.batch, device=device, channels_last=channels_last
        ),
        sets.train,
        sets.val,
        digest,
        sets.held_out.digest if sets.held_out else NO_DIGEST,
        open_held_out_loader(config, sets),
    )
    if max_val_samples is not None:
        for loader in filter(None, (loaders.val, loaders.held_out)):
            loader.num_samples = min(loader.num_samples, max_val_samples)
    return loaders


def _require_same_data(config: Config, sets: DataSets, train_digest: str) -> None:
    digests = {
        "data.train": train_digest,
        "data.val": sets.val.digest,
        "evaluation.held_out": sets.held_out.digest if sets.held_out else NO_DIGEST,
        "the configuration": config_digest(config),
    }
    numbers = {name: int(digest[:15], 16) for name, digest in digests.items()}  # ranks compare 63 bits; these are 60
    try:
        session.require_equal("data sets or configurations", numbers, step=0)
    except IntegrityError as error:
        raise IntegrityError(
            error.what,
            do="give every host the same command line, configuration file and data files "
            "(python -m data_prep info prints their digests)",
            is_reported_elsewhere=error.is_reported_elsewhere,
        ) from None


def open_held_out_loader(config: Config, sets: DataSets) -> EvalLoader | None:
    """Open the loader of the held-out set; None if nothing is chosen with one."""
    if sets.held_out is None:
        return None
    return open_eval_loader(
        sets.held_out.path,
        config.data,
        batch=config.evaluation.batch,
        num_images=config.evaluation.held_out_images,
        device=session.device(),
        channels_last=config.train.channels_last,
    )


def build_model(config: Config) -> nn.Module:
    """Build the configured network, initialised from the seed."""
    assert config.model.num_classes, "with_num_classes() was not called"
    return models.build(
        config.model.name, num_classes=config.model.num_classes, args=config.model.args, seed=config.seed
    )


def build_engine(config: Config, ranks: Session, train: TrainLoader) -> tuple[Engine, Start]:
    """Build the network in its engine with the weights to start from, and check that all ranks have the same.

    Returns:
        The engine, and what the run starts from, with masks that the method chooses by the first batch of ``train``.

    Raises:
        IntegrityError: on every rank, when the initial weights differ.
    """
    start = read_start(config)
    model = build_model(config)
    start.load(model)
    start = choose_masks(start, model, config, train)
    engine = build.build_engine(model, config.train, waiting=ranks.waiting)
    session.require_equal(
        "initial weights", {name: session.digest(p) for name, p in engine.model.named_parameters()}, step=0
    )
    # random numbers drawn in training, such as for dropout, differ between ranks but not between runs
    torch.manual_seed(key_of(config.seed, session.rank()))
    return engine, start


def build_sparsifier(engine: Engine, config: Config, start: Start = FROM_SEED) -> Sparsifier:
    """Build the sparsifier of the configured method for the engine's model and optimiser.

    Its initial masks are those of ``start``.
    """
    sparsity = config.sparsity
    strategy = strategy_of(sparsity)
    with named_as_keys("sparsity", SparsityConfig):
        return Sparsifier(
            engine.model,
            engine.optimizer,
            strategy,
            density=sparsity.density if strategy.initial_density is None else strategy.initial_density,
            seed=config.seed,
            dense_layers=sparsity.dense_layers,
            fragments=engine.fragments,
            on_masks=engine.use_masks,
            shadows=[] if engine.average is None else [engine.average.module],
            check_every=sparsity.check_every,
            own_step_counts=sparsity.own_step_counts,
            own_step_warmup=sparsity.own_step_warmup,
            masks=start.masks,
            macs=layer_macs(engine.model, (3, config.data.train_resolution, config.data.train_resolution)),
        )


@contextlib.contextmanager
def track(config: Config, plan: Plan, run: RunFolder, sets: DataSets, resumed: Resumed) -> Iterator[Tracker]:
    """Open the configured tracker, log the whole configuration as parameters, and describe the run.

    A resumed run continues its record.
    """
    with tracking.open_tracker(
        config.tracking,
        output_dir=run.path,
        run_name=config.tracking.run_name or config.name,
        resume_run_id=resumed.tracker_run,
    ) as tracker:
        if resumed.step:
            tracker.resume_from(resumed.step)
        tracker.log_params(dataclasses.asdict(config) | {"ranks": session.world_size(), "run_id": run.run_id})
        if session.is_main():
            describe_run(tracker, config, plan, sets, folder=run.path)
            tracker.log_artifact(run.path / "config.yaml")
        with monitored(tracker, every_seconds=config.tracking.system_every_seconds):
            yield tracker


def open_log(
    tracker: Tracker,
    ranks: Session,
    config: Config,
    plan: Plan,
    run: RunFolder,
    sets: DataSets,
    loaders: Loaders,
    engine: Engine,
    resumed: Resumed,
) -> StepLog:
    """Return what reports training to the tracker, the terminal and the run's chain of digests."""
    data = {"train": loaders.data_digest, "val": sets.val.digest, "held_out": loaders.held_out_digest}
    return StepLog(
        *(tracker, plan, loaders.train, ranks),
        every=config.tracking.log_every_steps,
        num_classes=config.model.num_classes,
        chain=open_run_chain(run.path, config, data=data, resumed=resumed, model=engine.model),
        window=resumed.window,
        profile=ProfileWindow(config.train.profile, run.path, step=resumed.step),
    )


def open_evaluation(
    engine: Engine, loaders: Loaders, ranks: Session, resumed: Resumed, *, config: Config, plan: Plan, log: StepLog
) -> Evaluation:
    """Return the evaluation during training as configured: of the network, on the validation set or a part of it.

    If the run left one out when it was asked to stop, it is made now, so that the record has no gap.

    Raises:
        Preempted: this run is asked to stop meanwhile.
    """
    num_images = config.evaluation.every_images
    loader = loaders.val.subset(num_images) if num_images else loaders.val
    networks = {}
    if config.evaluation.every != NEVER:
        networks[NETWORK] = place_model(build_model(config), config.train), lambda: averaged_state(engine.model)
        if (average := engine.average) is not None:
            networks["ema"] = place_model(build_model(config), config.train), lambda: averaged_state(average.module)
    evaluation = Evaluation(config, plan, AgreedEvalLoader(loader, ranks), networks, log=log)
    last = resumed.step - 1
    if resumed.is_evaluation_left_out and evaluation.is_due(last) and not evaluation.run(last):
        ranks.leave_preempted(f"nothing new since the checkpoint of step {resumed.step}")
    return evaluation


def averaged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the ``state_dict`` of the model as a ticket has it: with BatchNorm statistics averaged over ranks.

    Every rank must call this.
    """
    return {**model.state_dict(), **average_buffers(model)}


def open_tickets(config: Config, plan: Plan, run: RunFolder) -> TicketStore:
    """Open the run's folder of tickets, which are saved in the background, with the configured retention.

    Raises:
        ConfigError: the number of ticket weights is not the number of tickets to be superposed.
        WriteError, PermissionDenied: the folder cannot be used, see `TicketStore`.
    """
    retention = Retention(last=config.tickets.keep, first=config.tickets.keep_first)
    check_weights(config.evaluation, superposed_tickets(config, plan))
    return TicketStore(
        run.path / "tickets", owner=run.run_id, retention=retention, in_background=True, copy_to=config.tickets.copy_to
    )


def open_selection(
    tickets: TicketStore,
    engine: Engine,
    sparsifier: Sparsifier,
    loaders: Loaders,
    start: Start,
    *,
    config: Config,
    plan: Plan,
) -> Selection:
    """Return what saves the tickets of each phase, and keeps its best state if that is configured.

    With ``tickets.select: both`` the best ones go to the folder ``best`` in that of the others.
    """
    assert tickets.owner is not None
    select, copy_to = config.tickets.select, config.tickets.copy_to
    stores, network, network_of = [tickets], None, ticket_network(engine, config)
    if select == "both":
        best = tickets.folder / BEST
        copy_to = copy_to and f"{copy_to.rstrip('/')}/{BEST}"
        stores.append(TicketStore(best, owner=tickets.owner, retention=tickets.retention, copy_to=copy_to))
    if select != "last":
        network = place_model(build_model(config), config.train), lambda: averaged_state(network_of)
    return Selection(
        config,
        plan,
        stores,
        partial(
            make_ticket,
            engine,
            sparsifier,
            config=config,
            plan=plan,
            train_info=loaders.train_info,
            origin=start.origin,
        ),
        loader=loaders.held_out,
        network=network,
        num_active=lambda: num_active(sparsifier.masks),
        held_out_digest=loaders.held_out_digest if select != "last" else "",
    )


def open_checkpoints(config: Config, plan: Plan, run: RunFolder, *, loaders: Loaders, best: BestTicket) -> Checkpoints:
    """Return the run's checkpoints, which also hold the best ticket of the current phase."""
    return Checkpoints(run.path / "checkpoints", config, plan, data_digest=loaders.data_digest, best=best)


def require_tickets(stores: Sequence[TicketStore], plan: Plan, resumed: Resumed) -> None:
    """Check that all tickets that were due before the step to resume at, and have not been retired, exist.

    Without a checkpoint the run starts again, and existing tickets are reported in a warning. Every
    rank must call this.

    Raises:
        IntegrityError: a ticket is missing or damaged, so that the report would lack it.
    """
    due = {phase.ticket_index for phase in plan.phases if phase.ticket_index is not None and phase.stop <= resumed.step}

    def check(tickets: TicketStore) -> None:
        present = {ref.index for ref in tickets.list()}
        if present and not resumed.step:
            logger.warning(
                "no checkpoint found: the run starts again at step 0, although tickets %s exist", sorted(present)
            )
        newest = max(due | present, default=0)  # later tickets cause earlier ones to be retired
        missing = sorted(index for index in due - present if tickets.retention.keeps(index, newest))
        if missing:
            raise IntegrityError(
                f"{tickets.folder}: tickets {missing} are missing or damaged, expected before step {resumed.step}",
                do="restore them from a copy, or resume from an older checkpoint with --resume PATH",
            )

    for store in stores:
        session.on_main(partial(check, store))


def evaluate_and_report(
    selection: Selection,
    loaders: Loaders,
    log: StepLog,
    ranks: Session,
    *,
    config: Config,
    plan: Plan,
    run: RunFolder,
) -> Report | None:
    """Evaluate tickets, superposition and ensembles on all ranks; rank 0 prints, saves and tracks the report.

    With ``tickets.select: both`` the best tickets have rows, a superposition and ensembles of their own.

    Returns:
        The report on rank 0, None on the other ranks.

    Raises:
        Preempted: this rank was asked to stop.
    """
    last, *best = selection.stores
    session.on_main(last.finish)
    runs = [TicketRun(last.list()), *(TicketRun(store.list(), label=BEST, is_apart=True) for store in best)]
    result = evaluate_tickets(
        runs,
        evaluation_setup(
            config,
            train_loader=StoppableTrainLoader(loaders.train, ranks),
            held_out=None if loaders.held_out is None else StoppableEvalLoader(loaders.held_out, ranks),
        ),
        eval_loader=StoppableEvalLoader(loaders.val, ranks),
        further=FurtherSets(flip=config.evaluation.flip),
    )

    def publish_result() -> None:
        assert result is not None
        settings = {
            "data": config.data.val,
            "precision": config.train.precision,
            "test-time flip": config.evaluation.flip,
            "ranks": session.world_size(),
            "tickets": f"{last.folder} ({describe_tickets(config)})",
        }
        publish(
            result,
            run.path / "report",
            log.tracker,
            runs=runs,
            settings=settings,
            data_digest=loaders.val_info.digest,
            history=read_history(run.path),
        )
        log.tracker.set_tags({NOTE: note(config, plan, folder=run.path, report=result)})
        say_where_tracked(config.tracking, run.path)

    with line.showing(lambda _: "writing the report and its figures"):
        session.on_main(publish_result)
        if log.chain is not None:
            session.on_main(partial(log.chain.end, plan.num_steps, run.path / "report"))
    return result
