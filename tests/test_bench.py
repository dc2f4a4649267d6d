"""tools/bench.py: the memory that it predicts from shapes is the memory that PyTorch allocates."""

import pytest
import torch

from lib.command_line import override_constants
from lib.fast import checkpoint_layers
from tools import bench, bench_dift, bench_grpo4d


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_memory_is_what_a_step_allocates(checkpointing):
    """One DIFT step of the tiny shape: within 12 %; larger shapes come closer (docs)."""
    torch.set_num_threads(1)
    case = bench_dift.make_case("tiny")
    qwen = bench_dift.build_network(case)
    if checkpointing:
        checkpoint_layers(qwen)
    step = bench_dift.our_step(qwen, case)
    peak = bench.weight_bytes(qwen) + bench.allocated(step, qwen.device)
    predicted = bench.predict_memory(case, "dift", half=False, checkpointing=checkpointing, optimiser=False)
    assert predicted["peak"] == pytest.approx(peak, rel=0.12)


def test_more_rows_and_devices_by_hand():
    """A second row doubles the activations alone; eight devices hold an eighth of gradients and moments."""
    case = bench_dift.make_case("3B", pairs=18)
    one, two = (bench.predict_memory(case, "dift", rows) for rows in (1, 2))
    assert two["activations"] == pytest.approx(2 * one["activations"]) and two["weights"] == one["weights"]
    cut = bench.predict_memory(case, "dift", devices=8)
    for name in ("gradients", "moments"):
        assert cut[name] == one[name] / 8
    of_text, of_vision, _ = bench.count_weights(case)
    assert of_text + of_vision == pytest.approx(3.75e9, rel=0.02)  # Qwen2.5-VL-3B
    assert one["moments"] == 8 * of_text


def test_the_measured_row_and_answers_are_those_of_the_docstrings():
    """780 tokens, of which 151 are supervised, 288 visual and 8 latent; a question of 470 tokens."""
    case = bench_dift.make_case("45M")
    sample, patches = bench_dift.draw_row(case)
    assert len(sample.ids) == case.row_tokens == 780
    counts = [int(mask.sum()) for mask in (sample.is_text, sample.is_visual, sample.is_latent)]
    assert counts == [case.supervised, case.video_tokens, 2 * case.K] == [151, 288, 8]
    assert [len(pixels) for pixels, _ in patches.values()] == [4 * 288, 4 * 72, 4 * 72]
    prompt, _, answers = bench_grpo4d.draw_question(case)
    assert len(prompt.ids) == case.question_tokens == 470 and answers.shape == (8, 64)
    starts = (answers == case.token_id["latent_start"]).sum(dim=1)
    assert starts.tolist() == [1, 2] * 4


@pytest.mark.parametrize("fast", [True, False])
def test_both_ways_compute_the_same(fast):
    """Loss, gradient and log-probabilities of the tiny shape, by the plain code too."""
    torch.set_num_threads(1)
    case = bench_dift.make_case("tiny")
    found = []
    for make in (bench_dift.naive_step, bench_dift.our_step):
        qwen = bench_dift.build_network(case)
        step = make(qwen, case) if make is bench_dift.naive_step else make(qwen, case, fast)
        (loss,) = step()
        found.append({"loss": loss.item(), **bench_dift.describe_network(qwen)})
    bench_dift.require_same(*found)

    c = override_constants(vars(bench_grpo4d), [f"FAST={fast}", "SIZE=tiny", "REPEATS=0"])
    results = {}
    for way in ("naive", "ours"):
        c.WAY = way
        results[way] = bench_grpo4d.measure(case, c)
    bench_grpo4d.require_same_log_probs(results["naive"]["logp"], results["ours"]["logp"])
    bench_dift.require_same(**results)
    assert set(bench_grpo4d.add_step(results["ours"]["phases"])) == {"rollout", "reference", "policy", "step"}
