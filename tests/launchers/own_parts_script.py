"""The stock commands one after the other, in one process that has the example package; prints their exit codes."""

from __future__ import annotations

import sys

from launchers import evaluate_cli, train_cli
from launchers.evaluate import evaluate
from launchers.train import train
from pipeline.inference import load_ticket
from pipeline.tickets.__main__ import main as tickets

config, data = sys.argv[1:]
common = ["--config", config, f"data.train={data}/train", f"data.val={data}/val", "data.num_workers=1"]


def main() -> None:
    codes = [
        train_cli.main(train, [*common, "output_dir=whole"]),
        train_cli.main(train, [*common, "output_dir=parts", "--stop-after", "5"]),
        train_cli.main(train, [*common, "output_dir=parts", "--resume", "auto"]),
        evaluate_cli.main(
            evaluate, ["--tickets", "whole", "--data", f"{data}/val", "--output", "judged", "--imports", "own_parts"]
        ),
        tickets(["export", "whole", "--output", "whole.safetensors", "--imports", "own_parts"]),
    ]
    network = load_ticket("whole", imports=["own_parts"])
    print("CODES", codes, type(network.network).__name__, network.provenance.origin)


if __name__ == "__main__":
    main()
