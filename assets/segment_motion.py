"""SEGMENTER="motion": masks without weights or files; the largest region that moves is the moving object."""

import numpy as np
from PIL import Image, ImageFilter

LANDMARKS = False  # it finds what moves, not what stands still
MOST_GROWTH = 4.0  # largest ratio between the region of a frame and the median of its clip


def global_shifts(grey):
    """grey (T, H, W) -> shifts y, x (T, 2) of the picture since the first frame.

    The median over 3 x 3 blocks of the phase correlation's peak with the frame before: one thing has no say.
    """
    size, steps = np.array(grey.shape[1:]) // 3, []
    for y, x in np.ndindex(3, 3):
        block = grey[:, y * size[0] : (y + 1) * size[0], x * size[1] : (x + 1) * size[1]]
        spectra = np.fft.rfft2((block - block.mean((1, 2), keepdims=True)) * np.outer(*map(np.hanning, size)))
        cross = spectra[1:] * spectra[:-1].conj()
        peaks = np.fft.irfft2(cross / (np.abs(cross) + 1e-6), s=size).reshape(len(grey) - 1, -1).argmax(1)
        steps.append((np.stack(np.unravel_index(peaks, size), -1) + size // 2) % size - size // 2)
    return np.concatenate([np.zeros((1, 2), int), np.cumsum(np.median(steps, 0), 0).astype(int)])


def number_regions(masks):
    """masks (T, H, W) -> a number for each 4-connected region, 0 outside: pixels take the largest around."""
    numbers, last = np.where(masks, np.arange(1, masks.size + 1).reshape(masks.shape), 0), None
    while last is None or (numbers != last).any():
        last, pad = numbers, np.pad(numbers, ((0, 0), (1, 1), (1, 1)))
        around = [last, pad[:, 2:, 1:-1], pad[:, :-2, 1:-1], pad[:, 1:-1, 2:], pad[:, 1:-1, :-2]]
        numbers = np.where(masks, np.max(around, 0), 0)
    return numbers


def largest_regions(masks):
    """masks (T, H, W) -> the largest 4-connected region of each."""
    numbers = number_regions(masks)
    largest = [np.bincount(frame[frame > 0], minlength=1).argmax() for frame in numbers]
    return masks & (numbers == np.array(largest)[:, None, None])


def masks(frames, phrase, files, weights):
    """Frames (T, H, W, 3) -> masks (T, H, W) of what moves most; empty if its size is not steady.

    Difference to the median over time once the global shift is removed, blurred; largest region of a frame.
    Crude: of a thing that moves less than its own width only the edges are found.
    """
    grey = frames.mean(-1)
    shifts = global_shifts(grey)
    still = np.stack([np.roll(frame, tuple(-shift), (0, 1)) for frame, shift in zip(grey, shifts)])
    change = np.abs(still - np.median(still, 0)).astype(np.uint8)
    blurred = np.stack([Image.fromarray(frame).filter(ImageFilter.BoxBlur(3)) for frame in change])
    moving = blurred > np.maximum(8, 0.4 * blurred.max((1, 2), keepdims=True))
    found = largest_regions(np.stack([np.roll(m, tuple(shift), (0, 1)) for m, shift in zip(moving, shifts)]))
    areas = found.mean((1, 2))
    return found & (areas.max() <= MOST_GROWTH * np.median(areas) <= MOST_GROWTH**2 * areas.min())
