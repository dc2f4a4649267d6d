"""Look-alikes to follow, and the ablations of dift.py that say which text may look where."""

import json

import numpy as np
import pytest
import torch
from helpers import lively, run_script

import generate_data as gd
from lib import vocabulary
from lib.checkpoints import newest_checkpoint
from lib.command_line import override_constants
from lib.geometry import centroid_and_area
from lib.place import place_directions
from model import VisionCache, bottleneck_mask, collate, encode_row, load_model

C = override_constants(vars(gd), ["P_FOLLOW=1.0"])


@pytest.fixture(scope="module")
def clips():
    """Test clips of one to four exchanges with their rows."""
    return [gd.toy_clip(C, "test", number)[:2] for number in range(24)]


# ---------------------------------------------------------------- the world


def test_two_neighbours_change_places_and_no_two_twice_in_a_row(clips):
    counts = set()
    for clip, _ in clips:
        stands = np.array(list(clip.slots.values())).T  # (exchanges + 1, 4)
        counts.add(len(stands) - 1)
        changed = []
        for before, after in zip(stands, stands[1:]):
            moved = np.flatnonzero(before != after)
            assert sorted(after) == [0, 1, 2, 3] and len(moved) == 2
            assert abs(before[moved[0]] - before[moved[1]]) == 1
            assert before[moved].tolist() == after[moved[::-1]].tolist()
            changed.append(min(before[moved]))
        assert all(one != other for one, other in zip(changed, changed[1:]))
    assert counts == {1, 2, 3, 4}


def test_things_never_touch_and_stand_where_the_labels_say(clips):
    for clip, _ in clips:
        paths = np.stack([thing.path for thing in clip.scene.things])  # (4, T, 3)
        assert paths.shape[1] == len(clip.frames) == 2 + C.EXCHANGE * (len(clip.slots[clip.moving[0]]) - 1)
        for one in range(4):
            for other in range(one):
                apart = np.linalg.norm(paths[one] - paths[other], axis=1).min()
                assert apart > 2 * clip.scene.things[0].half[0] - 0.05
        # from left to right in the last frame, as in the picture itself
        x = [centroid_and_area(clip.masks[name][-1:], 0)[0] for name in clip.moving]
        order = [clip.slots[name][-1] for name in clip.moving]
        assert np.argsort(x).tolist() == np.argsort(order).tolist()


def test_rows_ask_for_the_last_place_and_show_each_frame_pair(clips):
    for clip, drafts in clips:
        assert len(drafts) == C.FOLLOWED[1] == 4
        for draft in drafts:
            row, slots = draft.row, clip.slots[draft.thing]
            moved = sum(one != other for one, other in zip(slots, slots[1:]))
            assert row["subtask"] == f"follow_{moved}"
            assert draft.label == list(vocabulary.SLOTS.values())[slots[-1]]
            assert f"<answer>{draft.key}. {draft.label}</answer>" in row["text_output"]
            assert f"Track the {list(vocabulary.SLOTS)[slots[0]]} " in row["text_input"]
            assert row["overlay_frames"] == list(range(1, len(clip.times), 2))
            assert set(row["overlay_things"]) == {draft.thing}
    assert len(gd.toy_clip(C, "train", 0)[1]) == C.FOLLOWED[0] == 2


def test_who_guesses_that_a_thing_stays_is_seldom_right(clips):
    """30 % in the long run; 42 % if two could change places twice in a row."""
    ends = [slots[0] == slots[-1] for clip, _ in clips for slots in clip.slots.values()]
    assert np.mean(ends) < 0.38


def test_questions_for_4drl_hold_options_and_key_alone():
    clip, drafts, _ = gd.toy_clip(C, "rl_train", 1)
    (draft,) = drafts
    row = draft.row
    assert row["Type"].startswith("follow_") and row["Question"].endswith("s?")
    assert row[row["Correct"]] == draft.label
    assert sorted(row[letter] for letter in "ABCD") == sorted(vocabulary.SLOTS.values())
    assert "text_output" not in row and len(row["frame_paths"]) == len(clip.times)
    assert len(clip.slots[clip.moving[0]]) - 1 in C.RL_EXCHANGES


def test_without_look_alikes_clips_are_those_of_their_seed():
    none = override_constants(vars(gd), ["P_FOLLOW=0.0"])
    rng = np.random.default_rng([none.SEED, 0, 5])
    assert gd.draw_kind(none, rng, "train")[0] == ("object" if firsts(5) < none.P_OBJECT_CLIP else "camera")


def firsts(number):
    """The first number that a train clip's generator gives."""
    return np.random.default_rng([0, 0, number]).random()


def test_place_is_what_cells_share():
    """Tokens that are a cell's own vector and noise of the same size: half of the variance is place."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(16, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    own = own - own.mean(dim=0)
    noise = torch.randn(4000, 16, 32, generator=generator)
    noise *= own.norm() / 16**0.5 / 32**0.5
    features = (own + noise).flatten(0, 1)
    _, directions, share = place_directions(features, 16, rank=4)
    assert share == pytest.approx(0.5, abs=0.02)
    # the directions hold all of what is the cells' own
    assert torch.allclose(own @ directions.T @ directions, own, atol=0.05 * own.abs().max().item())


# ---------------------------------------------------------------- which text may look where


def batch_of(model, rows, **which):
    samples = [encode_row(model, row, **which) for row in rows]
    return samples, VisionCache(model).prepare(collate(samples, model.token_id["pad"]))


def test_text_after_imagery_does_not_look_at_the_video(model, rows):
    (sample,), batch = batch_of(model, rows[:1], blind=True)
    mask = bottleneck_mask(batch)[0, 0]
    T = len(sample.ids)
    first_end = sample.ids.tolist().index(model.token_id["latent_end"])
    for i in range(T):
        # what starts a block, and its latents, must see the video to imagine
        imagines = sample.ids[i] in (model.token_id["latent_start"], model.token_id["latent_pad"])
        is_blind = i >= first_end and not imagines
        for j in range(T):
            seen = j <= i and not (is_blind and bool(sample.is_visual[j]))
            assert mask[i, j].item() == seen, (i, j)
    assert bottleneck_mask(batch_of(model, rows[:1])[1]) is None


def test_a_bottleneck_changes_the_text_after_imagery_alone(model, rows):
    _, plain = batch_of(model, rows[:2])
    samples, blind = batch_of(model, rows[:2], blind=True)
    with torch.no_grad():
        one, other = model(plain)[0], model(blind)[0]
    before = []
    for sample in samples:
        is_before = (sample.ids == model.token_id["latent_end"]).cumsum(0) == 0
        # the state at a token gives the probability of the next
        before.append(is_before.roll(1)[sample.is_text])
    before = torch.cat(before)
    assert torch.allclose(one[before], other[before], atol=1e-5)
    assert (one - other)[~before].abs().max() > 1e-3


def test_fast_paths_know_a_bottleneck_and_self_fed_rows(tiny, rows):
    results = []
    for fast in (True, False):
        model = lively(tiny, fast=fast)
        _, batch = batch_of(model, rows[:3], blind=True, self_fed=True)
        results.append(model(batch))
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-4), (one - other).abs().max()


def test_rows_that_read_their_own_imagery(model, rows):
    """Latents are read as they were imagined after the true ones; the targets stay, no gradient goes back."""
    _, batch = batch_of(model, rows[:2])
    with torch.no_grad():
        true_logp, imagined, targets = model(batch)
    _, fed = batch_of(model, rows[:2], self_fed=True)
    logp, again, same = model(fed)
    assert torch.equal(same, targets)
    # by hand: the first pass's states stand in the place of the true latents
    with torch.no_grad():
        by_hand = model.embed(batch, model.feedback(imagined))
        predicted = torch.cat([batch.text_at, batch.latent_at]) - 1
        hidden = model.text(by_hand, batch.positions, read=predicted)
    assert torch.allclose(again, hidden[len(batch.text_at) :], atol=1e-5)
    assert (logp - true_logp).abs().max() > 1e-4


def run(tiny, out, *words):
    """Two steps of dift.py in this process -> its log, the checkpoint's folder."""
    base = [f"MODEL={tiny / 'base'}", f"DATA={tiny / 'data'}", f"OUT={out}", "STEPS=2", "TEST_ROWS=0", "K=4"]
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, "dift.py", *base, "GLOBAL_BATCH=4", "WARMUP=5", *words)
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], newest_checkpoint(out)


def test_a_run_with_a_bottleneck_and_self_fed_rows(tiny, tmp_path):
    plain, _ = run(tiny, tmp_path / "plain")
    both, _ = run(tiny, tmp_path / "both", "BOTTLENECK=1.0", "SELF_FED=1.0")
    assert both[0]["ce"] != pytest.approx(plain[0]["ce"], abs=1e-6)
    none, _ = run(tiny, tmp_path / "none", "BOTTLENECK=0.0", "SELF_FED=0.0")
    assert [entry["loss"] for entry in none] == [entry["loss"] for entry in plain]


def test_markers_alone_and_pauses(tiny, tmp_path, rows):
    """Markers: blocks are empty. Pauses: pads in training and in generation. Neither has an imagery loss."""
    log, folder = run(tiny, tmp_path / "markers", "IMAGERY=markers")
    model = load_model(folder)
    assert model.K == 0 and log[0]["latents"] == 0
    text = model.tokenizer.decode(encode_row(model, rows[0]).ids)
    assert "<|latent_start|><|latent_end|>" in text

    log, folder = run(tiny, tmp_path / "pause", "IMAGERY=pause")
    assert log[0]["sim"] == 0 and log[0]["latents"] > 0
    model = load_model(folder)
    assert model.config.imagery == "pause"
    fed = model.feedback(torch.randn(2, model.config.text_config.hidden_size))
    assert torch.equal(fed[1], model.pad_embedding())


def test_another_imagery_does_not_go_on(tiny, tmp_path):
    run(tiny, tmp_path / "run")
    with pytest.raises(SystemExit, match="IMAGERY"):
        run(tiny, tmp_path / "run", "IMAGERY=pause", "STEPS=3")
