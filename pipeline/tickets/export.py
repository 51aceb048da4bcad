"""Write a ticket as an ordinary dense network, which says what it is and cannot be taken for a ticket.

A ticket is recognised by the entry ``ticket`` of its metadata, which no export has.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable

import safetensors.torch
import torch

from pipeline import models
from pipeline.errors import ConfigError, ServiceError
from pipeline.files import parse_json
from pipeline.tickets.format import Ticket


def description(ticket: Ticket) -> dict[str, str]:
    """Say in text values how the exported network is used: JSON for lists and numbers.

    ``exported_from`` is the sha256 of the ticket, ``mean`` and ``std`` are on the 0–255 scale,
    ``density`` is that of the sparse layers and ``network_density`` that of all parameters.
    ``classes`` and what is said of images are absent where the ticket does not record them.
    """
    of, prepared, network = ticket.provenance, ticket.provenance.preprocessing, ticket.network
    of_images = ("mean", "std", "eval_resolution", "eval_ratio", "eval_resize")
    facts = {
        "model_args": of.model_args,
        "num_classes": of.num_classes,
        **{key: prepared[key] for key in of_images if key in prepared},
        "density": ticket.density,
        "num_active": ticket.num_active,
    }
    if network is not None:
        facts |= {"network_density": network.density}
        facts |= {"classes": list(network.classes)} if network.classes else {}
    texts = {"exported_from": ticket.content_digest, "model": of.model, "method": of.method, "run": of.parent_run}
    return texts | {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}


def _as_safetensors(ticket: Ticket) -> bytes:
    content = bytes(safetensors.torch.save(ticket.state, metadata={"format": "pt", **description(ticket)}))
    start = 8 + int.from_bytes(content[:8], "little")
    header = parse_json(content[8:start])
    # the library writes the metadata in an order that changes from call to call
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def _as_pt(ticket: Ticket) -> bytes:
    content = io.BytesIO()
    torch.save(ticket.state, content)
    return content.getvalue()


def _as_onnx(ticket: Ticket) -> bytes:
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ServiceError(
            f"exporting to ONNX needs {' and '.join(missing)}, which is not installed",
            do=f"python -m pip install {' '.join(missing)}",
        )
    of, shapes = ticket.provenance, {name: tensor.shape for name, tensor in ticket.state.items()}
    model = models.build_for(
        shapes, of.model, num_classes=of.num_classes, args=of.model_args, whose=f"ticket {of.index}"
    )
    model.load_state_dict(ticket.state)
    side = int(of.preprocessing.get("eval_resolution", models.image_size(of.model)))
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, side, side),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
    )
    assert program is not None
    proto = program.model_proto
    proto.doc_string = "Dense export of a sparse network, 0 outside its masks. images: (pixels - mean) / std."
    for key, value in description(ticket).items():
        proto.metadata_props.add(key=key, value=value)
    return bytes(proto.SerializeToString())


EXPORTS: dict[str, Callable[[Ticket], bytes]] = {".safetensors": _as_safetensors, ".pt": _as_pt, ".onnx": _as_onnx}


def export(ticket: Ticket, suffix: str) -> bytes:
    """Return the content of a file of the ticket's dense network.

    Args:
        ticket: the ticket.
        suffix: a key of :data:`EXPORTS`.

    Raises:
        ConfigError: there is no such format.
        ServiceError: a package for ONNX is not installed.
        DataError: the ticket does not fit its network (ONNX).
    """
    if suffix not in EXPORTS:
        raise ConfigError(f"export: expected one of {', '.join(EXPORTS)}, got {suffix!r}")
    return EXPORTS[suffix](ticket)
