"""tests/bench.py: the memory that it predicts from shapes is the memory that PyTorch allocates."""

import bench
import bench_dift
import pytest
import torch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_memory_is_what_a_step_allocates(checkpointing):
    """One DIFT step of the tiny shape: within 12 %; larger shapes come closer (README)."""
    torch.set_num_threads(1)
    bench.choose("tiny")
    net = bench_dift.build()
    if checkpointing:
        bench_dift.checkpoint_layers(net)
    peak = bench.held(net) + bench.allocated(bench_dift.our_step(net, bench_dift.draw()))
    predicted = bench.predict_memory("dift", half=False, checkpointing=checkpointing, optimiser=False)
    assert predicted["peak"] == pytest.approx(peak, rel=0.12)


def test_more_rows_and_devices_by_hand():
    """A second row doubles the activations alone; eight devices hold an eighth of gradients and moments."""
    bench.choose("3B", pairs=18)
    one, two = (bench.predict_memory("dift", rows) for rows in (1, 2))
    assert two["activations"] == pytest.approx(2 * one["activations"]) and two["weights"] == one["weights"]
    cut = bench.predict_memory("dift", devices=8)
    for name in ("gradients", "moments"):
        assert cut[name] == one[name] / 8
    weights = sum(bench.weights()[:2])
    assert weights == pytest.approx(3.75e9, rel=0.02)  # Qwen2.5-VL-3B
    assert one["moments"] == 8 * bench.weights()[0]
