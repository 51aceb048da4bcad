"""Part ``evaluation``: recalibration, predictions, scores and attacks on the device are those of the CPU."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import loop
from benchmarks.gpu.feed import Images, eval_loader_of, loader_of
from benchmarks.gpu.loop import Trainer, on_device
from benchmarks.gpu.report import Options, Report
from pipeline.evaluation.attacks import Attack
from pipeline.evaluation.batchnorm import recalibrate
from pipeline.evaluation.predict import Networks, predict
from pipeline.evaluation.score import score

LARGEST = 1e-4  # difference of a probability
NUM_IMAGES = 300


def evaluation(given: Options, report: Report) -> None:
    """Evaluate one trained network on the CPU and on the device, without TF32."""
    with on_device(given, tf32="none", is_deterministic=True):
        ours = Trainer(loop.small_network(), num_images=64)
        for _, batch in loader_of(Images.made(NUM_IMAGES, 32), num_images=64).steps(0, 20):
            ours.step(*batch)
        state = ours.engine.model.state_dict()
        expected, found = (evaluated(state, torch.device(each)) for each in ("cpu", given.device))
    for key in ("statistics", "probabilities"):
        error = float((expected[key] - found[key]).abs().max() / max(1.0, float(expected[key].abs().max())))
        text = f"largest difference from the CPU {error:.1e}"
        report.check(f"{key} of an evaluation", error <= LARGEST, text, f"≤ {LARGEST:g}", error=error)
    is_equal = abs(expected["top1"] - found["top1"]) <= 1 / NUM_IMAGES
    text = f"{found['top1']:.4f}, on the CPU {expected['top1']:.4f}"
    report.check("top-1 of an evaluation", is_equal, text, "equal but for one image")
    # the sign of a gradient near zero may differ, and with it single pixels by twice the attack's step
    share = float((expected["attacked"] != found["attacked"]).double().mean())
    text = f"{share:.1%} of attacked images get another class than on the CPU"
    report.check("attacks", share <= 0.02, text, "≤ 2%", share=share)


def evaluated(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Recalibrate, score, predict and attack on a device."""
    network = loop.small_network()
    network.load_state_dict(state)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = Images.made(NUM_IMAGES, 32)
    recalibrate(network, loader_of(source, num_images=64, device=device).micro_batches(batch=50, num_batches=8, seed=1))
    networks = Networks([network])
    top1 = score(networks, eval_loader_of(source, batch=64, device=device), num_classes=10)[0].top1
    pixels = (127.0,) * 3, (60.0,) * 3  # mean and standard deviation
    attack = Attack.of(*pixels, epsilon=4.0, num_steps=5, device=device, num_images=100)
    predicted = predict(
        networks, eval_loader_of(source, batch=64, device=device), num_classes=10, attack=attack, attacked=[[0]]
    )
    assert predicted is not None
    rows = predicted[0].double()
    attacked = rows[1:][rows[1:].isfinite()].view(-1, 10).argmax(dim=1)
    statistics = torch.cat([buffer.flatten().double().cpu() for buffer in network.buffers()])
    return {"statistics": statistics, "probabilities": rows[0], "top1": top1, "attacked": attacked}
