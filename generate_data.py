"""Videos, overlays, questions and chains of thought (paper Sec. 3.1): a toy 3-D world, or real footage.

In:  nothing (SOURCE="toy"), or VIDEOS: a folder in SpatialVID's layout (SOURCE="spatialvid") or any folder
     of mp4 files (SOURCE="videos", "questions"); README, "Real video", says which files are read; tables and
     phrases from assets/vocabulary.json and assets/phrases.json
Out: OUT/{train,test}_{imagery,noimage,verbal}.jsonl  questions on disjoint clips, one chain of thought a file
     OUT/rl_{train,test}.jsonl    questions for 4DRL: compound ones of the toy, or those of QUESTIONS
     OUT/processed_data/<clip>/   frames/, masked_static_overlays/, masked_dynamic_overlays/ and rows.json
     OUT/meta.json                constants, counts and what was dropped, last: without it it is unfinished

    python generate_data.py                                                   # laptop: the toy world
    python generate_data.py TRAIN_CLIPS=64000 SIZE=84 OUT=out/big             # more, for a GPU run
    python generate_data.py SOURCE=videos VIDEOS=clips OUT=out/own            # any mp4 files, no masks needed
    python generate_data.py SOURCE=spatialvid SEGMENTER=files MAX_SIDE=640 VIDEOS=SpatialVID OUT=out/real
    python generate_data.py SOURCE=spatialvid SEGMENTER=sam3 ANNOTATOR=api MODEL=gpt-4.1 WORKERS=1 \\
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

import base64
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().with_name("assets")))

import ask_endpoint
import segment_files
import spatialvid
from assets.tables import read_table
from model import check, set_constants

# paths
OUT = "out/toy"  # folder that is written
QUESTIONS = ""  # 4DRL rows of the release (jsonl) or DSR-Train's (json, parquet), for SOURCE="questions"
VIDEOS = ""  # folder of mp4 files, searched through all its folders, or SpatialVID's own
# data
SOURCE = "toy"  # "toy" | "spatialvid" | "videos" | "questions"
TRAIN_CLIPS = 8000  # clips of train_*.jsonl (ours)
TEST_CLIPS = 500  # clips of test_*.jsonl, never seen in training (ours)
RL_TRAIN_CLIPS = 3000  # clips of rl_train.jsonl (ours)
RL_TEST_CLIPS = 250  # clips of rl_test.jsonl (ours)
P_OBJECT_CLIP = 0.6  # share of clips asked about objects (rl: about both); the others about the camera (ours)
P_CAMERA = (0.45, 0.35, 0.20)  # camera clips: one movement, two at once, two segments (ours)
P_OBJECT = (0.2, 0.3)  # object clips: the camera moves too; two moving objects (ours)
P_ASKED = (0.15, 0.15, 0.15)  # moving objects: distance instead of direction; a box; speed as well (ours)
OVERLAYS = (2, 3)  # fewest and most overlays of a moving object, first and last always in (paper: 2 to 5)
# toy world
SIZE = 56  # side of a square frame, pixels (ours)
FRAMES = 8  # frames of a clip (ours)
SPACINGS = (1.0, 2.0)  # seconds between frames, one drawn per clip (ours)
HFOV = 70.0  # horizontal field of view, degrees (ours)
TURNS = ((18.0, 27.0), (18.0, 27.0), (25.0, 40.0))  # pan, tilt, roll, degrees (ours)
SLIDE = (0.32, 0.48)  # truck, pedestal and sideways motions, as a share of the depth (ours)
DOLLY = (0.32, 0.45)  # dolly and motions in depth, as a share of the depth (ours)
MIN_AREA = 0.03  # least visible area of an object asked about, share of the frame (ours)
MIN_VISIBLE = 0.7  # least unoccluded share of its silhouette (ours)
HIDDEN_AREA = 0.005  # below this share of the frame a thing is called hidden (ours)
LINES = (20, 90, 165, 235)  # greys of upright viewfinder lines, left to right: so that x can be seen (ours)
NOISE = 4.0  # standard deviation of the pixel noise, of 255 (ours)
# real footage
SEGMENTER = "motion"  # "motion" (crude, needs no masks) | "files" | "dyn" | "sam3": assets/segment_<this>.py
WEIGHTS = "facebook/sam3"  # of a segmenter that has some: their folder, or their name on the hub (gated)
ANNOTATOR = "template"  # "template" | "api": who names objects, checks overlays and writes the reasoning
BASE_URL = "https://api.openai.com/v1"  # OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY
MODEL = ""  # the endpoint's model
ASKS = 3  # replies to one question before it is given up, if they are malformed or not valid (ours)
WAITS = (0, 2, 6, 14, 30, 62)  # seconds before each attempt at a busy, broken or silent server (ours)
TIMEOUT = 120.0  # seconds without a word from the server (ours)
SAMPLE_FPS = 4.0  # frames a second of videos without indexes.txt (ours; paper: 1)
WINDOW = 8  # frames of one clip of such a video; longer shots give several that overlap by half (ours)
MAX_FRAMES = 50  # annotated clips with more frames are skipped (release)
MAX_JUMP = 45.0  # mean change of brightness between neighbouring frames, of 255, that is a cut (ours)
MAX_SIDE = 160  # longer side of the stored frames, pixels (ours)
MIN_MASK = 0.001  # Eq. 2: least area of a mask, share of the frame (release)
MAX_GROWTH = 4.0  # Eq. 2: largest ratio between a mask's area and the median of its clip (ours)
CUE_SLACK = 0.05  # Eq. 3: displacement against a camera label, in frames, that contradicts it (ours)
DROP_CONTRADICTED = True  # False: rows whose camera label is contradicted stay, flagged (ours)
HELD_OUT = 0.25  # share of the scenes that go to test_*.jsonl (ours)
# overlay
ALPHA = 0.4  # Eq. 1 (release)
OVERLAY_COLOUR = (255, 0, 0)  # Eq. 1, RGB (release)
# logging
INSPECT = 0  # rows of train_imagery.jsonl drawn into OUT/inspect.png (ours)
# system
SEED = 0  # every clip's generator is a function of (SEED, split, number)
WORKERS = os.cpu_count()  # processes; the files do not depend on it

ASSETS = Path(__file__).resolve().with_name("assets")
PHRASES, WORDS = (json.loads((ASSETS / f"{name}.json").read_text()) for name in ("phrases", "vocabulary"))
DIRECTIONS, DISTANCES, COLOURS, SHAPES = (WORDS[n] for n in ("direction", "distance", "colour", "shape"))
MOVES, X_WORDS, Y_WORDS = list(WORDS["move"]), WORDS["x"], WORDS["y"]
# movements and directions stand in pairs of opposites, "Stationary" is its own
OPPOSITES = {name: names[n ^ 1] for names in (MOVES, list(DIRECTIONS)[:-1]) for n, name in enumerate(names)}
# ours: no pairs of pan and truck or of tilt and pedestal, which may cancel each other
PAIRS = [f"{MOVES[i]} and {MOVES[j]}" for i in range(12) for j in range(12) if i // 2 < j // 2 != i // 2 + 4]
VOCABULARY = {name: list(words) for name, words in WORDS.items()} | {"single": MOVES, "pair": PAIRS}
# a split's place seeds its clips; the last two are those of assets/make_tiny.py
SPLITS = ["train", "test", "rl_train", "rl_test", "pretrain", "pretrain_test"]
FORMS = ["imagery", "noimage", "verbal"]
SPENT = Counter()  # what was done in this process and the seconds it took, by `spend`

# ---------------------------------------------------------------- toy world: rays, shapes, light


def rotation(pan, tilt, roll):
    """Angles (T,) in radians, positive right, up, clockwise -> rot (T, 3, 3), columns right, up, forward."""
    zero = np.zeros_like(pan)
    right = np.stack([np.cos(pan), zero, -np.sin(pan)], -1)
    up = np.stack([-np.sin(pan) * np.sin(tilt), np.cos(tilt), -np.cos(pan) * np.sin(tilt)], -1)
    forward = np.stack([np.sin(pan) * np.cos(tilt), np.sin(tilt), np.cos(pan) * np.cos(tilt)], -1)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    return np.stack([right * c - up * s, up * c + right * s, forward], -1)


def view_width(hfov):
    """Horizontal field of view in degrees -> width of the view at depth 1."""
    return 2 * np.tan(np.radians(hfov) / 2)


def camera_rays(rot, size, hfov):
    """rot (T, 3, 3) -> ray of each pixel (3, T, H, W), scaled so that a ray's parameter is its depth."""
    u = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32) * np.float32(view_width(hfov))
    right, up, forward = rot.astype(np.float32).transpose(2, 1, 0)[..., None, None]  # each (3, T, 1, 1)
    return right * u - up * u[:, None] + forward


def project(points, pos, rot, hfov):
    """Points (T, 3), camera pos (T, 3), rot (T, 3, 3) -> x, y in frame widths from the corner, depth (T,)."""
    right, up, depth = np.einsum("tji,tj->it", rot, points - pos)
    return 0.5 + right / depth / view_width(hfov), 0.5 - up / depth / view_width(hfov), depth


def hit_round(origin, rays, half, shape):
    """Ball, pillar or cone at zero: origin (3, T, 1, 1), rays (3, T, H, W) -> depth (T, H, W), normals.

    All are X^2 + Z^2 = p + q Y + s Y^2 with |Y| <= half[1]; a ray that first meets the wall from inside came
    through the flat top, so it is shaded as the top. Depth is inf where the ray misses.
    """
    radius, height = half
    slope = (radius / (2 * height)) ** 2
    cone = (slope * height**2, -2 * slope * height, slope)
    p, q, s = {"ball": (radius**2, 0, -1), "pillar": (radius**2, 0, 0), "cone": cone}[shape]
    (ox, oy, oz), (dx, dy, dz) = origin, rays
    a = dx * dx + dz * dz - s * dy * dy
    b = ox * dx + oz * dz - (q / 2 + s * oy) * dy
    c = ox * ox + oz * oz - p - q * oy - s * oy * oy
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    first, second = (-b - root) / a, (-b + root) / a  # (T, H, W)
    outside = (first > 0) & (np.abs(oy + first * dy) <= height)
    inside = (second > 0) & (np.abs(oy + second * dy) <= height)
    depth = np.where((outside | inside) & (b * b > a * c), np.where(outside, first, second), np.inf)
    normal = np.stack([ox + first * dx, -q / 2 - s * (oy + first * dy), oz + first * dz]) / radius
    return depth, np.where(outside, normal, np.float32([0, 1, 0])[:, None, None, None])


def hit_box(origin, rays, half, yaw):
    """A box of half sizes half[0], half[1], half[0] turned by yaw -> depth (T, H, W), normal (3, T, H, W)."""
    turn = np.float32([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    origin, rays = np.tensordot(turn, origin, 1), np.tensordot(turn, rays, 1)
    reach = np.float32([half[0], half[1], half[0]])[:, None, None, None]
    step = 1 / np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)
    near = -origin * step - reach * np.abs(step)  # (3, T, H, W), where the ray enters each slab
    depth, last = near.max(0), (-origin * step + reach * np.abs(step)).min(0)
    face = np.where(near == depth, -np.sign(rays), 0)
    return np.where((depth < last) & (depth > 0), depth, np.inf), np.tensordot(turn.T, face, 1)


def paint_background(pos, rays, look, shadows):
    """Ground, shadows, mountains, sky and sun -> colour (3, T, H, W), depth (T, H, W), is_sun (T, H, W)."""
    dx, dy, dz = rays
    depth = np.where(dy < 0, pos[:, 1, None, None] / np.maximum(-dy, 1e-6), np.inf).astype(np.float32)
    far = np.minimum(depth, 1e4)
    x, z = pos[:, 0, None, None] + far * dx, pos[:, 2, None, None] + far * dz  # (T, H, W)
    column, line = (np.floor(v / look["cell"]).astype(np.int32) & 31 for v in (x, z))
    light = 1 + look["tiles"][column, line] * np.exp(-far / 14)
    for centre, radius in shadows:
        distance = (x - centre[:, 0, None, None]) ** 2 + (z - centre[:, 2, None, None]) ** 2
        light = np.where(distance < radius**2, light * 0.6, light)
    length = np.sqrt(dx * dx + dy * dy + dz * dz)
    colour = np.multiply.outer(look["sky"], 1.05 - 0.5 * np.maximum(dy / length, 0))
    is_sun = np.einsum("cthw,c->thw", rays, look["sun"]) > look["sun_cos"] * length
    ridge, is_ground = look["ridge"], np.isfinite(depth)
    is_mountain = (dy < ridge.max() * length) & (dy >= 0)  # low enough to be one
    angle = np.degrees(np.arctan2(dx[is_mountain], dz[is_mountain])).astype(np.int32) % 360
    is_mountain[is_mountain] = dy[is_mountain] < ridge[angle] * length[is_mountain]
    colour[:, is_sun] = np.float32([[255], [250], [190]])
    colour[:, is_mountain] = look["mountain"][:, None]
    colour[:, is_ground] = np.multiply.outer(look["ground"], light[is_ground])
    return colour, depth, is_sun & ~is_mountain & ~is_ground


def render(scene, size, hfov):
    """A scene -> frames (T, H, W, 3) uint8, masks {name: (T, H, W)}, silhouettes' areas {name: (T,)}."""
    pos, look, things = scene["pos"].astype(np.float32), scene["look"], scene["things"]
    rays = np.ascontiguousarray(camera_rays(scene["rot"], size, hfov))
    shadows = [(thing["path"].astype(np.float32), thing["half"][0]) for thing in things]
    colour, nearest, is_sun = paint_background(pos, rays, look, shadows)
    owner, areas = np.full(nearest.shape, -1), {}
    for number, (thing, (centre, _)) in enumerate(zip(things, shadows)):
        origin = (pos - centre).T[:, :, None, None]  # (3, T, 1, 1)
        hit, how = (hit_box, thing["yaw"]) if thing["shape"] == "box" else (hit_round, thing["shape"])
        depth, normal = hit(origin, rays, thing["half"], how)
        areas[thing["name"]] = np.isfinite(depth).sum((1, 2))
        front = depth < nearest
        nearest[front], owner[front] = depth[front], number
        light = 0.7 + 0.4 * np.maximum(look["light"] @ normal[:, front], 0)
        colour[:, front] = np.multiply.outer(np.float32(COLOURS[thing["colour"]]), light)
    frames = np.clip(colour * look["brightness"] + look["noise"][..., 0], 0, 255).astype(np.uint8)
    frames = np.ascontiguousarray(frames.transpose(1, 2, 3, 0))  # (T, H, W, 3)
    width = max(1, size // 28)
    for left, grey in zip(np.linspace(0, size - width, len(LINES)).round().astype(int), LINES):
        columns = slice(left, left + width)  # nothing is visible under the lines of the viewfinder
        frames[:, :, columns], owner[:, :, columns], is_sun[:, :, columns] = grey, -1, False
    masks = {thing["name"]: owner == number for number, thing in enumerate(things)}
    return frames, masks | {"sun": is_sun & (owner < 0)}, areas


# ---------------------------------------------------------------- toy world: clips of given labels


def draw_plan(rng, kind):
    """Labels of a clip, kind "camera" | "object" | "both" | "sequence" -> camera segments, movers, anchor."""
    last, middle = FRAMES - 1, int(rng.integers(FRAMES // 2 - 1, FRAMES // 2 + 1))
    one, two = (MOVES[2 * axis + rng.integers(2)] for axis in rng.permutation(6)[:2])
    single, pair = [(0, last, one)], [(0, last, str(rng.choice(PAIRS)))]
    modes = [single, pair, [(0, middle, one), (middle, last, two)], []]
    shares = {"object": (P_OBJECT[0], 0, 0, 1 - P_OBJECT[0]), "both": (1, 0, 0, 0), "sequence": (0, 0, 1, 0)}
    mode = rng.choice(4, p=shares.get(kind, (*P_CAMERA, 0)))
    movers = [draw_mover(rng, kind) for _ in range(1 + (kind == "object" and rng.random() < P_OBJECT[1]))]
    anchor = middle if mode == 2 else last // 2
    return {"kind": kind, "camera": modes[mode], "movers": movers, "anchor": anchor}


def draw_mover(rng, kind):
    """Labels of one moving object, each uniform over its vocabulary; `step`: its way right, up, forward."""
    label = str(rng.choice(list(DIRECTIONS)[: 10 if kind == "both" else 11]))
    ask, speed, chance = ["direction"], "Constant", rng.random(3) if kind == "object" else np.ones(3)
    if chance[0] < P_ASKED[0]:
        label = str(rng.choice(list(DISTANCES)))
        sideways = [0, 0] if "First" in label else 0.6 * rng.integers(-1, 2, 2)
        return {"ask": ["distance"], "distance": label, "speed": speed, "step": [*sideways, DISTANCES[label]]}
    ask += ["box"] if chance[1] < P_ASKED[1] else []
    if chance[2] < P_ASKED[2] and label != "Stationary":
        ask.append("speed")
        speed = str(rng.choice(VOCABULARY["speed"]))
    return {"ask": ask, "direction": label, "speed": speed, "step": DIRECTIONS[label]}


def draw_look(rng):
    """Light, colours and textures; sun and mountains are at infinity, known by their direction only."""
    azimuth, height, angle = rng.uniform(-0.45, 0.45), rng.uniform(0.18, 0.5), np.radians(np.arange(360))
    board = (np.add.outer(np.arange(32), np.arange(32)) % 2 - 0.5) * rng.uniform(0.3, 0.6)
    light = np.array([rng.uniform(-1, 1), rng.uniform(0.6, 1.2), rng.uniform(-1, -0.2)])
    look = {
        "sun": [np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)],
        "sun_cos": np.cos(np.radians(rng.uniform(5.5, 7))),
        "ridge": 0.06 + np.abs(sum(0.04 * np.sin(n * angle + rng.uniform(0, 6.3)) for n in (3, 7, 11, 19))),
        "tiles": board + rng.normal(0, 0.12, (32, 32)),
        "cell": rng.uniform(0.8, 1.4),
        "sky": np.array([150, 185, 215]) * rng.uniform(0.8, 1.1, 3),
        "ground": np.array([125, 112, 95]) * rng.uniform(0.8, 1.2, 3),
        "mountain": np.array([95, 100, 110]) * rng.uniform(0.7, 1.2),
        "light": light / np.linalg.norm(light),
        "brightness": rng.uniform(0.75, 1.08),
        "noise": rng.normal(0, NOISE, (FRAMES, SIZE, SIZE, 1)),
    }
    return {name: np.float32(value) for name, value in look.items()}


def camera_path(rng, segments, anchor, depth):
    """Segments [(start, end, label)] sized by what is seen at `depth` -> pos (T, 3), rot (T, 3, 3)."""
    rates = np.zeros((FRAMES, 6))  # pan, tilt, roll, dolly, truck, pedestal since the frame before
    spans = [*np.radians(TURNS), DOLLY, SLIDE, SLIDE]
    for start, end, label in segments:
        for move in label.split(" and "):
            axis, is_back = divmod(MOVES.index(move), 2)
            amount = rng.uniform(*spans[axis]) * (depth if axis > 2 else 1)
            rates[start + 1 : end + 1, axis] = (-amount if is_back else amount) / (end - start)
    angles = np.cumsum(rates[:, :3], 0)
    angles += [0, np.radians(rng.uniform(-18, 3)), 0] - angles[anchor]
    rot = rotation(*angles.T)
    pos = np.cumsum(np.einsum("tij,tj->ti", rot, rates[:, [4, 5, 3]]), 0)  # the axes are right, up, forward
    return pos + [0, rng.uniform(1.6, 2.6) - pos[anchor, 1], 0], rot


def draw_things(rng, count):
    """`count` things of different colours and shapes, so that colour, shape and name are each unique."""
    colours, things = rng.permutation(list(COLOURS)).tolist(), []
    for colour, shape in zip(colours, rng.permutation(list(SHAPES))[:count].tolist()):
        half = np.float32(SHAPES[shape]) * np.float32(rng.uniform(0.9, 1.15, 1 if shape == "ball" else 2))
        thing = {"name": f"{colour} {shape}", "colour": colour, "shape": shape, "half": half}
        things.append(thing | {"yaw": rng.uniform(0, np.pi / 2), "static": True})
    return things


def draw_scene(rng, plan):
    """One attempt at a scene of a plan: camera pos (T, 3) and rot (T, 3, 3), things with paths (T, 3).

    "asked" are the things that questions are about: the first landmark (camera), else the moving things.
    """
    near, side, anchor = rng.uniform(4.2, 5.4), rng.choice([-1, 1]), plan["anchor"]
    about_camera, still = plan["kind"] in ("camera", "sequence"), int(rng.integers(1, 3))
    pos, rot = camera_path(rng, plan["camera"], anchor, near)
    things = draw_things(rng, still + len(plan["movers"]))

    def place(x, y, depth):  # in frame widths right of and above the centre of the anchor frame
        return pos[anchor] + rot[anchor] @ np.array([x * view_width(HFOV), y * view_width(HFOV), 1]) * depth

    # a landmark off the centre shows a roll; in object clips landmarks stay behind the moving things
    first = rng.uniform(-0.14, 0.14) + (0.14 * side if "Roll" in str(plan["camera"]) else 0)
    aside, far = rng.uniform(0.25, 0.45, 2), rng.uniform(6.5, 9, 2)
    spots = [(first, near), (side * aside[0], far[0]), (-side * aside[1], far[1])]
    for thing, (x, depth) in zip(things[:still], spots[0 if about_camera else 1 :]):
        ground = place(x, 0, depth) * [1, 0, 1]
        thing["path"] = np.tile(ground + [0, thing["half"][1], 0], (FRAMES, 1))
    for number, (thing, mover) in enumerate(zip(things[still:], plan["movers"])):
        x = -side * rng.uniform(0.18, 0.34) if about_camera or number else rng.uniform(-0.16, 0.16)
        depth = rng.uniform(4, 5.2) + (1.2 if about_camera else 0)
        path = mover_path(rng, mover) * depth @ rot[0].T + place(x, rng.uniform(-0.2, 0.2), depth)
        path[:, 1] += max(0, thing["half"][1] - path[:, 1].min())  # nothing sinks into the ground
        thing |= mover | {"static": False, "path": path}
    asked = things[:1] if about_camera else things[still:]
    return {"pos": pos, "rot": rot, "camera": plan["camera"], "things": things, "asked": asked}


def pace(label, t):
    """A speed label, times t in 0..1 -> share of the path done: a power of t, or of 1 - t, and a wave."""
    power, is_slowing, wave = WORDS["speed"][label]
    share = 1 - (1 - t) ** power if is_slowing else t**power
    return share + wave * np.sin(2 * np.pi * t) / (2 * np.pi)


def mover_path(rng, mover):
    """A mover's way around its middle (T, 3): right, up, forward for the first camera, in shares of depth."""
    t, slide = np.linspace(0, 1, FRAMES), rng.uniform(*SLIDE)
    # first one way, then back, or a single way at the speed of its label
    share = 1 - np.abs(2 * t - 1) if "First" in mover.get("distance", "") else pace(mover["speed"], t)
    step = np.array(mover["step"]) * [slide, slide, 1.1 * rng.uniform(*DOLLY)]
    step += rng.normal(0, 0.08, 3) * np.linalg.norm(step)  # little enough to keep the label
    return np.outer(share - 0.5, step)


def fits(scene):
    """Whether a scene shows its labels: nothing collides, things asked about stay in view, labels hold."""
    things, pos, rot = scene["things"], scene["pos"], scene["rot"]
    for thing in scene["asked"]:
        x, y, depth = project(thing["path"], pos, rot, HFOV)
        if depth.min() < 2.2 or min(x.min(), y.min()) < 0.12 or max(x.max(), y.max()) > 0.88:
            return False
    for number, thing in enumerate(things):
        path, radius, asks = thing["path"], thing["half"][0], thing.get("ask", [])
        gaps = [np.linalg.norm(path - it["path"], axis=1).min() - it["half"][0] for it in things[:number]]
        if min(gaps, default=9) < radius + 0.2:
            return False
        facts = path_labels(path, pos, rot) if asks else {}
        if any(thing[ask] != facts[ask] for ask in asks if ask in facts):
            return False
    return pos[:, 1].min() > 0.7


def make_scene(rng, kind):
    """Draws scenes of a plan until one fits and shows what is asked -> scene with frames, masks, times."""
    for attempt in range(3000):
        if attempt % 200 == 0:
            plan = draw_plan(rng, kind)
        scene = draw_scene(rng, plan)
        if not fits(scene):
            continue
        scene["look"] = draw_look(rng)
        frames, masks, areas = render(scene, SIZE, HFOV)
        about_camera, names = scene["asked"][0]["static"], [thing["name"] for thing in scene["asked"]]
        keys = sorted({i for part in scene["camera"] for i in part[:2]}) if about_camera else [0, FRAMES - 1]
        seen = np.array([masks[name].sum((1, 2))[keys] for name in names])
        least = np.array([MIN_VISIBLE * areas[name][keys] for name in names])
        if (seen >= np.maximum(least, MIN_AREA * SIZE * SIZE)).all():
            times = (np.arange(FRAMES) * rng.choice(SPACINGS)).tolist()
            return scene | {"frames": frames, "masks": masks, "times": times}
    sys.exit("No toy clip fits these constants; make MIN_AREA, SLIDE, TURNS or DOLLY smaller.")


# ---------------------------------------------------------------- geometry to labels and words


def direction_label(shift):
    """Way (right, up, forward) in the first camera's axes, shares of the depth -> label, None if unclear."""
    lateral, forward = np.hypot(*shift[:2]), abs(shift[2])
    if max(lateral, forward) < 0.03:
        return "Stationary"
    if lateral < forward / 2:
        return "Moving Away from Camera" if shift[2] > 0 else "Moving Toward Camera"
    if forward < lateral / 2:
        for label, way in list(DIRECTIONS.items())[:8]:
            if np.dot(shift, way) > np.cos(np.radians(14)) * lateral * np.linalg.norm(way):
                return label
    return None


def motion_labels(shift, distances):
    """Way (3,) as above, true distances (T,) -> {"direction": label, "distance": label}, None if unclear."""
    d, names, distance = np.asarray(distances) / distances[0], list(DISTANCES), None
    steps, between, ends = np.diff(d), d[2:-2], d[[0, -1]]
    if d.max() < 1.1 * d.min():
        distance = names[2]
    elif max(d[-1], 1 / d[-1]) > 1.25 and (steps.max() < 0.02 or steps.min() > -0.02):
        distance = names[int(d[-1] > 1)]
    elif len(between) and between.min() * 1.18 < ends.min() and d.max() < 1.1:
        distance = names[3]
    elif len(between) and between.max() > 1.18 * ends.max() and d.min() > 0.9:
        distance = names[4]
    return {"direction": direction_label(shift), "distance": distance}


def path_labels(path, pos, rot):
    """A world path (T, 3) seen by a camera pos (T, 3), rot (T, 3, 3) -> its motion_labels, camera-free."""
    shift, middle = rot[0].T @ (path[-1] - path[0]), rot[0].T @ ((path[0] + path[-1]) / 2 - pos[0])
    return motion_labels(shift / middle[2], np.linalg.norm(path - pos, axis=1))


def overlay(frame, mask, alpha, colour):
    """Eq. 1: frame (H, W, 3) uint8, mask (H, W) bool -> (1 - alpha M) * I + alpha M * c, (H, W, 3) uint8."""
    weight = alpha * mask[..., None]
    return np.rint((1 - weight) * frame + weight * np.array(colour)).astype(np.uint8)


def where(masks):
    """Masks (n, H, W) of a thing -> mean centre x, y and area, shares of the frame; None if it is hidden."""
    area = float(masks.mean())
    if area < (HIDDEN_AREA if SOURCE == "toy" else MIN_MASK):
        return None
    _, y, x = np.nonzero(masks)
    return (x.mean() + 0.5) / masks.shape[2], (y.mean() + 0.5) / masks.shape[1], area


def static_cue(start, end):
    """Eq. 3: masks (H, W) of a static thing -> shift x, y in frame sizes and log area ratio: the camera's."""
    (x0, y0, a0), (x1, y1, a1) = where(start[None]), where(end[None])
    return x1 - x0, y1 - y0, float(np.log(a1 / a0))


def mask_box(mask):
    """mask (H, W) -> [x1, y1, x2, y2] in pixels; x2 and y2 are the far edges, so x2 - x1 is the width."""
    y, x = np.nonzero(mask)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def fifth(words, share):
    """The word for a share 0..1 of the frame: fifth(X_WORDS, 0.1) -> "leftmost"."""
    return words[min(max(int(share * 5), 0), 4)]


def spell_spot(spot):
    """x, y, area of `where` -> "left upper small"; None -> "hidden"."""
    if spot is None:
        return "hidden"
    size = WORDS["size"][int(np.searchsorted(WORDS["size_edges"], np.sqrt(spot[2])))]
    return f"{fifth(X_WORDS, spot[0])} {fifth(Y_WORDS, spot[1])} {size}"


# ---------------------------------------------------------------- options without a text-only shortcut


def opposite(label):
    """The label turned round: "Moving Left-Up" -> "Moving Right-Down"; a pair has both movements turned."""
    return " and ".join(OPPOSITES.get(part, part) for part in label.split(" and "))


def camera_options(rng, label, other=None):
    """Truth -> 4 options of its kind: two labels and their opposites, each as likely to be the truth.

    Half of the time the other label is a confusable one: truck for pan, or a pair's second movement turned.
    """
    names = [*MOVES, *PAIRS, label]
    axes = {name: [MOVES.index(move) // 2 for move in name.split(" and ")] for name in names}
    family = [name for name in axes if len(axes[name]) == len(axes[label]) and axes[name] != axes[label]]
    drawn = family
    if rng.random() < 0.5 or not family:
        first, *rest = label.split(" and ")
        partner = 2 * WORDS["partners"][axes[label][0]]
        drawn = [f"{first} and {opposite(' and '.join(rest))}"] if rest else MOVES[partner : partner + 2]
    other = other if other in family else str(rng.choice(drawn))
    return [label, opposite(label), other, opposite(other)]


def direction_options(rng, label):
    """Truth -> 4 options: two directions and their opposites, or such a pair, "Stationary" and a single one.

    "Stationary" has no opposite; with these shares every option of a set is equally likely to be the truth.
    """
    others = [name for name in DIRECTIONS if name not in (label, opposite(label), "Stationary")]
    other = str(rng.choice(others))
    if label == "Stationary":
        alone = [name for name in others if name not in (other, opposite(other))]
        return [label, str(rng.choice(alone)), other, opposite(other)]
    kind = rng.choice(3, p=[0.7, 0.2, 0.1])
    first = "Stationary" if kind == 2 else opposite(label)
    return [label, first, other, "Stationary" if kind == 1 else opposite(other)]


def box_options(rng, box, width, height):
    """Truth [x1, y1, x2, y2] -> 4 boxes at 2 x and 2 y positions, far enough apart; None without room."""
    starts = []
    for low, high, side in ((box[0], box[2], width), (box[1], box[3], height)):
        least, room = max(0.2 * side, 0.6 * (high - low)), range(side - (high - low) + 1)
        starts.append([low, *rng.permutation([p for p in room if abs(p - low) > least]).tolist()[:1]])
    w, h = box[2] - box[0], box[3] - box[1]
    boxes = [str([int(x), int(y), int(x + w), int(y + h)]) for x in starts[0] for y in starts[1]]
    return boxes if len(boxes) == 4 else None


def compound_options(rng, kind, first, second, noun=""):
    """Two true labels -> 4 texts, a 2 x 2 square: each label and another one, or both in the other order."""
    if kind == "both":
        ways = [name for name in DIRECTIONS if name not in (second, "Stationary")]
        turned = opposite(second) if rng.random() < 0.5 else str(rng.choice(ways))
        firsts = first, camera_options(rng, first)[rng.integers(1, 3)]
        return [f"Camera: {x}; {noun}: {y}" for x in firsts for y in (second, turned)]
    square = [(first, second), (opposite(first), opposite(second))]
    mixed = [(first, opposite(second)), (opposite(first), second)]
    square += mixed if rng.random() < 0.5 else [(y, x) for x, y in square]
    return [f"First {x}, then {y}" for x, y in square]


def draw_options(rng, kind, label, width=0, height=0):
    """A label of one kind of question -> 4 options, the truth first; None if there are no 3 wrong ones."""
    makers = {"single": camera_options, "pair": camera_options, "direction": direction_options}
    if kind in makers:
        return makers[kind](rng, label)
    if kind == "box":
        return box_options(rng, json.loads(label), width, height)
    return [label, *rng.permutation([name for name in VOCABULARY[kind] if name != label])[:3].tolist()]


def spell(rng, question, options):
    """Question and options, truth first -> text_input with shuffled letters, {letter: text}, true letter."""
    order = rng.permutation(len(options))
    lettered = {"ABCDEF"[place]: options[index] for place, index in enumerate(order)}
    lines = "\n".join(f"{letter}. {text}" for letter, text in lettered.items())
    return f"{question}\n\n{lines}", lettered, "ABCDEF"[int(np.argmin(order))]


# ---------------------------------------------------------------- rows: question, chain of thought, validator


def pick(rng, phrases, **names):
    """One phrase of a list, its {names} filled in."""
    return phrases[rng.integers(len(phrases))].format(**names)


def seconds(t):
    """8.0 -> "8s", 0.3333 -> "0.33s"."""
    return f"{round(t, 2):g}s"


def base_row(clip, name, question, thought, answer, subtask):
    """A row of the release's schema without imagery; a clip of only a name gives a row without video."""
    text = f"<think>{thought}</think>\n<answer>{answer}</answer>"
    row = {"id": f"{clip['name']}_{name}", "text_input": question, "text_output": text}
    times, folder = clip.get("times", []), f"processed_data/{clip['name']}/frames"
    row["image_input"] = [f"{folder}/frame_{number:04d}.jpg" for number in range(len(times))]
    row |= {"image_output": [], "times": times, "subtask": subtask, "clip": clip["name"]}
    return row | clip.get("evidence", {}).get(name, {})


def make_row(rng, clip, subtask, thing, looks, options, name):
    """A question about a clip, whose reasoning imagines `thing` at the frames `looks` -> made row.

    Made rows have besides the row its label, its true letter, and what stands for the imagery in other forms.
    """
    ask = "camera" if subtask.startswith("camera") else subtask.split("_")[1]
    phrases, (height, width) = PHRASES["any"] | PHRASES[ask], clip["frames"].shape[1:3]
    times = [seconds(clip["times"][look]) for look in looks]
    question = pick(rng, phrases["ask"], thing=thing, a=times[0], b=times[-1], w=width, h=height)
    question, _, key = spell(rng, question, options)
    steps = [pick(rng, phrases["link" if n else "open"], thing=thing, t=t) for n, t in enumerate(times)]
    end = pick(rng, phrases["end"], thing=thing, label=options[0])
    thought = "".join(f"{step} <output_image> " for step in steps) + end
    row = base_row(clip, name, question, thought, f"{key}. {options[0]}", subtask)
    row["image_output"] = [overlay_name(clip, thing, look) for look in looks]
    spots = [f" It is {spell_spot(where(clip['masks'][thing][look : look + 1]))}." for look in looks]
    return {"row": row, "label": options[0], "key": key, "thing": thing, "looks": looks, "spots": spots}


def overlay_name(clip, thing, frame):
    """Path of an overlay beside the jsonl; only the first static and the first moving thing go unnamed."""
    kind, prefix = ("static", "static") if thing in clip["static"] else ("dynamic", "dyn")
    suffix = "" if thing in (*clip["static"][:1], *clip["moving"][:1]) else "_" + thing.replace(" ", "-")
    return f"processed_data/{clip['name']}/masked_{kind}_overlays/{prefix}{suffix}_f{frame:04d}.jpg"


def camera_rows(rng, clip):
    """A question per segment; its overlays are the first landmark's at the segment's two ends (Eq. 3)."""
    rows, segments = [], clip["camera"]
    for number, (start, end, label) in enumerate(segments):
        options = camera_options(rng, label, segments[1 - number][2] if len(segments) == 2 else None)
        subtask = "camera_" + ("segment" if len(segments) > 1 else "pair" if " and " in label else "single")
        rows.append(make_row(rng, clip, subtask, clip["static"][0], [start, end], options, f"{start}->{end}"))
    return rows


def object_rows(rng, clip):
    """The questions each moving thing is to be asked; overlays at the first, last and some frames between."""
    rows, (height, width) = [], clip["frames"].shape[1:3]
    for number, thing in enumerate(clip["moving"]):
        masks, facts = clip["masks"][thing], clip["facts"][thing]
        shown = [t for t in range(len(masks)) if where(masks[[t]])]
        for ask in facts["ask"]:
            count = rng.integers(OVERLAYS[0], OVERLAYS[1] + 1) - 2
            looks = sorted([shown[0], *rng.permutation(shown[1:-1]).tolist()[:count], shown[-1]])
            label = str(mask_box(masks[looks[-1]])) if ask == "box" else facts[ask]
            options = draw_options(rng, ask, label, width, height)
            name = f"dynamic_{WORDS['tags'][ask]}" + ("_" + thing.replace(" ", "-") if number else "")
            if options:
                rows.append(make_row(rng, clip, f"object_{ask}", thing, looks, options, name))
    return rows


def compound_rows(rng, clip, kind):
    """A 4DRL question, answer only: camera and object both move, or one camera movement follows the other."""
    thing, first = clip["moving"][0], clip["camera"][0][2]
    second = clip["facts"][thing]["direction"] if kind == "both" else clip["camera"][1][2]
    options = compound_options(rng, kind, first, second, thing.split()[-1])
    a, b = seconds(clip["times"][0]), seconds(clip["times"][-1])
    question = pick(rng, PHRASES[kind]["ask"], thing=thing, a=a, b=b)
    _, lettered, key = spell(rng, question, options)
    base = base_row(clip, kind, "", "", "", f"compound_{kind}")
    row = {"Type": base["subtask"], "Question": question, **lettered, "Correct": key, "video_path": ""}
    row |= {"frame_paths": base["image_input"], **{name: base[name] for name in ("times", "clip", "id")}}
    return [{"row": row, "label": options[0]}]


def validate(row, key=None):
    """A DIFT row and its true letter -> None, or the first reason why it must not be written."""
    text, names, times = row["text_output"], row["image_output"], row["times"]
    parts = re.fullmatch(r"<think>(.*)</think>\s*<answer>(.*)</answer>", text, flags=re.S)
    thought, answer = parts.groups() if parts else ("", "")
    tags = re.search("</?(think|answer)>", thought + answer)
    moments = [dict(enumerate(times)).get(int(re.search(r"f(\d+)\.\w+$", name)[1]), -1) for name in names]
    letters = re.search(r"\b[B-F]\b|\bA[.):]|([Oo]ption|[Aa]nswer|[Cc]hoice) \(?A\b", thought)
    options = re.findall(r"^([A-F])\. (.*)$", row["text_input"], flags=re.M)
    letter, _, label = answer.partition(". ")
    reasons = {
        "the tags are not one closed think and then one closed answer": not parts or tags,
        "the number of placeholders is not that of overlays": text.count("<output_image>") != len(names),
        "the imagery is not all in the reasoning": "<output_image>" in answer,
        "the imagery is not in time order": any(b <= a for a, b in zip([-1, *moments], moments)),
        "the reasoning holds an option letter": letters,
        "the answer is not the key": options and not {(letter, label), (key or letter, label)} <= {*options},
        "two options are the same": len(dict(options)) > len({option for _, option in options}),
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


# ---------------------------------------------------------------- real footage: files and masks


def list_videos(folder):
    """[(split, number, path)] of all mp4 files; files named alike before the last "_" share a split.

    The number is a digest of the path inside the folder, so a run goes on although files were added.
    """
    check(importlib.util.find_spec("decord"), "Videos need decord: pip install decord, on ARM eva-decord.")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() == ".mp4")
    check(folder and paths, f"VIDEOS={folder} holds no mp4 file; set VIDEOS to a folder that does.")
    scenes = [str(path.with_name(path.stem.rpartition("_")[0] or path.stem)) for path in paths]
    names = np.random.default_rng(SEED).permutation(sorted(set(scenes))).tolist()
    held_out = names[: max(1, round(HELD_OUT * len(names)))] if len(names) > 1 else []
    splits = ["test" if scene in held_out else "train" for scene in scenes]
    digests = [hashlib.sha256(str(path.relative_to(folder)).encode()).hexdigest() for path in paths]
    jobs = [(split, int(digest[:10], 16), str(path)) for split, digest, path in zip(splits, digests, paths)]
    if not held_out:
        print(f"VIDEOS={folder} holds one scene only, so nothing is held out: a video is in both splits.")
        jobs.append(("test", *jobs[0][1:]))
    return jobs


def question_rows(jobs):
    """QUESTIONS of the release or DSR-Train about the jobs' videos -> {split: made rows}, {reason: where}.

    A video is known by its name without folders; grpo4d.py takes the frames.
    """
    check(Path(QUESTIONS).is_file(), f"QUESTIONS={QUESTIONS} is no file; give a jsonl, json or parquet.")
    videos, items = {Path(video).stem: (f"rl_{split}", video) for split, _, video in jobs}, {}
    for number, raw in enumerate(read_table(Path(QUESTIONS)), 1):
        raw = {WORDS["dsr_train"].get(name, name): raw[name] for name in raw} if isinstance(raw, dict) else {}
        raw |= zip("ABCDEF", found) if isinstance(found := raw.pop("options", ()), (list, tuple)) else {}
        fine = raw.get("Question") and raw.get("video_path") and raw.get(raw.get("Correct"))
        check(fine, f"{QUESTIONS}: question {number} lacks its text, its video's name or its right option.")
        name = Path(raw["video_path"]).name.removesuffix(".mp4")
        split, video = videos.get(name, ("", name))
        raw |= {"video_path": os.path.relpath(video, OUT), "id": f"{name}_{number}", "clip": name}
        items.setdefault(split, []).append({"row": raw, "label": raw["Correct"]})
    lost = [item["row"]["clip"] for item in items.pop("", [])]
    check(items, f"QUESTIONS={QUESTIONS} asks about no video in VIDEOS={VIDEOS}; set VIDEOS to their folder.")
    return items, {"questions are about videos that are not in VIDEOS": lost} if lost else {}


def spend(unit, count, begun):
    """Counts work of this process and its seconds since `begun`, for the rates at the end."""
    SPENT.update({unit: count, f"seconds of {unit}": time.time() - begun})


def read_video(path, indexes=None):
    """A video's frames at `indexes`, else SAMPLE_FPS a second -> (T, H, W, 3) uint8, true times (T,)."""
    import decord

    begun, reader = time.time(), decord.VideoReader(path)
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(float)
    if indexes is None:
        wanted = np.arange(times[0], times[-1] + 1e-6, 1 / SAMPLE_FPS)
        indexes = np.unique(np.searchsorted(times, wanted - 1e-6).clip(max=len(times) - 1))
    frames = [Image.fromarray(frame) for frame in reader.get_batch(indexes).asnumpy()]
    spend("frames", len(frames), begun)
    for frame in frames:
        frame.thumbnail((MAX_SIDE, MAX_SIDE), Image.LANCZOS)
    return np.stack([np.asarray(frame) for frame in frames]), np.round(times[indexes], 3)


def windows(frames):
    """Frames (T, H, W, 3) -> numbers of each clip's frames: WINDOW of a shot, overlapping by half."""
    half = WINDOW // 2
    cuts = np.flatnonzero(np.abs(np.diff(frames.mean(-1), axis=0)).mean((1, 2)) > MAX_JUMP) + 1
    shots = [shot for shot in np.split(np.arange(len(frames)), cuts) if len(shot) > 3]
    return [shot[i : i + WINDOW] for shot in shots for i in range(0, max(1, len(shot) - half), half)]


def consistent(masks):
    """Eq. 2 without a model: which masks (T, H, W) are neither too small nor of an odd size -> (T,)."""
    areas = masks.mean((1, 2))
    is_valid = (areas >= MIN_MASK) & (areas <= 0.5)
    typical = np.median(areas[is_valid]) if is_valid.any() else 1
    return is_valid & (areas <= MAX_GROWTH * typical) & (areas >= typical / MAX_GROWTH)


# ---------------------------------------------------------------- real footage: the annotator


def post(body):
    """Sends a request to BASE_URL and counts what it took -> the reply's text."""
    begun = time.time()
    text = ask_endpoint.post(BASE_URL, body, WAITS, TIMEOUT, SPENT)
    spend("requests", 0, begun)  # they are counted where they are sent
    return text


def ask(prompt, frames, masks, numbers, accept, **fields):
    """Asks assets/ask_<prompt>.txt about overlays -> what accept(reply) makes of it; None after ASKS bad.

    frames (T, H, W, 3), masks (T, H, W), numbers: which frames. The outcome is a file of OUT/annotator, named
    by the digest of the request, before it is used.
    """
    content = [{"type": "text", "text": (ASSETS / f"ask_{prompt}.txt").read_text().format(**fields)}]
    for t in numbers:
        image = Image.fromarray(overlay(frames[t], masks[t], ALPHA, OVERLAY_COLOUR))
        image.save(data := io.BytesIO(), "JPEG", quality=95)
        url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    path = Path(OUT, "annotator", hashlib.sha256(json.dumps(body).encode()).hexdigest() + ".json")
    if not path.exists():
        replies = (accept(post(body)) for _ in range(ASKS))
        taken = next((reply for reply in replies if reply is not None), None)
        part = path.with_suffix(f".{os.getpid()}")
        path.parent.mkdir(exist_ok=True)
        part.write_text(json.dumps(taken))
        part.rename(path)
    return json.loads(path.read_text())


def read_json(text, fits):
    """The JSON object in a reply if fits(it), else None."""
    try:
        found = json.loads(text[text.find("{") : text.rfind("}") + 1])
        return found if fits(found) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def spread(items):
    """At most 10 items of an array (release), evenly spaced, the first and the last among them."""
    return items[np.linspace(0, len(items) - 1, min(len(items), 10)).round().astype(int)]


def name_objects(frames, caption):
    """Names of a static and a moving object, 3 to 8 words each, as in objects.json; {} if one is missing."""

    def fits(found):
        names = found["static_object"], found["dynamic_object"]
        return None in names or names[0] != names[1] and all(3 <= len(name.split()) <= 8 for name in names)

    numbers, masks = spread(np.arange(len(frames))), np.zeros(frames.shape[:3], bool)
    names = ask("landmarks", frames, masks, numbers, lambda reply: read_json(reply, fits), caption=caption)
    return names if names and None not in names.values() else {}


def confirm(frames, thing, masks, numbers):
    """Eq. 2: whether the annotator finds just the thing in the overlay, of those frames `numbers` -> (T,)."""
    numbers = spread(np.array([t for t in numbers if masks[t].any()], int))

    def fits(found):
        return all(type(n) is int and 0 <= n < len(numbers) for n in found["valid"])

    fields = {"thing": thing, "count": len(numbers)}
    found = ask("check", frames, masks, numbers, lambda reply: read_json(reply, fits), **fields) or {}
    return np.isin(np.arange(len(masks)), numbers[found.get("valid", [])])


def rewrite(clip, item):
    """A made row -> the same with its reasoning in the annotator's words; None if no reply was valid."""
    row, looks, thing = item["row"], item["looks"], item["thing"]

    def accept(reply):
        text = re.sub(r"\s*<output_image>", " <output_image>", reply.strip().replace("thinking>", "think>"))
        made = item | {"row": row | {"text_output": text}}
        return None if any(validate(final_row(made, form), item["key"]) for form in FORMS) else made

    fields = {"question": row["text_input"], "answer": f"{item['key']}. {item['label']}", "thing": thing}
    fields |= {"times": ", ".join(seconds(row["times"][t]) for t in looks), "count": len(looks)}
    return ask("thought", clip["frames"], clip["masks"][thing], looks, accept, **fields)


# ---------------------------------------------------------------- real footage: geometry, clips, rows


def depth_inside(depth, mask):
    """Depth map (h, w) of any size, mask (H, W) -> the median depth inside the mask."""
    y, x = np.nonzero(mask)
    return np.nanmedian(depth[y * depth.shape[0] // mask.shape[0], x * depth.shape[1] // mask.shape[1]])


def object_facts(masks, notes):
    """Masks (T, H, W) of a moving object, its clip's annotations -> its camera-free labels, and "ask".

    Distances go by the depth maps, which have the poses' scale; a label must hold for the visible surface and
    for a middle 15 % behind it. Without them they go by the mask's height (the width changes when a thing
    turns) and are of unknown scale: if the camera travels, a label must hold for a thing at 2 and at 20 times
    its way. No direction without poses or the background's shifts (T, 2), which replace a turning camera.
    """
    shown, (count, height, width) = np.flatnonzero(masks.any((1, 2))), masks.shape
    lens, still = np.tile([1, width / height], (count, 1)) / view_width(HFOV), np.eye(7)[[6] * count]
    pos, rot = spatialvid.cameras(notes.get("poses", still)[shown])
    shifts = notes.get("shifts", np.zeros((count, 2)))[shown, ::-1] / [width, height]  # x, y
    spots = np.array([where(masks[[t]])[:2] for t in shown]) - shifts  # (n, 2)
    flat = (spots - 0.5) * [1, -1] / notes.get("intrinsics", lens)[shown, :2]
    rays = np.einsum("tij,tj->ti", rot, np.concatenate([flat, np.ones((len(shown), 1))], 1))
    if "depths" in notes:
        far = np.array([[depth_inside(notes["depths"][t], masks[t])] for t in shown])  # (n, 1)
        scales = [1, 1.15]
    else:
        far = 1 / np.array([[np.nonzero(masks[t])[0].std()] for t in shown]).clip(0.25)
        way = np.linalg.norm(pos - pos[0], axis=1).max()
        scales = np.array([2, 20]) * way / far.mean() if way > 0 else [1]
    found = [path_labels(pos + scale * far * rays, pos, rot) for scale in scales]
    known = ["direction", "distance"] if {"poses", "shifts"} & set(notes) else ["distance"]
    facts = {ask: found[0][ask] for ask in known if found[0][ask] and found[0][ask] == found[-1][ask]}
    return facts | {"ask": ["box", *facts]}


def contradicts(label, start, end):
    """Whether a static thing's masks (H, W) moved or grew against the camera's label (Eq. 3).

    Shifts are counted from where its growth alone would have put it; in a roll only growth counts.
    """
    moved = np.array(static_cue(start, end))  # x, y, log area ratio
    moved[:2] -= (np.exp(moved[2] / 2) - 1) * (np.array(where(start[None])[:2]) - 0.5)
    # 0: no displacement is expected, or two that may cancel each other
    expected = np.sum([WORDS["move"][move] for move in label.split(" and ")], 0)
    return bool((moved * expected < -CUE_SLACK)[2 if "Roll" in label else 0 :].any())


def real_clip(clip, notes, folder, start):
    """Adds what is asked about to a clip: things, masks, facts, camera segments with evidence -> reasons."""
    clip |= {"static": [], "moving": [], "masks": {}, "camera": [], "evidence": {}}
    frames, names, reasons = clip["frames"], notes.get("objects", {}), Counter()
    segmenter = importlib.import_module(f"segment_{SEGMENTER}")
    names = names if len({*names.values()}) == len(names) else {}  # one name for two objects is none
    # what finds moving things alone leaves the landmark to mask images; without one no camera questions
    finds_both, segments = getattr(segmenter, "LANDMARKS", True), []
    finders = {"moving": segmenter, "static": segmenter if finds_both else segment_files}
    if finds_both or (folder / "masks_static").exists():
        segments = spatialvid.camera_segments(notes.get("instructions", {}), len(frames), MOVES)
    if hasattr(segmenter, "global_shifts") and "poses" not in notes:
        notes = notes | {"shifts": segmenter.global_shifts(frames.mean(-1))}
    if ANNOTATOR == "api" and not (names := name_objects(frames, spatialvid.read_caption(folder))):
        return Counter({"clips have no two objects that the annotator names": 1})
    for kind, role in (("moving", "dynamic"), ("static", "static"))[: 2 if segments else 1]:
        phrase = names.get(f"{role}_object") or f"{kind} object"
        files = [folder / f"masks_{role}" / f"frame_{start + n:04d}.png" for n in range(len(frames))]
        begun = time.time()
        masks = finders[kind].masks(frames, phrase, files, WEIGHTS)
        spend("masks", len(masks), begun)
        masks &= consistent(masks)[:, None, None]
        if ANNOTATOR == "api":
            ends = {t for segment in segments for t in segment[:2]} if kind == "static" else range(len(masks))
            masks &= masks[[*ends]].any() and confirm(frames, phrase, masks, sorted(ends))[:, None, None]
        if masks.any((1, 2)).sum() < 2:
            reasons[f"clips show no consistent {role} object in two frames (Eq. 2)"] += 1
        else:
            clip[kind], clip["masks"][phrase] = [phrase], masks
    clip["facts"] = {thing: object_facts(clip["masks"][thing], notes) for thing in clip["moving"]}
    for first, last, label in segments:
        ends = masks[[first, last]]  # the landmark's
        if not ends.any((1, 2)).all():
            reasons["camera segments lack the landmark at an end (Eq. 2)"] += 1
            continue
        is_odd = contradicts(label, *ends)
        reasons["camera labels are contradicted by the landmark (Eq. 3)"] += is_odd
        if not (is_odd and DROP_CONTRADICTED):
            clip["camera"].append((first, last, label))
            clip["evidence"][f"{first}->{last}"] = {"static_cue": static_cue(*ends), "contradicted": is_odd}
    return reasons


# ---------------------------------------------------------------- clips on disk


def toy_clip(split, number, make=None):
    """The toy clip of a split and number, by SEED alone -> [(clip, rows)], why other rows are dropped.

    Its rows are made by make(rng, clip), or else by the maker of its kind of clip.
    """
    rng = np.random.default_rng([SEED, SPLITS.index(split), number])
    kinds = ("both", "sequence") if split.startswith("rl") else ("object", "camera")
    kind = kinds[int(rng.random() >= P_OBJECT_CLIP)]
    clip = make_scene(rng, kind) | {"name": f"{split}_{number:05d}"}
    clip["static"] = [thing["name"] for thing in clip["things"] if thing["static"]]
    clip["moving"] = [thing["name"] for thing in clip["things"] if not thing["static"]]
    clip["facts"] = {thing["name"]: thing for thing in clip["things"]}
    if split.startswith("rl"):
        return [(clip, compound_rows(rng, clip, kind))], {}
    rows, dropped = accept(make or (camera_rows if kind == "camera" else object_rows), rng, clip)
    return [(clip, rows)], dropped


def video_clips(name, number, path):
    """A video -> [(clip, rows)] of its windows, why others are left out; unreadable ones are a reason."""
    inside, made, dropped = Path(path).relative_to(Path(VIDEOS, WORDS["folders"][SOURCE][0])), [], Counter()
    folder = Path(VIDEOS, WORDS["folders"][SOURCE][1], inside.with_suffix(""))
    try:
        depths = Path(VIDEOS, "depths", inside.with_suffix(""))
        notes = spatialvid.read_notes(folder, depths, SOURCE == "spatialvid")
        frames, times = read_video(path, notes.get("indexes"))
        timed = [notes[kind] for kind in ("poses", "intrinsics", "depths") if kind in notes]
        if {*map(len, timed)} - {len(times)} or (set(notes) - {"objects"} and len(times) > MAX_FRAMES):
            return [], {"clips have not one pose and depth map a frame, or more than MAX_FRAMES frames": 1}
        for part in [np.arange(len(times))] if set(notes) - {"objects"} else windows(frames):
            clip = {"name": f"{name}/{part[0]:05d}", "frames": frames[part], "times": times[part].tolist()}
            dropped += real_clip(clip, notes, folder, part[0])
            rng = np.random.default_rng([SEED, number, part[0]])
            rows, bad = accept(lambda *how: camera_rows(*how) + object_rows(*how), rng, clip)
            if ANNOTATOR == "api":
                rows = [rewrite(clip, item) for item in rows]
                bad["rows have no valid reasoning by the annotator"] += rows.count(None)
            items = [item | {"row": item["row"] | {"video": str(inside)}} for item in rows if item]
            made.append((clip, items))
            dropped += bad
    except Exception as error:  # decord raises many kinds; each means that these files cannot be used
        return [], {f"clips are unreadable ({type(error).__name__})": 1}
    return made, dropped if made else {"videos have no shot of four frames": 1}


def accept(make, rng, clip):
    """Calls make(rng, clip) until the validator takes all rows, up to 3 times -> good rows, reasons."""
    for _ in range(3):
        rows = make(rng, clip)
        tries = [(item, final_row(item, form)) for item in rows for form in FORMS]
        bad = {item["row"]["id"]: reason for item, row in tries if (reason := validate(row, item.get("key")))}
        if not bad:
            break
    return [item for item in rows if item["row"]["id"] not in bad], Counter(bad.values())


def final_row(item, form):
    """A made row in one of the FORMS: without imagery its placeholders are left out or put into words."""
    row = item["row"]
    if form == "imagery" or "spots" not in item:
        return row
    spots = item["spots"] if form == "verbal" else [""] * len(item["spots"])
    first, *rest = row["text_output"].split(" <output_image>")
    text = first + "".join(spot + part for spot, part in zip(spots, rest))
    return row | {"text_output": text, "image_output": []}


def save_clips(folder, clips, made):
    """Writes frames of clips with rows, their overlays and rows.json under a temporary name, then renames."""
    part, images = folder.with_name(f"{folder.name}.part"), {}
    for clip, rows in clips:
        images |= zip(base_row(clip, "", "", "", "", "")["image_input"] if rows else [], clip["frames"])
        for item in rows:
            for name, t in zip(item["row"].get("image_output", []), item.get("looks", [])):
                mask = clip["masks"][item["thing"]][t]
                images[name] = overlay(clip["frames"][t], mask, ALPHA, OVERLAY_COLOUR)
    shutil.rmtree(part, ignore_errors=True)
    paths = {name: part / name.split("/", 2)[2] for name in images}
    for parent in {path.parent for path in paths.values()}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(paths[name], quality=95, subsampling=0)
    (part / "rows.json").write_text(json.dumps(made))
    part.rename(folder)


def work(job, make=None):
    """A job -> split, path, {"rows", "dropped"} made now or read if finished, what it took (Counter)."""
    split, number, path = job
    folder = Path(OUT, "processed_data", f"{split}_{number:05d}")
    SPENT.clear()
    if (folder / "rows.json").exists():
        return split, path, json.loads((folder / "rows.json").read_text()), {}
    clips, dropped = video_clips(folder.name, number, path) if path else toy_clip(split, number, make)
    made = {"rows": [item for _, rows in clips for item in rows], "dropped": dropped}
    if made["rows"]:
        save_clips(folder, clips, made)
    return split, path, made, dict(SPENT)


def start_worker(settings):
    """Gives a worker process the constants of the command line, and ends it when its parent is killed."""
    globals().update(settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which lets clips be finished
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def list_jobs():
    """[(split, number, path of the video or "")] to make; exits on a choice that does not exist."""
    choices = {"SOURCE": ("toy", *WORDS["folders"]), "ANNOTATOR": ("template", "api")}
    choices["SEGMENTER"] = sorted(path.stem.removeprefix("segment_") for path in ASSETS.glob("segment_*.py"))
    for name, known in choices.items():
        check(globals()[name] in known, f"{name}={globals()[name]} is not one of {', '.join(known)}.")
    if SOURCE != "toy":
        return list_videos(VIDEOS and Path(VIDEOS, WORDS["folders"][SOURCE][0]))
    counts = [TRAIN_CLIPS, TEST_CLIPS, RL_TRAIN_CLIPS, RL_TEST_CLIPS]
    return [(split, number, "") for split, count in zip(SPLITS, counts) for number in range(count)]


def open_folder(out, constants):
    """Makes a folder, or checks that what it holds has the same constants -> whether it is finished."""
    recorded, text = out / "constants.json", json.dumps(constants, indent=1)
    before = json.loads(recorded.read_text()) if recorded.exists() else {}
    changed = [name for name, value in json.loads(text).items() if before.get(name, value) != value]
    check(not changed, f"{out} was made with another {', '.join(changed)}; set OUT to a new folder.")
    check(before or not out.exists() or not any(out.iterdir()), f"{out} holds something else; set a new OUT.")
    (out / "processed_data").mkdir(parents=True, exist_ok=True)
    recorded.write_text(text)
    return (out / "meta.json").exists()


def run_jobs(jobs, do, start, settings):
    """Does jobs on WORKERS processes begun by start(*settings) -> {split: made rows}, {reason: examples}."""
    begun, items, dropped = time.time(), {}, {}
    often, first, last = (8, "\r", "") if sys.stdout.isatty() else (500, "", "\n")  # a file gets few lines
    try:
        with ProcessPoolExecutor(WORKERS, initializer=start, initargs=settings) as pool:
            for number, (split, path, made, spent) in enumerate(pool.map(do, jobs, chunksize=1), 1):
                items.setdefault(split, []).extend(made["rows"])
                for reason, count in made["dropped"].items():
                    dropped.setdefault(reason, []).extend([path or split] * count)
                SPENT.update(spent)
                if number % often == 0 or number == len(jobs):
                    rate = number / (time.time() - begun)
                    line = f"{first}clip {number:6d}/{len(jobs)} | {rate:.1f} a second"
                    print(line, end=last, flush=True)
    except KeyboardInterrupt:
        sys.exit(f"Stopped; {OUT} keeps what is done, the same command goes on from there.")
    return items, dropped


def write_files(out, items, dropped, constants):
    """{split: made rows} -> the jsonl files and, last, meta.json with constants and counts."""
    counts = {}
    for reason, names in dropped.items():
        print(f"\ndropped: {len(names)} {reason}, such as {', '.join(names[:3])}", end="")
    for split, rows in items.items():
        check(rows, f"There are no rows for the split {split}; use more videos or another HELD_OUT or SEED.")
        for form in FORMS if split in ("train", "test") else [""]:
            path = out / f"{split}{'_' if form else ''}{form}.jsonl"
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(final_row(item, form)) + "\n" for item in rows))
            part.rename(path)
        kinds = [item["row"].get("subtask", item["row"].get("Type")) for item in rows]
        labels = sorted(f"{kind}: {item['label']}" for kind, item in zip(kinds, rows) if "box" not in kind)
        counts[split] = {"rows": len(rows), "subtasks": {**Counter(sorted(kinds))}, "labels": Counter(labels)}
        print(f"\n{split:13s} {len(rows):6d} rows {counts[split]['subtasks']}", end="")
    meta = {"constants": constants, "counts": counts, "dropped": dropped}
    (out / "meta.json").write_text(json.dumps(meta, indent=1))


def print_rates():
    """Prints what was decoded, segmented and asked, and how much of it one worker does in a second."""
    for stage, unit in {"decoded": "frames", "segmented": "masks", "annotator": "requests"}.items():
        cost = f", {SPENT['tokens']} tokens" if stage == "annotator" else ""
        rate = SPENT[unit] / (SPENT[f"seconds of {unit}"] or 1)
        if SPENT[unit] or (cost and ANNOTATOR == "api"):
            print(f"\n{stage}: {SPENT[unit]} {unit}{cost}, {rate:.1f} {unit}/s/worker", end="")


# under torchrun the first process does it all
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    settings = {key: value for key, value in set_constants(globals()).items() if not isinstance(value, list)}
    free = "OUT WORKERS BASE_URL WAITS TIMEOUT INSPECT".split()  # these change no row
    recorded = {name: value for name, value in settings.items() if name not in free}
    out, begun, jobs = Path(OUT), time.time(), list_jobs()
    if open_folder(out, recorded):
        print(f"{out} is finished already, made with these very constants.")
        sys.exit(0)
    asked = SOURCE == "questions"
    items, dropped = question_rows(jobs) if asked else run_jobs(jobs, work, start_worker, [settings])
    print_rates()
    write_files(out, items, dropped, recorded)
    if INSPECT and not asked:
        sheet = importlib.import_module("contact_sheet")
        sheet.draw(out / "train_imagery.jsonl", out / "inspect.png", INSPECT)
    print(f"\n{out} is ready after {time.time() - begun:.0f} s.")
