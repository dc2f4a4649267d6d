"""dift.py: Eq. 7, schedule, order; a step does not depend on devices, micro-batches, caches or kills."""

import itertools
import json
import math
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, draw_image, forget_last, lively, one_thread, refused, run_script, two_processes
from helpers import write_data
from PIL import Image
from safetensors.torch import load_file

import evaluate
from dift import dift_loss, latent_sums, log_line, micro_batches, split_files
from lib import distributed
from lib.checkpoints import linear_warmup_decay, newest_checkpoint
from lib.images import load_patches
from lib.rows import order_of_epoch, rows_of_step
from model import VisionCache, collate, encode_row, load_model

STEP_FIELDS = "loss ce sim norm_fed norm_true gnorm lr latents tokens".split()


# ---------------------------------------------------------------- Eq. 7


def test_the_loss_by_hand():
    """ce = (1 + 2 + 3) / 6; sim = ((1 - 1) + (1 - 0)) / 4: the counts are those of the whole step."""
    logp = torch.tensor([-1.0, -2.0, -3.0])
    imagined = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([[1.0, 0.0], [3.0, 0.0]])

    def numbers(*given):
        loss, terms = dift_loss(*given, w_ce=0.1, w_sim=2.0)
        assert loss.shape == terms["ce"].shape == terms["sim"].shape == () and len(terms) == 2
        return terms["ce"].item(), terms["sim"].item(), loss.item()

    assert numbers(logp, imagined, targets, 6, 4) == pytest.approx((1.0, 0.25, 0.1 + 0.5))
    # no imagery in the whole step
    assert numbers(logp, imagined[:0], None, 6, 0) == pytest.approx((1.0, 0.0, 0.1))
    for none in (targets[:0], None):  # none in this micro-batch
        assert numbers(logp, imagined[:0], none, 6, 4) == pytest.approx((1.0, 0.0, 0.1))


def test_no_gradient_reaches_the_targets():
    logp = torch.tensor([-1.0], requires_grad=True)
    imagined, targets = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    dift_loss(logp, imagined, targets, 1, 3, 1.0, 1.0)[0].backward()
    assert targets.grad is None and imagined.grad.abs().sum() > 0 and logp.grad.item() == -1


def test_the_step_equals_a_naive_loop(tiny, rows):
    """Row by row, token by token: h_{t-1} predicts token t, or is compared with z_t; a prompt is free."""
    model = lively(tiny)
    visual = model.qwen.model.visual
    table = model.qwen.get_input_embeddings().weight
    nll, away, n_text, n_latent = 0.0, 0.0, 0, 0
    for row in rows[:5]:
        text = model.tokenizer.decode(encode_row(model, row, answer=False).ids)
        prompt = len(model.tokenizer(text)["input_ids"])
        sample = encode_row(model, row)
        ids = sample.ids.tolist()
        pixels, grid = load_patches(row.image_input, model.config)
        video = iter(visual(pixels, grid_thw=torch.tensor([grid])).pooler_output)
        latents = []
        for path in row.image_output:
            pixels, grid = load_patches([path], model.config)
            raster = visual(pixels, grid_thw=torch.tensor([grid])).pooler_output.view(3, 4, -1)
            for part in (raster[:2, :2], raster[:2, 2:], raster[2:, :2], raster[2:, 2:]):
                latents.append(part.mean(dim=(0, 1)))
        fed = iter(latents)
        special = {model.token_id["video_pad"]: video, model.token_id["latent_pad"]: fed}
        x = torch.stack([next(special[token]) if token in special else table[token] for token in ids])
        inputs = {"inputs_embeds": x[None], "position_ids": sample.positions[:, None]}
        hidden = model.qwen.model.language_model(**inputs).last_hidden_state[0]
        latents = iter(latents)
        for t in range(prompt, len(ids)):
            if ids[t] == model.token_id["latent_pad"]:
                away += 1 - F.cosine_similarity(hidden[t - 1], next(latents), dim=0)
                n_latent += 1
            else:
                nll -= (table @ hidden[t - 1]).log_softmax(dim=0)[ids[t]]
                n_text += 1
    samples = [encode_row(model, row) for row in rows[:5]]
    batch = VisionCache(model).prepare(collate(samples, model.token_id["pad"]))
    loss, terms = dift_loss(*model(batch), n_text, n_latent, 0.1, 1.0)
    ce, sim = terms["ce"].item(), terms["sim"].item()
    assert n_latent == 4 * (1 + 2 + 3 + 1 + 2) and n_text == batch.is_text.sum()
    assert ce == pytest.approx((nll / n_text).item(), abs=1e-5)
    assert sim == pytest.approx((away / n_latent).item(), abs=1e-5)
    assert loss.item() == pytest.approx(0.1 * ce + sim, abs=1e-6)


def test_the_logged_cosine_is_centred_per_latent_index():
    z = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    shared = torch.tensor([[100.0] * 8, [-50.0] * 8])  # another direction at each index
    same = latent_sums((2 * z + shared).view(10, 8), z.view(10, 8), 2)
    assert list(same) == ["cosine", "norm_fed", "norm_true"]
    assert same["cosine"].item() == pytest.approx(10, abs=1e-3)  # a sum over 10 latents of cosine 1
    assert same["norm_true"].item() == pytest.approx(z.norm(dim=-1).sum().item(), rel=1e-5)
    assert same["norm_fed"].item() == pytest.approx((2 * z + shared).norm(dim=-1).sum().item(), rel=1e-5)
    other = (z.roll(1, dims=0) + shared).view(10, 8)
    assert latent_sums(other, z.view(10, 8), 2)["cosine"] < 5  # the plain one would be near 10
    for none in (None, z.view(10, 8)[:0]):  # the same names in a micro-batch without imagery
        assert latent_sums(other[:0], none, 2) == dict.fromkeys(same, 0.0)
    given = (z.view(10, 8).clone().requires_grad_(), z.view(10, 8), 2)
    assert not any(value.requires_grad for value in latent_sums(*given).values())


# ---------------------------------------------------------------- schedule and order


def test_the_learning_rate_rises_and_falls():
    rates = [linear_warmup_decay(step, 100, 10, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9] == rates[10] == pytest.approx(2.0) == max(rates)
    assert rates[55] == pytest.approx(1.0) and rates[99] == pytest.approx(2.0 / 90)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert linear_warmup_decay(0, 10, 0, 1.0) == 1.0
    assert 0 < linear_warmup_decay(2, 3, 50, 1.0) == pytest.approx(3 / 50)  # a run shorter than its warm-up


def test_every_epoch_covers_the_rows_once():
    """10 rows in batches of 4: steps 0-4 are two epochs, step 2 is half of the first, half of the second."""
    drawn = [index for step in range(5) for index in rows_of_step(step, 10, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] and drawn[:10] != list(range(10))
    again = [rows_of_step(step, 10, 4, seed=0) for step in (4, 0, 2, 1, 3)]
    assert again == [drawn[4 * step : 4 * step + 4] for step in (4, 0, 2, 1, 3)]
    assert rows_of_step(0, 10, 4, seed=1) != drawn[:4]
    assert sorted(rows_of_step(0, 3, 9, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_an_epoch_is_shuffled_once():
    """A shuffle of 17,000 rows takes 14 ms; made for each row of a step it once took half of the step."""
    order_of_epoch.cache_clear()
    for step in range(90):
        rows_of_step(step, 1000, 16, seed=0)
    assert order_of_epoch.cache_info().misses == 2


LENGTHS = [0, 3, 1, 14, 2, 9, 0, 5, 12, 1, 7, 2, 4, 11, 0, 6, 3, 8, 1, 10, 13, 2, 5, 0]  # sentences more


def longer(rows, lengths=LENGTHS):
    """Rows whose answers go on for that many sentences more."""
    longer_rows = []
    for index, n in enumerate(lengths):
        row = rows[index % len(rows)]
        text = row.text_output + " So it goes." * 2 * n
        longer_rows.append(replace(row, id=str(index), text_output=text))
    return longer_rows


def test_rows_of_one_length_stand_together(tiny, rows):
    """Two processes, micro-batches of 3: padding is below 10 %; cut as they are drawn, above 15 %."""
    model, some = lively(tiny), longer(rows)
    vision = VisionCache(model)
    drawn = [encode_row(model, row) for row in some]
    parts = [micro_batches(drawn, vision, model.token_id["pad"], 3, rank, 2) for rank in (0, 1)]
    assert parts[0][1] == parts[1][1]  # counts of the whole step, on each process
    batches = [batch for batches, _ in parts for batch in batches]
    assert [len(batch.ids) for batch in batches] == [3] * 8
    seen = sorted(tuple(ids[real].tolist()) for b in batches for ids, real in zip(b.ids, b.is_real))
    samples = [encode_row(model, row) for row in some]
    assert seen == sorted(tuple(sample.ids.tolist()) for sample in samples)  # each row once
    counts = {}
    for name in ("text", "latent", "real"):
        counts[name] = sum(int(getattr(sample, f"is_{name}").sum()) for sample in samples)
    assert parts[0][1] == counts
    as_drawn = [collate(samples[start : start + 3], 0) for start in range(0, len(samples), 3)]
    places = [sum(batch.ids.numel() for batch in some) for some in (batches, as_drawn)]
    shares = [1 - counts["real"] / n for n in places]
    assert shares[0] < 0.1 and shares[1] > 0.15, shares
    alone = [[len(batch.ids), batch.ids.shape[1]] for batch in parts[0][0]]
    assert alone == sorted(alone)  # and so equal work for both processes, up to a row


def test_rows_are_dealt_out_as_the_docstring_says(tiny, rows):
    """Of lengths 1 to 8 in micro-batches of 2 the first of two processes has 1 3 | 5 7."""
    model = load_model(tiny / "base", K=4, pooling="grid")
    some = longer([rows[0]], [4, 0, 7, 2, 5, 1, 6, 3])
    drawn = [encode_row(model, row) for row in some]
    lengths = sorted(len(sample.ids) for sample in drawn)
    assert len(set(lengths)) == 8
    for rank in (0, 1):
        batches, _ = micro_batches(drawn, VisionCache(model), model.token_id["pad"], 2, rank, 2)
        dealt = [batch.is_real.sum(dim=1).tolist() for batch in batches]
        assert dealt == [lengths[rank : rank + 3 : 2], lengths[rank + 4 : rank + 7 : 2]]


def test_rows_that_ask_for_their_letters_count_them_alone(tiny, rows):
    """Of "<answer>B. Pan Right" the B; the other row of the step keeps all of its answer."""
    model = load_model(tiny / "base", K=4, pooling="grid")
    narrow = replace(rows[0], supervise="letters")
    drawn = [encode_row(model, row) for row in (narrow, rows[1])]
    (batch,), counts = micro_batches(drawn, VisionCache(model), model.token_id["pad"], 2)
    whole = encode_row(model, rows[1])
    assert counts["text"] == 1 + whole.is_text.sum() == len(batch.text_at)
    letters = [row for row in range(2) if batch.is_text[row].sum() == 1]
    assert model.tokenizer.decode(batch.ids[letters[0]][batch.is_text[letters[0]]]) == "B"
    assert counts["latent"] == 4 * (1 + 2)  # their imagery is learnt all the same


def test_files_of_a_folder_and_of_a_lone_file(tmp_path):
    train, test = split_files(tmp_path, "verbal")
    assert (train, test) == (tmp_path / "train_verbal.jsonl", tmp_path / "test_verbal.jsonl")
    assert split_files(tmp_path / "a.jsonl", "imagery") == (tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "a_test.jsonl").write_text("")
    assert split_files(tmp_path / "a.jsonl", "imagery")[1] == tmp_path / "a_test.jsonl"


def test_a_run_on_letters_alone(tiny, tmp_path, capsys):
    """The loss is that of the letters, one of four options, and the first sample shows what it sees."""
    raws = write_data(tmp_path / "data")
    lines = [json.dumps(raw | {"supervise": "letters"}) + "\n" for raw in raws]
    (tmp_path / "data" / "letters.jsonl").write_text("".join(lines))
    data = f"DATA={tmp_path / 'data' / 'letters.jsonl'}"
    log, _ = train(tiny, tmp_path / "run", data, "STEPS=1", "K=0")
    assert "<answer>[B]. Pan Right" in capsys.readouterr().out
    assert log[0]["ce"] == pytest.approx(math.log(448), abs=0.5)


def test_a_line_of_the_log():
    entry = {"step": 12, "loss": 1.23, "ce": 2.0, "sim": 0.03, "cosine": 0.5, "retrieval": None, "gnorm": 0.9}
    entry |= {"lr": 1e-5, "latents": 8.0, "seconds": 2.0, "tokens": 3000.0}
    line = log_line(entry, ["ce", "sim"], 1000, {"ce": 0.1, "sim": 1.0})
    assert line.startswith("step    12/1000 | loss 1.2300 = 0.1 x ce 2.0000 + 1 x sim 0.0300 |")
    assert "cosine 0.50 | object nan | retrieval nan | gnorm 0.90 | " in line
    assert "lr 1.0e-05 | latents 8.0 | 2.00 s | 1.5k tok/s" in line
    assert "retrieval 0.62 |" in log_line(entry | {"retrieval": 0.62}, ["ce"], 1000, {"ce": 0.1})


# ---------------------------------------------------------------- runs


def words(tiny, out, *more):
    """The command of a small run; later words win."""
    base = [f"MODEL={tiny / 'base'}", f"DATA={tiny / 'data'}", f"OUT={out}", "STEPS=3", "LR=1e-3"]
    base += [
        "TEST_ROWS=0",
        "EVAL_EVERY=0",
        "GLOBAL_BATCH=8",
        "MICRO_BATCH=8",
        "WARMUP=50",
        "W_SIM=1.0",
        "W_SIM_END=1.0",
        "K=4",
    ]
    return [*base, "LOG_EVERY=1", *more]


def train(tiny, out, *more):
    """A run in this process -> log entries, weights by name."""
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, "dift.py", *words(tiny, out, *more))
    return result_of(out)


def result_of(out):
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return log, load_file(newest_checkpoint(out) / "model.safetensors")


def assert_equal_runs(mine, theirs, fields=STEP_FIELDS):
    """Losses, gradient norms and weights to 1e-5."""
    assert len(mine[0]) == len(theirs[0]) == 3
    for one, other in zip(mine[0], theirs[0]):
        for name in fields:
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
    assert mine[1].keys() == theirs[1].keys()
    for name, weight in mine[1].items():
        assert torch.allclose(weight, theirs[1][name], atol=1e-5), name


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """Three steps of one process, one micro-batch a step."""
    return train(tiny, tmp_path_factory.mktemp("plain") / "run")


def test_a_step_trains_the_text_and_leaves_vision_alone(tiny, plain):
    log, weights = plain
    before = load_file(tiny / "base" / "model.safetensors")
    assert before.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]) is ("visual" in name), name
    assert sum("visual" in name for name in weights) > 10
    assert [entry["step"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["sim"])
        assert 0 < entry["padding"] < 1
        assert all(math.isfinite(entry[name]) for name in [*STEP_FIELDS, "cosine", "seconds"])
    rates = [linear_warmup_decay(step, 3, 50, 1e-3) for step in range(3)]
    assert [entry["lr"] for entry in log] == pytest.approx(rates)
    assert log[2]["ce"] < log[0]["ce"] == pytest.approx(math.log(448), abs=0.3)


def test_the_weight_of_imagery_falls_with_the_steps(tiny, tmp_path, capsys):
    """From W_SIM=4 to W_SIM_END=1 in three steps: 4, 3, 2, and 1 would come after them."""
    log, _ = train(tiny, tmp_path / "run", "STEPS=3", "W_SIM=4", "W_SIM_END=1", "LOG_EVERY=1")
    for entry, weight in zip(log, (4, 3, 2)):
        assert entry["loss"] == pytest.approx(entry["ce"] + weight * entry["sim"])
    printed = capsys.readouterr().out
    assert all(f" {weight} x sim" in printed for weight in (4, 3, 2))


def test_a_run_prints_what_it_does(tiny, tmp_path, capsys):
    train(tiny, tmp_path / "run", "STEPS=1", "W_CE=0.1", "W_SIM=0.5", "GLOBAL_BATCH=2")
    out = capsys.readouterr().out
    assert "W_CE=0.1" in out and "GLOBAL_BATCH=2" in out and f"torch {torch.__version__}" in out
    assert "M trained weights" in out and "{<|latent_pad|>" in out
    assert "step     1/1 | loss" in out and "0.1 x ce" in out and "0.5 x sim" in out
    log, _ = result_of(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(0.1 * log[0]["ce"] + 0.5 * log[0]["sim"])


@pytest.mark.parametrize(
    "change",
    ["MICRO_BATCH=2", "MICRO_BATCH=3", "CHECKPOINTING=True", "CACHE_FEATURES=False", "FAST=False"],
)
def test_a_step_does_not_depend_on(tiny, tmp_path, plain, change):
    mine = train(tiny, tmp_path / "run", change)
    assert_equal_runs(mine, plain)
    for one, other in zip(mine[0], plain[0]):  # smaller micro-batches hold less padding
        assert one["padding"] < other["padding"] if "MICRO" in change else one["padding"] == other["padding"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_equal_one(tiny, tmp_path, plain, layout):
    """Four micro-batches, two on each process; with FSDP each holds half of the weights and moments."""
    printed = two_processes("dift.py", *words(tiny, tmp_path / "run", "MICRO_BATCH=2", f"PARALLEL={layout}"))
    assert printed.count("2 x cpu") == 1  # one process speaks
    assert_equal_runs(result_of(tmp_path / "run"), plain)


def moments(out):
    return load_file(newest_checkpoint(out) / "optimizer.safetensors")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_saved_on_two_it_goes_on_on_one_and_back(tiny, tmp_path, plain, layout):
    """Step 1 on one process, step 2 on two, step 3 on one: weights, moments and log of a run on one."""
    out, more = tmp_path / "run", ["SAVE_EVERY=1", "EVAL_EVERY=0", f"PARALLEL={layout}"]
    train(tiny, out, *more)
    whole = moments(out)
    forget_last(out)
    forget_last(out)
    two_processes("dift.py", *words(tiny, out, *more))
    assert_same_files(moments(out), whole)
    assert_equal_runs(result_of(out), plain)
    forget_last(out)
    assert_equal_runs(train(tiny, out, *more), plain)
    assert_same_files(moments(out), whole)


def assert_same_files(mine, theirs):
    assert mine.keys() == theirs.keys() and any(name.endswith("exp_avg_sq") for name in mine)
    for name, x in mine.items():
        assert x.shape == theirs[name].shape and x.dtype == theirs[name].dtype, name
        assert torch.allclose(x, theirs[name], atol=1e-6), name


def test_a_run_on_two_ends_with_a_score_whatever_the_layout(tiny, tmp_path):
    """Generation and the picture under FSDP: the same answers as with DDP."""
    texts = []
    (tmp_path / "short.py").write_text(SHORT)
    for layout in ("ddp", "fsdp"):
        more = [f"PARALLEL={layout}", "STEPS=2", "TEST_ROWS=5", "EVAL_EVERY=1", "SAVE_EVERY=1"]
        two_processes(tmp_path / "short.py", *words(tiny, tmp_path / layout, *more))
        lines = (tmp_path / layout / "eval" / "results.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["text"] for line in lines])
        assert (tmp_path / layout / "eval" / "picture.png").stat().st_size > 1000
    assert texts[0] == texts[1] and len(texts[0]) == 5


SHORT = """
import runpy
from dataclasses import dataclass
import evaluate

@dataclass(frozen=True)
class Short(evaluate.Settings):
    max_new: int = 8

evaluate.Settings = Short
runpy.run_path("dift.py", run_name="__main__")
"""


def test_a_checkpoint_says_where_it_comes_from(tiny, tmp_path):
    log, _ = train(tiny, tmp_path / "run", "STEPS=2", "SAVE_EVERY=1", "W_SIM=0.5")
    folder = newest_checkpoint(tmp_path / "run")
    assert folder.name == "step_000002"
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["MODEL"] == str(tiny / "base") and config["run"]["W_SIM"] == 0.5
    assert config["run"]["step"] == 2
    assert config["latent_norm"] == pytest.approx(log[-1]["norm_true"])
    train(tiny, tmp_path / "plain", "STEPS=1", "MATCH_NORM=False")
    assert load_model(tmp_path / "plain").config.latent_norm is None


def test_pretraining_without_imagery(tiny, tmp_path):
    """K = 0: the text is learnt, vision stays as it is, and DIFT goes on from there."""
    log, weights = train(tiny, tmp_path / "run", "K=0", "STEPS=2")
    before = load_file(tiny / "base" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]) is ("visual" in name), name
    for entry in log:
        assert (entry["latents"], entry["sim"], entry["cosine"], entry["norm_true"]) == (0, 0, 0, 0)
        assert entry["loss"] == entry["ce"] > 0
    assert load_model(tmp_path / "run").K == 0
    train(tiny, tmp_path / "next", f"MODEL={tmp_path / 'run'}", "STEPS=1")
    assert load_model(tmp_path / "next").K == 4


@dataclass(frozen=True)
class Shortest(evaluate.Settings):
    """Answers of a few tokens, as if MAX_NEW had been edited in evaluate.py."""

    max_new: int = 6


def test_the_run_ends_with_a_score_and_a_picture(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Settings", Shortest)
    for steps in (1, 2):  # going on for longer answers the questions again
        train(tiny, tmp_path / "run", "TEST_ROWS=5", "EVAL_EVERY=1", f"STEPS={steps}")
        summary = json.loads((tmp_path / "run" / "eval" / "summary.json").read_text())
        assert summary["scores"]["micro"]["n"] == 5
    assert summary["settings"]["max_new"] == 6
    assert f"{tmp_path}/run/eval/report.html" in capsys.readouterr().out
    for name in ("picture.png", "report.html", "results.jsonl"):
        assert (tmp_path / "run" / "eval" / name).stat().st_size > 1000
    train(tiny, tmp_path / "run", "TEST_ROWS=5", "EVAL_EVERY=1", "STEPS=2")  # nothing left to do
    assert json.loads((tmp_path / "run" / "eval" / "summary.json").read_text()) == summary


# ---------------------------------------------------------------- kill -9 and resume


KILLED = """
import os, runpy, signal, sys
import evaluate
{fakes}
real = os.replace
def replace(source, target):
    if str(target).endswith("step_000006"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
runpy.run_path("dift.py", run_name="__main__")
"""
FAKES = """
def sum_of_weights(model, rows, out=None, **settings):
    weights = sum(weight.double().sum().item() for weight in model.parameters())
    return {"imagery": {"retrieval": weights}}
evaluate.evaluate = sum_of_weights
evaluate.draw = evaluate.print_table = lambda *words, **more: None
"""


def test_a_killed_run_goes_on_and_equals_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    """Killed while it writes the checkpoint of step 6, after six lines of log; it goes on from step 4."""
    more = ["STEPS=8", "SAVE_EVERY=2", "TEST_ROWS=2", "EVAL_EVERY=3", "WARMUP=3"]
    more += ["MICRO_BATCH=4", "GLOBAL_BATCH=6"]
    run = [sys.executable, "-c", KILLED.format(fakes=FAKES), *words(tiny, tmp_path / "killed", *more)]
    done = subprocess.run(run, cwd=ROOT, env=one_thread(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in (tmp_path / "killed").glob("*step*"))
    assert left == ["step_000002", "step_000004"]
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 6

    for name in ("evaluate", "draw", "print_table"):
        monkeypatch.setattr(evaluate, name, getattr(evaluate, name))  # restored after the test
    exec(FAKES, {"evaluate": evaluate})
    whole, whole_weights = train(tiny, tmp_path / "whole", *more)
    again, weights = train(tiny, tmp_path / "killed", *more)
    for entry in (*whole, *again):
        assert entry.pop("seconds") > 0
    assert len(again) == 8 and again == whole
    assert whole[3]["retrieval"] is not None and len({entry["retrieval"] for entry in whole}) == 3
    assert all(torch.equal(weight, whole_weights[name]) for name, weight in weights.items())
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json"):
        one, other = (tmp_path / out / "step_000008" / name for out in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_killed_pretraining_goes_on_too(tiny, tmp_path):
    """K = 0: the latent rows, which weight decay and the tied head change, do not start anew."""
    more = ["K=0", "WARMUP=1", "SAVE_EVERY=1"]
    whole, weights = train(tiny, tmp_path / "whole", *more)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "step_000002").rename(tmp_path / "cut" / "step_000002")
    (tmp_path / "cut" / "log.jsonl").write_text((tmp_path / "whole" / "log.jsonl").read_text())
    again, resumed = train(tiny, tmp_path / "cut", *more)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.items())


# the constants of a run in the config.json of a checkpoint from before FAST, when vision could be trained
FORMER = "MODEL DATA OUT COT TEST_ROWS TEST_BATCH MAX_PIXELS MIN_PIXELS SECONDS_PER_PAIR SUFFIX K POOLING"
FORMER += " MATCH_NORM TRAIN_VISION SUPERVISE STEPS GLOBAL_BATCH MICRO_BATCH LR WARMUP BETA2 WEIGHT_DECAY"
FORMER += " CLIP W_CE W_SIM LOG_EVERY EVAL_EVERY SAVE_EVERY RESUME CACHE_FEATURES PARALLEL CHECKPOINTING SEED"


def make_former(out, **changes):
    """Gives the newest checkpoint of a run the record that the code wrote before."""
    file = newest_checkpoint(out) / "config.json"
    config = json.loads(file.read_text())
    values = config["run"] | {"TRAIN_VISION": False, "SUPERVISE": "all"} | changes
    config["run"] = {name: values[name] for name in [*FORMER.split(), "step"]}
    assert "FAST" in values and len(config["run"]) == 34
    file.write_text(json.dumps(config, indent=1))


def test_a_run_of_the_former_code_goes_on(tiny, tmp_path, plain):
    """Its record has TRAIN_VISION and SUPERVISE and no FAST; the rest of the run is the same to the bit."""
    out = tmp_path / "run"
    train(tiny, out, "SAVE_EVERY=1")
    forget_last(out)
    make_former(out)
    refused(lambda: train(tiny, out, "LR=0.5"), "LR=0.001", "RESUME=never")
    log, weights = train(tiny, out, "SAVE_EVERY=1")
    assert_equal_runs((log, weights), plain)
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in plain[0]]
    assert all(torch.equal(weight, plain[1][name]) for name, weight in weights.items())
    run = json.loads((newest_checkpoint(out) / "config.json").read_text())["run"]
    assert run["step"] == 3 and run["FAST"] is True and run["LR"] == 1e-3


@pytest.mark.parametrize("name, value", [("TRAIN_VISION", True), ("SUPERVISE", "letters")])
def test_a_run_of_the_former_code_is_refused_where_the_code_has_no_more(tiny, tmp_path, name, value):
    """It would go on with vision frozen, or with all tokens supervised."""
    out = tmp_path / "run"
    train(tiny, out, "STEPS=1", "K=0")
    make_former(out, **{name: value})
    refused(lambda: train(tiny, out, "STEPS=2", "K=0"), f"{out}", f"{name}={value}", "RESUME=never")


def test_the_folder_of_another_run_is_refused(tiny, tmp_path):
    out = tmp_path / "run"
    write_data(tmp_path / "data")
    shutil.copy(tmp_path / "data" / "train_imagery.jsonl", tmp_path / "data" / "train_verbal.jsonl")
    data = f"DATA={tmp_path / 'data'}"
    train(tiny, out, data, "STEPS=1")
    changes = "LR=0.5 SEED=3 K=2 POOLING=strips GLOBAL_BATCH=4 W_CE=0.5 COT=verbal WARMUP=7 BETA2=0.9"
    changes += (
        " MATCH_NORM=False SUFFIX=Think. MAX_PIXELS=784 W_SIM=0.5 W_SIM_END=0.1 CLIP=2.0 WEIGHT_DECAY=0.5"
    )
    for word in f"{changes} MIN_PIXELS=784 SECONDS_PER_PAIR=2.0 MODEL=elsewhere".split():
        name, value = word.split("=")
        refused(lambda word=word: train(tiny, out, data, word), f"{out}", f"{name}=", "RESUME=never")
    refused(lambda: train(tiny, out), "DATA=")


def test_starting_afresh_replaces_the_old_run(tiny, tmp_path):
    out = tmp_path / "run"
    train(tiny, out, "STEPS=3", "SAVE_EVERY=1")
    log, _ = train(tiny, out, "STEPS=1", "RESUME=never", "LR=0.5")
    assert len(log) == 1
    assert newest_checkpoint(out).name == "step_000001"
    assert json.loads((newest_checkpoint(out) / "config.json").read_text())["run"]["LR"] == 0.5
    train_nothing = [*words(tiny, out), "RESUME=never", "STEPS=0"]  # as if killed before its first checkpoint
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, "dift.py", *train_nothing)
    assert not list(out.glob("step_*")) and (out / "log.jsonl").read_text() == ""


def test_plain_feedback_holds_for_a_parent_that_matches_norms(tiny, tmp_path):
    train(tiny, tmp_path / "one", "STEPS=1")
    assert load_model(tmp_path / "one").config.latent_norm > 0
    train(tiny, tmp_path / "two", "STEPS=1", f"MODEL={tmp_path / 'one'}", "MATCH_NORM=False")
    assert load_model(tmp_path / "two").config.latent_norm is None


def test_zero_prints_and_saves_the_last_step_alone(tiny, tmp_path, capsys):
    train(tiny, tmp_path / "run", "STEPS=2", "LOG_EVERY=0", "SAVE_EVERY=0")
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000002"]
    assert capsys.readouterr().out.count("| loss") == 1


# ---------------------------------------------------------------- bad input: one sentence each


def test_bad_input_ends_the_program_with_one_line(tiny, tmp_path):
    """As a user sees it: exit code 1, one line, no traceback. The others are tested in this process."""
    run = [sys.executable, "dift.py", "STEP=3"]
    done = subprocess.run(run, cwd=ROOT, env=one_thread(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == "Unknown constant STEP. Did you mean STEPS?"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "word, part",
    [
        ("STEPS=ten", "int"),
        ("DATA=none.jsonl", "none.jsonl"),
        ("MODEL=none", "none"),
        ("COT=words", "train_words.jsonl"),
        ("POOLING=gird", "POOLING"),
        ("RESUME=yes", "RESUME"),
        ("PARALLEL=zero", "PARALLEL=zero"),
        ("K=64", "K=64"),  # an overlay has 12 tokens
        ("SUFFIX=@none", "none"),
    ],
)
def test_bad_constants_are_one_sentence(tiny, tmp_path, word, part):
    refused(lambda: train(tiny, tmp_path / "run", word), part)
    assert not (tmp_path / "run" / "step_000003").exists()


@pytest.mark.parametrize(
    "word, near", [("STEP=3", "STEPS"), ("TRAIN_VISION=True", ""), ("SUPERVISE=letters", "")]
)
def test_unknown_constants_are_one_sentence(tiny, tmp_path, word, near):
    """Vision is always frozen, and what is supervised is a field of each row."""
    with pytest.raises(SystemExit, match=f"^Unknown constant {word.split('=')[0]}. Did you mean {near}"):
        train(tiny, tmp_path / "run", word)
    assert not (tmp_path / "run").exists()


def test_another_k_than_the_checkpoints_is_one_sentence(tiny, tmp_path):
    train(tiny, tmp_path / "run", "STEPS=1")
    more = [f"MODEL={tmp_path / 'run'}", "K=2"]
    refused(lambda: train(tiny, tmp_path / "other", *more), "K=4", "2")


def test_a_global_batch_that_cannot_be_shared_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "init_distributed", lambda: (0, 3, torch.device("cpu")))
    refused(lambda: train(tiny, tmp_path / "run"), "GLOBAL_BATCH=8", "3 processes")


def broken_data(folder, change):
    """A folder of data with one thing wrong in the sixth row."""
    rows = write_data(folder)
    change(rows[5], folder)
    text = [json.dumps(row) + "\n" for row in rows]
    if "raw" in rows[5]:
        text[5] = rows[5]["raw"] + "\n"
    (folder / "train_imagery.jsonl").write_text("".join(text))
    return folder


def spoil(folder, row, content):
    """Its last frame becomes another file."""
    row["image_input"][-1] = "spoilt.jpg"
    (folder / "spoilt.jpg").write_bytes(content)


def half_a_jpeg(folder):
    draw_image(folder / "whole.jpg", np.random.default_rng(0))
    return (folder / "whole.jpg").read_bytes()[:500]


def broken_png(folder):
    """A PNG whose first chunk of pixels is zeros, which PIL calls a SyntaxError."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    image.save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    at = content.index(b"IDAT", 60000)
    return content[: at - 4] + bytes(60) + content[at + 56 :]


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda row, folder: row.update(raw='{"id": '), "not valid JSON"),
        (lambda row, folder: row.pop("text_input"), "text_input"),
        (lambda row, folder: row.update(supervise="some"), "supervise"),
        (lambda row, folder: row["image_output"].pop(), "image_output"),
        (lambda row, folder: row["image_input"].__setitem__(1, "gone.jpg"), "gone.jpg"),
        (lambda row, folder: spoil(folder, row, b"no image"), "spoilt.jpg is not a readable image"),
        (lambda row, folder: spoil(folder, row, half_a_jpeg(folder)), "spoilt.jpg is not a readable image"),
        (lambda row, folder: spoil(folder, row, broken_png(folder)), "spoilt.jpg is not a readable image"),
    ],
    ids=[
        "json",
        "field",
        "supervise",
        "placeholders",
        "missing image",
        "no image",
        "half an image",
        "broken PNG",
    ],
)
def test_bad_data_is_named_by_file_and_line(tiny, tmp_path, change, part):
    data = broken_data(tmp_path / "data", change)
    more = [f"DATA={data}", "GLOBAL_BATCH=8", "MICRO_BATCH=1"]
    refused(lambda: train(tiny, tmp_path / "run", *more), f"{data}/train_imagery.jsonl:6: ", part)


def test_rows_without_imagery_and_without_a_key_are_trained_on(tiny, tmp_path, capsys):
    """Every other row has text alone and a free answer: micro-batches of one row, whatever is in them."""
    rows = write_data(tmp_path / "data")
    for row in rows[::2]:
        row |= {"text_output": "<think>I see it.</think>\n<answer>near</answer>", "image_output": []}
    file = tmp_path / "data" / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for size in ("MICRO_BATCH=1", "MICRO_BATCH=8"):
        runs.append(train(tiny, tmp_path / size, f"DATA={file}", "STEPS=2", "TEST_ROWS=9", size))
    one, other = ([(entry["ce"], entry["sim"], entry["gnorm"]) for entry in log] for log, _ in runs)
    assert all(mine == pytest.approx(theirs, rel=1e-4) and mine[1] > 0 for mine, theirs in zip(one, other))
    assert f"{len(rows)} rows, {len(rows) // 2} to score" in capsys.readouterr().out


def test_a_missing_folder_is_made(tiny, tmp_path, monkeypatch):
    commands = []

    def fake_run(command, **settings):
        commands.append([str(word) for word in command])
        write_data(tmp_path / "new")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    log, _ = train(tiny, tmp_path / "run", f"DATA={tmp_path / 'new'}", "STEPS=1")
    assert commands == [[sys.executable, str(ROOT / "generate_data.py"), f"OUT={tmp_path / 'new'}"]]
    monkeypatch.setattr(
        subprocess, "run", lambda command, **settings: subprocess.CompletedProcess(command, 1)
    )
    refused(lambda: train(tiny, tmp_path / "other", f"DATA={tmp_path / 'gone'}"), "generate_data.py", "gone")


def test_a_folder_that_is_half_made_is_made_to_its_end(tiny, tmp_path, monkeypatch):
    """As a kill of the first command leaves it: all but the last file, meta.json. Other folders are left."""
    commands, folder = [], tmp_path / "half"
    folder.mkdir()
    (folder / "constants.json").write_text("{}")
    write_data(folder)

    def fake_run(command, **settings):
        commands.append(str(command[-1]))
        (folder / "meta.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    train(tiny, tmp_path / "run", f"DATA={folder}", "STEPS=1")
    train(tiny, tmp_path / "again", f"DATA={folder}", "STEPS=1")
    assert commands == [f"OUT={folder}"]
    (tmp_path / "own").mkdir()
    refused(lambda: train(tiny, tmp_path / "other", f"DATA={tmp_path / 'own'}"), "train_imagery.jsonl")


def test_the_script_can_be_imported_without_running():
    assert "kept_on_resume" in runpy.run_path(str(ROOT / "dift.py"), run_name="dift")
