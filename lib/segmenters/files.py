"""SEGMENTER="files": masks are images that were made elsewhere, white where the object is."""

import numpy as np

from lib.pictures import BadImage, read_image


def read_mask(path, size):
    """A mask image of any encoding -> (H, W) bool at the size (W, H), as a viewer shows it on black.

    BadImage where it is dark but not empty, such as a mask of 0 and 1: then "no object" would be wrong.
    """
    image = read_image(path, background=(0, 0, 0)).convert("L")
    brightest = image.getextrema()[1]
    if 0 < brightest <= 127:
        raise BadImage(f"{path} is {brightest} of 255 at its brightest; a mask is white where the object is")
    return np.asarray(image.resize(size)) > 127


def masks(frames, phrase, files, weights):
    """A mask image for each of the frames (T, H, W, 3) -> masks (T, H, W); one that is not there is empty."""
    height, width = frames.shape[1:3]
    found = np.zeros(frames.shape[:3], bool)
    for number, path in enumerate(files):
        if path.exists():
            found[number] = read_mask(path, (width, height))
    return found
