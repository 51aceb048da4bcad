"""Suggest what to write instead of a command line that cannot be parsed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pipeline.config.other_names import written_here
from pipeline.errors import ConfigError

OF_THE_LAUNCHERS = ("gpus", "num_gpus", "nproc", "nproc_per_node", "num_processes", "ranks", "nodes", "nnodes")
CONFIG_ELSEWHERE = ("c", "cfg", "conf", "config_file", "yaml")
NEEDED_VALUE = {
    "--config": "--config NAME, where NAME is a YAML file or the name of one in configs/",
    "--resume": "--resume auto, which continues from the newest valid checkpoint, or --resume PATH",
    "--allow-change": "--allow-change KEY, a key of the configuration",
}


def slip_in(arguments: Sequence[str], options: Sequence[str]) -> ConfigError | None:
    """Find the first argument with a known mistake; None if there is none.

    Args:
        arguments: The command line of launchers/train.py, which could not be parsed.
        options: All options, as ``--name``.

    Returns:
        The error that says what to write instead.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name in NEEDED_VALUE and not value and (argument.endswith("=") or not following or following[0] == "-"):
            return ConfigError(f"command line: {name} needs a value", do=f"pass {NEEDED_VALUE[name]}")
        if argument.startswith("-") and name not in options:
            return _unknown_option(name, value or (following if following[:1] != "-" else ""), options)
    if not any(argument.partition("=")[0] == "--config" for argument in arguments):
        for argument in arguments:
            given = argument.removeprefix("config=")
            if given != argument or given.endswith((".yaml", ".yml")):
                return ConfigError(
                    f"command line: {argument}: a configuration is chosen with --config", do=f"--config {given}"
                )
    return None


def _unknown_option(name: str, value: str, options: Sequence[str]) -> ConfigError | None:
    plain = name.lstrip("-").replace("-", "_")
    if plain in CONFIG_ELSEWHERE:
        return ConfigError(f"command line: {name} is not an option", do=f"--config {value or 'NAME'}")
    if plain in OF_THE_LAUNCHERS:
        return ConfigError(
            f"command line: {name} is an option of launchers and goes before the name of the script",
            do="torchrun --nproc-per-node N, deepspeed --num_gpus N or python -m launchers.run: see --help",
        )
    if key := written_here(name, value):
        return ConfigError(f"command line: {name} is not an option; keys are set as key=value", do=key)
    close = difflib.get_close_matches("--" + plain.replace("_", "-"), options, n=1, cutoff=0.7)
    if not close:
        return None
    what = f"command line: {name} is not an option; did you mean {close[0]}?"
    return ConfigError(what, do="see launchers/train.py --help")
