r"""Videos, overlays, questions and chains of thought (paper Sec. 3.1): a toy 3-D world, or real footage.

In:  nothing (SOURCE="toy"), or VIDEOS: a folder in SpatialVID's layout (SOURCE="spatialvid") or any folder
     of videos (SOURCE="videos", "questions"); docs/data.md says which files are read
Out: OUT/{train,test}_{imagery,noimage,verbal}.jsonl  questions on disjoint clips, one chain of thought a file
     OUT/rl_{train,test}.jsonl    questions for 4DRL: compound ones of the toy, or those of QUESTIONS
     OUT/processed_data/<clip>/   frames/, masked_static_overlays/, masked_dynamic_overlays/ and rows.json
     OUT/meta.json                constants, counts and what was dropped, last: without it it is unfinished

    python generate_data.py                                                   # laptop: the toy world
    python generate_data.py TRAIN_CLIPS=64000 SIZE=84 OUT=out/big             # more, for a GPU run
    python generate_data.py SOURCE=videos VIDEOS=clips OUT=out/own            # any videos, no masks needed
    python generate_data.py SOURCE=spatialvid SEGMENTER=files MAX_SIDE=640 VIDEOS=SpatialVID OUT=out/real
    python generate_data.py SOURCE=spatialvid SEGMENTER=sam3 ANNOTATOR=api MODEL=gpt-4.1 WORKERS=1 \
        MAX_SIDE=640 VIDEOS=SpatialVID OUT=out/real       # one GPU and an OpenAI-compatible endpoint

The stage is numpy on WORKERS processes, without a GPU; under torchrun the first process does it
all. A killed run continues when started again.

Differs from the paper:
- labels and questions come from geometry; so do chains of thought, from templates, unless ANNOTATOR="api"
  lets a large model name the objects, check the overlays and write the reasoning.
- the toy world's masks, poses and paths are exact; real masks come from motion, files or SAM3.
- the overlay check (Eq. 2) starts with sizes: a mask that is tiny or far from the clip's median is dropped.
- camera labels that the landmark's own displacement contradicts (Eq. 3) are dropped.
- each text exists without imagery and with words for places; option sets do not tell the truth by
  themselves: they come in opposites or in 2 x 2 squares.
"""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import lib.rows
from lib import vocabulary
from lib.annotator import Annotator, require_url
from lib.clips import Clip, Draft, is_in_time_order
from lib.command_line import override_constants, require, require_choice
from lib.contact_sheet import draw_sheet
from lib.evidence import add_moving_object
from lib.files import evenly_spaced, is_json, is_leftover, read_json, remove_leftovers, replace_folder
from lib.files import to_jsonl, write_json, write_text
from lib.footage import describe_error, list_segmenters, list_videos, load_segmenter, path_inside
from lib.footage import fill_empty_split, keep_apart, object_names, read_shots
from lib.geometry import centroid_and_area, describe_location, mask_box
from lib.jobs import Job, Result, add_timing, print_rates, read_record, run_jobs, take_timings
from lib.look_alikes import draw_look_alikes
from lib.questions import question_rows
from lib.safety import release_lock, report_errors, take_lock
from lib.spatialvid import camera_segments
from lib.toy_scenes import draw_clip

# paths
OUT = "out/toy"  # folder that is written
QUESTIONS = ""  # 4DRL rows of the release (jsonl) or DSR-Train's (json, parquet), for SOURCE="questions"
VIDEOS = ""  # folder of videos, searched through all its folders, or SpatialVID's own
# data
SOURCE = "toy"  # "toy" | "spatialvid" | "videos" | "questions"
TRAIN_CLIPS = 8000  # 0 to 1e7; clips of train_*.jsonl (ours)
TEST_CLIPS = 500  # 0 to 1e7; clips of test_*.jsonl, never seen in training (ours)
RL_TRAIN_CLIPS = 3000  # 0 to 1e7; clips of rl_train.jsonl (ours)
RL_TEST_CLIPS = 250  # 0 to 1e7; clips of rl_test.jsonl (ours)
P_OBJECT_CLIP = 0.6  # 0 to 1; share of clips asked about objects (rl: both), others about the camera (ours)
P_CAMERA = (0.45, 0.35, 0.20)  # 0 to 1, sum 1; camera clips: one movement, two at once, two segments (ours)
P_OBJECT = (0.2, 0.3)  # 0 to 1; object clips: the camera moves too; two moving objects (ours)
P_FOLLOW = 0.0  # 0 to 1; share of clips with four look-alikes that change places, for any split (ours)
P_COMPOUND = 0.0  # 0 to 1; share of the other train and test clips asked about two motions, as in rl (ours)
P_ASKED = (0.15, 0.15, 0.15)  # 0 to 1; moving objects: distance, not direction; a box; speed too (ours)
EXCHANGES = (1, 4)  # 0 to 20, rising; fewest and most exchanges of look-alikes in train and test clips (ours)
RL_EXCHANGES = (3, 4)  # 0 to 20, rising; the same in rl clips (ours)
EXCHANGE = 6  # 2 to 100; frames of one exchange; every second one is a key frame (ours)
SWING = 0.0  # 0 to 10; degrees to either side that the camera goes around look-alikes; 0: it rests (ours)
FOLLOWED = (2, 4)  # 1 to 4; look-alikes asked about: of a train clip, of a test clip; rl: 1 (ours)
OVERLAYS = (2, 3)  # >= 2, rising; fewest and most of a moving object, its ends always in (paper: 2 to 5)
# toy world
SIZE = 56  # 8 to 4096; side of a square frame, pixels (ours)
FRAMES = 8  # 4 to 1000; frames of a clip, look-alikes apart (ours)
SPACINGS = (1.0, 2.0)  # > 0, <= 1e6, rising, any length; seconds between frames, one drawn per clip (ours)
HFOV = 70.0  # 1 to 170; horizontal field of view, degrees (ours)
TURNS = ((18.0, 27.0), (18.0, 27.0), (25.0, 40.0))  # 0 to 90, rising; pan, tilt, roll, degrees (ours)
SLIDE = (0.32, 0.48)  # 0 to 10, rising; truck, pedestal and sideways motions, as a share of the depth (ours)
DOLLY = (0.32, 0.45)  # 0 to 10, rising; dolly and motions in depth, as a share of the depth (ours)
MIN_AREA = 0.03  # 0 to 1; least visible area of an object asked about, share of the frame (ours)
MIN_VISIBLE = 0.7  # 0 to 1; least unoccluded share of its silhouette (ours)
HIDDEN_AREA = 0.005  # 0 to 1; below this share of the frame a thing is called hidden (ours)
LINES = (20, 90, 165, 235)  # 0 to 255, any length; greys of upright lines, so that x can be seen (ours)
NOISE = 4.0  # 0 to 255; standard deviation of the pixel noise, of 255 (ours)
# real footage
SEGMENTER = "motion"  # a file of lib/segmenters: "motion" or "flow" (need no masks), "files", "dyn", "sam3"
WEIGHTS = "facebook/sam3"  # of a segmenter that has some: their folder, or their name on the hub (gated)
ANNOTATOR = "template"  # "template" | "api": who names objects, checks overlays and writes the reasoning
BASE_URL = "https://api.openai.com/v1"  # OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY
MODEL = ""  # the endpoint's model
ASKS = 3  # >= 1; replies to one question before it is given up, if they are malformed or not valid (ours)
WAITS = (0, 2, 6, 14, 30, 62)  # 0 to 86400, any length; seconds before attempts at a silent server (ours)
TIMEOUT = 120.0  # > 0, <= 86400; seconds that one request may take, reply included (ours)
SAMPLE_FPS = 4.0  # 1e-6 to 1e3; frames a second of videos without indexes.txt (ours; paper: 1)
WINDOW = 8  # >= 4; frames of one clip of such a video; longer shots give several that overlap by half (ours)
MAX_FRAMES = 50  # >= 4; annotated clips with more frames are skipped (release)
CUT_CHANGE = 0.15  # 0 to 1; share of the colours that changes at a cut (ours)
MAX_CLIPS = 4  # >= 1; clips of one video that give rows, the surest that share no frame (ours)
MIN_CONFIDENCE = 0.45  # 0 to 1; least score of an object row without poses and depth (ours)
MAX_SIDE = 160  # >= 1; longer side of the stored frames, pixels (ours)
MIN_MASK = 0.001  # 0 to 1; Eq. 2: least area of a mask, share of the frame (release)
MAX_GROWTH = 4.0  # >= 1; Eq. 2: largest ratio between a mask's area and the median of its clip (ours)
CUE_SLACK = 0.05  # >= 0; Eq. 3: displacement against a camera label, in frames, that contradicts it (ours)
DROP_CONTRADICTED = True  # False: rows whose camera label is contradicted stay, flagged (ours)
HELD_OUT = 0.25  # 0 to 1; share of the scenes that go to test_*.jsonl (ours)
# overlay
ALPHA = 0.6  # 0 to 1; Eq. 1 (ours: the toy's frames are small; release: 0.4)
OVERLAY_COLOUR = (255, 0, 0)  # 0 to 255; Eq. 1, RGB (release)
# logging
INSPECT = None  # >= 0, whole; rows drawn into OUT/inspect.png; None: 8 of real footage, 0 of the toy (ours)
# system
SEED = 0  # >= 0; every clip's generator is a function of (SEED, split, number)
WORKERS = os.cpu_count()  # 1 to 1000; processes; the files do not depend on it

# ---------------------------------------------------------------- Eq. 1 to 3: overlays and their checks


def overlay(frame, mask, alpha, colour):
    """Eq. 1: frame (H, W, 3) uint8, mask (H, W) bool -> (1 - alpha M) * I + alpha M * c, (H, W, 3) uint8."""
    # the mask is 0 outside the thing, where the frame stays as it is
    weight = alpha * mask[..., None]
    return np.rint((1 - weight) * frame + weight * np.array(colour)).astype(np.uint8)


def draw_overlays(c, frames, masks, keyframes):
    """Overlays of one thing, masks (T, H, W), at the frames of these numbers."""
    return [overlay(frames[t], masks[t], c.ALPHA, c.OVERLAY_COLOUR) for t in keyframes]


def consistent(masks, least_area, max_growth):
    """Eq. 2 without a model: which masks (T, H, W) are neither tiny nor of an unusual size -> (T,) bool."""
    # A speck is an error, and so is what fills half of the frame.
    areas = masks.mean((1, 2))
    is_valid = (areas >= least_area) & (areas <= 0.5)
    # An object does not become max_growth times as large as it mostly is, nor as small.
    typical = np.median(areas[is_valid]) if is_valid.any() else 1
    return is_valid & (areas <= max_growth * typical) & (areas >= typical / max_growth)


def static_cue(start, end):
    """Eq. 3: masks (H, W) of a static thing -> shift x, y in frame sizes and log area ratio: the camera's."""
    # A thing at rest shifts and grows in the image by the camera's movement alone.
    x0, y0, area0 = centroid_and_area(start[None], 0)
    x1, y1, area1 = centroid_and_area(end[None], 0)
    return x1 - x0, y1 - y0, float(np.log(area1 / area0))


def contradicts(label, start, end, slack):
    """Whether a static thing's masks (H, W) moved or grew against the camera's label (Eq. 3)."""
    x, y, growth = static_cue(start, end)

    # What grows moves away from the middle of the frame: subtract the shift that this zoom alone causes.
    x0, y0, _ = centroid_and_area(start[None], 0)
    scale = np.exp(growth / 2)
    x -= (scale - 1) * (x0 - 0.5)
    y -= (scale - 1) * (y0 - 0.5)
    moved = np.array([x, y, growth])

    # MOVE_CUES has the signs of (right, down, larger): Pan Right (-1, 0, 0). An axis at 0 is not tested.
    expected = np.sum([vocabulary.MOVE_CUES[move] for move in label.split(" and ")], 0)
    is_against = moved * expected < -slack
    if "Roll" in label:  # it moves the thing too, so only growth counts
        return bool(is_against[2])
    return bool(is_against.any())


# ---------------------------------------------------------------- options without a text-only shortcut


def opposite(label):
    """The label turned round: "Moving Left-Up" -> "Moving Right-Down"; a pair has both movements turned."""
    # what has no opposite, "Stationary", stays
    parts = [vocabulary.OPPOSITES.get(part, part) for part in label.split(" and ")]
    return " and ".join(parts)


def axes_of(label):
    """Numbers of a camera label's axes: "Pan Left and Dolly In" -> [0, 3]."""
    return [vocabulary.MOVES.index(move) // 2 for move in label.split(" and ")]


def confusable_labels(label):
    """Camera labels that are easily taken for this one: truck for pan, or a pair's second movement turned."""
    # Of a pair, the label that shares its first movement; of one movement, the two of a similar axis.
    first, *others = label.split(" and ")
    if others:
        turned = opposite(" and ".join(others))
        return [f"{first} and {turned}"]
    partner = vocabulary.CONFUSED_AXES[axes_of(label)[0]]
    return vocabulary.MOVES[2 * partner : 2 * partner + 2]


def camera_options(rng, label, other=None):
    """Truth -> 4 options of its kind: two labels and their opposites, each as likely to be the truth.

    Half of the time the other label is a confusable one.
    """
    # The family: labels of as many movements, not all on the same axes.
    axes = axes_of(label)
    family = []
    for name in [*vocabulary.MOVES, *vocabulary.PAIRS]:
        if len(axes_of(name)) == len(axes) and axes_of(name) != axes:
            family.append(name)

    # The other label comes from the caller, or is confusable, or is any of the family.
    candidates = family
    if rng.random() < 0.5 or not family:
        candidates = confusable_labels(label)
    if other not in family:
        other = str(rng.choice(candidates))
    return [label, opposite(label), other, opposite(other)]


def direction_options(rng, label):
    """Truth -> 4 options: two directions and their opposites, or such a pair, "Stationary" and a single one.

    "Stationary" has no opposite; with these shares every option of a set is equally likely to be the truth.
    """
    # One more direction, on another axis than the truth.
    known = (label, opposite(label), "Stationary")
    others = [name for name in vocabulary.DIRECTIONS if name not in known]
    other = str(rng.choice(others))
    if label == "Stationary":
        alone = [name for name in others if name not in (other, opposite(other))]
        return [label, str(rng.choice(alone)), other, opposite(other)]
    # Two pairs of opposites, or "Stationary" in place of the other's opposite or of the truth's.
    kind = rng.choice(["opposites", "other alone", "truth alone"], p=[0.7, 0.2, 0.1])
    second = "Stationary" if kind == "truth alone" else opposite(label)
    fourth = "Stationary" if kind == "other alone" else opposite(other)
    return [label, second, other, fourth]


def box_options(rng, box, width, height):
    """Truth [x1, y1, x2, y2] -> 4 boxes at 2 x and 2 y positions, far enough apart; None without room."""
    # One more position on each axis, a fifth of the frame and most of the box away from the true one.
    starts = []
    for low, high, side in ((box[0], box[2], width), (box[1], box[3], height)):
        length = high - low
        least = max(0.2 * side, 0.6 * length)
        positions = [position for position in range(side - length + 1) if abs(position - low) > least]
        if not positions:
            return None
        starts.append([low, rng.permutation(positions).tolist()[0]])

    # Boxes of the true size at all four combinations, the truth first.
    w, h = box[2] - box[0], box[3] - box[1]
    options = []
    for x in starts[0]:
        for y in starts[1]:
            options.append(str([int(x), int(y), int(x + w), int(y + h)]))
    return options


def camera_and_object_options(rng, camera, direction, noun):
    """Two true labels -> 4 texts, a 2 x 2 square: each label and another one."""
    # The object's other direction is the opposite half of the time.
    others = [name for name in vocabulary.DIRECTIONS if name not in (direction, "Stationary")]
    if rng.random() < 0.5:
        other_direction = opposite(direction)
    else:
        other_direction = str(rng.choice(others))
    # The camera's other movement is one of its wrong options.
    options = camera_options(rng, camera)
    other_camera = options[rng.integers(1, 3)]
    return [
        f"Camera: {first}; {noun}: {second}"
        for first in (camera, other_camera)
        for second in (direction, other_direction)
    ]


def sequence_options(rng, first, second):
    """Two movements in their order -> 4 texts, a 2 x 2 square: one or both turned, or the order swapped."""
    # In both squares each movement stands first, or turned, in two of the four texts.
    square = [(first, second), (opposite(first), opposite(second))]
    if rng.random() < 0.5:
        square += [(first, opposite(second)), (opposite(first), second)]
    else:
        square += [(then, before) for before, then in square]
    return [f"First {before}, then {then}" for before, then in square]


def compound_options(rng, kind, first, second, noun=""):
    """Two true labels of a 4DRL question, kind "both" | "sequence" -> 4 texts, the truth first."""
    if kind == "both":
        return camera_and_object_options(rng, first, second, noun)
    return sequence_options(rng, first, second)


def draw_options(rng, kind, label, width=0, height=0):
    """A label of one kind of question -> 4 options, the truth first; None if there are no 3 wrong ones."""
    if kind in ("single", "pair"):
        return camera_options(rng, label)
    if kind == "direction":
        return direction_options(rng, label)
    if kind == "box":
        return box_options(rng, json.loads(label), width, height)
    # distances, speeds, colours: any three others of the vocabulary
    wrong = [name for name in vocabulary.VOCABULARY[kind] if name != label]
    return [label, *rng.permutation(wrong)[:3].tolist()]


def shuffle_options(rng, question, options):
    """Question and options, truth first -> text_input with shuffled letters, {letter: text}, true letter."""
    # order[i] is the option that gets the i-th letter; the truth is option 0
    order = rng.permutation(len(options))
    lettered = {letter: options[index] for letter, index in zip(lib.rows.LETTERS, order)}
    lines = "\n".join(f"{letter}. {text}" for letter, text in lettered.items())
    key = lib.rows.LETTERS[int(np.argmin(order))]
    return f"{question}\n\n{lines}", lettered, key


# ---------------------------------------------------------------- questions and chains of thought


def pick_phrase(rng, phrases, **names):
    """One phrase of a list, its {names} filled in."""
    return phrases[rng.integers(len(phrases))].format(**names)


def format_seconds(t):
    """8.0 -> "8s", 0.3333 -> "0.33s"."""
    return f"{round(t, 2):g}s"


def base_row(clip, name, question, thought, answer, subtask):
    """A row of the release's schema without imagery; a clip of only a name gives a row without video."""
    row = {
        "id": f"{clip.name}_{name}",
        "text_input": question,
        "text_output": f"<think>{thought}</think>\n<answer>{answer}</answer>",
        "image_input": frame_names(clip),
        "image_output": [],
        "times": clip.times,
        "subtask": subtask,
        "clip": clip.name,
    }
    # rows about a real camera carry the measured cue of Eq. 3
    row.update(clip.evidence.get(name, {}))
    return row


def frame_names(clip):
    """Paths of a clip's frames beside the jsonl."""
    folder = f"processed_data/{clip.name}/frames"
    return [f"{folder}/frame_{number:04d}.jpg" for number in range(len(clip.times))]


def overlay_name(clip, thing, frame):
    """Path of an overlay beside the jsonl; only the first static and the first moving thing go unnamed."""
    is_static = thing in clip.static
    kind, prefix = ("static", "static") if is_static else ("dynamic", "dyn")
    is_first = thing in (*clip.static[:1], *clip.moving[:1])
    suffix = "" if is_first else "_" + thing.replace(" ", "-")
    return f"processed_data/{clip.name}/masked_{kind}_overlays/{prefix}{suffix}_f{frame:04d}.jpg"


def write_thought(rng, phrases, thing, times, label, gap):
    """The chain of thought: a step for each keyframe's time, `gap` (the placeholder) after it, the label."""
    thought = ""
    for number, t in enumerate(times):
        opening = "open" if number == 0 else "link"
        thought += pick_phrase(rng, phrases[opening], thing=thing, t=t) + gap
    return thought + pick_phrase(rng, phrases["end"], thing=thing, label=label)


def make_row(rng, clip, subtask, motions, options, name):
    """Eq. 4: a question about a clip, whose reasoning imagines a thing at its key frames -> Draft.

    motions: [(kind of question, thing, key frames, label)], most questions have one; without key frames the
    label alone is said. The last key frame's thing is asked about. options: 4 texts, the truth first. Each
    key frame's step of the reasoning ends with a placeholder for an overlay.
    """
    # A subtask is family_kind; camera and follow have one set of phrases each.
    family, kind = subtask.split("_")
    if family in ("camera", "follow"):
        kind = family
    # The question, with times and sizes in its phrase and its options in random order.
    ask = vocabulary.phrases_for(kind)["ask"]
    height, width = clip.frames.shape[1:3]
    shown = [(thing, t) for _, thing, keyframes, _ in motions for t in keyframes]
    asked, last = shown[-1]
    begin, end = format_seconds(clip.times[shown[0][1]]), format_seconds(clip.times[last])
    question = pick_phrase(rng, ask, thing=asked, a=begin, b=end, w=width, h=height)
    question, _, key = shuffle_options(rng, question, options)

    thoughts = []
    for motion, highlighted, keyframes, label in motions:
        phrases = vocabulary.phrases_for(motion)
        times = [format_seconds(clip.times[t]) for t in keyframes]
        thoughts.append(write_thought(rng, phrases, highlighted, times, label, f" {lib.rows.PLACEHOLDER} "))
    row = base_row(clip, name, question, " ".join(thoughts), f"{key}. {options[0]}", subtask)
    row["image_output"] = [overlay_name(clip, thing, t) for thing, t in shown]
    row["overlay_frames"] = [t for _, t in shown]  # ours: which frame each overlay shows, and which thing
    row["overlay_things"] = [thing for thing, _ in shown]

    # What the verbal form says in place of each overlay.
    locations = []
    for shown_thing, t in shown:
        location = centroid_and_area(clip.masks[shown_thing][t : t + 1], clip.least_area)
        locations.append(f" It is {describe_location(location)}.")
    return Draft(row, options[0], key, asked, row["overlay_frames"], locations)


def camera_rows(rng, clip):
    """A question per segment; its overlays are the first landmark's at the segment's two ends (Eq. 3)."""
    drafts = []
    for number, (start, end, label) in enumerate(clip.camera):
        subtask = "camera_pair" if " and " in label else "camera_single"
        if len(clip.camera) > 1:
            subtask = "camera_segment"
        # the movement of the other segment is the best wrong option
        other = clip.camera[1 - number][2] if len(clip.camera) == 2 else None
        options = camera_options(rng, label, other)
        motions = [("camera", clip.static[0], [start, end], label)]
        drafts.append(make_row(rng, clip, subtask, motions, options, f"{start}->{end}"))
    return drafts


def object_rows(rng, clip, overlays):
    """The questions each moving thing is to be asked; overlays at the first, last and some frames between.

    overlays: fewest and most.
    """
    drafts = []
    height, width = clip.frames.shape[1:3]
    for number, thing in enumerate(clip.moving):
        # overlays only where there is enough to see
        masks = clip.masks[thing]
        visible = np.flatnonzero(masks.mean((1, 2)) >= clip.least_area).tolist()
        for kind, label in clip.facts[thing].items():
            # the first and the last visible frame are always keyframes
            count = rng.integers(overlays[0], overlays[1] + 1) - 2
            between = rng.permutation(visible[1:-1]).tolist()[:count]
            keyframes = sorted([visible[0], *between, visible[-1]])
            if kind == "box":
                label = str(mask_box(masks[keyframes[-1]]))
            # a box without room for wrong ones is not asked about
            options = draw_options(rng, kind, label, width, height)
            name = f"dynamic_{vocabulary.ID_TAGS[kind]}"
            if number > 0:
                name += "_" + thing.replace(" ", "-")
            if options:
                motions = [(kind, thing, keyframes, label)]
                drafts.append(make_row(rng, clip, f"object_{kind}", motions, options, name))
    return drafts


def follow_rows(rng, clip, count):
    """Where are `count` of the look-alikes in the end? Every second frame is a key frame, the last is one.

    The subtask tells how many exchanges moved the thing: follow_0, follow_1, ...
    """
    drafts = []
    keyframes = list(range(1 + len(clip.times) % 2, len(clip.times), 2))
    for thing in rng.permutation(clip.moving).tolist()[:count]:
        slots = clip.slots[thing]
        moved = sum(now != then for now, then in zip(slots, slots[1:]))
        options = list(vocabulary.VOCABULARY["follow"])
        options.insert(0, options.pop(slots[-1]))
        name = "follow_" + thing.replace(" ", "-")
        motions = [("follow", thing, keyframes, options[0])]
        drafts.append(make_row(rng, clip, f"follow_{moved}", motions, options, name))
    return drafts


def compound_rows(rng, clip, kind):
    """A question about two motions: camera and object both move, or one camera movement follows the other.

    The reasoning takes them one after the other and then says both.
    """
    # The two true labels, and options that hold both.
    thing = clip.moving[0]
    second = clip.facts[thing]["direction"] if kind == "both" else clip.camera[1][2]
    options = compound_options(rng, kind, clip.camera[0][2], second, thing.split()[-1])
    motions = [("camera", clip.static[0], [start, end], label) for start, end, label in clip.camera]
    if kind == "both":
        motions.append(("direction", thing, [0, len(clip.times) - 1], second))
    motions.append((kind, thing, [], options[0]))
    return [make_row(rng, clip, f"compound_{kind}", motions, options, kind)]


def rl_rows(rng, clip, make_rows):
    """The drafts of make_rows(rng, clip) in the release's 4DRL schema: options as fields, no reasoning."""
    drafts = []
    for draft in make_rows(rng, clip):
        question, options = draft.row["text_input"].split("\n\n")
        row = {"Type": draft.row["subtask"], "Question": question}
        row.update(line.split(". ", 1) for line in options.splitlines())
        row.update(Correct=draft.key, video_path="", frame_paths=frame_names(clip))
        row.update(times=clip.times, clip=clip.name, id=draft.row["id"])
        drafts.append(Draft(row, draft.label))
    return drafts


def final_row(draft, form):
    """A draft's row in one of the forms: without imagery its placeholders are left out or put into words."""
    if form == "imagery" or not draft.keyframes:
        return draft.row
    # Each placeholder goes, with the space before it; the verbal form says the location there.
    text, *parts = draft.row["text_output"].split(f" {lib.rows.PLACEHOLDER}")
    for location, part in zip(draft.locations, parts):
        if form == "verbal":
            text += location
        text += part
    row = {**draft.row, "text_output": text}
    for name in ("image_output", "overlay_frames", "overlay_things"):
        row[name] = []
    return row


# ---------------------------------------------------------------- validator


def validate(row, key=None):
    """A DIFT row and its true letter -> None, or the first reason why it must not be written."""
    # Tags: all of the text is one reasoning and one answer, without further tags inside.
    text = row["text_output"]
    parts = re.fullmatch(r"<think>(.*)</think>\s*<answer>(.*)</answer>", text, flags=re.S)
    thought, answer = parts.groups() if parts else ("", "")
    if not parts or re.search("</?(think|answer)>", thought + answer):
        return "the tags are not one closed think and then one closed answer"

    # Imagery: a placeholder for each overlay, all in the reasoning, in time order.
    if text.count(lib.rows.PLACEHOLDER) != len(row["image_output"]):
        return "the number of placeholders is not that of overlays"
    if lib.rows.PLACEHOLDER in answer:
        return "the imagery is not all in the reasoning"
    if not is_in_time_order(row["image_output"], row["times"]):
        return "the imagery is not in time order"

    # Options: the reasoning does not point at a letter, the answer is the key in its exact words.
    if re.search(r"\b[B-F]\b|\bA[.):]|([Oo]ption|[Aa]nswer|[Cc]hoice) \(?A\b", thought):
        return "the reasoning holds an option letter"
    options = re.findall(r"^([A-F])\. (.*)$", row["text_input"], flags=re.M)
    letter, _, label = answer.partition(". ")
    expected = {(letter, label), (key or letter, label)}
    if options and not expected <= set(options):
        return "the answer is not the key"
    if len(dict(options)) > len({text for _, text in options}):
        return "two options are the same"
    return None


def make_valid_rows(make_rows, rng, clip):
    """Calls make_rows(rng, clip) until the validator takes all rows, up to 3 times -> drafts, reasons.

    Rows that are still not valid then are left out and counted by their reason.
    """
    # Phrases are drawn again each time, which mends what chance did; geometry stays as it is.
    for _ in range(3):
        drafts = make_rows(rng, clip)
        bad = {}
        for draft in drafts:
            reasons = [validate(final_row(draft, form), draft.key) for form in vocabulary.FORMS]
            # the verbal form's words for a thing that is not seen
            if " It is hidden." in draft.locations:
                reasons = ["an overlay shows nothing"]
            if any(reasons):
                bad[draft.row["id"]] = next(filter(None, reasons))
        if not bad:
            break
    return [draft for draft in drafts if draft.row["id"] not in bad], Counter(bad.values())


# ---------------------------------------------------------------- clips of the toy world


def toy_clip(c, split, number, make_rows=None):
    """The toy clip of a split and number, by SEED alone -> Clip, its drafts, why other rows are dropped.

    Its rows are made by make_rows(rng, clip), or else by the maker of its kind of clip.
    """
    # The generator is a function of (SEED, split, number), so clips can be made in any order.
    rng = np.random.default_rng([c.SEED, vocabulary.SPLITS.index(split), number])
    kind, default_rows = draw_kind(c, rng, split)
    name = f"{split}_{number:05d}"
    if kind == "follow":
        exchanges = c.RL_EXCHANGES if split.startswith("rl") else c.EXCHANGES
        clip = draw_look_alikes(c, rng, name, exchanges)
    else:
        clip = draw_clip(c, rng, kind, name)
    # the validator is for reasoning, which 4DRL rows do not have
    if split.startswith("rl"):
        return clip, default_rows(rng, clip), Counter()
    drafts, dropped = make_valid_rows(make_rows or default_rows, rng, clip)
    return clip, drafts, dropped


def draw_kind(c, rng, split):
    """What a clip of a split is asked about -> its kind, and the function (rng, clip) that makes its rows."""
    # all of 4DRL's clips without look-alikes are asked about two motions, of DIFT's clips P_COMPOUND
    is_rl = split.startswith("rl")
    rest = 1 - c.P_FOLLOW
    compound = rest * (1 if is_rl else c.P_COMPOUND)
    p = c.P_OBJECT_CLIP
    shares = [c.P_FOLLOW, compound * p, compound * (1 - p), (rest - compound) * p]
    number = np.searchsorted(np.cumsum(shares), rng.random(), side="right")
    kind = ["follow", "both", "sequence", "object", "camera"][number]
    makers = {
        "follow": partial(follow_rows, count={"train": c.FOLLOWED[0], "test": c.FOLLOWED[1]}.get(split, 1)),
        "object": partial(object_rows, overlays=c.OVERLAYS),
        "camera": camera_rows,
    }
    make_rows = makers.get(kind, partial(compound_rows, kind=kind))
    return kind, partial(rl_rows, make_rows=make_rows) if is_rl else make_rows


# ---------------------------------------------------------------- clips of real footage


def open_annotator(c):
    """The endpoint of ANNOTATOR="api", or None for templates."""
    if c.ANNOTATOR != "api":
        return None
    return Annotator(Path(c.OUT, "annotator"), c.BASE_URL, c.MODEL, c.ASKS, c.WAITS, c.TIMEOUT)


def confirm(c, frames, thing, masks, numbers, annotator):
    """Eq. 2: in which of the frames `numbers` the annotator finds just the thing in the overlay -> (T,)."""
    # Only frames with a mask are sent, so many as one question may hold.
    numbers = [t for t in numbers if masks[t].any()]
    numbers = evenly_spaced(numbers, annotator.most_images)
    is_confirmed = np.zeros(len(masks), bool)
    if numbers:
        valid = annotator.confirm(thing, draw_overlays(c, frames, masks, numbers))
        is_confirmed[[numbers[index] for index in valid]] = True
    return is_confirmed


def rewrite(c, clip, draft, annotator):
    """A draft -> the same with its reasoning in the annotator's words; None if no reply was valid."""
    row = draft.row

    # A reply is taken if the validator takes it in all forms; else the annotator is asked again.
    def accept(reply):
        text = re.sub(r"\s*<output_image>", " <output_image>", reply.strip())
        new_row = dict(row)
        new_row["text_output"] = text.replace("thinking>", "think>")
        rewritten = Draft(new_row, draft.label, draft.key, draft.thing, draft.keyframes, draft.locations)
        if any(validate(final_row(rewritten, form), draft.key) for form in vocabulary.FORMS):
            return None
        return rewritten.to_json()

    accepted = annotator.write_reasoning(
        draw_overlays(c, clip.frames, clip.masks[draft.thing], draft.keyframes),
        accept,
        question=row["text_input"],
        answer=f"{draft.key}. {draft.label}",
        thing=draft.thing,
        times=", ".join(format_seconds(row["times"][t]) for t in draft.keyframes),
    )
    return Draft.from_json(accepted) if accepted else None


def find_masks(c, shot, segmenter, role, name, numbers, annotator):
    """Eq. 2: masks (T, H, W) of one object where they are consistent; empty in the other frames.

    numbers: frames that an annotator is asked about.
    """
    # Sizes first, they cost nothing; then the annotator, if there is one, looks at what is left.
    begun = time.time()
    if hasattr(segmenter, "masks_of_shot"):
        masks = segmenter.masks_of_shot(shot)
    else:
        masks = segmenter.masks(shot.frames, name, shot.mask_files(role), c.WEIGHTS)
    add_timing("masks", len(masks), begun)
    masks &= consistent(masks, c.MIN_MASK, c.MAX_GROWTH)[:, None, None]
    if annotator:
        masks &= confirm(c, shot.frames, name, masks, numbers, annotator)[:, None, None]
    return masks


def prove_segments(c, clip, segments, masks):
    """Eq. 3: gives a clip the camera segments that the landmark's masks (T, H, W) do not contradict.

    Returns a Counter of the reasons why others are left out.
    """
    reasons = Counter()
    for first, last, label in segments:
        start, end = masks[first], masks[last]
        if not (start.any() and end.any()):
            reasons["camera segments lack the landmark at an end (Eq. 2)"] += 1
            continue
        is_contradicted = contradicts(label, start, end, c.CUE_SLACK)
        if is_contradicted:
            reasons["camera labels are contradicted by the landmark (Eq. 3)"] += 1
            if c.DROP_CONTRADICTED:
                continue
        # what was measured goes into the row beside its label
        clip.camera.append((first, last, label))
        cue = static_cue(start, end)
        clip.evidence[f"{first}->{last}"] = {"static_cue": cue, "contradicted": is_contradicted}
    return reasons


def real_clip(c, shot, annotator=None):
    """A shot -> Clip with objects, masks, labels and camera segments, Counter of reasons for what is missing.

    A segmenter that finds moving things alone leaves the landmark to mask images; without them there are no
    questions about the camera.
    """
    # Camera segments come from the annotations, and need a landmark to be shown and checked by.
    clip = Clip(shot.name, shot.frames, shot.times, least_area=c.MIN_MASK)
    segmenter = load_segmenter(c.SEGMENTER)
    finds_landmarks = getattr(segmenter, "LANDMARKS", True)
    segments = []
    if finds_landmarks or (shot.folder / "masks_static").exists():
        instructions = shot.notes.get("instructions", {})
        segments = camera_segments(instructions, len(shot.frames), vocabulary.MOVES)
    names = object_names(shot, annotator)
    if names is None:
        return clip, Counter({"clips have no two objects that the annotator names": 1})

    # The moving object.
    reasons = Counter()
    every_frame = range(len(shot.frames))
    masks = find_masks(c, shot, segmenter, "dynamic", names["dynamic"], every_frame, annotator)
    if masks.any((1, 2)).sum() < 2:
        none = "clips show no consistent dynamic object in two frames (Eq. 2)"
        reasons[getattr(segmenter, "NOTHING", none)] += 1
    else:
        reasons += add_moving_object(c, clip, shot, names["dynamic"], masks)

    # The landmark, at the ends of the camera's segments.
    if segments:
        finder = segmenter if finds_landmarks else load_segmenter("files")
        ends = sorted({frame for first, last, _ in segments for frame in (first, last)})
        masks = find_masks(c, shot, finder, "static", names["static"], ends, annotator)
        if masks.any((1, 2)).sum() < 2:
            reasons["clips show no consistent static object in two frames (Eq. 2)"] += 1
        else:
            clip.static = [names["static"]]
            clip.masks[names["static"]] = masks
        reasons += prove_segments(c, clip, segments, masks)
    return clip, reasons


def real_rows(c, job, clip, start, annotator):
    """A real clip that starts at a frame of its video -> its drafts, why other rows are dropped."""
    # A function of the video's path and the shot, whatever other videos there are.
    rng = np.random.default_rng([c.SEED, job.number, start])

    def make_rows(rng, clip):
        return camera_rows(rng, clip) + object_rows(rng, clip, c.OVERLAYS)

    drafts, dropped = make_valid_rows(make_rows, rng, clip)
    # The annotator writes anew what the templates said; a row without a valid reply is left out.
    if annotator:
        rewritten = [rewrite(c, clip, draft, annotator) for draft in drafts]
        drafts = [draft for draft in rewritten if draft]
        dropped["rows have no valid reasoning by the annotator"] += len(rewritten) - len(drafts)
    return drafts, dropped


def video_clips(c, job, name):
    """A video -> [(clip, drafts)] of its shots, why others are left out; unreadable ones are a reason."""
    annotator = open_annotator(c)
    clips, dropped = [], Counter()
    try:
        shots = read_shots(c, job, name)
        if shots is None:
            return [], {"clips have not one pose and depth map a frame, or more than MAX_FRAMES frames": 1}
        for shot in shots:
            clip, reasons = real_clip(c, shot, annotator)
            drafts, bad = real_rows(c, job, clip, shot.start, annotator)
            for draft in drafts:
                draft.row["video"] = str(path_inside(c, job.path))
            clips.append((clip, drafts))
            dropped += reasons
            dropped += bad
    except Exception as error:  # readers raise many kinds; each means that these files cannot be used
        return [], {f"clips are unreadable ({describe_error(error)})": 1}
    if not clips:
        return [], {"videos have no shot of four frames": 1}
    return keep_apart(clips, dropped, c.MAX_CLIPS)


# ---------------------------------------------------------------- jobs


def list_jobs(c):
    """The clips to make; exits on a choice that does not exist."""
    require_choice("SEGMENTER", c.SEGMENTER, list_segmenters())
    if c.ANNOTATOR == "api":
        require_url(c.BASE_URL)
    if c.SOURCE != "toy":
        return list_videos(c.VIDEOS, vocabulary.VIDEO_FOLDERS[c.SOURCE][0], c.SEED, c.HELD_OUT)
    # a toy clip is known by its split and number alone
    counts = [c.TRAIN_CLIPS, c.TEST_CLIPS, c.RL_TRAIN_CLIPS, c.RL_TEST_CLIPS]
    jobs = []
    for split, count in zip(vocabulary.SPLITS, counts):
        jobs += [Job(split, number) for number in range(count)]
    return jobs


def process_job(job, c, make_rows=None):
    """Makes a job's clips and writes them, or reads what was made before -> Result."""
    # A finished job has its rows on disk, from this run or from one that was killed.
    take_timings()
    folder = Path(c.OUT, "processed_data", f"{job.split}_{job.number:05d}")
    if (folder / "rows.json").exists():
        # one that is damaged is made again
        record = read_record(folder / "rows.json")
        if record:
            drafts = [Draft.from_json(entry) for entry in record["rows"]]
            return Result(job, drafts, record["dropped"], Counter())

    if job.path:
        clips, dropped = video_clips(c, job, folder.name)
    else:
        clip, drafts, dropped = toy_clip(c, job.split, job.number, make_rows)
        clips = [(clip, drafts)]
    if any(drafts for _, drafts in clips):
        save_clips(c, folder, clips, dropped)
    drafts = [draft for _, drafts in clips for draft in drafts]
    return Result(job, drafts, dropped, take_timings())


def save_clips(c, folder, clips, dropped):
    """Writes frames of clips with rows, their overlays and rows.json under a temporary name, then renames."""
    # All pictures by their path, so that an overlay of two rows is written once.
    images, records = {}, []
    for clip, drafts in clips:
        if drafts:
            images.update(zip(frame_names(clip), clip.frames))
        for draft in drafts:
            records.append(draft.to_json())
            if draft.keyframes:
                row = draft.row
                for name, thing, t in zip(row["image_output"], row["overlay_things"], row["overlay_frames"]):
                    images[name] = draw_overlays(c, clip.frames, clip.masks[thing], [t])[0]

    # The renamed folder is whole, so a killed run leaves no half clip that looks finished.
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, image in images.items():
        path = unfinished / name.split("/", 2)[2]  # without processed_data/<clip>
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=95, subsampling=0)
    write_text(unfinished / "rows.json", json.dumps({"rows": records, "dropped": dropped}))
    replace_folder(unfinished, folder)


def collect(results):
    """[Result] -> {split: drafts}, {reason: examples, one for each time}, Counter of timings."""
    # a split is there even if it got no rows, which is an error later
    drafts, dropped, timings = {}, {}, Counter()
    counted = set()
    for result in results:
        drafts.setdefault(result.job.split, []).extend(result.drafts)
        timings.update(result.timings)
        # the only video of a folder is in both splits, and counts once
        if result.job.path and result.job.path in counted:
            continue
        counted.add(result.job.path)
        example = result.job.path or result.job.split
        for reason, count in result.dropped.items():
            dropped.setdefault(reason, []).extend(example for _ in range(count))
    return drafts, dropped, timings


# ---------------------------------------------------------------- files


def open_folder(out, constants):
    """Makes a folder, or checks that what it holds has the same constants -> whether it is finished."""
    # An empty folder may be used, one with other files may not.
    path = out / "constants.json"
    is_ours = path.exists() or all(is_leftover(entry) for entry in out.glob("*"))
    require(is_ours, f"{out} holds something else; set OUT to a new folder.")
    take_lock(out)
    remove_leftovers(out)
    # Constants that a folder does not know were added to the program since: it was made with their defaults.
    defaults = {name: globals().get(name, value) for name, value in constants.items()}
    now, defaults = json.loads(json.dumps([constants, defaults]))  # tuples become lists, as in the file
    before = read_json(path, dict, "set OUT to a new folder") if path.exists() else now
    changed = [name for name, value in now.items() if before.get(name, defaults[name]) != value]
    require(not changed, f"{out} was made with another {', '.join(changed)}; set OUT to a new folder.")
    # Constants come first: a folder without them is not ours.
    write_json(path, constants)
    (out / "processed_data").mkdir(exist_ok=True)
    return is_json(out / "meta.json")


def write_split(out, split, drafts):
    """Writes the jsonl files of a split and prints its counts -> counts for meta.json."""
    remedy = "use more videos, another SEED, or masks of a better SEGMENTER (docs/data.md)"
    require(drafts, f"There are no rows for the split {split}; {remedy}.")
    # DIFT splits are written in three forms of one and the same rows.
    if split in ("train", "test"):
        for form in vocabulary.FORMS:
            rows = [final_row(draft, form) for draft in drafts]
            write_text(out / f"{split}_{form}.jsonl", to_jsonl(rows))
    else:
        write_text(out / f"{split}.jsonl", to_jsonl(draft.row for draft in drafts))

    # Boxes are all different, so they are not counted as labels.
    kinds = [draft.row.get("subtask", draft.row.get("Type")) for draft in drafts]
    labels = [f"{kind}: {draft.label}" for kind, draft in zip(kinds, drafts) if "box" not in kind]
    subtasks = dict(Counter(sorted(kinds)))
    print(f"{split:13s} {len(drafts):6d} rows {subtasks}")
    return {"rows": len(drafts), "subtasks": subtasks, "labels": Counter(sorted(labels))}


def write_files(out, drafts, dropped, constants):
    """{split: drafts} -> the jsonl files and, last, meta.json with constants and counts."""
    for reason, names in dropped.items():
        examples = list(dict.fromkeys(names))[:3]
        print(f"dropped: {len(names)} {reason}, such as {', '.join(examples)}")
    counts = {split: write_split(out, split, rows) for split, rows in drafts.items()}
    write_json(out / "meta.json", {"constants": constants, "counts": counts, "dropped": dropped})


def main():
    """Makes the folder OUT, or continues where a killed run ended."""
    # What is recorded are the constants that the rows depend on: another value needs another folder.
    c = override_constants(globals())
    report_errors()
    begun = time.time()
    out = Path(c.OUT)
    changes_no_row = ("OUT", "WORKERS", "BASE_URL", "WAITS", "TIMEOUT", "INSPECT")
    recorded = {name: value for name, value in vars(c).items() if name not in changes_no_row}
    jobs = list_jobs(c)
    if open_folder(out, recorded):
        release_lock(out)
        print(f"{out} is finished already, made with these very constants.")
        sys.exit(0)

    # Questions of others need no clips: grpo4d.py decodes the videos that they name.
    if c.SOURCE == "questions":
        drafts, dropped = question_rows(c, jobs)
    else:
        results = run_jobs(jobs, partial(process_job, c=c), c.WORKERS)
        drafts, dropped, timings = collect(results)
        print_rates(timings, has_annotator=c.ANNOTATOR == "api")
        if c.SOURCE != "toy":
            drafts = fill_empty_split(drafts)
    # meta.json is written last and says that the folder is finished.
    write_files(out, drafts, dropped, recorded)
    shown = c.INSPECT
    if shown is None:
        shown = 0 if c.SOURCE == "toy" else 8
    is_drawn = shown > 0 and c.SOURCE != "questions"
    if is_drawn:
        draw_sheet(out / "train_imagery.jsonl", out / "inspect.png", shown)
    release_lock(out)
    print(f"{out} is ready after {time.time() - begun:.0f} s.")
    if is_drawn:
        print(f"Look at some rows before you train on them: {out / 'inspect.png'}")


# under torchrun the first process does it all
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    main()
