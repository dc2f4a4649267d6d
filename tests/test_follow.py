"""Look-alikes to follow, and the ablations of dift.py that say which text may look where."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import imaginative, lively, refused, run_script, two_processes

import generate_data as gd
from lib import look_alikes, vocabulary
from lib.checkpoints import newest_checkpoint
from lib.command_line import override_constants
from lib.geometry import centroid_and_area
from lib.place import place_directions
from model import Sample, VisionCache, bottleneck_mask, collate, encode_row, generate, load_model

C = override_constants(vars(gd), ["P_FOLLOW=1.0"])


@pytest.fixture(scope="module", params=["SWING=0", "SWING=10 HIDDEN_AREA=0.004"])
def clips(request):
    """Test clips of one to four exchanges, and rows; the camera rests, or goes around as far as it may.

    Then a cone that passes behind another is smaller.
    """
    c = override_constants(vars(gd), ["P_FOLLOW=1.0", *request.param.split()])
    return [gd.toy_clip(c, "test", number)[:2] for number in range(24)]


def test_the_camera_goes_around_the_look_alikes_and_looks_at_them(clips, request):
    for clip, _ in clips:
        scene = clip.scene
        middle = np.mean([thing.path[0] for thing in scene.things], axis=0) * [1, 0, 1]
        seen = middle - scene.pos * [1, 0, 1]
        distance = np.linalg.norm(seen, axis=1)
        assert distance == pytest.approx(distance[0])  # an arc
        forward = scene.rot[:, :, 2] * [1, 0, 1]
        cosine = (forward * seen).sum(axis=1) / np.linalg.norm(forward, axis=1) / distance
        assert cosine == pytest.approx(1)
        turned = np.degrees(np.arctan2(seen[:, 0], seen[:, 2]))
        swing = 10 if "SWING=10" in request.node.callspec.params["clips"] else 0
        assert np.abs(turned[[0, -1]]) == pytest.approx(swing) and turned[0] == pytest.approx(-turned[-1])


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
        # a box reaches as far as its corners
        thing = clip.scene.things[0]
        reach = thing.half[0] * (2**0.5 if thing.shape == "box" else 1)
        for one in range(4):
            for other in range(one):
                apart = np.linalg.norm(paths[one] - paths[other], axis=1).min()
                assert apart > 2 * reach + 0.2
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


def test_each_overlay_has_something_to_show(clips):
    """No key frame of any of the four things is hidden, in whatever order they stand."""
    for clip, drafts in clips:
        for name in clip.moving:
            areas = clip.masks[name][drafts[0].keyframes].mean((1, 2))
            assert areas.min() >= clip.least_area
        assert not any("hidden" in text for draft in drafts for text in draft.locations)


def test_the_last_frame_is_a_key_frame_whatever_an_exchange_lasts():
    """Five frames of an exchange and two at rest: the places at the end are those of frame 6."""
    c = override_constants(vars(gd), ["P_FOLLOW=1.0", "EXCHANGE=5", "EXCHANGES=(1, 1)"])
    clip, drafts, _ = gd.toy_clip(c, "train", 0)
    assert len(clip.times) == 7 and [draft.keyframes for draft in drafts] == [[2, 4, 6]] * 2
    assert f"at {gd.format_seconds(clip.times[6])}?" in drafts[0].row["text_input"]


def test_look_alikes_are_a_function_of_the_seed():
    clip, drafts, _ = gd.toy_clip(C, "test", 3)
    again, rows, _ = gd.toy_clip(C, "test", 3)
    assert np.array_equal(clip.frames, again.frames) and clip.slots == again.slots
    assert [draft.row for draft in drafts] == [draft.row for draft in rows]
    c = override_constants(vars(gd), ["P_FOLLOW=1.0", "SEED=1"])
    assert [draft.row for draft in gd.toy_clip(c, "test", 3)[1]] != [draft.row for draft in drafts]


def test_who_guesses_that_a_thing_stays_is_seldom_right(monkeypatch):
    """31 % in the long run; 42 % if two could change places twice in a row. 200 scenes without pictures."""
    monkeypatch.setattr(look_alikes, "render", lambda *scene: (None, {}, {}))
    stays = []
    for number in range(200):
        clip = look_alikes.draw_look_alikes(C, np.random.default_rng(number), "clip", C.EXCHANGES)
        stays += [slots[0] == slots[-1] for slots in clip.slots.values()]
    assert len(stays) == 800 and np.mean(stays) < 0.35


def test_questions_for_4drl_hold_options_and_key_alone():
    clip, drafts, _ = gd.toy_clip(C, "rl_train", 1)
    (draft,) = drafts
    row = draft.row
    assert row["Type"].startswith("follow_") and row["Question"].endswith("s?")
    assert row[row["Correct"]] == draft.label
    assert sorted(row[letter] for letter in "ABCD") == sorted(vocabulary.SLOTS.values())
    assert "text_output" not in row and len(row["frame_paths"]) == len(clip.times)
    assert len(clip.slots[clip.moving[0]]) - 1 in C.RL_EXCHANGES


@pytest.mark.parametrize(
    "split, share, number, kind",
    [
        ("train", 0.0, 0.599, "object"),  # without look-alikes clips are what they were before there were any
        ("train", 0.0, 0.601, "camera"),
        ("rl_train", 0.0, 0.599, "both"),
        ("rl_train", 0.0, 0.601, "sequence"),
        ("test", 0.35, 0.349, "follow"),
        ("test", 0.35, 0.351, "object"),
        ("test", 0.35, 0.739, "object"),  # 0.6 of the rest: 0.35 + 0.6 x 0.65 = 0.74
        ("test", 0.35, 0.741, "camera"),
        ("rl_test", 0.35, 0.349, "follow"),
        ("rl_test", 0.35, 0.741, "sequence"),
        ("train", 1.0, 0.999, "follow"),
    ],
)
def test_the_first_number_of_a_clip_says_its_kind(split, share, number, kind):
    c = override_constants(vars(gd), [f"P_FOLLOW={share}"])
    assert gd.draw_kind(c, SimpleNamespace(random=lambda: number), split)[0] == kind


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


def test_blind_is_the_text_after_the_first_imagery(model, rows):
    """Text before it, and all that starts a block or stands in it, may look at the video."""
    sample = encode_row(model, rows[1], blind=True)
    text = "".join("1" if is_blind else "." for is_blind in sample.is_blind)
    ids = sample.ids.tolist()
    starts = [place for place, token in enumerate(ids) if token == model.token_id["latent_start"]]
    first, second = starts  # each with K = 4 latents and an end
    between, after = second - first - 5, len(ids) - second - 5
    assert text == "." * first + "....." + "1" * between + "....." + "1" * after
    assert not encode_row(model, rows[1]).is_blind.any()


def test_a_bottleneck_by_hand():
    """A video of two tokens v, a word w, two blocks (s, latent z, e) with a word after each; a short row."""
    T = 10  # v v w s z e w s z e: e and w after the first block are blind, its s and z are not
    visual = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    blind = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    none = torch.zeros(T, dtype=torch.bool)
    positions = torch.arange(T).expand(3, -1)
    one = Sample(torch.arange(T), positions, ~visual, none, visual, ~none, is_blind=blind)
    short = [torch.arange(4), positions[:, :4], ~visual[:4], none[:4], visual[:4], ~none[:4]]
    mask = bottleneck_mask(collate([one, Sample(*short)], 0))
    assert mask.shape == (2, 1, T, T)
    expected = """
        1.........
        11........
        111.......
        1111......
        11111.....
        ..1111....
        ..11111...
        11111111..
        111111111.
        ..11111111
    """
    lines = ["".join("1" if seen else "." for seen in line) for line in mask[0, 0]]
    assert lines == expected.split()
    # the row without a bottleneck looks at all before it, and its padding disturbs nothing
    assert torch.equal(mask[1, 0], torch.ones(T, T, dtype=torch.bool).tril())
    assert bottleneck_mask(collate([Sample(*short)], 0)) is None


def test_blind_text_reads_nothing_of_the_video_itself(tiny, rows):
    """In a network of one layer the video reaches blind text only through what it looks at: not at all."""
    model = lively(tiny, fast=False)
    model.qwen.model.language_model.layers = model.qwen.model.language_model.layers[:1]
    sample, seen = encode_row(model, rows[1], blind=True), encode_row(model, rows[1])
    for one, is_moved in ((sample, False), (seen, True)):
        batch = VisionCache(model).prepare(collate([one], model.token_id["pad"]))
        video = batch.video_features.requires_grad_()
        hidden = model.text(model.embed(batch, torch.ones(8, 64)), batch.positions, bottleneck_mask(batch))
        hidden[0, sample.is_blind].square().sum().backward()
        assert video.grad.abs().sum().item() > 0 if is_moved else not video.grad.any()


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


def test_rows_that_read_their_own_imagery(tiny, rows):
    """The second of two rows reads h_{t-1} of a first pass; targets stay, no gradient enters that pass."""
    model = lively(tiny)
    model.config.latent_norm = 6.0  # scaled as at inference
    samples = [encode_row(model, rows[0]), encode_row(model, rows[1], self_fed=True)]
    fed = VisionCache(model).prepare(collate(samples, model.token_id["pad"]))
    _, plain = batch_of(model, rows[:2])
    with torch.no_grad():
        _, imagined, targets = model(plain)
    assert torch.allclose(model.feedback(imagined).norm(dim=-1), torch.tensor(6.0))

    # by hand: latents given for all, the first row's four true ones and eight imagined ones
    latents = torch.cat([targets[:4], model.feedback(imagined)[4:]])
    results = []
    for batch, given in ((fed, None), (plain, latents)):
        logp, again, same = model(batch, given)
        (logp.sum() + again.sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([logp, again, *gradients])
        model.zero_grad(set_to_none=True)
        assert same is latents or torch.equal(same, targets)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * max(1, other.abs().max().item()))
    # the first row is read as ever, the second is not
    true_logp = model(plain)[0]
    count = int(samples[0].is_text.sum())
    assert torch.allclose(results[0][0][:count], true_logp[:count], atol=1e-5)
    assert (results[0][0] - true_logp)[count:].abs().max() > 1e-3


def test_a_pooling_with_weights_learns_from_rows_that_read_true_latents(tiny, rows):
    """Beside a self-fed row, too: only that row's latents are the model's own, and have no gradient."""
    model = lively(tiny)
    samples = [encode_row(model, rows[0]), encode_row(model, rows[1], self_fed=True)]
    batch = VisionCache(model).prepare(collate(samples, model.token_id["pad"]))
    scale = torch.ones(12, 1, requires_grad=True)
    pool, starts = model.pool, iter(range(0, 12, 4))
    model.pool = lambda *overlay: pool(*overlay) * scale[(start := next(starts)) : start + 4]
    logp, _, _ = model(batch)
    logp.sum().backward()
    assert (scale.grad[:4] != 0).all() and (scale.grad[4:] == 0).all()


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
    refused(lambda: load_model(folder, K=4), "K=0", "K=4")  # its delimiters are trained
    # from a base that never imagined, delimiters start as they do with other imagery, whatever the pooling
    base, ids = tiny / "base", [model.token_id[name] for name in ("latent_start", "latent_end")]
    one = load_model(base, K=0, pooling="strips", imagery="markers").embed_tokens(torch.tensor(ids))
    other = load_model(base, K=4, pooling="strips", imagery="pause").embed_tokens(torch.tensor(ids))
    assert torch.equal(one, other)

    log, folder = run(tiny, tmp_path / "pause", "IMAGERY=pause")
    assert log[0]["sim"] == 0 and log[0]["latents"] > 0
    model = load_model(folder)
    assert model.config.imagery == "pause"
    fed = model.feedback(torch.randn(2, model.config.text_config.hidden_size))
    assert torch.equal(fed[1], model.pad_embedding())


def test_pauses_are_fed_in_training_and_in_generation(tiny, rows, monkeypatch):
    """Whatever the overlays show, and whether or not a row reads its own imagery."""
    model = imaginative(tiny)
    model.config.imagery = "pause"
    pad = model.pad_embedding()
    inputs = []
    text = model.text
    monkeypatch.setattr(
        model, "text", lambda x, *given, **named: inputs.append(x) or text(x, *given, **named)
    )
    for self_fed in (False, True):
        _, batch = batch_of(model, rows[:2], self_fed=self_fed)
        logp, imagined, targets = model(batch)
        assert targets is None and len(imagined) == 12 and logp.isfinite().all()
        assert torch.equal(inputs[-1][batch.is_latent], pad.expand(12, -1))
    samples = [encode_row(model, row, answer=False) for row in rows[:4]]
    latents = torch.cat([answer.latents for answer in generate(model, samples, 40)])
    assert len(latents) >= 4 and torch.equal(latents, pad.expand_as(latents))


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_ablations_on_two_processes_equal_one(tiny, tmp_path, layout):
    """Which rows are blind or self-fed is drawn by step and place; all processes make as many passes."""
    words = ["BOTTLENECK=0.5", "SELF_FED=0.2", "MICRO_BATCH=2", "EVAL_EVERY=0"]
    one, _ = run(tiny, tmp_path / "one", *words)
    base = [f"MODEL={tiny / 'base'}", f"DATA={tiny / 'data'}", f"OUT={tmp_path / 'two'}", "STEPS=2", "K=4"]
    base += ["TEST_ROWS=0", "GLOBAL_BATCH=4", "WARMUP=5", f"PARALLEL={layout}"]
    two_processes("dift.py", *base, *words)
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    for mine, line in zip(one, lines, strict=True):
        for name in ("ce", "sim", "gnorm"):
            assert json.loads(line)[name] == pytest.approx(mine[name], abs=1e-5), name


def test_other_ablations_do_not_go_on(tiny, tmp_path):
    run(tiny, tmp_path / "run")
    for word in ("IMAGERY=pause", "BOTTLENECK=0.5", "SELF_FED=0.5"):
        with pytest.raises(SystemExit, match=word.split("=")[0]):
            run(tiny, tmp_path / "run", word, "STEPS=3")
