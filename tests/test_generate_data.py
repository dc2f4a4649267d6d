"""The toy world's signs and labels, the questions' honesty, and the files' exactness."""

import json
import re
import runpy
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate_data as gd
from lib import geometry, vocabulary
from lib.clips import Draft
from lib.command_line import override_constants
from lib.contact_sheet import draw_sheet
from lib.ray_tracer import camera_rays, render
from lib.rows import read_rows
from lib.toy_scenes import (
    Plan,
    draw_motion,
    draw_scene,
    draw_style,
    progress_at,
    scene_is_valid,
)

SCRIPT = Path(gd.__file__)
c = override_constants(vars(gd), [])  # of the toy world, as they stand in the script
FEW = ["TRAIN_CLIPS=14", "TEST_CLIPS=4", "RL_TRAIN_CLIPS=4", "RL_TEST_CLIPS=2", "INSPECT=2"]
LAST = c.FRAMES - 1


def generate(monkeypatch, out, *words):
    """Runs the script in this process with KEY=value words; returns the folder."""
    monkeypatch.setattr(sys, "argv", ["generate_data.py", f"OUT={out}", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return Path(out)


def files_of(folder):
    """{relative path: bytes} of all files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(path):
    """The raw rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def scene_of(kind, seed, camera=(), **labels):
    """A rendered scene with the given camera segments and the given labels of its moving object.

    Returns the scene, its masks, its silhouettes' areas and the name of its first target.
    """
    rng = np.random.default_rng(seed)
    anchor = camera[0][1] if len(camera) == 2 else LAST // 2
    motion = draw_motion(c, rng, "camera")
    for name, value in labels.items():
        setattr(motion, name, value)
    for _ in range(5000):
        scene = draw_scene(c, rng, Plan(kind, list(camera), [motion], anchor))
        if scene_is_valid(c, scene):
            _, masks, areas = render(scene, draw_style(c, rng), c.SIZE, c.HFOV, c.LINES)
            target = scene.targets[0].name
            if min(masks[target][[0, -1]].mean((1, 2))) > 0.02:
                return scene, masks, areas, target
    raise AssertionError(f"no scene for {camera} {labels}")


def locate(mask):
    """Centroid and area of a mask (H, W) of the toy world, None if it is hidden."""
    return geometry.centroid_and_area(mask[None], c.HIDDEN_AREA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small finished toy folder."""
    with pytest.MonkeyPatch.context() as patch:
        return generate(patch, tmp_path_factory.mktemp("toy") / "out", *FEW, "WORKERS=2")


@pytest.fixture(scope="module")
def clips():
    """120 toy clips with the drafts of their rows."""
    return [gd.toy_clip(c, "train", number)[:2] for number in range(120)]


# ---------------------------------------------------------------- the world


# film conventions: how the landmark shifts in the image (x right, y down) or grows
@pytest.mark.parametrize(
    ("label", "axis", "sign", "sun"),
    [
        ("Pan Left", 0, 1, True),
        ("Pan Right", 0, -1, True),
        ("Tilt Up", 1, 1, True),
        ("Tilt Down", 1, -1, True),
        ("Truck Left", 0, 1, False),
        ("Truck Right", 0, -1, False),
        ("Pedestal Up", 1, 1, False),
        ("Pedestal Down", 1, -1, False),
        ("Dolly In", 2, 1, False),
        ("Dolly Out", 2, -1, False),
    ],
)
def test_camera_movements_shift_the_landmark_as_in_film(label, axis, sign, sun):
    """Eq. 3 on the masks; the sun is at infinity, so only turning the camera moves it."""
    for seed in range(4):
        _, masks_of, _, target = scene_of("camera", seed, [(0, LAST, label)])
        masks = masks_of[target]
        cue = gd.static_cue(masks[0], masks[-1])
        assert sign * cue[axis] > (0.15, 0.15, np.log(1.5))[axis]
        suns = [locate(mask) for mask in masks_of["sun"][[0, -1]]]
        if all(suns) and min(s[2] for s in suns) > 0.01 and min(s[1] for s in suns) > 0.1:
            moved = np.array(suns[1][:2]) - suns[0][:2]
            assert sign * moved[axis] > 0.15 if sun else np.abs(moved).max() < 0.06


@pytest.mark.parametrize(("label", "sign"), [("Roll Clockwise", 1), ("Roll Counter-Clockwise", -1)])
def test_roll_turns_the_horizon_the_other_way(label, sign):
    """A camera that rolls clockwise sees the right end of the horizon rise: less sky in the right half."""
    for seed in range(4):
        scene, *_ = scene_of("camera", seed, [(0, LAST, label)])
        is_sky = camera_rays(scene.rot, c.SIZE, c.HFOV)[1] > 0
        left, right = np.split(is_sky, 2, axis=2)
        lean = (left.mean((1, 2)) - right.mean((1, 2))).round(6)
        assert sign * (lean[-1] - lean[0]) > 0.15


def test_two_segments_follow_each_other():
    """Each segment moves its own axis, in its own frames."""
    _, masks_of, _, target = scene_of("camera", 1, [(0, 3, "Pan Left"), (3, LAST, "Dolly In")])
    masks = masks_of[target]
    first, second = gd.static_cue(masks[0], masks[3]), gd.static_cue(masks[3], masks[-1])
    assert first[0] > 0.15 and abs(first[2]) < 0.4
    assert abs(second[0]) < 0.15 and second[2] > np.log(1.4)


@pytest.mark.parametrize("label", vocabulary.DIRECTIONS)
def test_objects_move_as_labelled(label):
    """With a resting camera the centroid and the area show the label's direction."""
    right, up, forward = vocabulary.DIRECTIONS[label]
    for seed in range(2):
        _, masks_of, _, target = scene_of("object", seed, direction=label, step=vocabulary.DIRECTIONS[label])
        masks = masks_of[target]
        x, y, growth = gd.static_cue(masks[0], masks[-1])
        for moved, way in ((x, right), (-y, up)):
            assert moved * way > 0.12 if way else abs(moved) < (0.25 if forward else 0.1)
        assert growth * -forward > np.log(1.5) if forward else abs(growth) < np.log(1.6)


def test_object_directions_are_free_of_camera_motion():
    """While the camera trucks along with it, a thing that moves right stays in place in the image."""
    camera = [(0, LAST, "Truck Right")]
    _, masks, _, target = scene_of("object", 0, camera, direction="Moving Right", step=(1, 0, 0))
    x, _, _ = gd.static_cue(*masks[target][[0, -1]])
    assert abs(x) < 0.15


def test_masks_are_exact_under_occlusion():
    """Masks are disjoint, the nearer thing hides the farther, a mask is where its thing changes pixels."""
    scene, *_ = scene_of("object", 3)
    thing = scene.things[0]
    middle = (thing.path + scene.pos) / 2
    half = thing.half * np.float32(0.4)
    front = replace(thing, name="red copy", colour="white", shape="ball", path=middle, half=half)
    scene.things = [thing, front]
    style = draw_style(c, np.random.default_rng(0))
    both, masks, areas = render(scene, style, c.SIZE, c.HFOV, c.LINES)
    behind = thing.name
    assert not (masks[behind] & masks["red copy"]).any()
    assert (masks["red copy"].sum((1, 2)) == areas["red copy"]).all()
    assert (masks[behind].sum((1, 2)) < areas[behind]).all() and masks[behind].any()
    scene.things[1] = replace(front, colour="purple")
    other, _, _ = render(scene, style, c.SIZE, c.HFOV, c.LINES)
    assert ((both != other).any(-1) == masks["red copy"]).all()


def test_projection_agrees_with_the_masks():
    """The projected centre of a ball is the centre of its mask, and depth is along the camera's axis."""
    scene, *_ = scene_of("object", 5)
    ball = replace(scene.things[0], shape="ball", half=np.float32([0.5, 0.5]), name="ball")
    scene.things = [ball]
    style = draw_style(c, np.random.default_rng(0))
    masks = render(scene, style, c.SIZE, c.HFOV, c.LINES)[1]["ball"]
    x, y, depth = geometry.project(ball.path, scene.pos, scene.rot, c.HFOV)
    centre_x, centre_y, area = locate(masks[0])
    assert abs(centre_x - x[0]) < 0.03 and abs(centre_y - y[0]) < 0.03
    radius = np.sqrt(area / np.pi) * geometry.view_width(c.HFOV) * depth[0]
    assert abs(radius - 0.5) < 0.12


# ---------------------------------------------------------------- labels and words


def test_direction_labels_are_exact():
    """Each label is found for its own vector, never its neighbour's; between two of them there is none."""
    for label, way in vocabulary.DIRECTIONS.items():
        assert geometry.direction_label(np.array(way) * 0.4) == label
    assert geometry.direction_label((-0.3, 0.3, 0)) == "Moving Left-Up"
    assert geometry.direction_label((-0.3, 0.12, 0)) is None  # 22 degrees: neither left nor left-up
    assert geometry.direction_label((0.3, 0, 0.25)) is None
    assert geometry.direction_label((0.01, 0.01, 0)) == "Stationary"


def test_distance_is_read_from_depth_and_not_from_the_direction():
    """A thing that moves left and comes nearer: one label each, by its own rule."""
    closer = np.linspace(6, 4, 8)
    facts = geometry.motion_labels((-0.5, 0, 0.1), closer)
    assert facts == {"direction": "Moving Left", "distance": "Getting Closer to Camera"}
    there_and_back = [5, 4.5, 4, 3.8, 3.8, 4, 4.5, 5]
    assert (
        geometry.motion_labels((0, 0, 0), there_and_back)["distance"] == "First Getting Closer, Then Farther"
    )
    back_and_there = [4, 4.5, 5, 5.3, 5.3, 5, 4.5, 4]
    assert (
        geometry.motion_labels((0, 0, 0), back_and_there)["distance"] == "First Getting Farther, Then Closer"
    )
    assert geometry.motion_labels((0, 0, 0), [5] * 8)["distance"] == "Maintaining Roughly the Same Distance"
    assert geometry.motion_labels((0, 0, 0), np.linspace(5, 4.3, 8))["distance"] is None


@pytest.mark.parametrize("label", vocabulary.SPEEDS)
def test_progress_has_the_labels_speed(label):
    """Early, middle and late steps of a path compare as the label says."""
    steps = np.diff(progress_at(label, np.linspace(0, 1, c.FRAMES)))
    early, middle, late = steps[:2].mean(), steps[2:5].mean(), steps[-2:].mean()
    orders = {
        "Constant": np.allclose(steps, steps[0]),
        "Speeding Up": early * 1.5 < middle < late / 1.2,
        "Slowing Down": early > middle * 1.2 > late * 1.5,
        "First Speeding Up, Then Slowing Down": middle > 1.5 * max(early, late),
        "First Slowing Down, Then Speeding Up": middle * 1.5 < min(early, late),
    }
    assert orders[label] and abs(steps.sum() - 1) < 1e-9


def test_overlay_is_equation_1():
    """Worked numbers: red at 0.4 over a grey pixel, and an untouched pixel."""
    frame = np.full((1, 2, 3), 100, np.uint8)
    out = gd.overlay(frame, np.array([[True, False]]), 0.4, (255, 0, 0))
    assert out.tolist() == [[[162, 60, 60], [100, 100, 100]]]


def test_locations_are_described_in_fifths():
    """Worked examples of the location words, and "hidden" for a thing that is too small."""
    mask = np.zeros((50, 50), bool)
    mask[40:50, 0:10] = True
    assert geometry.describe_location(locate(mask)) == "leftmost bottom small"
    assert geometry.describe_location(locate(np.zeros((50, 50), bool))) == "hidden"


# ---------------------------------------------------------------- questions


def test_no_question_has_two_true_answers(clips):
    """Options differ, are of the truth's own kind, and only the truth agrees with the scene's geometry."""
    seen = Counter()
    for clip, drafts in clips:
        for draft in drafts:
            row, label = draft.row, draft.label
            options = dict(re.findall(r"^([A-F])\. (.*)$", row["text_input"], flags=re.M))
            seen[row["subtask"]] += 1
            assert len(options) == 4 == len(set(options.values())) and options[draft.key] == label
            wrong = [text for text in options.values() if text != label]
            if row["subtask"].startswith("camera"):
                start, end = (int(n) for n in row["id"].rpartition("_")[2].split("->"))
                assert (start, end, label) in clip.camera
                family = vocabulary.PAIRS if " and " in label else vocabulary.MOVES
                assert all(text in family for text in wrong)
                axes = [move.split()[0] for move in label.split(" and ")]
                true = {move for s, e, name in clip.camera for move in name.split(" and ") if s == start}
                assert all(set(text.split(" and ")) != true for text in wrong) and len(set(axes)) == len(axes)
            if row["subtask"] == "object_box":
                box = json.loads(label)
                assert all(overlap(box, json.loads(text)) < 0.34 for text in wrong)
            if row["subtask"] in ("object_direction", "object_distance"):
                thing = next(t for t in clip.scene.things if t.name in row["text_input"])
                path, rot, pos = thing.path, clip.scene.rot, clip.scene.pos
                depth = ((path[0] + path[-1]) / 2 - pos[0]) @ rot[0][:, 2]
                labels = geometry.motion_labels(
                    rot[0].T @ (path[-1] - path[0]) / depth, np.linalg.norm(path - pos, axis=1)
                )
                assert labels[row["subtask"].split("_")[1]] == label
    assert len(seen) == 7 and sum(seen.values()) > 130


def overlap(a, b):
    """Intersection over union of two boxes."""
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return w * h / (sum(areas) - w * h)


@pytest.mark.parametrize("kind", ["single", "pair", "direction", "distance", "speed"])
def test_the_options_alone_do_not_tell_the_truth(kind):
    """Guessing the most frequent truth of each set of options, counted on other draws: near 25 %."""
    rng = np.random.default_rng(0)
    family = vocabulary.VOCABULARY[kind]
    counts, hits, draws = defaultdict(Counter), 0, 6000
    for _ in range(draws):
        label = family[rng.integers(len(family))]
        counts[frozenset(gd.draw_options(rng, kind, label))][label] += 1
    for _ in range(2000):
        label = family[rng.integers(len(family))]
        known = counts[frozenset(gd.draw_options(rng, kind, label))]
        hits += bool(known) and known.most_common(1)[0][0] == label
    assert hits / 2000 < 0.30
    if kind == "direction":
        with_it = [c for options, c in counts.items() if "Stationary" in options]
        share = sum(c["Stationary"] for c in with_it) / sum(sum(c.values()) for c in with_it)
        assert abs(share - 0.25) < 0.03


def test_labels_and_letters_are_balanced(clips):
    """Letters are uniform, and no direction or single movement is rare."""
    keys = [draft.key for _, drafts in clips for draft in drafts]
    letters = Counter(keys)
    assert min(letters.values()) > 0.15 * len(keys)
    rng = np.random.default_rng(1)
    counts = Counter(draw_motion(c, rng, "object").direction for _ in range(3000))
    counts.pop(None)
    assert set(counts) == set(vocabulary.DIRECTIONS) and max(counts.values()) < 1.35 * min(counts.values())


def test_phrases_vary_and_name_the_label_last():
    """At least 6 phrasings of each step; an ending ends with the label in its exact words.

    Look-alikes have up to 13 steps, which are short, and always the same; what repeats two motions has 3.
    """
    fewest = {"follow": 1, "both": 3, "sequence": 3}
    for kind, phrases in vocabulary.read_phrases().items():
        for step in ("open", "link", "end"):
            assert step not in phrases or len(set(phrases[step])) >= fewest.get(kind, 6), (kind, step)
        assert all(phrase.endswith("{label}.") for phrase in phrases.get("end", []))


def test_imagery_does_not_tell_the_trajectory(clips):
    """Outside the label no word of the imagery says where or how large a thing is, or how it moves."""
    places = {*vocabulary.X_WORDS, *vocabulary.Y_WORDS, *vocabulary.SIZE_WORDS}
    places |= {"hidden", "up", "down", "closer", "farther", "larger"}
    lengths = []
    for _, drafts in clips:
        for draft in drafts:
            thought = draft.row["text_output"].split("</think>")[0].removeprefix("<think>")
            assert thought.endswith(draft.label + ".") and thought.count(draft.label) == 1
            assert not places & set(re.findall(r"[a-z]+", thought.replace(draft.label, "")))
            lengths.append(len(thought.replace("<output_image>", "").split()))
            overlays = len(draft.row["image_output"])
            assert (overlays == 2) if draft.row["subtask"].startswith("camera") else 2 <= overlays <= 5
    assert 20 < np.mean(lengths) < 60


def test_validator_names_each_defect():
    """A good row passes; each defect has its own reason."""
    row = {
        "text_input": "How?\n\nA. Pan Left\nB. Pan Right",
        "times": [0.0, 2.0, 4.0],
        "subtask": "camera_single",
    }
    row["image_output"] = ["x/static_f0000.jpg", "x/static_f0002.jpg"]
    good = "<think>At 0s. <output_image> At 4s. <output_image> So it is Pan Right.</think>"
    good += "\n<answer>B. Pan Right</answer>"
    assert gd.validate(row | {"text_output": good}, "B") is None
    bad = {
        "placeholders": good.replace("<output_image>", "", 1),
        "tags": good.replace("</think>", ""),
        "tags ": good + " I am sure.",
        "tags  ": good.replace("So it", "<answer>B. Pan Right</answer> So it"),
        "not all in": good.replace("At 4s. <output_image>", "").replace(
            "<answer>B.", "<answer><output_image>B."
        ),
        "option letter": good.replace("So it is", "So option B is"),
        "key": good.replace("<answer>B. Pan Right", "<answer>A. Pan Left"),
        "key ": good.replace("<answer>B. Pan Right", "<answer>B. Pan Left"),
        "key  ": good.replace("<answer>B. Pan Right", "<answer>Pan Right"),
    }
    for word, text in bad.items():
        assert word.strip() in gd.validate(row | {"text_output": text}, "B"), word
    late = row | {"text_output": good, "image_output": row["image_output"][::-1]}
    assert "time order" in gd.validate(late, "B")
    # each thing by itself: another one may begin anew
    other = ["x/static_f0002.jpg", "x/dyn_f0000.jpg"]
    assert gd.validate(row | {"text_output": good, "image_output": other}, "B") is None
    outside = row | {"text_output": good, "image_output": ["x/static_f0000.jpg", "x/static_f0007.jpg"]}
    assert "time order" in gd.validate(outside, "B")
    twice = row | {"text_output": good, "text_input": row["text_input"] + "\nC. Pan Right"}
    assert "same" in gd.validate(twice, "B")


def test_rejected_rows_are_made_again_and_then_dropped():
    """Rows that stay bad are dropped with their reason; a maker that recovers loses nothing."""
    row = {"text_input": "How?\n\nA. x\nB. y", "times": [], "subtask": "colour", "image_output": []}
    good, bad = (
        Draft(row | {"id": a, "text_output": f"<think></think>\n<answer>{a}</answer>"}, label=a)
        for a in ("A. x", "C. z")
    )
    tries = iter([[bad], [good]])
    assert gd.make_valid_rows(lambda rng, clip: next(tries), None, None) == ([good], {})
    kept, reasons = gd.make_valid_rows(lambda rng, clip: [good, bad], None, None)
    assert kept == [good] and reasons == {"the answer is not the key": 1}


# ---------------------------------------------------------------- files


def test_rows_of_the_three_forms_ask_the_same(folder):
    """noimage is imagery without its placeholders; verbal has words in their place; the rest is equal."""
    forms = [rows_of(folder / f"train_{form}.jsonl") for form in vocabulary.FORMS]
    assert len(forms[0]) > 14
    for imagery, noimage, verbal in zip(*forms):
        for field in imagery:
            if field not in ("text_output", "image_output", "overlay_frames", "overlay_things"):
                assert imagery[field] == noimage[field] == verbal[field]
        assert noimage["text_output"] == imagery["text_output"].replace(" <output_image>", "")
        assert noimage["image_output"] == verbal["image_output"] == []
        words = re.sub(r"It is (hidden|[a-z]+ [a-z]+ [a-z]+)\.", "<output_image>", verbal["text_output"])
        assert words == imagery["text_output"]


def test_files_are_read_by_the_other_stages(folder):
    """read_rows takes every jsonl, so the images exist; frames are of SIZE; meta.json counts right."""
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path):
            assert len(row.times) == len(row.image_input)
            assert row.key in row.options
    row = read_rows(folder / "train_imagery.jsonl")[0]
    assert Image.open(row.image_input[0]).size == (c.SIZE, c.SIZE)
    assert row.text_output.count("<output_image>") == len(row.image_output)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["constants"]["SEED"] == 0 and meta["counts"]["train"]["rows"] == len(
        rows_of(folder / "train_imagery.jsonl")
    )


def test_the_contact_sheet_shows_rows(folder, tmp_path):
    """INSPECT=2: frames with times, overlays and all text of two rows in one picture; a script draws more."""
    sheet = np.asarray(Image.open(folder / "inspect.png").convert("L")).astype(int)
    assert sheet.shape[1] == 1280 and sheet.shape[0] > 4 * 74  # two rows of two lines of pictures
    first = read_rows(folder / "train_imagery.jsonl")[0]
    for number, name in enumerate(first.image_input):
        frame = np.asarray(Image.open(name).convert("L")).astype(int)
        left = number * 160
        assert np.abs(sheet[14:70, left : left + 56] - frame).mean() < 2
        assert (sheet[1:13, left + 1 : left + 20] < 128).any()  # its time
    mark = np.asarray(Image.open(first.image_output[0]).convert("L")).astype(int)
    assert np.abs(sheet[88:144, :56] - mark).mean() < 2 and (sheet[148:] < 128).any()
    draw_sheet(folder / "train_imagery.jsonl", tmp_path / "all.png", 99)
    assert Image.open(tmp_path / "all.png").size[1] > 7 * 148


def test_boxes_are_pixels_of_the_stored_frames(monkeypatch, tmp_path):
    """The answer's box bounds what the last overlay reddens, in files."""
    words = ["TRAIN_CLIPS=8", "TEST_CLIPS=1", "RL_TRAIN_CLIPS=1", "RL_TEST_CLIPS=1"]
    words += ["P_ASKED=(0.0, 1.0, 0.15)", "P_OBJECT_CLIP=1.0", "WORKERS=1", "SIZE=84"]
    out = generate(monkeypatch, tmp_path / "boxes", *words)
    rows = [row for row in rows_of(out / "train_imagery.jsonl") if row["subtask"] == "object_box"]
    assert len(rows) >= 5
    for row in rows:
        number = int(row["image_output"][-1][-8:-4])
        frame, marked = (
            np.asarray(Image.open(out / name)).astype(int)
            for name in (row["image_input"][number], row["image_output"][-1])
        )
        y, x = np.nonzero(np.abs(frame - marked).max(-1) > 40)
        label = json.loads(row["text_output"].split("<answer>")[1][3:].split("</answer>")[0])
        assert np.abs(np.array(label) - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 2
        assert "84 x 84" in row["text_input"]


def test_splits_share_no_clip_and_ids_are_unique(folder):
    """A clip belongs to one split; every id is unique in its file; ids have the release's shape."""
    clips = {}
    for path in folder.glob("*.jsonl"):
        split = re.sub("_(imagery|noimage|verbal)$", "", path.stem)
        rows = rows_of(path)
        clips.setdefault(split, set()).update(row["clip"] for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
    names = [name for split in clips for name in clips[split]]
    assert len(clips) == 4 and len(names) == len(set(names))
    for row in rows_of(folder / "train_imagery.jsonl"):
        assert re.fullmatch(
            rf"{row['clip']}_(\d->\d|dynamic_(direct|bbox|distance|speed)(_\w+-\w+)?)", row["id"]
        )


def test_rl_rows_are_compound(folder):
    """4DRL rows: the release's fields, four options, a question about two things at once."""
    for row in rows_of(folder / "rl_train.jsonl"):
        options = [row[letter] for letter in "ABCD"]
        assert len(set(options)) == 4 and row["Correct"] in "ABCD" and row["video_path"] == ""
        assert row["Type"] in ("compound_both", "compound_sequence")
        assert all(text.startswith(("Camera: ", "First ")) for text in options)
        assert len(row["frame_paths"]) == len(row["times"]) == c.FRAMES


def test_reasoning_about_two_motions_is_that_of_either_one_after_the_other():
    """P_COMPOUND: both labels in their order, each after its own key frames; hidden landmarks give no row."""
    stage = override_constants(vars(gd), ["P_COMPOUND=1.0"])
    kinds = Counter()
    for number in range(30):
        clip, drafts, dropped = gd.toy_clip(stage, "train", number)
        landmark, thing = clip.static[0], clip.moving[0]
        ends = sorted({frame for first, last, _ in clip.camera for frame in (first, last)})
        is_seen = all(clip.masks[landmark][t].mean() >= c.HIDDEN_AREA for t in ends)
        assert bool(drafts) == is_seen and bool(dropped) != is_seen
        for draft in drafts:
            row = draft.row
            kinds[row["subtask"]] += 1
            thought, answer = row["text_output"].split("</think>")
            parts = thought.split(gd.lib.rows.PLACEHOLDER)
            labels = [label for _, _, label in clip.camera]
            if row["subtask"] == "compound_both":
                labels.append(clip.facts[thing]["direction"])
                assert row["overlay_things"] == [landmark, landmark, thing, thing]
                assert row["overlay_frames"] == [0, LAST, 0, LAST]
            else:
                assert row["overlay_things"] == [landmark] * 4
                assert row["overlay_frames"] == [0, ends[1], ends[1], LAST]
            # a label follows its second key frame, and the answer holds both in this order
            assert labels[0] in parts[2] and labels[1] in parts[4]
            assert answer.index(labels[0]) < answer.rindex(labels[1])
            # the reasoning ends with both, in the words of the option
            assert thought.endswith(f": {draft.label}.") or thought.endswith(f" is {draft.label}.")
            assert draft.label in answer and gd.validate(row, draft.key) is None
    assert set(kinds) == {"compound_both", "compound_sequence"}


def test_share_of_questions_about_two_motions():
    """P_COMPOUND is a share of the DIFT clips without look-alikes; 4DRL's clips do not depend on it."""
    stage = override_constants(vars(gd), ["P_COMPOUND=0.25", "P_FOLLOW=0.2"])
    kinds = {}
    for split in ("train", "rl_train"):
        rng = np.random.default_rng(0)
        kinds[split] = Counter(gd.draw_kind(stage, rng, split)[0] for _ in range(4000))
    shares = {"follow": 0.2, "both": 0.12, "sequence": 0.08, "object": 0.36, "camera": 0.24}
    for kind, share in shares.items():
        assert abs(kinds["train"][kind] / 4000 - share) < 0.03
    shares = {"follow": 0.2, "both": 0.48, "sequence": 0.32}
    assert set(kinds["rl_train"]) == set(shares)
    for kind, share in shares.items():
        assert abs(kinds["rl_train"][kind] / 4000 - share) < 0.03


def test_same_seed_same_bytes_and_a_killed_run_continues(folder, monkeypatch, tmp_path):
    """One worker writes what two write; a folder cut off in the middle is finished to the same bytes."""
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    for name in ("meta.json", "train_imagery.jsonl", "rl_train.jsonl"):
        (cut / name).unlink()
    clips = sorted((cut / "processed_data").iterdir())
    for clip in clips[::3]:
        shutil.rmtree(clip)
    half = cut / "processed_data" / f"{clips[0].name}.part"
    (half / "frames").mkdir(parents=True)
    (half / "frames" / "frame_0000.jpg").write_bytes(b"half")
    kept = clips[1] / "rows.json"
    before = kept.stat().st_mtime_ns
    generate(monkeypatch, cut, *FEW, "WORKERS=1")
    assert kept.stat().st_mtime_ns == before
    assert files_of(cut) == files_of(folder)


def test_finished_and_foreign_folders_are_named(folder, monkeypatch, tmp_path, capsys):
    """A finished folder: said, exit 0. Other constants, a foreign folder, unknown choices: a sentence."""
    with pytest.raises(SystemExit) as done:
        generate(monkeypatch, folder, *FEW)
    assert done.value.code == 0 and "finished" in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    wrong = {
        "another SEED": (folder, *FEW, "SEED=1"),
        "something else": (tmp_path, *FEW),
        "SOURCE=words is not one of": (tmp_path / "a", "SOURCE=words"),
        "holds no video": (tmp_path / "a", "SOURCE=videos", f"VIDEOS={tmp_path / 'empty'}"),
        "holds no video ": (tmp_path / "a", "SOURCE=videos"),
        "TRAIN_CLIPS": (tmp_path / "a", "TRAIN_CLIP=3"),
    }
    for sentence, words in wrong.items():
        with pytest.raises(SystemExit) as refused:
            generate(monkeypatch, *words)
        assert sentence.strip() in str(refused.value.code), sentence
    assert not (tmp_path / "a").exists()
