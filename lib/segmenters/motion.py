"""SEGMENTER="motion": masks without weights or files; the largest region that moves is the moving object."""

import numpy as np
from PIL import Image, ImageFilter

LANDMARKS = False  # it finds what moves, not what stands still
MOST_GROWTH = 4.0  # largest ratio between the region of a frame and the median of its clip


def global_shifts(grey):
    """grey (T, H, W) -> shifts y, x (T, 2) of the picture since the first frame.

    The median over 3 x 3 blocks of the phase correlation's peak with the frame before, so that one moving
    thing does not decide.
    """
    height, width = grey.shape[1] // 3, grey.shape[2] // 3  # of a block
    steps = []
    for row in range(3):
        for column in range(3):
            y, x = row * height, column * width
            block = grey[:, y : y + height, x : x + width]
            steps.append(block_steps(block))
    median = np.median(steps, 0)
    sums = np.cumsum(median, 0).astype(int)
    first = np.zeros((1, 2), int)
    return np.concatenate([first, sums])


def block_steps(block):
    """block (T, h, w) -> shifts y, x (T - 1, 2) since the frame before, by phase correlation."""
    size = np.array(block.shape[1:])
    window = np.outer(np.hanning(size[0]), np.hanning(size[1]))
    mean = block.mean((1, 2), keepdims=True)
    spectra = np.fft.rfft2((block - mean) * window)
    cross = spectra[1:] * spectra[:-1].conj()
    phase = cross / (np.abs(cross) + 1e-6)
    correlation = np.fft.irfft2(phase, s=size)
    peaks = correlation.reshape(len(block) - 1, -1).argmax(1)
    shift = np.stack(np.unravel_index(peaks, size), -1)
    # a peak beyond half the block is a shift the other way
    half = size // 2
    return (shift + half) % size - half


def number_regions(masks):
    """masks (T, H, W) -> a number for each 4-connected region, 0 outside: pixels take the largest around."""
    own_number = np.arange(1, masks.size + 1).reshape(masks.shape)
    numbers = np.where(masks, own_number, 0)
    previous = None
    while previous is None or (numbers != previous).any():
        previous = numbers
        padded = np.pad(numbers, ((0, 0), (1, 1), (1, 1)))
        right = padded[:, 1:-1, 2:]
        left = padded[:, 1:-1, :-2]
        below = padded[:, 2:, 1:-1]
        above = padded[:, :-2, 1:-1]
        largest = np.max([numbers, below, above, right, left], 0)
        numbers = np.where(masks, largest, 0)
    return numbers


def largest_regions(masks):
    """masks (T, H, W) -> the largest 4-connected region of each."""
    numbers = number_regions(masks)
    largest = []
    for frame in numbers:
        pixels = np.bincount(frame[frame > 0], minlength=1)
        largest.append(pixels.argmax())
    is_largest = numbers == np.array(largest)[:, None, None]
    return masks & is_largest


def roll_frames(frames, shifts):
    """Each frame (H, W) rolled by its own shift y, x."""
    rolled = []
    for frame, shift in zip(frames, shifts):
        rolled.append(np.roll(frame, tuple(shift), (0, 1)))
    return np.stack(rolled)


def masks(frames, phrase, files, weights):
    """Frames (T, H, W, 3) -> masks (T, H, W) of what moves most; empty if its size is not steady.

    Difference to the median over time once the global shift is removed, blurred; largest region of a frame.
    Crude: of a thing that moves less than its own width only the edges are found.
    """
    grey = frames.mean(-1)
    shifts = global_shifts(grey)
    still = roll_frames(grey, -shifts)
    background = np.median(still, 0)
    change = np.abs(still - background).astype(np.uint8)
    images = [Image.fromarray(frame).filter(ImageFilter.BoxBlur(3)) for frame in change]
    blurred = np.stack(images)
    threshold = np.maximum(8, 0.4 * blurred.max((1, 2), keepdims=True))
    found = largest_regions(roll_frames(blurred > threshold, shifts))

    areas = found.mean((1, 2))
    typical = np.median(areas)
    is_steady = areas.max() <= MOST_GROWTH * typical <= MOST_GROWTH**2 * areas.min()
    return found & is_steady
