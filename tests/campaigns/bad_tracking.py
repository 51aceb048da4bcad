"""16 places for records that MLflow cannot open, found without connecting: addresses, drivers, paths, variables."""

from __future__ import annotations

import sys

from tests.campaigns.cases import CONFIG, Case

ADDRESSES = (
    ("postgresql+psycopg2://me:hunter2secret@host/mlflow", "the driver psycopg2 is not installed"),
    ("mysql://host/mlflow", "do: pip install mysqlclient, or name another driver as mysql+DRIVER://"),
    (
        "mssql+nothing://host/mlflow",
        "no driver 'nothing' is installed for mssql; do: install it, or name another as mssql+",
    ),
    ("postgresql://host:port/mlflow", "the port 'port' is not a number; do: write postgresql://HOST:5432/NAME"),
    ("mongodb://host/mlflow", "MLflow has no store for mongodb://"),
    ("postgres://host/mlflow", "do: write postgresql://"),
    ("file:///mnt/mlruns", "MLflow no longer opens a file store (a folder"),
    ("sqlite:////dev/null", "/dev/null is not a regular file; do: name a file"),
    ("sqlite:////etc/hosts/mlflow.db", "tracking.uri=sqlite:////etc/hosts/mlflow.db: /etc/hosts: is not a folder"),
    (f"sqlite:////tmp/{'x' * 300}", "File name too long"),
)
VARIABLES = (
    ({"MLFLOW_TRACKING_URI": "mlruns"}, "MLFLOW_TRACKING_URI: expected a URI, got 'mlruns'"),
    ({"MLFLOW_TRACKING_URI": "http://:5000"}, "MLFLOW_TRACKING_URI: has no host name; expected http://HOST:PORT or"),
    ({"MLFLOW_TRACKING_URI": "sqlite:///:memory:"}, "an in-memory database is lost when the run ends"),
    ({"MLFLOW_TRACKING_URI": "oracle://me:hunter2secret@host/db"}, "MLflow has no store for oracle://"),
    ({"MLFLOW_RUN_ID": "a' OR 1"}, "MLFLOW_RUN_ID=a' OR 1: is not a valid MLflow run ID; expected 1 to 128"),
)
CASES = [
    *(
        Case(
            "tracking",
            uri,
            CONFIG,
            says,
            lambda good, _, uri=uri: good.train("tracking.backend=mlflow", f"tracking.uri={uri}"),
        )
        for uri, says in ADDRESSES
    ),  # type: ignore[misc]
    *(
        Case(
            "tracking",
            " ".join(map("=".join, set_.items())),
            CONFIG,
            says,
            lambda good, _: good.train("tracking.backend=mlflow"),
            set_,
        )
        for set_, says in VARIABLES
    ),
    Case(
        "tracking",
        "a variable in --uri",
        CONFIG,
        "argument --uri: contains $HOST, but variables are not expanded",
        lambda good, _: [sys.executable, "-m", "pipeline.tracking", "replay", str(good.root), "--uri", "http://$HOST"],
    ),
]
EACH_REFUSAL = [CASES[index] for index in (0, 2, 4, 6, 7, 10, 14)]  # one input of each, for CI
