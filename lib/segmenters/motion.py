"""SEGMENTER="motion": masks without weights or files; one thing that clearly moves against the background.

For clips of one moving thing before a background that stays in view: a fixed or hand-held camera, or one that
turns after the thing. It says nothing where that is not so. numpy alone.
"""

from lib.follow import masks_of_one_thing, measure_pairs

LANDMARKS = False  # it finds what moves, not what stands still
BY_MOTION = True  # its masks are held against the clean plate, which is found without motion
NOTHING = "clips show nothing that clearly moves against the background"


def masks_of_shot(shot):
    """A Shot -> masks (T, H, W) of what moves; empty where nothing clearly does."""
    return masks_of_one_thing(shot, *measure_pairs(shot))
