"""152 bad configurations: overrides, files, command lines, environment variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.campaigns.cases import CONFIG, DATA, WRITE, Case, Good

OVERRIDES = (
    ("sparsity.densty=0.2", "unknown key 'sparsity.densty'; did you mean 'sparsity.density'?"),
    ("densty=0.2", "did you mean 'sparsity.density'?"),
    ("sparsity.density=0", "expected a number > 0 and <= 1, got 0.0"),
    ("sparsity.density=1.5", "expected a number > 0 and <= 1, got 1.5"),
    ("sparsity.density=nan", "expected a finite number, got 'nan'"),
    ("sparsity.density=-inf", "expected a finite number"),
    ("sparsity.density=", "expected a finite number, got ''"),
    ("sparsity.density=1e-400", "is too small and would be rounded to 0"),
    ("sparsity.density=[0.1]", "expected a finite number, got a list"),
    (
        "train.global_batch=0x10",
        "expected a whole number written in digits 0–9 without leading zeros, such as 1000, got '0x10'",
    ),
    (
        "train.global_batch=010",
        "expected a whole number written in digits 0–9 without leading zeros, such as 1000, got '010'",
    ),
    ("train.global_batch=-8", "expected a whole number > 0, got -8"),
    ("train.global_batch=1e3", "expected a whole number written in digits 0–9"),
    ("train.global_batch=１２８", "expected a whole number written in digits 0–9"),
    ("train.global_batch=99999999999999999999", "'99999999999999999999' is too large; do: correct it"),
    ("train.global_batch=1000000", "is larger than the training set (12 samples)"),
    ("train.accumulation=7", "train.accumulation: expected a divisor of train.global_batch"),
    ("train.channels_last=on", "expected true or false, got 'on'"),
    ("train.engine=horovod", "not one of deepspeed, torch, ddp"),
    ("train.zero_stage=3", "partitions the gradients among the ranks"),
    ("train={optimizer: muon, zero_stage: 1}", "in flat pieces, but train.optimizer 'muon' needs"),
    ("train.precision=fp16", "not one of fp32, bf16"),
    ("train.device=gpu", "train.device: 'gpu' is not one of auto, cuda, cpu"),
    ("train.tf32=true", "not one of none, convolutions, all"),
    ("train={device: cpu, backend: nccl}", "train.backend: 'nccl' needs GPUs, but train.device is 'cpu'; use auto"),
    ("train.momentum=1", "expected a number from 0 to 0.999999, got 1.0"),
    ("train.betas=[0.9]", "expected two numbers, each >= 0 and < 1, got [0.9]"),
    ("train.profile=[30, 20]", "expected two steps of which the second is larger, such as [20, 30], got [30, 20]"),
    ("tracking.uri=http://me:hunter2secret/#@host:5000", "expected http://USER:PASSWORD@HOST:PORT, with"),
    ("train.collective_timeout_seconds=-1", "expected a number > 0, got -1.0"),
    ("train.deepspeed={zero_optimization: {stage: 3}}", "cannot be set; remove it, and set train.zero_stage instead"),
    ("model.name=resnet5O", "choose a name such as resnet50"),
    ("model.name=../../etc/passwd", "is not a model"),
    ("model.num_classes=1", "expected 0 (taken from the data set) or at least 2, got 1"),
    ("model.num_classes=2", "has 3 classes, but model.num_classes is 2"),
    ("model.args=[1, 2]", "expected a mapping (key: value pairs), got a list"),
    ("model.args={width: .nan}", "is not a finite number"),
    ("model.args={api_key: hunter2secret}", "which would appear in every record of the run; remove it"),
    ("model.args={width: *w}", "uses a YAML alias (*w), which is not supported"),
    ("model.args={1: 2}", "model.args: keys must be text; write '1' instead of 1"),
    ("data.mean=[1, 2]", "expected three numbers, one per colour channel, got [1.0, 2.0]"),
    ("data.std=[1, 1, 0]", "expected three positive numbers, one per colour channel, got [1.0, 1.0, 0.0]"),
    ("data.eval_ratio=2", "expected a number > 0 and <= 1, got 2.0"),
    ("data.eval_resize=bilinear", "not one of area, torchvision"),
    ("data.num_workers=100000", "expected a whole number > 0 and <= 1024, got 100000"),
    ("data.augmentation=randaugment", "not one of random_resized_crop"),
    ("sparsity.method=rigel", "did you mean 'rigl'?"),
    ("sparsity.regrown=zeros", "did you mean 'zero'?"),
    ("sparsity.structure=3:2", "would keep 3 of every 2 weights"),
    ("sparsity.min_salient=0.3", "lets outputs die, which structure 'none' does not support; use structure 'fan_in'"),
    ("sparsity.dense_layers=fc", "expected a list, got 'fc'; write [fc]"),
    ("plan.timetable=lottery", "not one of dense"),
    ("plan.exploration.length=90", "expected a number and a unit, such as '4000 steps'"),
    ("evaluation.every=often", "evaluation.every: expected 'never', or a number and a unit, such as '4000 steps'"),
    ("evaluation.every=0 epochs", "evaluation.every: expected more than 0"),
    ("evaluation.every_images=-1", "evaluation.every_images: expected a whole number >= 0, got -1"),
    ("plan.exploration.length=0 epochs", "expected more than 0, got '0 epochs'"),
    (
        "plan.exploration.length=999999999999999 epochs",
        "expected at most 1,000,000,000,000 epochs, got '999999999999999 epochs'",
    ),
    (
        "plan.exploration.length=100000000 epochs",
        "expected at most 100,000,000 steps, got '100000000 epochs', which is 300,000,000 steps",
    ),
    ("plan.exploration.update_interval=nan steps", "expected a number and a unit"),
    ("plan.refinement=null", "plan.refinement: is null, but plan.timetable"),
    ("plan.exploration.lr.milestones=[30]", "expected every entry to be a number and a unit"),
    ("plan.exploration=3", "expected a mapping (key: value pairs), got '3'"),
    ("name=../escape", "starting with a letter or digit, got '../escape'"),
    ("seed=-1", "expected a whole number from 0 to 9223372036854775807, got -1"),
    ("seed={a: 1}", "expected a whole number, got a mapping (key: value pairs)"),
    (
        "seed=[1",
        "override 'seed=[1': is not valid YAML: expected ',' or ']', but the text ends; do: correct the override",
    ),
    ("checkpoint.every=5", "expected a number and a unit"),
    ("tracking.password=hunter2secret", "override 'tracking.password=[redacted]': unknown key 'tracking.password'"),
    ("model.args=null", "expected a mapping (key: value pairs), got 'null'; write {} to clear it"),
    ("output_dir=${HOME}/runs", "${HOME} is not a key (variables are not expanded); write the value"),
    ("output_dir=$SCRATCH/${name}", "output_dir: contains $SCRATCH, but variables are not expanded"),
    ("tickets.copy_to=s3://$BUCKET/tickets", "tickets.copy_to: contains $BUCKET, but variables are not expanded"),
    ("output_dir=${oc.env:HOME}", "would copy the environment"),
    ("output_dir=${output_dir}", "refers to itself"),
    ("name=${nope}", "${nope} refers to a key that does not exist"),
    ("seed", "command line: expected key=value, got 'seed'"),
)
# Of the right type, possible, and nothing that a run can work with.
UNWORKABLE_OVERRIDES = (
    ("data.mean=[0.485, 0.456, 0.406]", CONFIG, "write [123.675, 116.28, 103.53]"),
    ("data.std=[0.229, 0.224, 0.225]", CONFIG, "write [58.395, 57.12, 57.375]"),
    ("model.num_classes=1000", DATA, "has 3 classes, but model.num_classes is 1000; do: set model.num_classes=3"),
    ("model.args.widht=16", CONFIG, "is not an argument of cifar_resnet8; did you mean 'width'?"),
    ("model.args.width=0.5", CONFIG, "model.args.width: expected a whole number of at least 1, got 0.5"),
    ("plan.refinement.opening_drop=null", CONFIG, "all tickets would have the same mask"),
    ("plan.refinement.length=4 samples", CONFIG, "all tickets would have the same mask"),
    ("plan.timetable=itop", CONFIG, "there is no topology update in the run's 12 steps"),
    ("evaluation.recalibration_batch=13", CONFIG, "13 is larger than the training set (12 samples), with which"),
    ("output_dir=$HOME/runs", CONFIG, "output_dir: contains $HOME, but variables are not expanded; write the value"),
    ("data.stage=~nobody-here/fast", CONFIG, "data.stage: the home folder ~nobody-here is not known; write the whole"),
    ("tracking.uri=sqlite:///~/mlflow.db", CONFIG, "tracking.uri: contains ~, which is not expanded in a URL; write"),
    ("tracking.uri=mlruns", CONFIG, "tracking.uri: expected a URI, got 'mlruns'; write http://HOST:PORT"),
    ("tracking.uri=sqlite:mlflow.db", CONFIG, "sqlite:////path/mlflow.db for a file"),
    ("tracking.uri=localhost:5000", CONFIG, "got 'localhost:5000'; did you mean 'http://localhost:5000'?"),
    ("tracking.uri=me:hunter2secret@host:5000", CONFIG, "tracking.uri: has no scheme; write http://HOST:PORT (or"),
)


def _file(content: str | bytes) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        whole = content.encode() if isinstance(content, str) else content
        (folder / "bad.yaml").write_bytes(whole.replace(b"GOOD", str(good.config).encode()))
        return good.train("--config", str(folder / "bad.yaml"))

    return make


def _fifo(good: Good, folder: Path) -> list[str]:
    os.mkfifo(folder / "fifo")
    (folder / "bad.yaml").write_text("base: fifo\n")
    return good.train("--config", str(folder / "bad.yaml"))


def _loop(good: Good, folder: Path) -> list[str]:
    for one, other in ("ab", "ba"):
        (folder / f"{one}.yaml").write_text(f"base: {other}.yaml\n")
    return good.train("--config", str(folder / "a.yaml"))


def _tower(good: Good, folder: Path) -> list[str]:
    for level in range(40):
        (folder / f"{level}.yaml").write_text(f"base: {level + 1}.yaml\n")
    return good.train("--config", str(folder / "0.yaml"))


def _in_a_file(good: Good, folder: Path) -> list[str]:
    (folder / "file").touch()
    return good.train(f"output_dir={folder}/file/run")


BOMB = "base: GOOD\nmodel:\n  args:\n    a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"    {name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
FILES: tuple[tuple[str, str, Callable[[Good, Path], list[str]]], ...] = (
    ("an empty file", "is required", _file("")),
    ("a list", "expected a mapping (key: value pairs), got a list", _file("- a\n- b\n")),
    ("binary", "is not valid YAML", _file(b"PK\x03\x04" + bytes(range(32)) * 9)),
    ("latin-1", "is not UTF-8 text (byte 0xe9 at position 9)", _file("name: café\n".encode("latin-1"))),
    (
        "a tab",
        "bad.yaml:2: is not valid YAML: a tab is used where only spaces are allowed",
        _file("train:\n\tglobal_batch: 4\n"),
    ),
    ("a key twice", "is set twice; remove one of the two", _file("base: GOOD\nseed: 1\nseed: 2\n")),
    ("deep nesting", "nested too deeply", _file("name: " + "[" * 20000)),
    ("billion laughs", "uses a YAML alias (*a)", _file(BOMB)),
    ("a list that holds itself", "uses a YAML alias (*a)", _file("base: GOOD\nmodel: {args: {a: &a [*a]}}\n")),
    (
        "a megabyte",
        "is larger than 131072 bytes; do: pass the YAML file of a configuration",
        _file("name: " + "x" * (1 << 20)),
    ),
    ("5000 unknown keys", "and 4980 more", _file("base: GOOD\n" + "".join(f"densty{i}: 1\n" for i in range(5000)))),
    ("python object", "unknown key", _file("base: GOOD\nx: !!python/object/apply:os.system [id]\n")),
    (
        "python object in args",
        "the tag !!python/name:os.system is not supported",
        _file("base: GOOD\nmodel: {args: {x: !!python/name:os.system }}\n"),
    ),
    (
        "a date",
        "model.args.x: a date is not supported; put it in quotes",
        _file("base: GOOD\nmodel: {args: {x: 2020-01-01}}\n"),
    ),
    ("terminal escape in a key", "\\x1b[2J", _file('base: GOOD\n"\\e[2Jdensty": 1\n')),
    ("base is missing", "base: nowhere.yaml: not found in", _file("base: nowhere.yaml\n")),
    ("base is a list", "base: expected one file name, got a list; do: write base: NAME.yaml", _file("base: [GOOD]\n")),
    ("base is a FIFO", "fifo: is not a regular file; do: pass the YAML file", _fifo),
    ("base leads back", "lines form a loop: a.yaml → b.yaml → a.yaml", _loop),
    ("40 bases", "the chain of base: files is longer than 16", _tower),
    ("a device", "/dev/zero: is not a regular file", lambda good, _: good.train("--config", "/dev/zero")),
    ("a folder", "is not a regular file", lambda good, folder: good.train("--config", str(folder))),
    ("a long name", "not found in", lambda good, _: good.train("--config", "x" * 1000)),
    ("a wrong name", "imagenet_r50_s90.yaml", lambda good, _: good.train("--config", "imagenet_r50_s9")),
    ("an unknown option", "command line", lambda good, _: good.train("--rseume", "auto")),
    ("a variable in an option", "--resume: contains $RUN, but", lambda good, _: good.train("--resume", "$RUN/a")),
    ("a variable in a data set", "contains $(, but", lambda good, _: good.prepare("verify", "$(pwd)/train.beton")),
    ("no value", "command line", lambda good, _: good.train("--resume")),
)
RANK_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
ENVIRONMENT = (
    ({"RANK": "abc"}, "RANK='abc' is not a whole number"),
    ({"RANK": "2"}, "RANK=2 is out of range for WORLD_SIZE=2, expected 0 to 1"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
    ({"LOCAL_RANK": "1e9"}, "LOCAL_RANK='1e9'"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ({"MASTER_ADDR": "a b"}, "MASTER_ADDR='a b' is not a host name"),
    ({"MASTER_ADDR": ""}, "is not a host name"),
    ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR='nowhere.invalid' does not resolve on this host"),
    ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many'"),
    ({"OMP_NUM_THREADS": "1000000000"}, "OMP_NUM_THREADS='1000000000'"),
    ({"GLOO_SOCKET_IFNAME": "eth77"}, "is not a network interface of this machine"),
    ({"TICKETWORKS_EXIT_DIR": "/nowhere"}, "is not a folder"),
)
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
LAUNCHED = (
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
    (SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE='4', but srun has started this process as rank 0 of 2"),
    (SRUN | {"SLURM_PROCID": "2"}, "SLURM_PROCID='2' is not a whole number from 0 to 1"),
    (SRUN | {"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, "SLURM_STEP_TASKS_PER_NODE='' is not a list of 2 tasks with"),
    (
        SRUN | {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
        "srun started 2 tasks on several hosts, but does not say on which of them rank 0 is",
    ),
    (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR is not set; do: mpirun -x MASTER_ADDR=HOST …"),
    ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "LOCAL_WORLD_SIZE or MPI_LOCALNRANKS or PMI_LOCAL_SIZE is not set"),
)

SELECTIONS = (
    (("tickets.select=first",), CONFIG, "not one of last, best, both"),
    (("tickets.select=best",), CONFIG, "chooses by accuracy on held-out images; set evaluation.held_out"),
    (("tickets.select=best", "evaluation.held_out=DATA", "evaluation.every=never"), CONFIG, "set evaluation.every"),
    (
        ("tickets.select=both", "evaluation.held_out=DATA"),
        DATA,
        "is also data.val, but tickets must be chosen on other images",
    ),
    (
        ("tickets.weights=average",),
        CONFIG,
        "'average' needs a moving average of weights; set train.ema_decay, for example to 0.999",
    ),
    (("train.ema_decay=1",), CONFIG, "expected a number from 0 to 0.999999, got 1.0"),
)

VIT = ("model.args={}", "model.name=timm/vit_tiny_patch16_224", "model.args.img_size=32", "data.train_resolution=32")
SHAPES = (
    ((*VIT, "data.eval_resolution=48"), CONFIG, "data.eval_resolution: timm/vit_tiny_patch16_224 does not run on"),
    (("data.train_resolution=4", "train.accumulation=4"), CONFIG, "(ranks × train.accumulation) give a micro"),
    (
        ("model.args={}", "model.name=googlenet", "model.args.aux_logits=true"),
        CONFIG,
        "set model.args.aux_logits=false",
    ),
)


def _with_data(good: Good, texts: tuple[str, ...]) -> list[str]:
    return good.train(*(text.replace("DATA", str(good.beton)) for text in texts))


def _preflight(*arguments: str) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, _: Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "launchers.preflight",
            *(text.replace("GOOD", str(good.config)) for text in arguments),
        ]

    return make


PREFLIGHT = (  # what ends it before the first of its other lines
    (("--", "launchers/evaluate.py"), "expected launchers/train.py and its arguments after --"),
    (
        ("--nproc-per-node", "3", "--", "launchers/train.py", "--config", "GOOD"),
        "configuration: train.global_batch: 4 samples cannot be divided evenly among 3 ranks",
    ),
)

CASES = [
    *(
        Case(
            "configuration",
            text,
            DATA if "has 3 classes" in says else CONFIG,
            says,
            lambda good, _, text=text: good.train(text),
        )
        for text, says in OVERRIDES
    ),  # type: ignore[misc]
    *(Case("configuration", name, CONFIG, says, make) for name, says, make in FILES),
    *(
        Case(
            "configuration",
            " ".join(map("=".join, changed.items())),
            CONFIG,
            says,
            lambda good, _: good.train(),
            environ,
        )
        for changed, says, environ in (
            *((changed, says, RANK_OF_TWO | changed) for changed, says in ENVIRONMENT),
            *((changed, says, changed) for changed, says in LAUNCHED),
        )
    ),
    *(
        Case("configuration", " ".join(texts), code, says, lambda good, _, texts=texts: _with_data(good, texts))
        for texts, code, says in (*SELECTIONS, *SHAPES)
    ),
    Case(
        "configuration",
        "output_dir is below a file",
        WRITE,
        "is not a folder; do: choose another output_dir",
        _in_a_file,
    ),
]
UNWORKABLE = [
    Case("configuration", text, code, says, lambda good, _, text=text: good.train(text))
    for text, code, says in UNWORKABLE_OVERRIDES
]
BEFORE_A_RUN = [
    Case("configuration", f"preflight {' '.join(arguments)}", CONFIG, says, _preflight(*arguments))
    for arguments, says in PREFLIGHT
]
