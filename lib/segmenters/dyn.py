"""SEGMENTER="dyn": masks of what moves from SpatialVID's dyn_masks.npz, one region followed over time."""

import numpy as np
from PIL import Image

from lib.follow import number_regions

LANDMARKS = False  # the file holds what moves, not what stands still
COARSE = 96  # longer side at which regions are told apart, pixels


def read_mask(packed, number):
    """dyn_masks.npz and a frame's number -> its mask (H, W), stored as a list of columns for each row (CSR).

    shape [2, 3], indptr [0, 2, 3], indices [0, 2, 1], data [1, 1, 1] -> [[1, 0, 1], [0, 1, 0]]
    """
    mask = np.zeros(packed["shape"][-2:], bool)
    counts = np.diff(packed[f"f_{number}_indptr"])
    rows = np.repeat(np.arange(len(mask)), counts)
    columns = packed[f"f_{number}_indices"]
    if (counts < 0).any() or (columns < 0).any():
        raise ValueError(f"dyn_masks.npz: the mask of frame {number} has a negative place")
    mask[rows, columns] = packed[f"f_{number}_data"] > 0
    return mask


def most_common(numbers):
    """Numbers -> the one that stands there most often, 0 aside; 0 if there is none."""
    found, counts = np.unique(numbers[numbers > 0], return_counts=True)
    return found[counts.argmax()] if len(found) else 0


def follow(numbers, start):
    """Regions' numbers (T, H, W), 0 outside -> the largest of frame `start`, and what overlaps it."""
    chosen = (numbers > 0) & (numbers == most_common(numbers[start]))
    onwards, backwards = range(start + 1, len(numbers)), range(start - 1, -1, -1)
    for frames in (onwards, backwards):
        previous = chosen[start]
        for t in frames:
            number = most_common(numbers[t][previous])
            if number:
                chosen[t] = numbers[t] == number
                previous = chosen[t]
    return chosen


def resize(masks, size, filter):
    """masks (T, h, w) -> shares 0..1 of each pixel (T, H, W) at the size (W, H)."""
    images = [Image.fromarray(mask.astype(np.float32)) for mask in masks]
    return np.stack([np.asarray(image.resize(size, filter)) for image in images])


def masks(frames, phrase, files, weights):
    """Frames (T, H, W, 3), whose numbers stand in the files' names -> masks (T, H, W) of one moving region.

    It is the one with most pixels over time: what is large but there only once does not win. Regions are told
    apart on a coarse grid, where a cell is in if any of its pixels is: narrower gaps do not part a region.
    """
    numbers_in_video = [int(path.stem.rpartition("_")[2]) for path in files]
    with np.load(files[0].parent.parent / "dyn_masks.npz") as packed:
        stored = [read_mask(packed, number) for number in numbers_in_video]

    size = frames.shape[2], frames.shape[1]  # width, height
    scale = min(1, COARSE / max(size))
    coarse_size = [max(1, round(side * scale)) for side in size]
    fine = resize(stored, size, Image.Resampling.BILINEAR) > 0.5
    regions = number_regions(resize(fine, coarse_size, Image.Resampling.BOX) > 0)
    followed = [follow(regions, start) for start in range(len(regions))]
    chosen = max(followed, key=np.sum)
    return fine & (resize(chosen, size, Image.Resampling.NEAREST) > 0)
