"""One moving thing followed through a clip, as one identity, from what moves against the background.

A Pair says how one frame goes over into a neighbour. What moves does so towards both neighbours; a region is
the same thing in the next frame if it is where its pixels went.
"""

import functools
from dataclasses import dataclass

import numpy as np

from lib.background import (
    SAME,
    WINDOW,
    box_mean,
    fit_homography,
    improve_flow,
    improve_homography,
    measure_flow,
    move_points,
    normalise,
    pixel_grid,
    resize_masks,
    sample,
    scaled,
    share_explained,
    split_into_cells,
    stands_still,
)
from lib.clean_plate import find_changed

LEAST_TEXTURE = 0.01  # of a normalised picture; where there is less, nothing is seen to move
LEAST_STEP = 0.5  # pixels; what moves less between two frames is not seen to move
MOST_NOISE = 0.2  # pixels; the flow is not noisier than that where the pictures differ
DIFFERENT = 2.0  # times the background's difference from itself; what differs less has not moved
NOISE_FACTOR = 4.0  # a pixel moves if its flow is so many times as large as the background's
LEAST_PIXELS = 30  # of a region
LEAST_OVERLAP = 0.35  # of a region and where the one before went, intersection over union
FILLS = (7, 15, 31)  # pixels; where nothing is seen, flow is that of the texture in squares of these sides
STARTS = 3  # largest regions of each frame that are followed from there
COLOUR_STEPS = 8  # of each channel, for shares of colours
GROWTH = 13  # pixels; an outline reaches no farther than this wide a square around a rough mask
INSIDE = 9  # pixels; what such a square around it has no other pixel of is well inside a rough mask
LEAST_MOVING = 0.1  # share of a changed region that is seen to move, if it is of a moving thing
RING = 21  # pixels; a thing's surroundings are what this wide a square around it reaches


# ---------------------------------------------------------------- pairs of frames


@dataclass
class Pair:
    """How one frame goes over into another."""

    homography: np.ndarray  # (3, 3), pixels of the one to pixels of the other: what stands still
    flow: np.ndarray  # (H, W, 2) pixels beyond the homography; 0 where it is not known
    noise: float  # pixels; what the flow is where nothing moves
    has_texture: np.ndarray  # (H, W) bool; where the flow was measured, not filled in

    def strength(self, measured=False):
        """How clearly each pixel moves, (H, W): above 1 it does. measured: 0 where the flow is filled in."""
        threshold = max(LEAST_STEP, NOISE_FACTOR * self.noise)
        strength = np.hypot(self.flow[..., 0], self.flow[..., 1]) / threshold
        return strength * self.has_texture if measured else strength

    def carry(self, mask):
        """A mask (H, W) of the other frame -> where these pixels are in the one frame, (H, W) bool."""
        x, y = move_points(self.homography, *pixel_grid(mask.shape))
        share = sample(mask.astype(float), x + self.flow[..., 0], y + self.flow[..., 1])
        return np.nan_to_num(share) > 0.5


def measure_pairs(shot):
    """A Shot -> the Pairs of its frames t to t + 1, and those t + 1 to t; T - 1 each, at small size."""
    return measure_bytes(shot.dense.tobytes(), shot.dense.shape, tuple(shot.places))


@functools.lru_cache(maxsize=2)
def measure_bytes(data, shape, places):
    """As measure_pairs, of the bytes of all frames: the segmenter and the evidence measure a clip once."""
    frames = np.frombuffer(data, np.uint8).reshape(shape)
    pictures = np.stack([normalise(frame.mean(-1)) for frame in frames])
    is_still = stands_still(pictures)

    # Between close frames all things move little; several of these steps make one to the next frame.
    steps = [
        measure_step(a.tobytes(), b.tobytes(), a.shape, is_still) for a, b in zip(pictures, pictures[1:])
    ]
    onwards, backwards = zip(*steps)
    return join_steps(onwards, backwards, places, lambda pair, i, j: polish(pair, pictures[i], pictures[j]))


@functools.lru_cache(maxsize=64)
def measure_step(a, b, shape, is_still):
    """Bytes of two normalised pictures -> the Pair from a to b and that back, once for overlapping clips."""
    a, b = [np.frombuffer(data).reshape(shape) for data in (a, b)]
    homography = np.eye(3) if is_still else fit_homography(a, b)
    return measure_pair(a, b, homography), measure_pair(b, a, scaled(np.linalg.inv(homography)))


def measure_pair(a, b, homography):
    """Two normalised pictures (H, W) and the homography between them -> Pair."""
    return to_pair(homography, *measure_flow(a, b, homography), differences(homography, a, b))


def polish(pair, a, b):
    """A Pair of several steps between two pictures (H, W) -> the same without what the steps added up to."""
    flow, texture = improve_flow(pair.flow, a, b, pair.homography)
    return to_pair(pair.homography, flow, texture, differences(pair.homography, a, b))


def differences(homography, a, b):
    """A homography from a to b (H, W) -> what they differ by around each pixel, the root of a mean square.

    What is not seen in b does not differ.
    """
    moved = sample(b, *move_points(homography, *pixel_grid(a.shape)))
    return np.sqrt(box_mean(np.nan_to_num(moved - a) ** 2, WINDOW).clip(0))


def to_pair(homography, flow, texture, differs):
    """A homography, flow (H, W, 2) beyond it, texture (H, W) that the flow rests on, differences -> Pair.

    Where the homography alone leads to the same picture nothing moves, whatever the flow says: on the edges
    and the fine grain of a background that a moving camera passes it is often wrong.
    """
    has_texture = texture > LEAST_TEXTURE
    is_same = differs < min(SAME, DIFFERENT * calm_median(differs, has_texture))
    noise = noise_of(flow, has_texture)
    if np.isfinite(noise):
        noise = min(noise, MOST_NOISE)
    flow = np.where((has_texture & is_same)[..., None], 0, flow)
    return Pair(homography, fill_flow(flow, has_texture), noise, has_texture)


def fill_flow(flow, has_texture):
    """flow (H, W, 2), where it was measured (H, W) -> the same with means of the nearest in between.

    A thing of one colour is seen to move at its corners alone. What is far from all texture stays still.
    """
    filled = flow * has_texture[..., None]
    is_known = has_texture
    for side in FILLS:
        share = box_mean(has_texture, side)
        mean = [box_mean(flow[..., axis] * has_texture, side) / share.clip(1e-6) for axis in (0, 1)]
        is_new = ~is_known & (share > 0.02)
        filled[is_new] = np.stack(mean, -1)[is_new]
        is_known = is_known | is_new
    return filled


def join_steps(onwards, backwards, places, finish):
    """Pairs of neighbours -> Pairs of the frames at `places` both ways, each through finish(pair, i, j)."""
    joined, joined_back = [], []
    for i, j in zip(places, places[1:]):
        pair = functools.reduce(join, onwards[i:j])
        back = functools.reduce(join, backwards[i:j][::-1])
        joined.append(finish(pair, i, j))
        joined_back.append(finish(back, j, i))
    return joined, joined_back


def join(first, second):
    """The Pairs of two steps, one after the other -> that of both."""
    x, y = pixel_grid(first.flow.shape[:2])
    between = move_points(first.homography, x, y)
    between_x, between_y = between[0] + first.flow[..., 0], between[1] + first.flow[..., 1]
    more = [np.nan_to_num(sample(second.flow[..., axis], between_x, between_y)) for axis in (0, 1)]
    end = np.add(move_points(second.homography, between_x, between_y), more)
    homography = scaled(second.homography @ first.homography)
    flow = np.stack(end - np.array(move_points(homography, x, y)), -1)
    return Pair(homography, flow, np.hypot(first.noise, second.noise), first.has_texture)


def noise_of(flow, has_texture):
    """flow (H, W, 2) -> what it is where nothing moves: 1.48 times its median, of the calmer cells."""
    return 1.48 * calm_median(np.hypot(flow[..., 0], flow[..., 1]), has_texture)


def calm_median(values, has_texture):
    """values (H, W) -> their median where there is texture, of the calmer cells; infinite if too few have it.

    A quarter of the cells is calmer than that; so what moves may fill most of what has texture.
    """
    medians = []
    for cell in split_into_cells(np.where(has_texture, values, np.nan)):
        known = cell[np.isfinite(cell)]
        if len(known) > 0.01 * cell.size:
            medians.append(np.median(known))
    return float(np.quantile(medians, 0.25)) if len(medians) >= 3 else np.inf


def homographies_to_first(frames, onwards):
    """Small frames (T, h, w, 3), Pairs t to t + 1 -> homographies (T, 3, 3) from each frame to the first.

    Each is fitted once more to the two frames themselves: what is chained adds up its errors.
    """
    steps = np.array([pair.homography for pair in onwards])
    return chain_bytes(frames.tobytes(), frames.shape, steps.tobytes())


@functools.lru_cache(maxsize=2)
def chain_bytes(data, shape, steps):
    """As homographies_to_first, of bytes of frames and homographies: the masks and the plate ask alike."""
    frames = np.frombuffer(data, np.uint8).reshape(shape)
    first, *others = [normalise(frame.mean(-1)) for frame in frames]
    chain = [np.eye(3)]
    for picture, step in zip(others, np.frombuffer(steps).reshape(-1, 3, 3)):
        homography = scaled(chain[-1] @ np.linalg.inv(step))
        if not np.allclose(homography, np.eye(3)):
            homography = improve_if_seen(homography, picture, first)
        chain.append(homography)
    return np.stack(chain)


def improve_if_seen(homography, a, b):
    """A homography from a to b (H, W) -> a better one, if it is one: the two may show little in common."""
    better = homography
    for _ in range(6):
        better = improve_homography(better, a, b, 5)
    is_better = share_explained(better, a, b) > share_explained(homography, a, b)
    return better if is_better else homography


# ---------------------------------------------------------------- regions


def number_regions(masks):
    """masks (T, H, W) -> a number for each 4-connected region, 0 outside: pixels take the largest around."""
    own_number = np.arange(1, masks.size + 1).reshape(masks.shape)
    numbers = np.where(masks, own_number, 0)
    previous = None
    while previous is None or (numbers != previous).any():
        previous = numbers
        across = largest_of_runs(numbers)
        numbers = largest_of_runs(across.swapaxes(1, 2)).swapaxes(1, 2)
    return numbers


def largest_of_runs(numbers):
    """numbers (T, H, W), 0 outside -> the same, each run along a row with its largest.

    [0, 1, 2, 0, 3] -> [0, 2, 2, 0, 3].
    """
    # a gap ends each row
    padded = np.pad(numbers, ((0, 0), (0, 0), (1, 1)))
    flat = padded.ravel()
    inside = flat > 0
    begins = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
    ends = np.flatnonzero(inside[:-1] & ~inside[1:]) + 1
    if len(begins):
        largest = np.maximum.reduceat(flat, begins)
        flat[inside] = np.repeat(largest, ends - begins)
    return padded[..., 1:-1]


def list_regions(mask, least=LEAST_PIXELS):
    """mask (H, W) -> its connected regions of at least so many pixels, the largest first."""
    numbers = number_regions(mask[None])[0]
    found, counts = np.unique(numbers[numbers > 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [numbers == found[i] for i in order if counts[i] >= least]


def fill_inside(region):
    """region (H, W) -> the same with what has it to the left and right, above and below.

    Of a thing of one colour little more than the outline is seen to move.
    """
    inside = np.ones_like(region)
    for axis in (0, 1):
        before = np.logical_or.accumulate(region, axis)
        after = np.flip(np.logical_or.accumulate(np.flip(region, axis), axis), axis)
        inside &= before & after
    return region | inside


def overlap(a, b):
    """Intersection over union of two masks."""
    return (a & b).sum() / max((a | b).sum(), 1)


def widen(mask, side):
    """mask (H, W) -> what has any of it in a square of this odd side around it."""
    return box_mean(mask, side) > 1e-6


def find_moving(onwards, backwards, measured=False):
    """Pairs -> (T, H, W) bool: what moves towards each neighbour in time; specks and holes are closed.

    measured: without what only lies near something that moves, on a bare surface.
    """
    masks = []
    for t in range(len(onwards) + 1):
        pairs = [*onwards[t : t + 1], *backwards[max(t - 1, 0) : t]]
        strengths = [pair.strength(measured) for pair in pairs]
        moves = np.min(strengths, 0) > 1
        masks.append(box_mean(moves, 3) > 0.5)
    return np.stack(masks)


# ---------------------------------------------------------------- one identity


def follow(regions, onwards, backwards, start, region):
    """A region of frame `start`, all regions by frame -> {frame: region} of one thing, until it is lost."""
    chain = {start: region}
    for step in (1, -1):
        t = start
        while 0 <= t + step < len(regions):
            # the pair that begins in the next frame says where its pixels were in this one
            pair = backwards[t] if step == 1 else onwards[t - 1]
            expected = pair.carry(chain[t])
            candidates = sorted(regions[t + step], key=lambda other: overlap(expected, other))
            if not candidates or overlap(expected, candidates[-1]) < LEAST_OVERLAP:
                break
            t += step
            chain[t] = candidates[-1]
    return chain


def follow_largest(moving, onwards, backwards):
    """What moves (T, H, W), Pairs -> masks (T, H, W) of the thing with most pixels over all its frames.

    Empty if nothing moves.
    """
    regions = [[fill_inside(region) for region in list_regions(mask)] for mask in moving]
    found = np.zeros_like(moving)
    most = 0
    for t in range(len(moving)):
        for region in regions[t][:STARTS]:
            chain = follow(regions, onwards, backwards, t, region)
            size = sum(mask.sum() for mask in chain.values())
            if size > most:
                most = size
                found[:] = False
                for frame, mask in chain.items():
                    found[frame] = mask
    return found


# ---------------------------------------------------------------- outlines


def colour_numbers(frames):
    """RGB (..., 3) uint8 -> a number for each colour, COLOUR_STEPS of a channel."""
    steps = frames.astype(int) * COLOUR_STEPS // 256
    return (steps[..., 0] * COLOUR_STEPS + steps[..., 1]) * COLOUR_STEPS + steps[..., 2]


def colour_shares(numbers):
    """Numbers of colours (n,) -> the share of each (COLOUR_STEPS ** 3,), blurred into its neighbours."""
    counts = np.bincount(numbers, minlength=COLOUR_STEPS**3).astype(float)
    counts = counts.reshape([COLOUR_STEPS] * 3)
    for axis in range(3):
        padded = np.pad(counts, [(1, 1) if axis == other else (0, 0) for other in range(3)])
        before, after = padded.take(range(COLOUR_STEPS), axis), padded.take(range(2, COLOUR_STEPS + 2), axis)
        counts = counts + (before + after) / 4
    return counts.ravel() / max(counts.sum(), 1)


def sharpen(frames, found, moving, changed):
    """Rough masks (T, H, W) of one thing -> its outline, by what has changed and by its colours.

    The thing's colours are those of its changed pixels, the background's those of the ring around it. What
    has changed around the rough mask counts unless its colour is the background's or it is of another moving
    thing; a slow thing's middle, which has not changed, counts if its colour is the thing's.
    """
    visible = np.flatnonzero(found.any((1, 2)))
    ring = np.zeros_like(found)
    around = np.zeros_like(found)
    for t in visible:
        wide = widen(found[t], RING)
        ring[t] = wide & ~widen(moving[t], 5) & ~changed[t]
        around[t] = widen(found[t], GROWTH) & ~(moving[t] & ~widen(found[t], 5))
    certain = found & changed
    if certain.sum() < 0.35 * found.sum():
        # a slow thing is its own background: what is well inside of the rough mask is surely the thing
        certain = np.stack([~widen(~mask, INSIDE) for mask in found])
    if not certain.any() or not ring.any():
        return found & False

    numbers = colour_numbers(frames)
    own, other = colour_shares(numbers[certain]), colour_shares(numbers[ring])
    log_ratio = np.log((own + 1e-4) / (other + 1e-4))
    outlines = np.zeros_like(found)
    for t in visible:
        likely = box_mean(log_ratio[numbers[t]], 5)
        mask = changed[t] & around[t] & (likely > 0)
        mask |= widen(found[t], 5) & (likely > 0.7)
        regions = list_regions(box_mean(mask, 5) > 0.5)
        if regions:
            outlines[t] = max(regions, key=lambda region: (region & found[t]).sum())
    return outlines


def complete(moving, changed):
    """What moves, what has changed (T, H, W) -> the connected regions of both in which enough moves."""
    both = moving | changed
    completed = np.zeros_like(moving)
    for t, mask in enumerate(both):
        for region in list_regions(mask):
            if moving[t][region].mean() > LEAST_MOVING:
                completed[t] |= region
    return completed


def touches_border(mask):
    """Whether a mask (H, W) reaches the frame's rim, so that some of the thing may be outside."""
    rims = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    return rims > 0.15 * np.sqrt(mask.sum())


def count_whole(masks):
    """In how many of the frames a mask (T, H, W) shows a whole thing."""
    return sum(mask.any() and not touches_border(mask) for mask in masks)


def masks_of_one_thing(shot, onwards, backwards):
    """A Shot and its Pairs -> masks (T, H, W) of one moving thing, or none."""
    frames = shot.dense[shot.places]
    moving = find_moving(onwards, backwards)
    found = follow_largest(moving, onwards, backwards)
    # three frames give no row, so the rest is not worth its time
    if found.any((1, 2)).sum() > 3:
        # Of a thing of one colour, or a slow one, more has changed than is seen to move.
        changed = find_changed(shot, homographies_to_first(frames, onwards))
        completed = follow_largest(complete(moving, changed), onwards, backwards)
        found = sharpen(frames, completed, moving, changed)
        # Before a bare wall this may join things that pass; then what was measured itself says more.
        measured = find_moving(onwards, backwards, measured=True)
        alone = follow_largest(measured, onwards, backwards)
        alone = sharpen(frames, alone, measured, changed)
        if count_whole(alone) > count_whole(found):
            found = alone
    return resize_masks(found, shot.frames.shape[1:3])
