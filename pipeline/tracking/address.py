"""Addresses of MLflow stores: SQLite files as URIs, and whether MLflow can open an address, without connecting."""

from __future__ import annotations

import importlib
import os
import re
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.errors import ConfigError, RunError
from pipeline.files import require_writable
from pipeline.redaction import redact

SERVERS = ("http", "https", "databricks")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SIMILAR = {"postgres": "postgresql", "sqlite3": "sqlite", "mariadb": "mysql"}
_SPECIAL = "%?#"  # what a path may contain and a URI gives a meaning
FILE_STORES = "MLFLOW_ALLOW_FILE_STORE"


def sqlite_uri(database: Path) -> str:
    """Return the URI of a SQLite file, with its absolute path.

    Raises:
        ConfigError: the path contains a ``?``, and the installed SQLAlchemy cannot express it.
    """
    path = str(database.resolve())
    if any(each in path for each in _SPECIAL):
        if _is_decoded():
            path = re.sub(f"[{_SPECIAL}]", lambda found: quote(found[0]), path)
        elif "?" in path:
            raise ConfigError(
                f"{database}: the installed SQLAlchemy cannot open a path with a question mark",
                do="install sqlalchemy 2.1 or newer, choose another output_dir, or set tracking.uri",
            )
    return f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """Return the path of the SQLite file that ``uri`` names; None if it does not name one."""
    scheme, _, rest = uri.partition(":///")
    name = rest.partition("?")[0]
    if scheme.partition("+")[0] != "sqlite" or not name or name.startswith((":memory:", "file:")):
        return None
    return Path(unquote(name) if "%" in name and _is_decoded() else name)


def with_absolute_path(uri: str) -> str:
    """Return ``uri`` with an absolute path if it names a SQLite file; MLflow would look in the current folder."""
    database = sqlite_path(uri)
    if database is None or database.is_absolute():
        return uri
    _, separator, query = uri.partition("?")
    return sqlite_uri(database) + separator + query


def _is_decoded() -> bool:
    """Return whether SQLAlchemy reads ``%3F`` in the path of a database as a question mark: from 2.1 on."""
    return tuple(map(int, metadata.version("sqlalchemy").split(".")[:2])) >= (2, 1)


def check_address(uri: str, *, setting: str) -> None:
    """Check scheme, driver and path of a store, without connecting and without importing mlflow.

    Args:
        uri: a URI.
        setting: the key or variable that holds it, for the error.

    Raises:
        ConfigError: MLflow cannot open such an address on this machine.
    """
    shown = f"{setting}={redact(uri)}"
    scheme = uri.partition(":")[0].lower()
    kind = scheme.partition("+")[0]
    if kind == "sqlite":
        _check_sqlite(uri, shown, setting)
    if kind in DATABASES:
        _check_driver(uri, shown)
    elif kind == "file":
        if os.environ.get(FILE_STORES, "").lower() not in ("true", "1"):
            raise ConfigError(
                f"{shown}: MLflow no longer opens a file store (a folder of files) by default",
                do=f"write sqlite:////path/mlflow.db, or set {FILE_STORES}=true",
            )
    elif kind not in SERVERS and kind not in _plugins():
        similar = _SIMILAR.get(kind)
        raise ConfigError(
            f"{shown}: MLflow has no store for {kind}://",
            do=f"write {similar}://…"
            if similar
            else f"use one of {', '.join((*SERVERS, *DATABASES))}, or install the plugin that provides it",
        )


def _plugins() -> set[str]:
    """Return the schemes that installed packages add to MLflow."""
    return {entry.name for entry in metadata.entry_points(group="mlflow.tracking_store")}


def _check_driver(uri: str, shown: str) -> None:
    """Import the driver of a database as SQLAlchemy would."""
    sqlalchemy = importlib.import_module("sqlalchemy")
    try:
        dialect = sqlalchemy.make_url(uri).get_dialect()
    except sqlalchemy.exc.NoSuchModuleError:
        kind, _, driver = uri.partition("://")[0].partition("+")
        raise ConfigError(
            f"{shown}: no driver '{driver}' is installed for {kind}",
            do=f"install it, or name another as {kind}+DRIVER://…",
        ) from None
    except ValueError:  # of int(); what is taken for the port may be part of a password if there is an @
        found = None if "@" in uri else re.search(r":(\w*[^\W\d]\w*)(?:/|$)", uri.partition("://")[2])
        kind = uri.partition(":")[0].partition("+")[0]
        raise ConfigError(
            f"{shown}: the port {found[1]!r} is not a number" if found else f"{shown}: the port is not a number",
            do=f"write {kind}://HOST:{_PORTS.get(kind, 'PORT')}/NAME",
        ) from None
    except Exception as error:
        raise ConfigError(
            f"{shown}: is not an address of a database: {error}", do="write DATABASE://HOST/NAME"
        ) from None
    try:
        dialect.import_dbapi()
    except ImportError as error:
        package = error.name or dialect.driver
        raise ConfigError(
            f"{shown}: the driver {dialect.driver} is not installed: {error}",
            do=f"pip install {_PACKAGES.get(package, package)}, or name another driver as {dialect.name}+DRIVER://…",
        ) from None


_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PACKAGES = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'"}


def _check_sqlite(uri: str, shown: str, setting: str) -> None:
    if ":memory:" in uri or uri.partition("://")[2] in ("", "/"):
        raise ConfigError(
            f"{shown}: an in-memory database is lost when the run ends", do="write sqlite:////path/mlflow.db"
        )
    database = sqlite_path(uri)
    if database is None:
        return
    try:
        if database.exists() and not database.is_file():
            raise ConfigError(f"{shown}: {database} is not a regular file", do="name a file: sqlite:////path/mlflow.db")
        require_writable(database.parent, setting=setting)
        if database.exists() and not os.access(database, os.W_OK):
            raise ConfigError(f"{shown}: this user may not write to {database}", do=f"choose another {setting}")
    except ConfigError:
        raise
    except RunError as error:
        raise ConfigError(f"{shown}: {error.what}", do=f"choose another {setting}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: {error.strerror}", do=f"choose another {setting}") from None
