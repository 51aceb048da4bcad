"""The files of a published ticket in Hugging Face's layout: card, configuration, dense network, and the ticket itself.

The card and ``config.json`` are for people and other programs: nothing here reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.files import parse_json, read_capped, why_malformed
from pipeline.tickets.export import export
from pipeline.tickets.format import Ticket, decode
from pipeline.tickets.remote import DENSE, TICKET

CARD, CONFIG = "README.md", "config.json"
LIBRARY = "ticketworks"
MAX_REPORT_BYTES = 1 << 28
# key in a report: type of the metric in the card's metadata, name in its table, factor
METRICS = {
    "top1": ("accuracy", "top-1 %", 100),
    "top5": ("top_5_accuracy", "top-5 %", 100),
    "nll": ("nll", "NLL", 1),
    "ece": ("ece", "ECE %", 100),
    "training_flops_ratio": ("training_flops_ratio", "train ×", 1),
    "inference_flops_ratio": ("inference_flops_ratio", "test ×", 1),
}


@dataclass(frozen=True)
class Measured:
    """What a report says of a ticket."""

    values: Mapping[str, float]  # by a key of METRICS
    num_images: int


def measured_in(report: Path, ticket: Ticket, name: str) -> Measured:
    """Return what a report says of a ticket.

    Args:
        report: a ``report.json``.
        ticket: the ticket.
        name: of the row, such as ``ticket-0``; in a report of several runs it ends so, as in ``a-ticket-0``.

    Raises:
        DataError: it is not a report, or has not exactly one row of that name with the ticket's density and size.
    """
    do = "pass the report.json of a report on this ticket"
    try:
        content = parse_json(read_capped(report, MAX_REPORT_BYTES))
        rows = [row for row in content["rows"] if row["name"] == name or row["name"].endswith(f"-{name}")]
        facts = (ticket.density, ticket.num_parameters)
        rows = [row for row in rows if (row["density"], row["num_parameters"]) == facts]
        if len(rows) != 1:
            raise DataError(f"{report}: has {len(rows)} rows of this {name}, expected 1", do=do)
        values = {key: float(rows[0][key]) for key in METRICS if rows[0].get(key) is not None}
        return Measured(values, int(content["num_images"]))
    except FileNotFoundError:
        raise DataError(f"{report}: does not exist", do=do) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{report}: is not a report: {why_malformed(error)}", do=do) from None


def published_files(
    content: bytes, *, address: str, measured: Measured | None = None, dataset: str = "", license: str = ""
) -> dict[str, bytes]:
    """Return the files of a published ticket by name, the ticket last.

    Args:
        content: of the ticket's file.
        address: from which the ticket can be loaded.
        measured: what a report says of it.
        dataset: name of the data set that it was measured on.
        license: of the weights, by its name on the Hub, such as ``apache-2.0``; empty: not stated.

    Raises:
        IntegrityError: the ticket is damaged.
    """
    ticket = decode(content)
    config = json.dumps(_config(ticket), indent=2, ensure_ascii=False) + "\n"
    card = _metadata(ticket, measured, dataset, license) + _text(ticket, measured, dataset, address)
    return {
        CARD: card.encode(),
        CONFIG: config.encode(),
        DENSE: export(ticket, ".safetensors"),
        TICKET: content,
    }


def _config(ticket: Ticket) -> dict[str, Any]:
    of = ticket.provenance
    names = ticket.network.classes if ticket.network is not None else ()
    return {
        "library_name": LIBRARY,
        "model": of.model,
        "model_args": of.model_args,
        "num_classes": of.num_classes,
        "id2label": dict(enumerate(names)),
        "preprocessing": of.preprocessing,
        "density": ticket.density,
        "num_active": ticket.num_active,
        "provenance": asdict(of),
        "ticket_sha256": ticket.content_digest,
    }


def _metadata(ticket: Ticket, measured: Measured | None, dataset: str, license: str) -> str:
    """Return the card's YAML; every value is JSON, which YAML reads as it is."""
    of = ticket.provenance
    facts: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "image-classification",
        "tags": ["sparse", "sparse-training", of.method],
    }
    if license:
        facts["license"] = license
    if measured is not None:
        results = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset or "validation images", "type": dataset or "other"},
            "metrics": [
                {"type": METRICS[key][0], "value": value, "name": METRICS[key][1].removesuffix(" %")}
                for key, value in measured.values.items()
            ],
        }
        facts["model-index"] = [{"name": _title(ticket), "results": [results]}]
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())
    return "\n".join(["---", *lines, "---", "", ""])


def _title(ticket: Ticket) -> str:
    return f"{ticket.provenance.model} {ticket.provenance.method} density {ticket.density:.3g}"


def _text(ticket: Ticket, measured: Measured | None, dataset: str, address: str) -> str:
    of = ticket.provenance
    total = sum(mask.numel() for mask in ticket.masks.values())
    rows = {
        "network": " ".join([of.model, *(f"{key}={value}" for key, value in of.model_args.items())]),
        "method": f"{of.method}, phase {of.phase}, seed {of.seed}",
        "density of the sparse layers": f"{ticket.density:.4f} ({ticket.num_active:,} of {total:,} weights)",
        "active parameters": f"{ticket.num_parameters:,}",
        "in-time over-parameterisation rate R_s": f"{of.r_s:.3f}",
        "trained for": f"{of.step:,} steps, {of.samples_seen:,} images, {of.epochs:g} epochs",
        "run": f"{of.parent_run}, ticket {of.index}",
        "sha256 of the ticket's content": ticket.content_digest,
    }
    parts = [f"# {_cell(_title(ticket))}", "", "A sparse network for images, trained sparse.", ""]
    parts += ["| | |", "| --- | --- |", *(f"| {key} | {_cell(text)} |" for key, text in rows.items()), ""]
    if measured is not None:
        shown = {METRICS[key][1]: value * METRICS[key][2] for key, value in measured.values.items()}
        cells = (f"{value:.2f}" if name.endswith("%") else f"{value:.4f}" for name, value in shown.items())
        parts += [f"Evaluated on {measured.num_images:,} images{f' of {_cell(dataset)}' if dataset else ''}:", ""]
        parts += [f"| {' | '.join(shown)} |", f"|{' --- |' * len(shown)}", f"| {' | '.join(cells)} |", ""]
        parts += ["train × and test × are FLOPs relative to the dense network.", ""] if "train ×" in shown else []
    parts += ["```python", "from pipeline.inference import load_ticket, predict", ""]
    parts += [f"network = load_ticket({json.dumps(address, ensure_ascii=False)})"]
    parts += ['print(predict(network, ["image.png"], top=3))  # names of classes and probabilities', "```", ""]
    parts += [
        f"`{TICKET}` is the ticket: packed masks, active weights and where they come from. `{DENSE}` is the same",
        f"network as a dense state_dict, 0 outside the masks. `{CONFIG}` says how it is built and images are prepared.",
        "",
    ]
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table, without marks of its own."""
    return "".join(f"\\{each}" if each in "\\`*|[]<>#" else each for each in text if each.isprintable())
