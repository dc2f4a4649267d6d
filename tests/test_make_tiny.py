"""tools/make_tiny.py: rows that ground and bind letters, the random network, the chain of stages."""

import json
import math
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refused, run_script, write_data
from safetensors.torch import load_file
from test_generate_data import LAST, scene_of
from transformers import AutoTokenizer

import generate_data as gd
from lib import geometry, vocabulary
from lib.clips import Clip
from lib.command_line import override_constants
from lib.rows import read_rows
from tools import make_tiny, measure_base

FEW = ["CLIPS=4", "TEST_CLIPS=2", "OPTION_ROWS=60", "OPTION_TEST_ROWS=6", "TOY_CLIPS=(4, 2, 1, 1)"]
FEW += ["EYES=(4, 3, 1e-3)", "VOCAB=512", "MICRO_BATCH=4", "PROCESSES=1", "WORKERS=2"]
STAGES = [("ground", "grounding cells", 2, 1e-3, "all"), ("easy", "plain", 3, 5e-4, "letters")]
C = override_constants(vars(make_tiny), [])
DATA = make_tiny.data_constants(C)
DATA.SEED = 0  # clips that no network of these tests has learned from
PATCHING = (7, 2, 2)  # of assets/tiny_network.json
LEARN = ["EYES_BATCH=4", "LOG_EVERY=10", "WORKERS=1"]
MOTION_WORDS = "mov|pan|tilt|roll|dolly|truck|pedestal|toward|away|closer|farther|speed|up\\b|down"


def make(patch, out, *words):
    """Runs the script in this process."""
    run_script(patch, "tools/make_tiny.py", f"OUT={out}", *FEW, *words)


def toy_clip(split, number):
    """A clip of the toy world."""
    return gd.toy_clip(DATA, split, number)[0]


def sights(number):
    """What the visual encoder sees of a clip."""
    return make_tiny.sights(number, DATA, PATCHING)


def flow(clip):
    """The optical flow of a clip."""
    return make_tiny.flow(clip, PATCHING, DATA.HFOV)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, random network and a first stage of two real steps."""
    out = tmp_path_factory.mktemp("make_tiny") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        make(patch, out, f"STAGES={STAGES[:1]}")
    return out


# ---------------------------------------------------------------- rows


def test_every_kind_of_row_is_there_and_read_by_the_stages(folder):
    """Splits share no clip; ids are unique; only drills and tracks have no option letter for a key."""
    no_key, clips, kinds = ("grounding", "fine", "near", "far", "cells"), [], set()
    for name in ("pretrain", "pretrain_test", "train_imagery", "test_imagery"):
        rows = read_rows(folder / f"rows/{name}.jsonl")
        assert len({row.id for row in rows}) == len(rows)
        assert all(row.key in row.options or row.subtask in no_key for row in rows)
        clips += {row.clip for row in rows}
        kinds |= {row.subtask for row in rows}
    assert len(clips) == len(set(clips)) and {*no_key, "options", "colour"} <= kinds


def test_cells_name_what_covers_them():
    """Worked by hand: 28 pixels are 2 x 2 cells; under a quarter is hidden, the larger of two things wins."""
    masks = {name: np.zeros((4, 28, 28), bool) for name in ("green box", "white ball", "sun")}
    masks["green box"][:2, :14, :14] = True
    masks["sun"][:, :14, 14:21] = True
    masks["white ball"][2:, 14:, :14] = True
    masks["white ball"][2:, 14:, 14:17] = True  # three columns of fourteen
    masks["white ball"][2:, :14, 14:18] = True  # less than the sun's seven columns
    clip = Clip("hand", times=[0, 1, 2, 3], masks=masks)
    colours = "1.1: green sun\n1.2: hidden hidden\n2.1: hidden sun\n2.2: white hidden"
    assert make_tiny.cells(clip, 0) == colours
    assert make_tiny.cells(clip, 1) == "1.1: box sun\n1.2: hidden hidden\n2.1: hidden sun\n2.2: ball hidden"


def test_cells_follow_the_size_of_the_frame():
    """Cells are about 14 pixels wide: 6 x 6 of a frame of 84, and every line has a word for each."""
    large = override_constants(vars(gd), ["SIZE=84"])
    clip, _, _ = gd.toy_clip(large, "pretrain", 0)
    lines = make_tiny.cells(clip, 1).split("\n")
    assert len(lines) == 6 * DATA.FRAMES // 2 and all(len(line.split(": ")[1].split()) == 6 for line in lines)
    assert lines[0].startswith("1.1: ") and lines[-1].startswith("4.6: ")
    assert {word for line in lines for word in line.split()[1:]} <= {*vocabulary.SHAPES, "sun", "hidden"}


@pytest.mark.parametrize(
    ("label", "ends"),
    [
        ("Roll Clockwise", ["sloping-right", "sloping-left"]),
        ("Roll Counter-Clockwise", ["sloping-left", "sloping-right"]),
    ],
)
def test_a_track_of_the_horizon_names_its_lower_end(label, ends):
    """Before and after a roll: two frame pairs, each of one and the same frame twice."""
    for seed in range(4):
        scene, *_ = scene_of("camera", seed, [(0, LAST, label)])
        scene.rot = scene.rot[[0, 0, -1, -1]]
        frames = np.zeros((4, DATA.SIZE, DATA.SIZE, 3), np.uint8)
        clip = Clip("roll", frames, times=[0, 1, 2, 3], scene=scene)
        entries = make_tiny.track(clip, "horizon", False, DATA).split(", ")
        assert [entry.split()[-1] for entry in entries] == ends


def test_grounding_rows_name_no_motion(folder):
    """Pretraining rows track things over frame pairs without any word of motion."""
    rows = [row for row in read_rows(folder / "rows/pretrain.jsonl") if row.image_input]
    assert {row.subtask for row in rows} >= {"grounding", "fine", "cells"}
    for row in rows:
        text = (row.text_input + row.text_output).lower().replace("upper", "")
        assert not re.search(MOTION_WORDS, text)
        if row.subtask == "grounding":
            lines = re.search("<answer>(.*)</answer>", row.text_output, flags=re.S)[1].split("\n")
            assert all(len(line.split(": ")[1].split(", ")) == DATA.FRAMES // 2 for line in lines)


def test_option_rows_are_answered():
    """By turns: two drills, a question that names an option, and one whose reasoning names its label."""
    for number in range(0, 120, 4):
        four = range(number, number + 4)
        rows = [make_tiny.option_row("pretrain", one, C.SEED, DATA.SIZE).row for one in four]
        assert [row["subtask"] for row in rows] == ["near", "far", "options", "bind"]
        bound = re.search(r"<answer>([A-D])\. (.*)</answer>", rows[3]["text_output"])
        assert f"{bound[1]}. {bound[2]}" in rows[3]["text_input"].split("\n")
        assert rows[3]["text_output"].count(f"{bound[2]}.</think>") == 1
        assert rows[3]["supervise"] == "letters"
        assert all(row["image_input"] == [] for row in rows)
        asked = re.search(r'says "(.*)"\.', rows[2]["text_input"])[1]
        answer = re.search("<answer>(.*)</answer>", rows[2]["text_output"])[1]
        assert answer.endswith(". " + asked) and answer in rows[2]["text_input"].split("\n")


def test_two_motions_are_bound_as_they_are_asked():
    """Both labels of a compound question stand in the reasoning, which then says them as the option does."""
    kinds = Counter()
    for number in range(3, 800, 4):
        row = make_tiny.option_row("pretrain", number, C.SEED, DATA.SIZE).row
        label = re.search(r"<answer>[A-D]\. (.*)</answer>", row["text_output"])[1]
        both = re.fullmatch(r"Camera: (.*); (.*): (.*)|First ([^,]*), then (.*)", label)
        kinds[bool(both), label.startswith("Camera")] += 1
        if both:
            *before, last = row["text_output"].split("</think>")[0].split(label)
            one, two = both[1] or both[4], both[3] or both[5]
            assert before[0].index(one) < before[0].index(two) and last == "."
            assert both[2] is None or f" {both[2]} " in row["text_input"].split("\n")[0]
    assert min(kinds[True, True], kinds[True, False]) > 10 and kinds[False, False] > 100


def check_pairs(text, options, gaps):
    """Every label of a drill's text, with one of the gaps and its letter, is in the list -> the letters."""
    letters = []
    for gap in gaps:
        label = next(x[3:] for x in options if text.startswith(x[3:] + gap + x[0]))
        letters.append(text[len(label + gap)])
        assert f"{letters[-1]}. {label}" in options
        text = text[len(label + gap) + 1 :].removeprefix("\n")
    assert text == ""
    return letters


def test_a_far_drill_names_the_letters_of_its_options():
    """Eight labels of the question's list with their letters, at growing distances."""
    seen = set()
    for number in range(60):
        question, answer = make_tiny.drill(np.random.default_rng(number), near=False, size=DATA.SIZE)
        options = question.split("\n\n")[1].split("\n")
        assert len(options) == len(set(options)) == 4
        seen |= set(check_pairs(answer, options, ("", "\n", ".\n", ".</think>\n<answer>") * 2))
    assert seen == set("ABCD")


def test_a_near_drill_copies_each_list_before_its_labels():
    """Three lists of four as in the question, after each six labels with their letters."""
    seen = set()
    for number in range(20):
        question, answer = make_tiny.drill(np.random.default_rng(number), near=True, size=DATA.SIZE)
        lists, parts = question.split("\n\n")[1:], answer.split("\n\n")
        assert len(lists) == len(parts) == 3
        for listed, part in zip(lists, parts):
            assert part.startswith(listed + "\n")
            options = listed.split("\n")
            seen |= set(check_pairs(part.removeprefix(listed + "\n"), options, ("", "\n") * 3))
    assert seen == set("ABCD")


# ---------------------------------------------------------------- eyes


def test_covers_are_shares_of_cells():
    """Worked by hand: 2 x 2 cells, a lit green box over half of the first; the sun at first over the last."""
    masks = np.zeros((2, 2, 28, 28), bool)
    masks[0, :, :7, :14] = True
    masks[1, 0, 14:, 14:] = True  # in one of two frames
    cover = make_tiny.covers(masks, ["green box", "sun"], [1, 0])
    words = [*vocabulary.COLOURS, *vocabulary.SHAPES, "sun", "sky", "lit"]
    names = [*words, *(f"{word} at last" for word in words), "left", "right", "upper", "lower"]
    shown = [{name: share for name, share in zip(names, cell) if share} for cell in cover.tolist()]
    box = {name: 0.5 for word in ("green", "box", "lit") for name in (word, f"{word} at last")}
    assert shown == [
        box | {"left": 1, "upper": 1},
        {"right": 1, "upper": 1},
        {"left": 1, "lower": 1},
        {"sun": 1, "right": 1, "lower": 1},
    ]


def test_sights_are_a_video_and_two_overlays():
    """A cover and a flow for each visual token; only overlays are highlighted, only the video moves."""
    video, *overlays = sights(3)
    lit = len(vocabulary.COLOURS) + len(vocabulary.SHAPES) + 2
    assert video[1][0] == DATA.FRAMES // 2 and len(overlays) == 2 and not video[2][:, lit].any()
    for pixels, grid, cover, shift in (video, *overlays):
        assert len(pixels) == np.prod(grid) == 4 * len(cover) == 4 * len(shift)
    assert video[3].any() and not any(shift.any() for *_, shift in overlays)
    for _, _, cover, _ in overlays:
        colour = cover[:, : len(vocabulary.COLOURS)]
        thing = colour[:, (colour * cover[:, [lit]]).sum(0).argmax()]
        assert 0 < cover[:, lit].sum() and np.allclose(cover[:, lit], thing)


def test_the_sky_is_above_the_horizon():
    """Of an upright frame: above the height that "track" names is nearly all sky or things, below it none."""
    for number in range(30):
        _, grid, cover, _ = sights(number)[0]
        right, up, forward = toy_clip("train", number).scene.rot[0, 1]
        horizon = 0.5 + forward / up / geometry.view_width(DATA.HFOV)
        if abs(right) < 0.02 and 0.3 < horizon < 0.7:
            break
    sky = cover[: grid[1] * grid[2] // 4, len(vocabulary.COLOURS) + len(vocabulary.SHAPES) + 1]
    side = math.isqrt(len(sky))
    middle, rows = (np.arange(side) + 0.5) / side, sky.reshape(side, side).max(1)
    assert abs(right) < 0.02 and 0.3 < horizon < 0.7  # there is such a clip
    assert (rows[middle < horizon - 0.15] > 0.9).all() and (rows[middle > horizon + 0.15] == 0).all()


def test_eyes_alone_are_trained(folder):
    """Only the visual encoder moves, and after them no stage moves it."""
    random, eyes = (load_file(folder / name / "model.safetensors") for name in ("random", "eyes"))
    stage = load_file(folder / "ground/step_000002/model.safetensors")
    for name in random:
        if "visual" in name:
            assert torch.equal(stage[name], eyes[name])
            assert not torch.equal(eyes[name], random[name])
        elif "embed_tokens" not in name:  # that one has got rows for the latent tokens
            assert torch.equal(eyes[name], random[name])


def test_eyes_learn(folder, tmp_path, capsys):
    """Fifty steps on four clips: the loss comes well below what knowing no picture costs."""
    c = override_constants(vars(make_tiny), ["EYES=(4, 50, 3e-3)", *LEARN])
    clips = make_tiny.all_sights(c, make_tiny.data_constants(c), PATCHING)
    make_tiny.train_eyes(folder / "random", tmp_path / "eyes", c, clips)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+),", capsys.readouterr().out)]
    some = [sight for number in range(4) for sight in sights(number)]
    covers = np.concatenate([cover for _, _, cover, _ in some])
    blind = torch.from_numpy(covers).mean(0).expand(len(covers), -1)
    assert losses[-1] < 0.9 * F.binary_cross_entropy(blind, torch.from_numpy(covers))
    model = make_tiny.load_model(tmp_path / "eyes", K=0, pooling="grid")
    with torch.no_grad():
        features = make_tiny.features_of(model, some)
    width = features.shape[1]
    assert features.mean(0).norm() < 0.1 * width**0.5  # no direction that all of them share
    assert features.norm(dim=1).mean().item() == pytest.approx(width**0.5, rel=0.1)  # a hidden state's


def scene(label, kind="camera"):
    """The first toy clip of one whole camera movement, or (kind "object") of a thing that moves that way."""
    for number in range(2000):
        clip = toy_clip("test", number)
        facts = clip.facts[clip.moving[0]]
        if kind == "camera" and [part[2] for part in clip.camera] == [label]:
            return clip
        if kind == "object" and not clip.camera and facts.get("direction") == label:
            return clip


@pytest.mark.parametrize(
    "label, x, y", [("Pan Left", 1, 0), ("Pan Right", -1, 0), ("Tilt Up", 0, 1), ("Pedestal Up", 0, 1)]
)
def test_flow_has_the_sign_of_the_camera(label, x, y):
    """Film conventions: as the camera turns left the scene moves right, as it rises the scene sinks."""
    right, down = flow(scene(label)).reshape(-1, 2).mean(0)
    assert (right * x > 2 * abs(down)) if x else (down * y > 2 * abs(right))


def test_flow_of_a_roll_turns_and_of_a_dolly_spreads():
    """Left and right half of the frame: a roll moves them against each other up and down, a dolly asunder."""
    halves = {}
    for label in ("Roll Clockwise", "Roll Counter-Clockwise", "Dolly In", "Dolly Out"):
        parts = flow(scene(label)).reshape(4, 4, 4, 4, 2)  # pair, row, column, patch, x and y
        halves[label] = (parts[:, :, 2:] - parts[:, :, :2]).mean((0, 1, 2, 3))
    assert halves["Roll Clockwise"][1] * halves["Roll Counter-Clockwise"][1] < 0
    assert halves["Dolly In"][0] > 0 > halves["Dolly Out"][0]


@pytest.mark.parametrize(
    "label, x, y", [("Moving Left", -1, 0), ("Moving Right", 1, 0), ("Moving Up", 0, -1)]
)
def test_flow_is_the_way_of_a_thing_before_a_still_camera(label, x, y):
    """Patches that the thing covers move its way, patches without a moving thing stay where they are."""
    clip = scene(label, "object")
    shift = flow(clip).reshape(4, 16, 4, 2)  # pair, token, patch, x and y

    def share(name):
        mask = clip.masks[name][::2].reshape(4, 4, 2, 7, 4, 2, 7)  # the first frame of each pair
        return mask.mean((3, 6)).transpose(0, 1, 3, 2, 4).reshape(4, 16, 4)

    first = clip.moving[0]
    way = shift[share(first) > 0.6].mean(0)
    assert (way[0] * x > 2 * abs(way[1])) if x else (way[1] * y > 2 * abs(way[0]))
    assert np.abs(shift[sum(share(name) for name in clip.moving) == 0]).max() < 1e-4


def test_flow_is_learned_beside_the_covers(folder, tmp_path, capsys):
    """Eighty steps on four clips tell more of the flow; what tells the covers stays, only vision changes."""
    c = override_constants(vars(make_tiny), ["EYES=(4, 3, 1e-3)", *LEARN])
    clips = make_tiny.all_sights(c, make_tiny.data_constants(c), PATCHING)
    make_tiny.train_flow(folder / "random", tmp_path / "flow", 80, 3e-3, c, clips)
    lines = re.findall(r"covers changed ([\d.]+) \| flow missed ([\d.]+)", capsys.readouterr().out)
    assert len(lines) == 8
    assert float(lines[-1][1]) < 0.7 * float(lines[0][1]) and float(lines[-1][0]) < 0.1
    before = load_file(folder / "random/model.safetensors")
    after = load_file(tmp_path / "flow/model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    changed -= {"model.embed_tokens.weight"}  # that one has got rows for the latent tokens
    assert changed and all("visual" in name for name in changed)


def test_place_is_shrunk_as_its_formula_says(folder, tmp_path, capsys):
    """z' = g (I - (1 - s) P) (z - m): what is in the subspace P falls to s of it, beside what is not."""
    c = override_constants(vars(make_tiny), ["EYES=(4, 3, 1e-3)", "PLACE=(0.25, 3.0)", *LEARN])
    clips = make_tiny.all_sights(c, make_tiny.data_constants(c), PATCHING)
    make_tiny.shrink_place(folder / "random", tmp_path / "place", c, clips)
    videos = [clip[0] for clip in clips]
    with torch.no_grad():
        z, after = (
            make_tiny.features_of(make_tiny.load_model(path, K=0, pooling="grid"), videos)
            for path in (folder / "random", tmp_path / "place")
        )
    mean, directions, share = make_tiny.place_directions(z, 16)
    inside = (z - mean) @ directions.T @ directions
    expected = 3.0 * (z - mean - 0.75 * inside)
    assert torch.allclose(after, expected, atol=1e-4 * expected.abs().max().item())
    # what differs between cells, against all that is not in P: s² of what it was
    shares = []
    for x in (z, after):
        x = x - x.mean(dim=0)
        cells = x.view(-1, 16, x.shape[1]).mean(dim=0) @ directions.T
        shares.append(cells.square().sum() / (x - x @ directions.T @ directions).square().sum())
    assert (shares[1] / shares[0]).item() == pytest.approx(0.25**2, rel=1e-3)
    left = make_tiny.place_directions(after, 16)[2]
    assert left < share and f"{share:.3f}, now {left:.3f}" in capsys.readouterr().out
    # vision alone is changed, in its last layer
    before, new = (load_file(path / "model.safetensors") for path in (folder / "random", tmp_path / "place"))
    changed = {name for name in new if not torch.equal(before[name], new[name])}
    changed -= {"model.embed_tokens.weight"}  # that one has got rows for the latent tokens
    assert {name.split("visual.")[1] for name in changed} == {"merger.mlp.2.weight", "merger.mlp.2.bias"}


# ---------------------------------------------------------------- stages


def test_a_stage_is_a_real_run_of_dift(folder):
    """Two steps from the network with trained eyes, on the stage's own rows, vision frozen."""
    run = json.loads((folder / "ground/step_000002/config.json").read_text())["run"]
    assert run["K"] == 0 and run["STEPS"] == 2
    assert Path(run["MODEL"]).name == "eyes" and Path(run["DATA"]).name == "stage_ground.jsonl"
    rows = read_rows(folder / "rows/stage_ground.jsonl")
    assert {row.subtask for row in rows} == {"grounding", "cells"}
    assert {row.supervise for row in rows} == {"all"}


def test_a_chain_goes_on_where_it_stopped(folder, monkeypatch, capsys):
    """The finished stage is skipped, the next starts from it on its own rows; a failed one is named."""
    asked, run = [], subprocess.run

    def fake(command, **options):
        if "torch.distributed.run" not in command:
            return run(command, **options)
        asked.append(dict(word.split("=", 1) for word in command if re.match("[A-Z_]+=", word)))
        return subprocess.CompletedProcess(command, len(asked) - 1)

    monkeypatch.setattr(subprocess, "run", fake)
    before = (folder / "rows/pretrain.jsonl").stat().st_mtime_ns
    make(monkeypatch, folder, f"STAGES={STAGES}", "MOST_STEPS=2")
    assert "python -m tools.measure_base" in capsys.readouterr().out
    assert asked[0]["MODEL"] == str(folder / "ground")
    assert asked[0]["GLOBAL_BATCH"] == "32"  # the stages' own, whatever dift.py's default is
    assert asked[0]["STEPS"] == "2" and float(asked[0]["LR"]) == 5e-4
    assert (folder / "rows/pretrain.jsonl").stat().st_mtime_ns == before
    plain = read_rows(Path(asked[0]["DATA"]))
    assert plain and all(row.subtask == "far" and row.supervise == "letters" for row in plain)
    assert not any(re.search(" and [A-Z]|First|Camera: ", row.text_input) for row in plain)
    refused(lambda: make(monkeypatch, folder, f"STAGES={STAGES}"), "stage easy failed")
    refused(lambda: make(monkeypatch, folder, "SEED=2"), "another SEED")
    assert len(asked) == 2


def test_a_stage_may_be_the_encoder_alone(folder, monkeypatch):
    """A stage without rows changes vision, once, and the next stage starts from it."""
    asked, run = [], subprocess.run

    def fake(command, **options):
        if "torch.distributed.run" not in command:
            return run(command, **options)
        asked.append(dict(word.split("=", 1) for word in command if re.match("[A-Z_]+=", word)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake)
    stages = [STAGES[0], ("flow", "", 2, 1e-3, ""), ("after", "plain", 3, 5e-4, "letters")]
    make(monkeypatch, folder, f"STAGES={stages}")
    written = (folder / "flow/model.safetensors").stat().st_mtime_ns
    make(monkeypatch, folder, f"STAGES={stages}")
    assert (folder / "flow/model.safetensors").stat().st_mtime_ns == written
    assert [constants["MODEL"] for constants in asked] == [str(folder / "flow")] * 2


# ---------------------------------------------------------------- the network


def test_a_letter_is_one_token_wherever_it_stands(tiny, tmp_path):
    """Even if the corpus has "blueB" so often that the tokenizer would merge it; "-Clockwise" stays whole."""
    (tmp_path / "data").mkdir()
    row = {"text": "<answer>B</answer> blueB whiteC LeftA\nblueB whiteC LeftA Counter-Clockwise"}
    (tmp_path / "data" / "rows.jsonl").write_text((json.dumps(row) + "\n") * 50)
    make_tiny.make_network(tmp_path / "base", tmp_path / "data", tiny / "config.json", prompts=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    pieces = tokenizer.tokenize(row["text"])
    assert [piece for piece in pieces if piece in "ABC"] == list("BBCABCA")
    assert "-Clockwise" in pieces and tokenizer.decode(tokenizer(row["text"])["input_ids"]) == row["text"]


def test_a_tiny_network_is_reproducible_and_speaks_its_data(tiny, tmp_path):
    rows = read_rows(tiny / "data" / "train_imagery.jsonl")
    write_data(tmp_path / "data")
    make_tiny.make_network(tmp_path / "base", tmp_path / "data", tiny / "config.json", prompts=0)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tiny / "base" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    text = rows[0].text_output
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("<|im_start|><|video_pad|><|vision_end|>")["input_ids"]) == 3
    for text in ("\nB. Pan Right", "<answer>B. Pan Right"):  # one token for a letter, wherever it stands
        assert "B" in tokenizer.tokenize(text)
    config = json.loads((tiny / "base" / "config.json").read_text())
    assert config["video_token_id"] == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert F.one_hot(torch.tensor(tokenizer("é 字")["input_ids"])).sum() > 2  # any text has tokens


def test_a_letter_is_bound_if_it_is_that_of_the_words_beside_it():
    question = SimpleNamespace(text_input="Pick.\n\nA. Left\nB. Far Left")
    texts = ["<answer>A. Left</answer>", "<answer>B. Left</answer>", "<answer>B. Far Left</answer>"]
    texts += ["<answer>A. Right</answer>", "<answer>A.", "Left"]  # no option's words
    assert measure_base.bound_letters([question] * 6, texts) == [True, False, True]
