"""The commands between tickets and other files: ``export`` and ``import``."""

from __future__ import annotations

import argparse

from pipeline.command_line import local_path, path_or_url, whole_number
from pipeline.errors import ConfigError
from pipeline.parts import import_parts
from pipeline.tickets.cli import Add, add_imports, read, require_new

FORMATS = (".safetensors", ".pt", ".onnx")


def add_commands(command: Add) -> None:
    """Add the commands between tickets and other files."""
    exported = command("export", _export, "write a ticket as an ordinary dense network, with zeros outside the masks")
    exported.add_argument("file", type=path_or_url, metavar="FILE", help="ticket file to export")
    help_output = (
        "file to write; its name decides the format: .safetensors or .pt (a state_dict) or .onnx (the network; needs "
        "the packages onnx and onnxscript); .safetensors and .onnx say classes, image size, mean and deviation, density"
    )
    exported.add_argument("--output", type=local_path, required=True, metavar="FILE", help=help_output)
    imported = command("import", _import, "make a ticket of a sparse network that another project trained")
    imported.add_argument("file", type=local_path, metavar="FILE", help="state_dict: .safetensors, or of torch.save")
    imported.add_argument(
        "--model", required=True, metavar="NAME", help="the network, as model.name of a configuration"
    )
    imported.add_argument(
        "--model-args", default="{}", metavar="JSON", help="its further arguments, as a JSON object (default: {})"
    )
    imported.add_argument(
        "--num-classes", type=whole_number(2), default=0, metavar="N", help="outputs (default: as --like, or 1000)"
    )
    imported.add_argument(
        "--layout",
        default="auto",
        metavar="NAME",
        help="how the file keeps its masks: torch-prune, str, masks, masks-apart, zeros (default: auto, recognise it)",
    )
    imported.add_argument(
        "--like",
        type=path_or_url,
        metavar="TICKET",
        help="ticket with the same classes and preparation of images, which are taken from it",
    )
    imported.add_argument(
        "--imagenet",
        action="store_true",
        help="images are prepared as torchvision's weights for ImageNet expect it",
    )
    imported.add_argument("--name", default="", help="what trained it, for reports (default: the name of the file)")
    imported.add_argument("--output", type=local_path, required=True, metavar="FILE", help=".safetensors file to write")
    for each in (exported, imported):
        add_imports(each)


def _export(options: argparse.Namespace) -> int:
    output = options.output
    if output.suffix not in FORMATS:
        raise ConfigError(f"--output {output}: expected a name that ends in one of {', '.join(FORMATS)}")
    require_new(output)
    import_parts(options.imports, setting="--imports")
    ticket = read(options.file)
    from pipeline.files import write_atomically
    from pipeline.tickets.export import export

    write_atomically(output, export(ticket, output.suffix))
    print(f"{output}: {ticket.provenance.model}, {ticket.num_active:,} of its sparse weights not pruned, stored dense")
    return 0


def _import(options: argparse.Namespace) -> int:
    from pipeline.files import parse_json, write_atomically

    output = options.output
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")
    require_new(output)
    try:
        args = parse_json(options.model_args)
    except ValueError as error:
        raise ConfigError(
            f"--model-args: is not valid JSON: {error}", do='pass an object such as {"width": 8}'
        ) from None
    if not isinstance(args, dict):
        raise ConfigError("--model-args: expected a JSON object", do='pass an object such as {"width": 8}')
    import_parts(options.imports, setting="--imports")
    like = None if options.like is None else read(options.like)
    from pipeline.tickets.foreign import IMAGENET, import_ticket
    from pipeline.tickets.format import encode

    ticket, said = import_ticket(
        options.file,
        options.model,
        args=args,
        num_classes=options.num_classes,
        layout=options.layout,
        like=like,
        preprocessing=IMAGENET if options.imagenet else None,
        run=options.name,
    )
    write_atomically(output, encode(ticket))
    total = sum(mask.numel() for mask in ticket.masks.values())
    print(
        f"{output}: {ticket.provenance.model}, layout {ticket.provenance.origin['layout']}, {ticket.num_active:,} of "
        f"{total:,} weights active in {len(ticket.masks)} layers, density {ticket.density:.4f}"
    )
    for text in said:
        print(f"note: {text}")
    return 0
