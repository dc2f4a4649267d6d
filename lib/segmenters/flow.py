"""SEGMENTER="flow": as "motion", with OpenCV's optical flow; less than half the time.

The flow is that of dense inverse search (Kroeger et al., 2016), the background a homography by a robust
consensus of it (MAGSAC++). Needs `pip install opencv-python-headless`.
"""

import functools
import sys

import numpy as np

from lib.background import move_points, pixel_grid, scaled
from lib.follow import Pair, join_steps, masks_of_one_thing, noise_of

LANDMARKS = False  # it finds what moves, not what stands still
BY_MOTION = True  # its masks are held against the clean plate, which is found without motion
NOTHING = "clips show nothing that clearly moves against the background"
SPACING = 4  # pixels between the points that the background is fitted to
TOLERANCE = 1.0  # pixels; a point that is farther off is not of the background


@functools.cache
def load_opencv():
    """The library on one thread, since each worker is a process of its own; exits without it."""
    try:
        import cv2
    except ImportError:
        sys.exit("SEGMENTER=flow needs OpenCV: pip install opencv-python-headless, or set SEGMENTER=motion.")
    cv2.setNumThreads(1)
    return cv2


def measure_pair(a, b):
    """Two grey frames (H, W) uint8 -> Pair of what OpenCV measures from one to the other."""
    cv2 = load_opencv()
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    moved = np.stack(pixel_grid(a.shape), -1) + search.calc(a, b, None)  # (H, W, 2)

    # The homography that most points of a grid agree on is the background's.
    x, y = pixel_grid(a.shape)
    points = np.stack([x, y], -1)[::SPACING, ::SPACING].reshape(-1, 2)
    targets = moved[::SPACING, ::SPACING].reshape(-1, 2)
    everywhere = np.ones(a.shape, bool)  # its flow is smooth over bare surfaces
    homography, _ = cv2.findHomography(points, targets, cv2.USAC_MAGSAC, TOLERANCE)
    if homography is None:
        return Pair(np.eye(3), 0 * moved, np.inf, everywhere)
    flow = moved - np.stack(move_points(homography, x, y), -1)
    return Pair(scaled(homography), flow, noise_of(flow, everywhere), everywhere)


def masks_of_shot(shot):
    """A Shot -> masks (T, H, W) of what moves; empty where nothing clearly does."""
    grey = [np.rint(frame.mean(-1)).astype(np.uint8) for frame in shot.dense]
    onwards = [measure_pair(a, b) for a, b in zip(grey, grey[1:])]
    backwards = [measure_pair(b, a) for a, b in zip(grey, grey[1:])]
    pairs = join_steps(onwards, backwards, shot.places, lambda pair, i, j: pair)
    return masks_of_one_thing(shot, *pairs)
