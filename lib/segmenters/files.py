"""SEGMENTER="files": masks are images that were made elsewhere, white where the object is."""

import numpy as np
from PIL import Image


def masks(frames, phrase, files, weights):
    """A mask image for each of the frames (T, H, W, 3) -> masks (T, H, W); one that is not there is empty."""
    height, width = frames.shape[1:3]
    found = np.zeros(frames.shape[:3], bool)
    for number, path in enumerate(files):
        if path.exists():
            image = Image.open(path).convert("L").resize((width, height))
            found[number] = np.asarray(image) > 127
    return found
