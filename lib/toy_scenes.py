"""Toy clips of given labels: plans, scenes that show them, pictures. Constants `c` are generate_data.py's."""

import sys
from dataclasses import dataclass, field

import numpy as np

from lib import vocabulary
from lib.clips import Clip
from lib.geometry import path_labels, project, rotation, view_width
from lib.ray_tracer import render

ATTEMPTS = 3000  # scenes drawn before it is said that none can be found
ATTEMPTS_PER_PLAN = 200  # of them with the same labels


@dataclass
class Motion:
    """Labels of a moving object, and which of them are asked about."""

    step: tuple  # its way right, up, forward
    questions: list  # "direction" | "distance" | "box" | "speed"
    direction: str | None = None  # None where the distance is planned, and the other way round
    distance: str | None = None
    speed: str = "Constant"


@dataclass
class Plan:
    """What a clip is to show."""

    kind: str  # "camera" | "object" | "both" | "sequence"
    camera: list  # segments [(first frame, last frame, label)]
    motions: list  # [Motion], one for each moving object
    anchor: int  # the frame whose view things are placed in


@dataclass
class Thing:
    """A thing on the ground, or one that moves."""

    name: str  # colour and shape
    colour: str
    shape: str
    half: np.ndarray  # (2,) float32: radius, half the height
    yaw: float  # radians
    path: np.ndarray | None = None  # (T, 3), its centre in the world
    motion: Motion | None = None  # None: it stands still


@dataclass
class Scene:
    """A camera's way, things, and what questions are about."""

    pos: np.ndarray  # (T, 3), of the camera
    rot: np.ndarray  # (T, 3, 3), columns right, up, forward
    camera: list  # segments [(first frame, last frame, label)]
    things: list  # [Thing]
    targets: list  # the first landmark (camera), else the moving things


@dataclass
class Style:
    """Light, colours and textures; sun and mountains are at infinity, known by their direction only."""

    sun: np.ndarray  # (3,), its direction
    sun_cos: np.ndarray  # cosine of its radius
    ridge: np.ndarray  # (360,), height of the mountains at each degree
    tiles: np.ndarray  # (32, 32), brightness of the ground
    cell: np.ndarray  # side of a tile
    sky: np.ndarray  # (3,) RGB
    ground: np.ndarray
    mountain: np.ndarray
    light: np.ndarray  # (3,), towards the light
    brightness: np.ndarray
    noise: np.ndarray = field(repr=False)  # (T, H, W, 1)


# ---------------------------------------------------------------- plans


def draw_plan(c, rng, kind):
    """Labels of a clip of a kind, "camera" | "object" | "both" | "sequence" -> Plan."""
    last = c.FRAMES - 1
    middle = int(rng.integers(c.FRAMES // 2 - 1, c.FRAMES // 2 + 1))
    axes = rng.permutation(6)[:2]
    first, second = [vocabulary.MOVES[2 * axis + rng.integers(2)] for axis in axes]
    modes = {
        "single": [(0, last, first)],
        "pair": [(0, last, str(rng.choice(vocabulary.PAIRS)))],
        "two segments": [(0, middle, first), (middle, last, second)],
        "resting": [],
    }
    shares = {
        "camera": (*c.P_CAMERA, 0),
        "object": (c.P_OBJECT[0], 0, 0, 1 - c.P_OBJECT[0]),
        "both": (1, 0, 0, 0),
        "sequence": (0, 0, 1, 0),
    }
    mode = list(modes)[rng.choice(4, p=shares[kind])]
    has_second_object = kind == "object" and rng.random() < c.P_OBJECT[1]
    motions = [draw_motion(c, rng, kind) for _ in range(2 if has_second_object else 1)]
    anchor = middle if mode == "two segments" else last // 2
    return Plan(kind, modes[mode], motions, anchor)


def draw_motion(c, rng, kind):
    """Labels of one moving object, each uniform over its vocabulary -> Motion."""
    directions = list(vocabulary.DIRECTIONS)
    if kind == "both":
        directions.remove("Stationary")
    direction = str(rng.choice(directions))
    draws = rng.random(3) if kind == "object" else np.ones(3)
    asks_distance, asks_box, asks_speed = draws < c.P_ASKED

    if asks_distance:
        distance = str(rng.choice(list(vocabulary.DISTANCES)))
        sideways = [0, 0] if "First" in distance else 0.6 * rng.integers(-1, 2, 2)
        step = (*sideways, vocabulary.DISTANCES[distance])
        return Motion(step, ["distance"], distance=distance)

    motion = Motion(vocabulary.DIRECTIONS[direction], ["direction"], direction=direction)
    if asks_box:
        motion.questions.append("box")
    if asks_speed and direction != "Stationary":
        motion.questions.append("speed")
        motion.speed = str(rng.choice(list(vocabulary.SPEEDS)))
    return motion


# ---------------------------------------------------------------- scenes


def draw_style(c, rng):
    """Light, colours and textures of a clip -> Style, all float32."""
    azimuth = rng.uniform(-0.45, 0.45)
    height = rng.uniform(0.18, 0.5)
    degrees = np.radians(np.arange(360))
    squares = np.add.outer(np.arange(32), np.arange(32)) % 2 - 0.5
    board = squares * rng.uniform(0.3, 0.6)
    light = np.array([rng.uniform(-1, 1), rng.uniform(0.6, 1.2), rng.uniform(-1, -0.2)])
    sun = [np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)]
    sun_cos = np.cos(np.radians(rng.uniform(5.5, 7)))
    waves = sum(0.04 * np.sin(n * degrees + rng.uniform(0, 6.3)) for n in (3, 7, 11, 19))
    return Style(
        sun=np.float32(sun),
        sun_cos=np.float32(sun_cos),
        ridge=np.float32(0.06 + np.abs(waves)),
        tiles=np.float32(board + rng.normal(0, 0.12, (32, 32))),
        cell=np.float32(rng.uniform(0.8, 1.4)),
        sky=np.float32(np.array([150, 185, 215]) * rng.uniform(0.8, 1.1, 3)),
        ground=np.float32(np.array([125, 112, 95]) * rng.uniform(0.8, 1.2, 3)),
        mountain=np.float32(np.array([95, 100, 110]) * rng.uniform(0.7, 1.2)),
        light=np.float32(light / np.linalg.norm(light)),
        brightness=np.float32(rng.uniform(0.75, 1.08)),
        noise=np.float32(rng.normal(0, c.NOISE, (c.FRAMES, c.SIZE, c.SIZE, 1))),
    )


def camera_path(c, rng, segments, anchor, depth):
    """Segments [(start, end, label)] sized by what is seen at `depth` -> pos (T, 3), rot (T, 3, 3)."""
    rates = np.zeros((c.FRAMES, 6))  # pan, tilt, roll, dolly, truck, pedestal since the frame before
    ranges = [*np.radians(c.TURNS), c.DOLLY, c.SLIDE, c.SLIDE]
    for start, end, label in segments:
        for move in label.split(" and "):
            axis, is_back = divmod(vocabulary.MOVES.index(move), 2)
            amount = rng.uniform(*ranges[axis])
            if axis > 2:
                amount *= depth
            if is_back:
                amount = -amount
            rates[start + 1 : end + 1, axis] = amount / (end - start)

    # Angles and places are sums of what is added in each frame; the anchor frame looks nearly straight on.
    angles = np.cumsum(rates[:, :3], 0)
    angles += [0, np.radians(rng.uniform(-18, 3)), 0] - angles[anchor]
    rot = rotation(*angles.T)
    moved = rates[:, [4, 5, 3]]  # the axes are right, up, forward
    pos = np.cumsum(np.einsum("tij,tj->ti", rot, moved), 0)
    eye_height = rng.uniform(1.6, 2.6)
    return pos + [0, eye_height - pos[anchor, 1], 0], rot


def draw_things(rng, count):
    """`count` things of different colours and shapes, so that colour, shape and name are each unique."""
    colours = rng.permutation(list(vocabulary.COLOURS)).tolist()
    shapes = rng.permutation(list(vocabulary.SHAPES)).tolist()
    things = []
    for colour, shape in zip(colours, shapes[:count]):
        scale = np.float32(rng.uniform(0.9, 1.15, 1 if shape == "ball" else 2))
        half = np.float32(vocabulary.SHAPES[shape]) * scale
        yaw = rng.uniform(0, np.pi / 2)
        things.append(Thing(f"{colour} {shape}", colour, shape, half, yaw))
    return things


def draw_scene(c, rng, plan):
    """One attempt at a scene of a plan."""
    near = rng.uniform(4.2, 5.4)
    side = rng.choice([-1, 1])
    still_count = int(rng.integers(1, 3))
    about_camera = plan.kind in ("camera", "sequence")
    pos, rot = camera_path(c, rng, plan.camera, plan.anchor, near)
    things = draw_things(rng, still_count + len(plan.motions))
    still, moving = things[:still_count], things[still_count:]

    def locate(x, y, depth):  # x, y in frame widths right of and above the centre of the anchor frame
        width = view_width(c.HFOV)
        ray = np.array([x * width, y * width, 1])
        return pos[plan.anchor] + rot[plan.anchor] @ ray * depth

    # Landmarks stand on the ground. One off the centre shows a roll; in object clips they stay behind the
    # moving things.
    first = rng.uniform(-0.14, 0.14)
    if "Roll" in str(plan.camera):
        first += 0.14 * side
    aside = rng.uniform(0.25, 0.45, 2)
    far = rng.uniform(6.5, 9, 2)
    spots = [(first, near), (side * aside[0], far[0]), (-side * aside[1], far[1])]
    for thing, (x, depth) in zip(still, spots if about_camera else spots[1:]):
        ground = locate(x, 0, depth) * [1, 0, 1]
        thing.path = np.tile(ground + [0, thing.half[1], 0], (c.FRAMES, 1))

    # A moving thing passes its place in the middle of its way.
    for number, (thing, motion) in enumerate(zip(moving, plan.motions)):
        if about_camera or number > 0:
            x = -side * rng.uniform(0.18, 0.34)
        else:
            x = rng.uniform(-0.16, 0.16)
        depth = rng.uniform(4, 5.2)
        if about_camera:
            depth += 1.2
        way = motion_path(c, rng, motion) * depth @ rot[0].T
        thing.path = way + locate(x, rng.uniform(-0.2, 0.2), depth)
        thing.path[:, 1] += max(0, thing.half[1] - thing.path[:, 1].min())  # nothing sinks into the ground
        thing.motion = motion
    return Scene(pos, rot, plan.camera, things, targets=still[:1] if about_camera else moving)


def progress_at(speed, t):
    """A speed label, times t in 0..1 -> share of the path done: a power of t, or of 1 - t, and a wave."""
    power, is_slowing, wave = vocabulary.SPEEDS[speed]
    share = 1 - (1 - t) ** power if is_slowing else t**power
    return share + wave * np.sin(2 * np.pi * t) / (2 * np.pi)


def motion_path(c, rng, motion):
    """A moving object's way around its middle (T, 3): right, up, forward for the first camera, per depth."""
    t = np.linspace(0, 1, c.FRAMES)
    slide = rng.uniform(*c.SLIDE)
    # First one way, then back, or a single way at the speed of its label.
    if motion.distance and "First" in motion.distance:
        share = 1 - np.abs(2 * t - 1)
    else:
        share = progress_at(motion.speed, t)
    step = np.array(motion.step) * [slide, slide, 1.1 * rng.uniform(*c.DOLLY)]
    step += rng.normal(0, 0.08, 3) * np.linalg.norm(step)  # little enough to keep the label
    return np.outer(share - 0.5, step)


def scene_is_valid(c, scene):
    """Whether a scene shows its labels: nothing collides, targets stay in view, labels hold."""
    for thing in scene.targets:
        x, y, depth = project(thing.path, scene.pos, scene.rot, c.HFOV)
        is_outside = min(x.min(), y.min()) < 0.12 or max(x.max(), y.max()) > 0.88
        if depth.min() < 2.2 or is_outside:
            return False
    for number, thing in enumerate(scene.things):
        for other in scene.things[:number]:
            distance = np.linalg.norm(thing.path - other.path, axis=1).min()
            if distance - other.half[0] < thing.half[0] + 0.2:
                return False
        if thing.motion and not labels_hold(thing, scene):
            return False
    return scene.pos[:, 1].min() > 0.7


def labels_hold(thing, scene):
    """Whether a thing's way, as the camera sees it, has the planned direction and distance."""
    labels = path_labels(thing.path, scene.pos, scene.rot)
    motion = thing.motion
    if "direction" in motion.questions and labels["direction"] != motion.direction:
        return False
    return "distance" not in motion.questions or labels["distance"] == motion.distance


# ---------------------------------------------------------------- clips


def draw_clip(c, rng, kind, name):
    """Draws scenes of a plan until one is valid and shows its targets well -> Clip with its scene."""
    for attempt in range(ATTEMPTS):
        if attempt % ATTEMPTS_PER_PLAN == 0:
            plan = draw_plan(c, rng, kind)
        scene = draw_scene(c, rng, plan)
        if not scene_is_valid(c, scene):
            continue
        style = draw_style(c, rng)
        frames, masks, areas = render(scene, style, c.SIZE, c.HFOV, c.LINES)
        if targets_are_visible(c, scene, masks, areas):
            times = np.arange(c.FRAMES) * rng.choice(c.SPACINGS)
            return make_clip(c, name, scene, frames, masks, times.tolist())
    sys.exit("No toy clip can be made with these constants; make MIN_AREA, SLIDE, TURNS or DOLLY smaller.")


def targets_are_visible(c, scene, masks, areas):
    """Whether each target is large enough and hardly hidden in the frames that are asked about.

    masks {name: (T, H, W)}; areas {name: (T,)}: pixels of the whole silhouettes.
    """
    keyframes = [0, c.FRAMES - 1]
    if scene.targets[0].motion is None:
        ends = {frame for start, end, _ in scene.camera for frame in (start, end)}
        keyframes = sorted(ends)
    for thing in scene.targets:
        seen = masks[thing.name].sum((1, 2))[keyframes]
        least = np.maximum(c.MIN_VISIBLE * areas[thing.name][keyframes], c.MIN_AREA * c.SIZE * c.SIZE)
        if (seen < least).any():
            return False
    return True


def make_clip(c, name, scene, frames, masks, times):
    """A rendered scene -> Clip; what its moving things are asked is in `facts`."""
    facts = {}
    for thing in scene.things:
        if thing.motion:
            motion = thing.motion
            labels = {"direction": motion.direction, "distance": motion.distance, "speed": motion.speed}
            facts[thing.name] = {kind: labels.get(kind, "") for kind in motion.questions}
    return Clip(
        name=name,
        frames=frames,
        times=times,
        static=[thing.name for thing in scene.things if thing.motion is None],
        moving=list(facts),
        masks=masks,
        camera=scene.camera,
        facts=facts,
        least_area=c.HIDDEN_AREA,
        scene=scene,
    )
