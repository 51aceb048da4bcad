"""Names that other programs use for our keys, so that a message can suggest the right key."""

from __future__ import annotations

import re

from pipeline.config.schema import KEYS

OTHER_NAMES = {  # name in other programs -> what to write here; {} is the value
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs"), "plan.exploration.length='{} epochs'"),
    **dict.fromkeys(("steps", "num_steps", "max_steps", "iterations"), "plan.exploration.length='{} steps'"),
    **dict.fromkeys(("lr", "learning_rate", "base_lr"), "plan.exploration.lr.value={}"),
    **dict.fromkeys(("lr_schedule", "scheduler"), "plan.exploration.lr.schedule={}"),
    **dict.fromkeys(("warmup_epochs",), "plan.exploration.lr.warmup='{} epochs'"),
    **dict.fromkeys(("batch_size", "batch", "bs", "global_batch_size"), "train.global_batch={}"),
    **dict.fromkeys(("accumulation_steps", "gradient_accumulation_steps"), "train.accumulation={}"),
    **dict.fromkeys(("wd",), "train.weight_decay={}"),
    **dict.fromkeys(("optim", "opt"), "train.optimizer={}"),
    **dict.fromkeys(("bf16", "amp"), "train.precision=bf16"),
    **dict.fromkeys(("sparsity",), "sparsity.density=… (1 − the sparsity)"),
    **dict.fromkeys(("model", "arch", "network"), "model.name={}"),
    **dict.fromkeys(("data", "dataset", "data_path", "data_dir"), "data.train=… data.val=…"),
    **dict.fromkeys(("output", "out", "save_dir", "log_dir"), "output_dir={}"),
    **dict.fromkeys(("workers",), "data.num_workers={}"),
    **dict.fromkeys(("log_interval", "print_freq"), "tracking.log_every_steps={}"),
}


def written_here(name: str, value: str = "") -> str:
    """Return the ``key=value`` that sets here what ``name`` sets in other programs; empty if no key does.

    Args:
        name: An option or key as the user wrote it: ``--epochs``, ``train.epochs``, ``--density``.
        value: Its value; shown as ``…`` if it is empty, long or needs quotes.
    """
    shown = value if re.fullmatch(r"[\w./:+-]{1,60}", value) else "…"
    key = name.lstrip("-").replace("-", "_")
    last = key.rpartition(".")[2]
    by_last = {full.rpartition(".")[2]: full for full in reversed(KEYS) if KEYS[full].section is None}
    known = key if key in KEYS and KEYS[key].section is None else None
    if known is None and last in OTHER_NAMES:
        return OTHER_NAMES[last].format(shown)
    known = known or by_last.get(last)
    return f"{known}={shown}" if known else ""


def key_elsewhere_called(name: str) -> str:
    """Return our key for the one that other programs call ``name``; empty if there is none."""
    return OTHER_NAMES.get(name.rpartition(".")[2], "").partition("=")[0]
