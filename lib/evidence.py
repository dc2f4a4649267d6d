"""What masks of a moving thing prove without poses and depth: labels with a confidence, or why none.

The background's homographies stand for the camera, measured here by numpy whatever the segmenter is. They are
the camera's motion only as long as the background looks flat, as it does when the camera turns. Silence is
better than a wrong label: what is not clear gives none, and the reason is counted.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lib.background import move_points, resize_masks, scaled
from lib.clean_plate import find_changed, find_changed_outside
from lib.follow import (
    colour_numbers,
    colour_shares,
    fill_inside,
    find_moving,
    homographies_to_first,
    list_regions,
    measure_pairs,
    overlap,
    touches_border,
    widen,
)
from lib.footage import UNNAMED, load_segmenter
from lib.geometry import mask_box, object_labels, view_width
from lib.vocabulary import DIRECTIONS, DISTANCES, ID_TAGS

LEAST_FRAMES = 4  # in a row, in which a thing is seen whole
LEAST_WAY = 0.06  # frame widths; who moves less is not asked for a direction
STILL = 0.02  # frame widths; a camera that moves the background less stands still
NEARER = 3.0  # what stands still moves at most so many times as far as the background, by being nearer
# frame widths; a background that moves otherwise than by turning by more: the camera travels
TURN_ERROR = 0.04
LEAST_EXPLAINED = 0.85  # share of the frame outside of the thing that moves with the background
OTHER_SIZE = 0.3  # another moving region of this share of the thing's size is another moving thing
OTHER_FRAMES = 0.3  # share of the frames in which there may be one
AROUND = 5  # pixels; in such a square around a mask there may be more of the thing
LEAST_SHARED = 8  # pixels that a mask and a region share, if the region is of the thing
COVER = (0.45, 0.84)  # overlap of the mask and of what differs from the plate, worst and best
MOVING_VIEWS = 12  # frames of the shot that are fitted to a clip of a moving camera; more take long
HALO = 3  # pixels; what moves is found so far beyond the thing
FOCALS = (0.5, 0.6, 0.75, 0.9, 1.1, 1.4, 1.8, 2.5, 4.0)  # focal lengths that are tried, in longer sides
FINER = (1.1, 1.05, 1.025, 1.012, 1.006)  # factors by which the best of them is changed to a better one

FLAWS = {
    "border": "clips have a moving object at the border, or for fewer than four frames in a row",
    "background": "clips have a background that does not move as one",
    "travel": "clips have a camera that travels: what is near seems to move",
}
CROWD = "box questions are about one of several things that move"
LACKS = {
    "cover": "a mask that two ways of finding it agree on",
    "residual": "clear motion",
    "identity": "one clear identity",
    "margin": "a clear label",
}


@dataclass
class Evidence:
    """What the masks of one thing prove."""

    masks: np.ndarray  # (T, H, W) bool; those that may be shown, in a row
    labels: dict = field(default_factory=dict)  # {kind of question: label; "" for a box}
    confidence: dict = field(default_factory=dict)  # {kind of question: {name of a score: 0 to 1}}
    is_alone: bool = True  # nothing else of its size moves
    reasons: Counter = field(default_factory=Counter)  # {why a question is not asked: times}


@dataclass
class Track:
    """A thing over its n frames, measured at small size."""

    masks: np.ndarray  # (n, h, w) bool
    colours: np.ndarray  # (n, colours) shares of each colour inside the mask
    path: np.ndarray  # (n, 2) its centre x, y on the first frame, in frame widths
    flow_way: np.ndarray  # (2,) the same way from first to last by the flow inside the masks
    growth: np.ndarray  # (3,) log growth from first to last by the flow, the area and the height
    stretch: float  # log growth of what is at the last centre, if it is seen as in the first frame
    strength: float  # flow inside the masks over the background's noise, the median of all frames
    slip: float  # most that a step's centre differs from where the flow leads, in roots of the area
    wholeness: float  # of the last mask: how much of what moves there it bounds, intersection over union
    camera_way: float  # frame widths; the farthest that a corner of the background moves
    turn_error: float  # frame widths; how far off the best turn of a camera is from it


# ---------------------------------------------------------------- what is measured


def longest_run(is_good):
    """Flags by frame -> the numbers of the longest run of true ones; [0, 1, 1, 0, 1] -> [1, 2]."""
    best, run = [], []
    for t, good in enumerate(is_good):
        run = [*run, t] if good else []
        if len(run) > len(best):
            best = run
    return best


def corner_points(shape):
    """(H, W) -> x and y of 3 x 3 points over a frame."""
    height, width = shape
    return np.meshgrid([0, width / 2, width], [0, height / 2, height])


def corner_shift(homography, other, shape):
    """The farthest that a point of the frame is between two homographies, in frame widths."""
    x, y = corner_points(shape)
    moved, other_moved = move_points(homography, x, y), move_points(other, x, y)
    return float(np.hypot(*np.subtract(moved, other_moved)).max() / shape[1])


def turn_error(homography, shape):
    """How far, in frame widths, a homography is from that of a camera that only turns, K R K^-1.

    The focal length is not known: the best one counts. A wide turn shows it well, so it is found closely.
    """
    height, width = shape

    def error(focal):
        length = focal * max(shape)
        to_pixels = np.array([[length, 0, width / 2], [0, length, height / 2], [0, 0, 1]])
        turn = to_pixels @ turn_like(homography, to_pixels) @ np.linalg.inv(to_pixels)
        return corner_shift(homography, turn, shape)

    best = min(FOCALS, key=error)
    for factor in FINER:
        best = min((best / factor, best, best * factor), key=error)
    return error(best)


def turn_like(homography, to_pixels):
    """The rotation (3, 3) that does to the frame's middle what a homography does: where it goes, its roll.

    to_pixels: K, rays to pixels.
    """
    # The least turn of the ray z ahead to where it goes, d: with v = z x d, 1 + [v] + [v][v] / (1 + z d).
    to_rays = np.linalg.inv(to_pixels)
    ahead = to_rays @ homography @ to_pixels @ [0, 0, 1]
    ahead = ahead / np.linalg.norm(ahead)
    cross = np.array([[0, 0, ahead[0]], [0, 0, ahead[1]], [-ahead[0], -ahead[1], 0]])
    least = np.eye(3) + cross + cross @ cross / (1 + ahead[2])

    # The roll is the angle by which the horizon through the middle differs.
    angles = []
    for mapping in (homography, to_pixels @ least @ to_rays):
        ends = [move_points(mapping, *(to_pixels @ [side, 0, 1])[:2]) for side in (-0.1, 0.1)]
        angles.append(np.arctan2(*np.subtract(ends[1], ends[0])[::-1]))
    sin, cos = np.sin(angles[0] - angles[1]), np.cos(angles[0] - angles[1])
    return least @ [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]


def centre_of(mask):
    """mask (H, W) -> the mean x, y of its pixels."""
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def moving_pixels(pair, mask):
    """The pixels of a mask (H, W) that are seen to move, all of them if none is.

    Those whose flow was measured come first: filled in beside what stands still it is too short.
    """
    for measured in (True, False):
        moves = mask & (pair.strength(measured) > 1)
        if moves.any():
            return moves
    return mask


def stretch_at(homography, x, y):
    """Log by which lengths around a point grow through a homography: half that of the area."""
    here = np.array(move_points(homography, x, y))
    right = np.array(move_points(homography, x + 1, y)) - here
    down = np.array(move_points(homography, x, y + 1)) - here
    return float(np.log(abs(right[0] * down[1] - right[1] * down[0])) / 2)


def growth_by_flow(pair, mask):
    """Log growth of the thing in a mask (H, W) from this frame to the next: how its pixels spread."""
    y, x = np.nonzero(moving_pixels(pair, mask))
    moved_x, moved_y = move_points(pair.homography, x.astype(float), y.astype(float))
    points = np.stack([x, y], -1)
    targets = np.stack([moved_x, moved_y], -1) + pair.flow[y, x]
    kept = np.ones(len(x), bool)
    for _ in range(3):
        # least squares without the fifth of the pixels that fits it worst
        before = points - points[kept].mean(0)
        after = targets - targets[kept].mean(0)
        scale = (before[kept] * after[kept]).sum() / max((before[kept] ** 2).sum(), 1e-9)
        error = np.hypot(*(after - scale * before).T)
        kept = error <= np.percentile(error, 80)
    return float(np.log(max(scale, 0.1)))


def wholeness(mask, moving):
    """mask (H, W), what moves (H, W) -> overlap of the mask's box with that of the moving region it is in.

    A region reaches HALO pixels beyond the thing. Little is left out where the two boxes are alike.
    """
    inside = [region for region in list_regions(moving) if (region & mask).any()]
    if not inside:
        return 0.0
    x1, y1, x2, y2 = np.add(mask_box(np.any(inside, 0)), [HALO, HALO, -HALO, -HALO])
    whole, own = np.zeros_like(mask), np.zeros_like(mask)
    whole[y1:y2, x1:x2] = True
    x1, y1, x2, y2 = mask_box(mask)
    own[y1:y2, x1:x2] = True
    return float(overlap(whole, own))


def measure_track(frames, masks, run, onwards, moving):
    """Small frames (T, h, w, 3), masks and what moves (T, h, w), a run's frame numbers, Pairs -> Track."""
    shape = masks.shape[1:]
    width = shape[1]
    to_start = homographies_to_first(frames[run], [onwards[t] for t in run[:-1]])
    centres = [centre_of(masks[t]) for t in run]
    path = np.array([move_points(home, *centre) for home, centre in zip(to_start, centres)])

    # The same way by the flow: its median inside the mask, at the centre that it leads to.
    areas = masks[run].sum((1, 2))
    flow_way = np.zeros(2)
    strengths, slips = [], []
    for n, t in enumerate(run[:-1]):
        inside = onwards[t].flow[moving_pixels(onwards[t], masks[t])]
        here, there = centres[n], centres[n + 1]
        flow = np.median(inside, 0)
        expected = np.array(move_points(onwards[t].homography, *here)) + flow
        home = to_start[n + 1]
        flow_way += np.subtract(move_points(home, *(there + flow)), move_points(home, *there))
        slips.append(np.hypot(*(there - expected)) / np.sqrt(areas[n : n + 2].min()))
        lengths = np.hypot(inside[:, 0], inside[:, 1])
        strengths.append(np.percentile(lengths, 75) / (onwards[t].noise + 0.1))

    heights = [np.nonzero(masks[t])[0].std() + 0.3 for t in run]
    by_flow = sum(growth_by_flow(onwards[t], masks[t]) for t in run[:-1])
    growth = [by_flow, np.log(areas[-1] / areas[0]) / 2, np.log(heights[-1] / heights[0])]
    camera = scaled(np.linalg.inv(to_start[-1]))
    return Track(
        masks=masks[run],
        colours=np.array([colour_shares(colour_numbers(frames[t])[masks[t]]) for t in run]),
        path=path / width,
        flow_way=flow_way / width,
        growth=np.array(growth),
        stretch=stretch_at(to_start[-1], *centres[-1]),
        strength=float(np.median(strengths)),
        slip=max(slips),
        wholeness=wholeness(masks[run[-1]], moving[run[-1]]),
        camera_way=corner_shift(camera, np.eye(3), shape),
        turn_error=turn_error(camera, shape),
    )


def plate_overlaps(shot, masks, run, onwards):
    """A Shot, small masks (T, h, w), a run's frame numbers, Pairs -> overlap with the plate's thing (n,).

    0 to 1, of each frame of the run. The regions that differ from the shot's clean plate, and share pixels
    with the mask, are a second way to the thing's outline.
    """
    to_first = homographies_to_first(shot.dense[shot.places], onwards)
    if shot.context is None:
        changed = find_changed_outside(shot, to_first, np.stack([widen(mask, AROUND) for mask in masks]))
    else:
        changed = find_changed(shot, to_first, MOVING_VIEWS)
    overlaps = []
    for t in run:
        thing = np.zeros_like(masks[t])
        for region in list_regions(changed[t], least=LEAST_SHARED):
            if (region & masks[t]).sum() >= LEAST_SHARED:
                thing |= region
        overlaps.append(overlap(fill_inside(thing), masks[t]))
    return np.array(overlaps)


# ---------------------------------------------------------------- gates and labels


def find_flaw(track, outside_moves):
    """The first gate that a track does not pass, of FLAWS, or "".

    outside_moves: the largest share of a frame outside of the thing that moves.
    """
    if track.camera_way < STILL:
        return ""
    if outside_moves > 1 - LEAST_EXPLAINED:
        return "background"
    # What stands still and is near moves against the background if the camera travels, but only so far.
    way = np.hypot(*(track.path[-1] - track.path[0]))
    is_clear = way > NEARER * track.camera_way
    if not is_clear and track.turn_error > TURN_ERROR:
        return "travel"
    return ""


def score_identity(track):
    """Whether it is one thing, 0 to 1: each frame's colours are those of the others, and no area jumps."""
    others = (track.colours.sum(0) - track.colours) / (len(track.colours) - 1)
    shared = np.minimum(track.colours, others).sum(1).min()
    jumps = np.abs(np.diff(np.log(track.masks.sum((1, 2)))))
    return min(rise(shared, 0.4, 0.9), rise(jumps.max(), np.log(2), 0), rise(track.slip, 0.7, 0.1))


def rise(value, worst, best):
    """A score from 0 at the worst value, or beyond it, to 1 at the best."""
    return float(np.clip((value - worst) / (best - worst), 0, 1))


def judge_direction(track):
    """Track -> (label, margin 0 to 1) of its direction; the margin is that of the least certain part."""
    way = (track.path[-1] - track.path[0]) * [1, -1]  # right, up
    length = np.hypot(*way)
    total = np.hypot(*np.diff(track.path, axis=0).T).sum()
    disagreement = np.hypot(*(track.flow_way - way * [1, -1])) / max(length, 1e-9)
    sure = [rise(length, 0.6 * LEAST_WAY, 2 * LEAST_WAY)]
    sure += [rise(length / max(total, 1e-9), 0.5, 1), rise(disagreement, 0.8, 0.1)]

    # Sideways in shares of the depth, and by how much of the depth it nears or recedes: by its size as the
    # first frame would show it, since a camera that turns shows what is aside larger.
    lateral = length * view_width(66.0)
    forward = abs(np.expm1(-np.median(track.growth) - track.stretch))
    names = list(DIRECTIONS)[:8]
    cosines = []
    for name in names:
        axis = np.array(DIRECTIONS[name][:2])
        cosines.append(np.dot(way, axis) / np.linalg.norm(axis) / max(length, 1e-9))
    off = np.degrees(np.arccos(min(max(cosines), 1)))
    sure += [rise(off, 22.5, 0), rise(forward, 0.65 * lateral, 0)]
    return names[int(np.argmax(cosines))], min(sure)


def judge_distance(track):
    """Track -> (label, margin 0 to 1) of its distance: flow, area and height must say the same.

    There and back is never asked: a mask that wobbles looks the same.
    """
    closer, farther, same = list(DISTANCES)[:3]
    way = np.hypot(*(track.path[-1] - track.path[0]))
    # a wide turn changes sizes by itself: what is aside is shown larger
    steady = rise(track.camera_way, 0.4, 0.1)
    most = np.abs(track.growth).max()
    if most < 0.17:
        # that it stays where it is says little of what hardly moves
        return same, min(steady, rise(most, 0.17, 0), rise(way, 0.6 * LEAST_WAY, 2 * LEAST_WAY))
    is_one_way = (track.growth > 0).all() or (track.growth < 0).all()
    if not is_one_way:
        return same, 0.0
    label = closer if track.growth[0] > 0 else farther
    areas = np.log(track.masks.sum((1, 2))) / 2
    steps = np.diff(areas) * np.sign(track.growth[0])
    return label, min(steady, rise(np.abs(track.growth).min(), 0.1, 0.5), rise(-steps.min(), 0.15, 0))


def judge_box(track):
    """Track -> ("", margin 0 to 1): the masks are of one size, and show the whole thing.

    Of what moves by less than its own size some may be taken for the background.
    """
    areas = track.masks.sum((1, 2))
    change = np.abs(np.log(areas / np.median(areas))).max()
    size = np.sqrt(np.median(areas)) / track.masks.shape[2]  # frame widths
    way = np.hypot(*(track.path[-1] - track.path[0]))
    sure = [rise(change, np.log(1.5), 0), rise(way / size, 0.2, 1), rise(track.wholeness, 0.4, 0.9)]
    return "", min(sure)


JUDGES = {"box": judge_box, "direction": judge_direction, "distance": judge_distance}


def weigh(shot, masks, least_confidence, by_motion=False):
    """A Shot and masks (T, H, W) of a moving thing -> Evidence.

    least_confidence: 0 to 1, what each score of a label must reach. by_motion: the masks come from motion, so
    that they are held against the clean plate.
    """
    small = shot.dense[shot.places]
    small_masks = resize_masks(masks, small.shape[1:3])
    is_whole = [mask.any() and not touches_border(mask) for mask in small_masks]
    run = longest_run(is_whole)
    shown = masks & np.isin(np.arange(len(masks)), run)[:, None, None]
    if len(run) < LEAST_FRAMES:
        return Evidence(shown, reasons=Counter([FLAWS["border"]]))

    onwards, backwards = measure_pairs(shot)
    moving = find_moving(onwards, backwards, measured=True)
    track = measure_track(small, small_masks, run, onwards, moving)
    outside = [moving[t] & ~widen(small_masks[t], 15) for t in run]
    n_others = 0
    for t, mask in zip(run, outside):
        largest = next(iter(list_regions(mask)), mask & False)
        n_others += largest.sum() > OTHER_SIZE * small_masks[t].sum()
    evidence = Evidence(shown, is_alone=n_others <= OTHER_FRAMES * len(run))
    flaw = find_flaw(track, max(mask.mean() for mask in outside))
    if flaw:
        evidence.reasons[FLAWS[flaw]] += 1
        return evidence

    shared = {"residual": rise(track.strength, 2, 12), "identity": score_identity(track)}
    judged = {}
    for kind, judge in JUDGES.items():
        # Two people who walk side by side among others move as one, but a box is of one thing.
        if kind == "box" and not evidence.is_alone:
            evidence.reasons[CROWD] += 1
            continue
        label, margin = judge(track)
        judged[kind] = label, {**shared, "margin": margin}
    # the second way to the outline takes long, so it is asked last
    is_worth = any(min(scores.values()) >= least_confidence for _, scores in judged.values())
    if by_motion and is_worth:
        overlaps = plate_overlaps(shot, small_masks, run, onwards)
        for _, scores in judged.values():
            scores["cover"] = rise(np.median(overlaps), *COVER)

    for kind, (label, scores) in judged.items():
        least = min(scores, key=scores.get)
        if scores[least] < least_confidence:
            evidence.reasons[f"{kind} questions lack {LACKS[least]}"] += 1
        else:
            evidence.labels[kind] = label
            evidence.confidence[kind] = {name: round(score, 2) for name, score in scores.items()}
    return evidence


def name_by_place(shot, masks):
    """A Shot and masks (T, H, W) -> a name for a thing among others: where it is in its first frame."""
    first = int(np.flatnonzero(masks.any((1, 2)))[0])
    x, y = np.rint(centre_of(masks[first])).astype(int)
    return f"{UNNAMED} that is at [{x}, {y}] at {round(shot.times[first], 2):g}s"


def add_moving_object(c, clip, shot, name, masks):
    """Gives a clip its moving object with the labels that are clear -> Counter of why others are not asked.

    Without poses and depth the labels come from the picture alone, each with its confidence.
    """
    reasons = Counter()
    if "poses" in shot.notes or "depths" in shot.notes:
        labels = {"box": "", **object_labels(masks, shot.notes, c.HFOV)}
    else:
        by_motion = getattr(load_segmenter(c.SEGMENTER), "BY_MOTION", False)
        evidence = weigh(shot, masks, c.MIN_CONFIDENCE, by_motion)
        masks, labels, reasons = evidence.masks, evidence.labels, evidence.reasons
        # among others that move, an object without a name is known by where it begins
        if labels and name == UNNAMED and not evidence.is_alone:
            name = name_by_place(shot, masks)
        for kind, scores in evidence.confidence.items():
            clip.evidence[f"dynamic_{ID_TAGS[kind]}"] = {"confidence": scores}
    if labels:
        clip.moving = [name]
        clip.masks[name] = masks
        clip.facts[name] = labels
    return reasons
