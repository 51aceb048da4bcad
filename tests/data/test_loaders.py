"""The loaders on small .beton files: exact pixels, exact sets, and errors where they could hang."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import types
from numba.core import event as numba_event

from pipeline.data import loaders
from pipeline.data.augment import sample_stream, uniform
from pipeline.data.decoder import IMAGE_MODES, KeyedDecoder
from pipeline.data.ffcv_source import Epoch
from pipeline.data.loaders import EvalLoader, TrainLoader, open_eval_loader, open_train_loader
from pipeline.data.order import stream_key
from pipeline.errors import ConfigError, DataError

HELPER = Path(__file__).with_name("read_as_rank.py")
spec = importlib.util.spec_from_file_location("read_as_rank", HELPER)
assert spec is not None and spec.loader is not None
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)

CPU = torch.device("cpu")
Step = tuple[int, tuple[torch.Tensor, torch.Tensor]]
MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]


class Noise:
    """Images of noise with the sample id as label; ``sides(id)`` returns height and width."""

    def __init__(self, num_samples: int, sides: tuple[int, int]) -> None:
        self.num_samples, self.sides = num_samples, sides

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        random = np.random.default_rng(index)
        height, width = random.integers(self.sides[0], self.sides[1] + 1, 2)
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8), index


def write(path: Path, images: Noise, mode: str) -> Path:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    threads = torch.get_num_threads()
    DatasetWriter(str(path), {"image": RGBImageField(mode), "label": IntField()}, num_workers=1).from_indexed_dataset(
        images
    )
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images with sides of 20 to 40 pixels, about half of them JPEG."""
    return write(tmp_path_factory.mktemp("data") / "photographs.beton", Noise(21, (20, 40)), "proportion")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 raw images of 8x8 pixels."""
    return write(tmp_path_factory.mktemp("data") / "squares.beton", Noise(7, (8, 8)), "raw")


@pytest.fixture(scope="module")
def both(photographs: Path) -> tuple[TrainLoader, EvalLoader]:
    train, evaluation = helper.open_both(helper.data_config(photographs))
    return train, evaluation


@pytest.fixture
def train(both: tuple[TrainLoader, EvalLoader]) -> TrainLoader:
    return both[0]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def pixels_by_sample(loader: TrainLoader, epoch: int) -> dict[int, torch.Tensor]:
    spe = loader.steps_per_epoch
    return {
        int(label): image
        for _, (images, labels) in loader.steps(epoch * spe, (epoch + 1) * spe)
        for image, label in zip(images, labels, strict=True)
    }


def assert_same(ours: list[Step], theirs: list[Step]) -> None:
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    for (_, (images, labels)), (_, (other_images, other_labels)) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_batches_are_what_the_interface_says(train: TrainLoader) -> None:
    assert (train.num_samples, train.steps_per_epoch) == (21, 5)
    step, (images, labels) = next(iter(train.steps(3, 4)))
    assert step == 3
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64
    assert train.seconds_waited > 0


def test_an_epoch_gives_the_same_pixels_again_and_another_epoch_others_without_compiling(train: TrainLoader) -> None:
    first = pixels_by_sample(train, 0)
    with numba_event.install_recorder("numba:compile") as compilations:
        again, next_epoch = pixels_by_sample(train, 0), pixels_by_sample(train, 1)
    assert not compilations.buffer
    assert len(first) == 20
    assert all(torch.equal(first[sample], again[sample]) for sample in first)
    common = first.keys() & next_epoch.keys()
    assert not any(torch.equal(first[sample], next_epoch[sample]) for sample in common)


def test_starting_in_the_middle_of_an_epoch_gives_the_remaining_batches(train: TrainLoader) -> None:
    whole = list(train.steps(0, 12))
    assert_same(list(train.steps(8, 12)), whole[8:])
    assert_same(list(train.steps(5, 5)), [])


def test_recalibration_in_the_middle_of_an_epoch_disturbs_nothing(train: TrainLoader) -> None:
    undisturbed, steps = list(train.steps(0, 5)), train.steps(0, 5)
    seen = [next(steps)]
    micro_batches = list(train.micro_batches(batch=6, num_batches=100, seed=1))
    assert [len(images) for images in micro_batches] == [6, 6, 6]  # 21 // 6
    assert_same(seen + list(steps), undisturbed)
    other_seed = next(train.micro_batches(batch=6, num_batches=1, seed=2))
    assert not torch.equal(micro_batches[0], other_seed)


def test_any_number_of_ranks_and_any_resumption_give_the_same_steps_over_ten_epochs(
    train: TrainLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(train.steps(0, 50))
    for epoch in range(10):
        labels = torch.cat([labels for _, (_, labels) in whole[5 * epoch : 5 * epoch + 5]])
        assert len(labels) == len(labels.unique()) == 20  # of 21 samples: each once, and the incomplete batch left out
    start = int(np.random.default_rng().integers(1, 50))
    assert_same(list(train.steps(start, 50)), whole[start:])
    for world_size in (2, 4):
        monkeypatch.setattr(train, "_world_size", world_size)
        ranks = []
        for rank in range(world_size):
            monkeypatch.setattr(train, "_rank", rank)
            ranks.append(list(train.steps(0, 50)))
        together = []
        for parts in zip(*ranks, strict=True):
            images, labels = (torch.cat(of) for of in zip(*(batch for _, batch in parts), strict=True))
            together.append((parts[0][0], (images, labels)))
        assert_same(together, whole)


def test_images_grow_from_epoch_to_epoch_without_compiling(train: TrainLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = dataclasses.replace(train._data, first_resolution=32, train_resolution=96, ramp_from=1, ramp_until=4)
    monkeypatch.setattr(train, "_data", ramp)
    next(train.steps(0, 1))
    with numba_event.install_recorder("numba:compile") as compilations:
        sides = [next(train.steps(5 * epoch, 5 * epoch + 1))[1][0].shape[2] for epoch in range(6)]
        assert next(train.micro_batches(batch=2, num_batches=1, seed=0)).shape[2:] == (96, 96)
    assert not compilations.buffer
    assert sides == [32, 32, 64, 64, 96, 96]  # 32 + 64 / 3 is 53, 32 + 128 / 3 is 75: multiples of 32


def test_the_order_by_blocks_mixes_the_same_samples_and_reads_ahead(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = helper.data_config(photographs, order="quasi_random")
    loader = open_train_loader(photographs, data, global_batch=4, seed=5, device=CPU, channels_last=True)
    assert loader._blocks is not None
    assert loader._window == 1  # a file of one page
    monkeypatch.setattr(loader, "_blocks", np.arange(21) // 3)
    monkeypatch.setattr(loader, "_window", 2)
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, start, num_bytes, _how: advised.append((start, num_bytes)))
    whole = list(loader.steps(0, 10))
    assert_same(list(loader.steps(3, 10)), whole[3:])
    for first in (0, 5):
        assert len(torch.cat([labels for _, (_, labels) in whole[first : first + 5]]).unique()) == 20
    page = loader._source.page_size  # type: ignore[attr-defined]
    size = 128 << 10  # what Linux reads at once by default
    assert page % size == 0
    assert set(advised) == {
        (page * block + offset, size) for block in loader._source.blocks().tolist() for offset in range(0, page, size)
    }


@pytest.mark.slow
def test_two_ranks_read_what_one_rank_reads(
    both: tuple[TrainLoader, EvalLoader], photographs: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, str(HELPER), str(photographs), str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**common, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(2)]
    alone = helper.read_all(*both)
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (dict(np.load(tmp_path / f"rank{k}.npz")) for k in range(2))

    for name in ("images", "labels"):
        assert np.array_equal(np.concatenate([first[name], second[name]], axis=1), alone[name])
    assert len(np.unique(alone["labels"][:5])) == 20
    assert np.array_equal(first["micro_batches"], alone["micro_batches"][0::2])
    assert np.array_equal(second["micro_batches"], alone["micro_batches"][1::2])
    for name in ("eval_ids", "eval_labels", "eval_images"):
        assert np.array_equal(np.concatenate([first[name], second[name]]), alone[name])
    assert alone["eval_labels"].tolist() == list(range(21))
    assert alone["eval_ids"].tolist() == list(range(21))


def test_two_decoding_threads_give_the_pixels_of_one(train: TrainLoader, photographs: Path) -> None:
    data = helper.data_config(photographs, num_workers=min(2, len(os.sched_getaffinity(0))))
    parallel = open_train_loader(photographs, data, global_batch=4, seed=5, device=CPU, channels_last=False)
    ours, theirs = list(parallel.steps(2, 7)), list(train.steps(2, 7))
    assert ours[0][1][0].is_contiguous()
    assert_same(ours, theirs)


def test_opening_a_loader_leaves_numbas_types_as_they_are(photographs: Path) -> None:
    """ffcv marks one as read-only; code that was compiled with it before is then compiled anew.

    That happened at every call.
    """
    shared = types.uint8[::1]
    open_train_loader(
        photographs, helper.data_config(photographs), global_batch=4, seed=5, device=CPU, channels_last=False
    )
    assert shared.mutable and types.uint8[::1] is shared


def test_opening_a_loader_leaves_ffcvs_classes_as_they_are(photographs: Path) -> None:
    from ffcv.memory_managers import OSCacheManager

    data = helper.data_config(photographs)
    open_train_loader(photographs, data, global_batch=4, seed=5, device=CPU, channels_last=False)
    assert OSCacheManager.compile_reader.__module__ == OSCacheManager.__module__ == "ffcv.memory_managers.os_cache"


@pytest.mark.parametrize("world_size", [1, 3, 10])
def test_evaluation_sees_every_sample_once(
    both: tuple[TrainLoader, EvalLoader], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, evaluation = both
    assert evaluation.num_samples == 21
    seen = []
    monkeypatch.setattr(evaluation, "_world_size", world_size)
    for rank in range(world_size):
        monkeypatch.setattr(evaluation, "_rank", rank)
        # kept without a copy: ffcv's buffers are used again after five batches, and 21 samples are six
        for ids, images, labels in list(evaluation.batches()):
            assert len(ids) == len(images) == len(labels) <= 4
            assert torch.equal(ids, labels)
            seen += ids.tolist()
    assert seen == list(range(21))


def test_equal_sized_images_pass_unchanged_but_for_the_flip(squares: Path) -> None:
    data = helper.data_config(squares, augmentation="none", train_resolution=8, mean=MEAN, std=STD)
    loader = open_train_loader(squares, data, global_batch=7, seed=0, device=CPU, channels_last=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    num_flips = 0
    for epoch in range(20):
        key = np.uint64(stream_key("augmentation", 0, epoch) % 2**64)
        for sample, image in pixels_by_sample(loader, epoch).items():
            pixels, _ = Noise(7, (8, 8))[sample]
            is_flipped = uniform(np.uint64(sample_stream(key, sample)), 0) < 0.5
            expected = pixels[:, ::-1] if is_flipped else pixels
            assert torch.equal(image, (torch.from_numpy(expected.copy()).permute(2, 0, 1) - mean) / std)
            num_flips += is_flipped
    assert 46 <= num_flips <= 94  # 140 fair coins, four standard deviations


def test_some_of_a_set_are_spread_over_it_and_numbered_from_zero(squares: Path) -> None:
    data = helper.data_config(squares, eval_ratio=1.0, eval_resolution=8, mean=[0.0] * 3, std=[1.0] * 3)
    loader = open_eval_loader(squares, data, batch=4, num_images=3, device=CPU, channels_last=True)
    ((ids, images, _),) = loader.batches()
    assert ids.tolist() == [0, 1, 2] and loader.num_samples == 3
    for image, sample in zip(images, (0, 2, 4), strict=True):  # of 7
        assert np.array_equal(image.permute(1, 2, 0).numpy(), Noise(7, (8, 8))[sample][0])


def test_a_subset_is_evenly_spaced_the_same_on_any_number_of_ranks_and_leaves_the_loader_as_it_is(
    both: tuple[TrainLoader, EvalLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = both
    for world_size, num_batches in ((1, 2), (2, 1), (5, 1)):  # of up to four images each
        monkeypatch.setattr(whole, "_world_size", world_size)
        ids, labels = [], []
        for rank in range(world_size):
            monkeypatch.setattr(whole, "_rank", rank)
            part = whole.subset(6)
            assert (part.num_samples, part.num_batches) == (6, num_batches)
            for some_ids, _, some_labels in part.batches():
                ids += some_ids.tolist()
                labels += some_labels.tolist()
        assert ids == [0, 1, 2, 3, 4, 5]
        assert labels == [0, 3, 7, 10, 14, 17]  # 21·i/6, rounded down; the label is the sample
    assert whole.num_samples == 21 and whole.subset(100).num_samples == 21


def test_two_loaders_decode_one_batch_at_a_time(
    both: tuple[TrainLoader, EvalLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because numba's threads of last resort (its layer ``workqueue``) end a process that uses them twice at once."""
    from ffcv.loader.epoch_iterator import EpochIterator

    decode, num_running, most = EpochIterator.run_pipeline, 0, 0

    def watched(*batch: object) -> object:
        nonlocal num_running, most
        num_running += 1
        most = max(most, num_running)
        time.sleep(0.01)
        num_running -= 1
        return decode(*batch)

    monkeypatch.setattr(EpochIterator, "run_pipeline", watched)
    train, evaluation = both
    for _ in train.steps(0, 3):
        assert sum(len(ids) for ids, _, _ in evaluation.batches()) == 21
    assert most == 1


def test_a_set_smaller_than_the_ranks_leaves_some_without_a_batch(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "world_size", lambda: 8)
    data = helper.data_config(squares, eval_ratio=1.0, eval_resolution=8)
    assert (
        list(open_eval_loader(squares, data, batch=4, device=CPU, channels_last=True).batches()) == []
    )  # rank 0 of 8, 7 samples


def test_padding_is_zero_after_normalisation(squares: Path) -> None:
    data = helper.data_config(squares, augmentation="pad_crop_flip", train_resolution=8, mean=MEAN, std=STD, flip=False)
    loader = open_train_loader(squares, data, global_batch=7, seed=0, device=CPU, channels_last=True)
    _, (images, labels) = next(loader.steps(0, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for image, label in zip(images, labels, strict=True):
        original = (torch.from_numpy(Noise(7, (8, 8))[int(label)][0]).permute(2, 0, 1) - mean) / std
        padded = torch.nn.functional.pad(original, (4, 4, 4, 4))
        windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(81, 3, 8, 8)
        assert (windows == image).all(dim=(1, 2, 3)).sum() == 1


def test_threads_of_torch_stay_as_they_were(train: TrainLoader) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in train.steps(0, 6):
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as other_thread:  # new threads take the number set last, by whatever thread
                assert other_thread.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_leaving_early_ends_the_worker(train: TrainLoader) -> None:
    before = threading.active_count()
    for step, _ in train.steps(0, 100):
        assert threading.active_count() == before + 1
        if step == 1:
            break
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        for step, _ in train.steps(0, 100):
            step / 0
    # two of five batches taken, three fill the queue: ffcv's thread waits, without a time-out, to
    # put its end mark behind them
    steps = train.steps(0, 5)
    next(steps), next(steps)
    time.sleep(0.3)
    del steps
    assert threading.active_count() == before


def test_a_worker_that_dies_is_an_error(train: TrainLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    next(train.steps(0, 1))
    run_pipeline = Epoch.run_pipeline

    def fail_at_second_batch(self: Epoch, index: int, *rest: object) -> object:
        if index == 1:
            raise OSError("input/output error")
        return run_pipeline(self, index, *rest)

    monkeypatch.setattr(Epoch, "run_pipeline", fail_at_second_batch)
    steps, started = train.steps(5, 10), time.monotonic()
    next(steps)
    with pytest.raises(
        DataError,
        match=r"photographs\.beton: epoch 1, batch 1: the worker thread died: OSError\('input/output error'\)",
    ):
        next(steps)
    assert time.monotonic() - started < 5


def test_a_batch_that_never_comes_is_an_error_in_time(train: TrainLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    next(train.steps(0, 1))
    release, run_pipeline = threading.Event(), Epoch.run_pipeline

    def wait_at_second_batch(self: Epoch, index: int, *rest: object) -> object:
        if index == 1:
            release.wait(30)
        return run_pipeline(self, index, *rest)

    monkeypatch.setattr(Epoch, "run_pipeline", wait_at_second_batch)
    monkeypatch.setattr(train._source, "timeout_seconds", 2.0)  # of the first batch, too
    steps, before = train.steps(2, 5), threading.active_count()
    next(steps)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"epoch 0, batch 3: no batch came within 2 seconds"):
        next(steps)
    assert time.monotonic() - started < 6
    release.set()  # a late worker is not waited for, but ends by itself
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_damaged_jpeg_is_an_error_that_names_the_sample(tmp_path: Path) -> None:
    from ffcv.reader import Reader

    path = write(tmp_path / "damaged.beton", Noise(3, (24, 24)), "jpg")
    start = int(Reader(str(path)).metadata["f0"]["data_ptr"][1])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(64))
    loader = open_eval_loader(path, helper.data_config(path), batch=3, device=CPU, channels_last=True)
    with pytest.raises(DataError, match=r"damaged\.beton: evaluation, batch 0: the JPEG of sample 1 cannot be decoded"):
        list(loader.batches())


def test_what_cannot_work_is_refused(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_with(path: Path, global_batch: int = 4, **changes: object) -> None:
        data = helper.data_config(path, **changes)
        open_train_loader(path, data, global_batch=global_batch, seed=0, device=CPU, channels_last=True)

    with pytest.raises(DataError, match="no such file"):
        open_with(tmp_path / "nothing.beton")
    with pytest.raises(
        DataError,
        match=r"squares\.beton: data\.augmentation=pad_crop_flip: expected images with sides of 16 pixels, got 8 to 8",
    ):
        open_with(squares, augmentation="pad_crop_flip")
    with pytest.raises(ConfigError, match="7 samples, fewer than one global batch of 8"):
        open_with(squares, global_batch=8)
    monkeypatch.setattr(loaders, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="is not divisible by the number of ranks, 3"):
        open_with(squares)


def test_our_decoder_takes_the_place_of_ffcvs() -> None:
    from ffcv.fields import RGBImageField

    assert issubclass(KeyedDecoder, RGBImageField().get_decoder_class())


def test_importing_ffcv_compiles_nothing() -> None:
    """As a numba.typed.Dict, this table alone would cost every process 6 seconds."""
    assert type(IMAGE_MODES) is dict
