"""Compare all superposition rules on the same tickets.

::

    python -m benchmarks.superposition --tickets FOLDER --data FILE --recalibrate FILE

rules     the table of pipeline/superposition/rules.py; rules that choose tickets do so on the set
          of ``--held-out`` (default: the set of ``--recalibrate``)
scope     pruned back by one ranking over all layers (global), or to the counts of the last ticket
          in each layer (layer)
pruned    after every ticket, or once at the end
tickets   with the ticket that ends exploration, or only those of refinement phases

All networks are evaluated in one pass over the set. ``key=value`` sets other keys of
``evaluation.*``, such as ``recalibration_batches``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.command_line import local_path, path_or_url
from pipeline.config.schema import Config, EvaluationConfig
from pipeline.data.loaders import open_eval_loader, open_train_loader
from pipeline.datasets.sets import DataSets
from pipeline.distributed import session
from pipeline.evaluation import inputs, metrics
from pipeline.evaluation.members import network_of, superposed_network
from pipeline.evaluation.networks import evaluation_setup
from pipeline.evaluation.predict import Networks, predict
from pipeline.plan import EXPLORATION
from pipeline.superposition.rules import RULES
from pipeline.tickets.format import decode
from pipeline.tickets.remote import fetched
from pipeline.tickets.store import TicketRef
from pipeline.training import assembly

SETTINGS = list(
    itertools.product((True, False), ("global", "layer"), (True, False))
)  # with exploration, scope, prune after every ticket
METRICS = {"top1": metrics.top1, "nll": metrics.nll, "ece": metrics.ece}


def main() -> None:
    given = parse()
    logging.basicConfig(level=logging.WARNING if given.quiet else logging.INFO, format="%(message)s")
    torch.set_num_threads(given.threads)
    with fetched([given.tickets]) as folders:
        sets = inputs.open_sets(given.data, train=given.recalibrate)
        runs = inputs.open_runs(folders)
        inputs.check_classes(runs, sets, may_differ=False)
        judged = next(rule for rule in RULES if RULES[rule].is_judged)
        chosen_with = [
            f"evaluation.superposition={judged}",
            f"evaluation.held_out={given.held_out or given.recalibrate}",
        ]
        config = inputs.configure(runs, sets, output=Path(), overrides=[*chosen_with, *given.overrides])
        results = judge(config, list(runs[0].refs), inputs.with_held_out(sets, config))
    print(table(results))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


def judge(config: Config, refs: list[TicketRef], sets: DataSets) -> list[dict[str, Any]]:
    """Evaluate every ticket, and every rule under every setting; returns one row for each."""
    assert sets.train is not None
    data, device, channels_last = config.data, session.device(), config.train.channels_last
    trained_on = open_train_loader(
        sets.train.path, data, global_batch=1, seed=config.seed, device=device, channels_last=channels_last
    )
    held_out = assembly.open_held_out_loader(config, sets)
    setup = evaluation_setup(config, train_loader=trained_on, held_out=held_out)
    rows: list[dict[str, Any]] = [{"rule": f"ticket {ref.index}"} for ref in refs]
    networks = [network_of(decode(ref.path), setup) for ref in refs]
    for rule, (with_exploration, scope, is_every) in itertools.product(RULES, SETTINGS):
        how = replace(
            config.evaluation,
            superposition=rule,
            prune_scope=scope,
            prune_every=is_every,
            with_exploration=with_exploration,
        )
        network, ticket = superposed_network(chosen(refs, how), replace(setup, settings=how))
        networks.append(network)
        rows.append(
            {
                "rule": rule,
                "scope": scope,
                "prune_every": is_every,
                "with_exploration": with_exploration,
                **ticket.provenance.extra,
            }
        )
    loader = open_eval_loader(
        sets.val.path, data, batch=config.evaluation.batch, device=device, channels_last=channels_last
    )
    predicted = predict(
        Networks(networks, autocast_dtype=setup.autocast_dtype), loader, num_classes=config.model.num_classes
    )
    assert predicted is not None
    for row, probabilities in zip(rows, predicted[0], strict=True):
        row |= {name: metric(probabilities, predicted[1]) for name, metric in METRICS.items()}
    return rows


def chosen(refs: list[TicketRef], how: EvaluationConfig) -> list[TicketRef]:
    return [ref for ref in refs if how.with_exploration or ref.provenance.phase != EXPLORATION]


def table(rows: list[dict[str, Any]]) -> str:
    """Format top-1 in % as a Markdown table: one line per rule, one column per setting."""
    tickets = [f"{row['rule']}: {100 * row['top1']:.2f}" for row in rows if "scope" not in row]
    heads = [
        f"{scope}, {'after each' if is_every else 'once'}{'' if with_exploration else ', without exploration'}"
        for with_exploration, scope, is_every in SETTINGS
    ]
    lines = [", ".join(tickets), "", f"| rule | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for rule in RULES:
        cells = [f"{100 * row['top1']:.2f} ({row['num_members']:g})" for row in rows if row["rule"] == rule]
        lines.append(f"| `{rule}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--tickets",
        type=path_or_url,
        required=True,
        metavar="FOLDER",
        help="folder with the tickets of one run, or any URL that fsspec supports",
    )
    add("--data", type=local_path, required=True, metavar="FILE", help=".beton file to evaluate on")
    add(
        "--recalibrate",
        type=local_path,
        required=True,
        metavar="FILE",
        help=".beton file of the training set, which recalibrates BatchNorm",
    )
    add(
        "--held-out",
        type=local_path,
        metavar="FILE",
        help=".beton file on which the rules that select tickets compare them (default: the file of --recalibrate)",
    )
    add("--threads", type=int, default=1, metavar="N", help="number of torch threads (default: 1)")
    add("--quiet", action="store_true", help="do not log which tickets each superposition includes")
    add("--json", type=local_path, metavar="FILE", help="also write the results to FILE")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="configuration setting to override, such as evaluation.held_out_images=5000",
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
