"""Train a sparse network from scratch, save tickets, and evaluate them: alone, superposed and as ensembles.

The same script runs under every launcher::

    deepspeed --num_gpus 8 launchers/train.py --config imagenet_r50_s90.yaml data.train=… data.val=…
    torchrun --nproc-per-node 8 launchers/train.py --config imagenet_r50_s90.yaml …
    python launchers/train.py --config fashion_mnist_s90.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config.schema import Config
    from pipeline.datasets.sets import DataSets
    from pipeline.evaluation.report import Report
    from pipeline.plan import Plan


def train(
    config: Config,
    plan: Plan,
    *,
    sets: DataSets,
    resume: str = "none",
    allowed_changes: Sequence[str] = (),
    stop_after: int | None = None,
    max_val_samples: int | None = None,
) -> Report | None:
    """Run ``plan`` on the verified ``sets``; return the report on rank 0, None on the other ranks."""
    from pipeline.training import assembly, run_folder

    with assembly.open_session(config) as ranks, run_folder.open_run_folder(config, resume=resume) as run:
        loaders = assembly.open_loaders(config, sets, max_val_samples=max_val_samples)
        engine, begin = assembly.build_engine(config, ranks, loaders.train)  # from its seed, or a ticket or state_dict
        sparsifier = assembly.build_sparsifier(engine, config, begin)  # the same masks on every rank
        tickets = assembly.open_tickets(config, plan, run)
        selection = assembly.open_selection(tickets, engine, sparsifier, loaders, begin, config=config, plan=plan)
        checkpoints = assembly.open_checkpoints(config, plan, run, loaders=loaders, best=selection.best)
        resumed = checkpoints.load(engine, sparsifier, resume=resume, allowed_changes=allowed_changes)
        assembly.require_tickets(selection.stores, plan, resumed)
        ranks.stop_on_signals(after_step=stop_after)

        with assembly.track(config, plan, run, sets, resumed) as tracker, tickets, checkpoints, ranks.report_first():
            log = assembly.open_log(tracker, ranks, config, plan, run, sets, loaders, engine, resumed)
            evaluation = assembly.open_evaluation(engine, loaders, ranks, resumed, config=config, plan=plan, log=log)
            for step, (images, labels) in loaders.train.steps(resumed.step, plan.num_steps):  # 0 on a fresh run
                phase = plan.at(step)
                update = phase.update_at(step)  # None on most steps
                needs_dense = sparsifier.needs_dense_gradient(update)
                loss, top1, gradient_norm = engine.backward(images, labels, lr=phase.lr(step), dense=needs_dense)
                is_read = update is not None or any(it.is_due(step) for it in (log, evaluation, selection, checkpoints))
                goes_on = ranks.agree_to_go_on(loss, gradient_norm, step, at_once=is_read)  # raises if not finite
                if sparsifier.before_step(update, is_finite=True, is_masked=engine.masks_gradients):  # scores, masks
                    engine.step(ranks.is_bad)  # changes nothing if the step is bad; clears gradients
                else:
                    engine.skip_step()  # the update replaces the step
                updated = sparsifier.after_step()  # prune and regrow if due; agree on all ranks
                log.step(step, phase, loss, top1, gradient_norm, sparsifier, updated)
                if goes_on and evaluation.is_due(step):
                    goes_on = evaluation.run(step)  # leaves training as it is; stops early if asked to
                if selection.is_due(step):
                    selection.consider(step, log)  # keeps the best state of the phase, if that is its ticket
                if phase.closes_with_ticket(step):
                    log.tickets(step, selection.save(phase))
                # in the background, after the ticket, which a run that resumes here needs
                if checkpoints.is_due(step) or not goes_on:
                    saved = log.saved(is_evaluation_left_out=not goes_on and evaluation.is_due(step))
                    checkpoints.save(step + 1, engine, sparsifier, after=tickets.finish, **saved)
                if not goes_on:
                    checkpoints.finish()
                    ranks.leave_preempted(f"checkpoint saved after step {step + 1}")
            checkpoints.finish()
            return assembly.evaluate_and_report(selection, loaders, log, ranks, config=config, plan=plan, run=run)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, installed or not
    from launchers.start import require_environment

    require_environment()
    from launchers import train_cli
    from pipeline.command_line import leave

    leave(train_cli.main(train, sys.argv[1:]))
