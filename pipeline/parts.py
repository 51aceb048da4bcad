"""Packages with parts of one's own: models, growth rules, methods, … that are registered when they are imported.

Only a caller names what is imported: ``imports`` of a configuration that is trained with, ``--imports``
of a command, or an argument. What a ticket, a checkpoint or a bundle says it needs is compared with that,
and never imported.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from pipeline.errors import ConfigError

MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
GROUP = "ticketworks"  # of entry points, whose names stand for modules
IMPORTS = "imports"  # entry of a ticket's ``origin``

_imported: dict[str, str] = {}  # by name as it was given: version of its distribution


def import_parts(names: Iterable[str], *, setting: str = "imports") -> None:
    """Import packages that a caller names, each once.

    Args:
        names: of modules, such as ``my_package``, or of entry points of the group ``ticketworks``.
        setting: what names them, for errors.

    Raises:
        ConfigError: a name is not that of a module, or importing it fails.
    """
    for name in names:
        if name in _imported:
            continue
        if not MODULE.fullmatch(name):
            raise ConfigError(
                f"{setting}: {name[:80]!r} is not the name of a module", do="write it as my_package.parts"
            )
        found = next(iter(metadata.entry_points(group=GROUP, name=name)), None)
        module = name if found is None else found.module
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = f"{name} is not installed" if (error.name or "") in module else f"{name} needs {error.name}"
            raise ConfigError(
                f"{setting}: {missing}", do="install it (python -m pip install …), or set PYTHONPATH to its folder"
            ) from error
        except Exception as error:  # the package's own code, which may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise ConfigError(f"{setting}: {name} cannot be imported: {reason}", do="correct the package") from error
        _imported[name] = _version(module)


def imported() -> dict[str, str]:
    """Return the packages that callers have named so far, with their versions, for a record."""
    return dict(_imported)


def is_named(module: str) -> bool:
    """Return whether a caller has named this module or a package that it is in."""
    return any(f"{module}.".startswith(f"{name}.") for name in _imported)


def missing_of(origin: Mapping[str, Any]) -> str:
    """Return which packages a file says that it needs and no caller has named; empty if there is none."""
    stated = origin.get(IMPORTS)
    needed = [str(name)[:80] for name in stated] if isinstance(stated, dict) else []
    return ", ".join(name for name in needed if name not in _imported)


def _version(module: str) -> str:
    top = module.partition(".")[0]
    names = metadata.packages_distributions().get(top, [])
    return metadata.version(names[0]) if names else str(getattr(importlib.import_module(top), "__version__", ""))
