"""The clean plate of a shot: its background without what moves, and what differs from it. numpy alone.

A thing that has been away from a place for most of a shot is not in the median of the shot's frames there.
What differs from this median is then the thing, found without its motion: a second way to its outline.
"""

import functools

import numpy as np

from lib.background import (
    box_mean,
    fit_homography,
    move_points,
    normalise,
    pixel_grid,
    sample,
    share_explained,
    stands_still,
)
from lib.files import evenly_spaced

LEAST_CHANGE = 14.0  # of 255; what differs less from the background has not changed
NOISE_FACTOR = 4.0  # nor has what differs less than so many standard deviations of the pixel over the shot
LEAST_VIEWS = 2  # of a place without the thing, or its background is not known
LEAST_SEEN = 0.5  # share of a frame that is the same in another one; with less it shows another place


def find_changed(shot, to_first, more_views=0):
    """A Shot, homographies (T, 3, 3) from its frames to the first -> (T, h, w) bool: what is not background.

    more_views: of the shot beyond the clip, if the camera moves; they take long to fit.
    """
    frames = shot.dense[shot.places].astype(float)
    context = shot.dense if shot.context is None else shot.context
    is_still = np.allclose(to_first, np.eye(3))
    plates = still_plate(context.tobytes(), frames.shape[1:]) if is_still else None
    if plates and has_same_view(frames[0], plates[0]):
        return np.stack([differs(frame, *plates) for frame in frames])

    # The camera moves: what the shot shows of the clip's view is moved into each frame.
    views = list(zip(frames, to_first)) + align(frames[0], context, more_views)
    changed = []
    for frame, home in zip(frames, to_first):
        aligned = move_views(views, home)
        # outside of a view nothing is known, so nothing has changed
        changed.append(differs(frame, *median_and_noise(np.where(np.isnan(aligned), frame, aligned))))
    return np.stack(changed)


def find_changed_outside(shot, to_first, masks):
    """As find_changed, of a shot no longer than its clip: by the frames outside of the masks (T, h, w).

    In so short a time a thing may stand before its background for longer than not. What is known nowhere has
    not changed.
    """
    frames = shot.dense[shot.places].astype(float)
    outside = np.where(masks[..., None], np.nan, frames)
    views = list(zip(outside, to_first))
    changed = []
    for frame, home in zip(frames, to_first):
        aligned = move_views(views, home)
        known = np.isfinite(aligned).sum(0)
        aligned = np.where((known < LEAST_VIEWS) & np.isnan(aligned), frame, aligned)
        plate = np.nanmedian(aligned, 0)
        deviation = np.nanmedian(np.abs(aligned - plate), 0).max(-1)
        changed.append(differs(frame, plate, box_mean(1.48 * deviation, 3)))
    return np.stack(changed)


def move_views(views, to_first):
    """[(frame (h, w, 3), its homography to the first)] -> as seen from another frame (N, h, w, 3), or NaN."""
    x, y = pixel_grid(views[0][0].shape[:2])
    aligned = []
    for view, homography in views:
        points = move_points(np.linalg.inv(homography) @ to_first, x, y)
        aligned.append(np.stack([sample(view[..., channel], *points) for channel in range(3)], -1))
    return np.array(aligned)


@functools.lru_cache(maxsize=1)
def still_plate(context, shape):
    """Bytes of a shot's frames -> its background (h, w, 3) and noise (h, w); None if the camera moves."""
    context = np.frombuffer(context, np.uint8).reshape(-1, *shape).astype(float)
    pictures = np.stack([normalise(frame.mean(-1)) for frame in context])
    return median_and_noise(context) if stands_still(pictures) else None


def has_same_view(frame, plate):
    """Whether a frame (h, w, 3) shows the place that the plate shows."""
    return share_explained(np.eye(3), normalise(frame.mean(-1)), normalise(plate.mean(-1))) > LEAST_SEEN


def align(first, context, most):
    """A clip's first frame (h, w, 3), frames of its shot (N, h, w, 3) -> [(frame, homography to the first)].

    At most so many, and only those that show the same place.
    """
    first = normalise(first.mean(-1))
    views = []
    for view in evenly_spaced(context.astype(float), most):
        picture = normalise(view.mean(-1))
        homography = fit_homography(picture, first)
        if share_explained(homography, picture, first) > LEAST_SEEN:
            views.append((view, homography))
    return views


def median_and_noise(views):
    """Views of one place (N, h, w, 3) -> their median (h, w, 3), and the deviation of a pixel (h, w)."""
    plate = np.median(views, 0)
    deviation = np.median(np.abs(views - plate), 0).max(-1)
    return plate, box_mean(1.48 * deviation, 3)


def differs(frame, plate, noise):
    """A frame (h, w, 3), its background (h, w, 3), a pixel's noise (h, w) -> (h, w) bool."""
    # the exposure may differ: what most pixels differ by does not count
    difference = frame - plate
    difference = np.abs(difference - np.median(difference, (0, 1))).max(-1)
    threshold = np.maximum(NOISE_FACTOR * noise, max(LEAST_CHANGE, 3 * np.median(difference)))
    return box_mean(difference, 3) > threshold
