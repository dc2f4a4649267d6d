"""Look-alikes: four equal things that change places, two at a time, while the camera looks on or goes around.

Neither the last frame nor the text tells which is which: a question about one of them needs it followed
through the clip. Constants `c` are generate_data.py's.
"""

from types import SimpleNamespace

import numpy as np

from lib import vocabulary
from lib.clips import Clip
from lib.geometry import rotation, view_width
from lib.ray_tracer import render
from lib.toy_scenes import Scene, Thing, draw_style

DEPTH = 5.2  # metres from the camera to the row of things
TILT = 24.0  # degrees that the camera looks down
EYE_HEIGHT = 2.6  # metres
RADIUS = 1.0  # metres that an exchange takes the two things to the front and to the back
HALF = {"ball": (0.58, 0.58)}  # radius and half the height, metres; small enough to pass each other
OTHER_HALF = (0.5, 0.62)


def draw_look_alikes(c, rng, name, exchanges):
    """A clip of (fewest, most) exchanges, `c.EXCHANGE` frames each -> Clip, its things' places in `slots`.

    The first two frames are at rest. A thing is called by its place there, such as "left yellow cone".
    """
    count = int(rng.integers(exchanges[0], exchanges[1] + 1))
    colour = str(rng.choice(list(vocabulary.COLOURS)))
    shape = str(rng.choice(list(vocabulary.SHAPES)))
    half = np.float32(HALF.get(shape, OTHER_HALF))

    # four places side by side, each as wide as a quarter of the frame
    width = view_width(c.HFOV) * DEPTH
    forward = DEPTH * np.cos(np.radians(TILT)) + 0.2
    places = np.array([[(0.125 + 0.25 * slot - 0.5) * 0.98 * width, half[1], forward] for slot in range(4)])

    # who stands where: at the start, and after each exchange of two neighbours
    stands = [[0, 1, 2, 3]]  # of each thing, its place
    paths = [places, places]  # (4, 3) for each frame
    left = None
    for _ in range(count):
        # no two change places twice in a row: who guesses that a thing stays should seldom be right
        left = int(rng.choice([slot for slot in range(3) if slot != left]))
        side = int(rng.choice([-1, 1]))
        after, frames = exchange(stands[-1], left, side, places, c.EXCHANGE)
        stands.append(after)
        paths += frames
    path = np.stack(paths, axis=1)  # (4, T, 3)

    # the camera looks at the row: at rest, or along an arc around its middle
    T = path.shape[1]
    still = np.zeros(T)
    arc = still
    if c.SWING:
        arc = rng.choice([-1, 1]) * np.linspace(-1, 1, T) * np.radians(c.SWING)
    pos = np.stack([np.sin(arc), still, 1 - np.cos(arc)], axis=-1) * forward + [0, EYE_HEIGHT, 0]
    rot = rotation(-arc, still - np.radians(TILT), still)
    things = []
    for slot, word in enumerate(vocabulary.SLOTS):
        things.append(Thing(f"{word} {colour} {shape}", colour, shape, half, 0.3, path[slot]))
    scene = Scene(pos, rot, [], things, targets=things)

    # as many frames as the exchanges need
    style = draw_style(SimpleNamespace(NOISE=c.NOISE, FRAMES=T, SIZE=c.SIZE), rng)
    frames, masks, _ = render(scene, style, c.SIZE, c.HFOV, c.LINES)
    slots = {}
    for number, thing in enumerate(things):
        slots[thing.name] = [stand[number] for stand in stands]
    return Clip(
        name=name,
        frames=frames,
        times=(np.arange(T) * c.SPACINGS[0]).tolist(),
        moving=list(slots),
        masks=masks,
        slots=slots,
        least_area=c.HIDDEN_AREA,
        scene=scene,
    )


def exchange(stand, left, side, places, frames):
    """The thing at place `left` and its right neighbour change places on half circles.

    stand: place of each thing; side: -1 or 1, who passes in front; places (4, 3) -> the new places of the
    things, [(4, 3)] of each frame.
    """
    one, other = stand.index(left), stand.index(left + 1)
    middle = (places[left] + places[left + 1]) / 2
    reach = (places[left + 1] - places[left]) / 2
    paths = []
    for frame in range(1, frames + 1):
        angle = np.pi * frame / frames
        aside = np.cos(angle) * reach
        depth = np.array([0, 0, side * RADIUS * np.sin(angle)])
        at = places[stand]  # a copy
        at[one] = middle - aside - depth
        at[other] = middle + aside + depth
        paths.append(at)
    after = list(stand)
    after[one], after[other] = left + 1, left
    return after, paths
