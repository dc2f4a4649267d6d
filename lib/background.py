"""How the picture of what stands still moves between two frames, and what moves against it. numpy alone.

Frames are grey, (H, W) float; a point is x, y in pixels. A homography (3, 3) takes points of one frame to
another; it is exact for a camera that turns, or for a scene that is flat or far away. It is fitted to the
brightness itself, coarse to fine, with weights that let what moves by itself drop out (Odobez and Bouthemy,
1995). What is left is measured by the optical flow of Lucas and Kanade (1981), on top of the homography.
"""

import functools

import numpy as np
from PIL import Image

SIDE = 160  # pixels; the longer side at which motion is measured
LEVELS = 4  # of a pyramid, each half as large as the one before
SMALLEST = 12  # pixels; the shorter side of the smallest level at least
CONTRAST = 8.0  # grey values of 255, or so many times the pixel noise; fainter texture is not amplified
NEIGHBOURHOOD = 15  # pixels; side of the square over which brightness and contrast are local
WINDOW = 7  # pixels; side of the square that a pixel's flow is measured on
CELLS = (4, 6)  # rows and columns of cells over a frame
TEXTURE_SLOPE = 0.12  # of a normalised picture; a steeper pixel has texture
SAME = 0.3  # of a normalised picture; what differs less is the same
ENOUGH_EXPLAINED = 0.75  # share of a picture; a homography that explains more is not searched for again
LITTLE_MORE = 0.02  # share of a cell; by more one homography explains it better than another
FEW_CELLS = 0.2  # share of the cells; where no more of them move otherwise than by a turn, it is a turn
FOCAL = 0.8  # longer sides; of a usual camera, by which a small turn is known
TUKEY = 4.685  # residuals beyond so many standard deviations have no weight
# (numbers that are free, steps) at the coarsest level, between, and at the finest
TURN_STAGES = ([(2, 6), (4, 4)], [(4, 4)], [(4, 2), (5, 3)])
FREE_STAGES = ([(2, 6), (6, 6)], [(6, 4), (8, 4)], [(8, 4)])
# from pixels of a halved picture to those of the picture: a pixel's middle stands at 0
DOUBLE = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])


# ---------------------------------------------------------------- pictures


def shrink(frame):
    """frame (H, W, 3) uint8 -> the same with a longer side of at most SIDE."""
    height, width = frame.shape[:2]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return frame
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))


def resize_masks(masks, shape):
    """masks (T, h, w) bool -> (T, H, W) bool of the shape (H, W): a pixel is in if most of it is."""
    if masks.shape[1:] == tuple(shape):
        return masks
    larger = shape[0] > masks.shape[1]
    kind = Image.Resampling.BILINEAR if larger else Image.Resampling.BOX
    images = [Image.fromarray(np.uint8(mask) * 255).resize(shape[::-1], kind) for mask in masks]
    return np.stack([np.asarray(image) for image in images]) > 127


def box_mean(image, side):
    """image (H, W) -> the mean over the square of this odd side around each pixel, inside the image."""
    return window_sums(image.astype(float), side) / window_counts(image.shape, side)


@functools.cache
def window_counts(shape, side):
    """How many pixels of an image lie in the square of this side around each, (H, W)."""
    return window_sums(np.ones(shape), side)


def window_sums(image, side):
    """image (H, W) -> sums over the square of this odd side around each pixel (H, W)."""
    rim = (side // 2 + 1, side // 2)
    total = np.pad(image, (rim, rim)).cumsum(0).cumsum(1)
    columns = total[:, side:] - total[:, :-side]
    return columns[side:] - columns[:-side]


def pixel_noise(grey):
    """grey (H, W) -> standard deviation of its noise from pixel to pixel.

    It is measured where the picture is calmest, by a difference that is zero on edges and slopes (Immerkaer,
    1996): noise is everywhere, texture is not.
    """
    across = np.diff(grey, 2, 0)
    cells = split_into_cells(np.abs(np.diff(across, 2, 1)))
    medians = [np.median(cell) for cell in cells if cell.size]
    # the 3 x 3 weights 1 -2 1, -2 4 -2, 1 -2 1 make the noise six times as large
    return 1.48 * float(np.quantile(medians, 0.1)) / 6 if medians else 0.0


def normalise(grey):
    """grey (H, W) -> the same without the local brightness and contrast: exposure does not count.

    Noise stays small, so that a bare surface has no texture.
    """
    mean = box_mean(grey, NEIGHBOURHOOD)
    variance = box_mean(grey**2, NEIGHBOURHOOD) - mean**2
    contrast = CONTRAST * max(1, pixel_noise(grey))
    return (grey - mean) / (np.sqrt(variance.clip(0)) + contrast)


def halve(image):
    """image (H, W) -> means of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    even = image[: 2 * height, : 2 * width]
    return even.reshape(height, 2, width, 2).mean((1, 3))


def pyramid(image):
    """image (H, W) -> [image, half, quarter, ...], LEVELS of them, or fewer of a small one."""
    levels = [image]
    while len(levels) < LEVELS and min(levels[-1].shape) >= 2 * SMALLEST:
        levels.append(halve(levels[-1]))
    return levels


def pixel_grid(shape):
    """(H, W) -> x and y of each pixel, each (H, W)."""
    y, x = np.indices(shape).astype(float)
    return x, y


def sample(image, x, y):
    """image (H, W) at points x, y of any shape -> values between its pixels; NaN outside."""
    height, width = image.shape
    left = np.floor(x).astype(int).clip(0, width - 2)
    top = np.floor(y).astype(int).clip(0, height - 2)
    right_share = x - left
    low_share = y - top

    # Between left and right in the row above and in the row below, then between the two.
    first = top * width + left
    flat = image.ravel()
    upper_left = flat[first]
    lower_left = flat[first + width]
    upper = upper_left + right_share * (flat[first + 1] - upper_left)
    lower = lower_left + right_share * (flat[first + width + 1] - lower_left)
    values = upper + low_share * (lower - upper)
    outside = (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)
    values[outside] = np.nan
    return values


def move_points(homography, x, y):
    """Points x, y of any shape through a homography (3, 3) -> x, y."""
    to_x, to_y, to_depth = homography
    depth = to_depth[0] * x + to_depth[1] * y + to_depth[2]
    moved_x = to_x[0] * x + to_x[1] * y + to_x[2]
    moved_y = to_y[0] * x + to_y[1] * y + to_y[2]
    return moved_x / depth, moved_y / depth


def scaled(homography):
    """A homography with 1 in its last place."""
    return homography / homography[2, 2]


# ---------------------------------------------------------------- the camera's share


def split_into_cells(image):
    """image (H, W) -> its CELLS cells of about equal size, row by row."""
    rows = np.array_split(image, CELLS[0])
    cells = []
    for row in rows:
        cells += np.array_split(row, CELLS[1], axis=1)
    return cells


def cell_means(image):
    """image (H, W) -> the means of its cells."""
    return np.array([cell.mean() for cell in split_into_cells(image)])


def stands_still(pictures):
    """Normalised pictures (T, H, W) -> whether the camera does not move: what has texture stays as it is.

    What moves is not in the median over time, so a large thing before a bare wall does not count.
    """
    median = np.median(pictures, 0)
    slopes = np.hypot(*np.gradient(median))
    has_texture = slopes > TEXTURE_SLOPE
    # of each pixel, but for the fifth of the frames in which something may pass before it
    changes = np.quantile(np.abs(pictures - median), 0.8, 0)
    textured = cell_means(has_texture)
    constant = cell_means(has_texture & (changes < SAME))
    cells = textured > 0.01
    still = cells & (constant > 0.7 * textured)
    return still.sum() >= 3 and still.sum() >= 0.4 * cells.sum()


def fit_homography(a, b):
    """Two normalised pictures (H, W) -> the homography, in pixels, that takes most of a to b.

    The search begins without motion. If that explains little, it begins with the best shift as well.
    """
    found = simplest_climb(np.eye(3), a, b)
    explained = share_explained(found, a, b)
    if explained > ENOUGH_EXPLAINED:
        return found
    levels_a, levels_b = pyramid(a), pyramid(b)
    pixel = 2 ** (len(levels_a) - 1)  # of the smallest level, in pixels
    shift = np.eye(3)
    shift[:2, 2] = pixel * np.array(find_shift(levels_a[-1], levels_b[-1]))
    other = simplest_climb(shift, a, b)
    return other if share_explained(other, a, b) > explained else found


def simplest_climb(homography, a, b):
    """As climb; that of a camera that turns and zooms, unless a free one explains more all over the picture.

    A free one bends towards what moves by itself, and so explains more there: in few cells.
    """
    turn, free = climb(homography, a, b, TURN_STAGES), climb(homography, a, b, FREE_STAGES)
    gains = cell_means(is_explained(free, a, b)) - cell_means(is_explained(turn, a, b))
    is_turn = (gains > LITTLE_MORE).mean() <= FEW_CELLS
    return turn if is_turn else free


def is_explained(homography, a, b):
    """What of the picture a (H, W) a homography takes to the same in b, (H, W) bool."""
    moved = sample(b, *move_points(homography, *pixel_grid(a.shape)))
    return np.abs(moved - a) < SAME


def share_explained(homography, a, b):
    """The share of the picture a (H, W) that a homography takes to the same in b."""
    return float(is_explained(homography, a, b).mean())


def climb(homography, a, b, all_stages):
    """A homography that takes a to b (H, W) -> a better one, from coarse to fine, by stages of each level."""
    pairs = list(zip(pyramid(a), pyramid(b)))
    for _ in pairs[1:]:
        homography = np.linalg.inv(DOUBLE) @ homography @ DOUBLE

    coarsest, between, finest = all_stages
    for level in reversed(range(len(pairs))):
        stages = between
        if level == len(pairs) - 1:
            stages = coarsest
        if level == 0:
            stages = finest
        for freedom, steps in stages:
            for _ in range(steps):
                homography = improve_homography(homography, *pairs[level], freedom)
        if level:
            homography = scaled(DOUBLE @ homography @ np.linalg.inv(DOUBLE))
    return homography


def find_shift(a, b):
    """Two small pictures (H, W) -> the shift x, y in whole pixels that takes a to b, at most half of it."""
    height, width = a.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    spectrum = np.fft.rfft2(a * window)
    cross = np.fft.rfft2(b * window) * spectrum.conj()
    correlation = np.fft.irfft2(cross, s=a.shape)
    peak = np.array(np.unravel_index(correlation.argmax(), a.shape))
    half = np.array(a.shape) // 2
    y, x = (peak + half) % a.shape - half
    return x, y


def free_changes(freedom, shift):
    """2, 4, 5, 6 or 8 -> what may change of a homography's eight numbers (8, freedom).

    2: the camera pans and tilts; 4: it rolls and zooms too; 5: its lens is another; 6: an affine map; 8: all.
    The eight are the shift x, y, the four of the affine map row by row, and how x and y change the depth.
    shift: x, y of the frame's middle so far, which tells how a longer lens would differ.
    """
    if freedom > 5:
        return np.eye(8)[:, :freedom]
    # A pan shifts what is aside by more: by a share of the square of its distance in focal lengths.
    nearer = -1 / (2 * FOCAL) ** 2  # in units of half the longer side
    pan = [1, 0, 0, 0, 0, 0, nearer, 0]
    tilt = [0, 1, 0, 0, 0, 0, 0, nearer]
    zoom = [0, 0, 1, 0, 0, 1, 0, 0]
    roll = [0, 0, 0, -1, 1, 0, 0, 0]
    lens = [0, 0, 0, 0, 0, 0, *shift]
    return np.array([pan, tilt, zoom, roll, lens][:freedom], float).T


def improve_homography(homography, a, b, freedom):
    """One Gauss-Newton step on the brightness, with Tukey's weights; freedom: of free_changes."""
    # pixels to units of half the longer side around the middle, in which all numbers are of one size
    height, width = a.shape
    size = max(a.shape) / 2
    to_units = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, size]]) / size
    x, y = pixel_grid(a.shape)
    moved = sample(b, *move_points(homography, x, y))
    is_seen = np.isfinite(moved)
    if is_seen.mean() < 0.3:
        return homography

    # What a small change of each number does to the picture: slopes (n, freedom).
    down, right = np.gradient(np.where(is_seen, moved, a))
    u, v = move_points(to_units, x, y)
    along = right * u + down * v
    slopes = [right, down, right * u, right * v, down * u, down * v, -along * u, -along * v]
    middle = np.array([width / 2, height / 2])
    free = free_changes(freedom, (np.array(move_points(homography, *middle)) - middle) / size)
    slopes = size * np.stack(slopes, -1)[is_seen] @ free
    difference = (moved - a)[is_seen]
    deviation = 1.48 * np.median(np.abs(difference)) + 0.02
    weights = (1 - (difference / (TUKEY * deviation)) ** 2).clip(0) ** 2
    weighted = slopes * weights[:, None]
    system = weighted.T @ slopes + 1e-3 * np.eye(freedom)

    change = -free @ np.linalg.solve(system, weighted.T @ difference)
    shift_x, shift_y, xx, xy, yx, yy, depth_x, depth_y = change
    small = np.eye(3) + [[xx, xy, shift_x], [yx, yy, shift_y], [depth_x, depth_y, 0]]
    return scaled(homography @ np.linalg.inv(to_units) @ small @ to_units)


# ---------------------------------------------------------------- what moves against it


def measure_flow(a, b, homography):
    """Where each pixel of a goes in b beyond the homography -> flow (H, W, 2) in pixels, texture (H, W).

    texture: the lesser eigenvalue of the mean structure tensor; where it is small the flow means nothing.
    """
    pairs = list(zip(pyramid(a), pyramid(b)))
    homographies = [homography]
    for _ in pairs[1:]:
        homographies.append(np.linalg.inv(DOUBLE) @ homographies[-1] @ DOUBLE)
    flow = np.zeros((*pairs[-1][0].shape, 2))
    for level in reversed(range(len(pairs))):
        flow = double_flow(flow, pairs[level][0].shape)
        flow, texture = improve_flow(flow, *pairs[level], homographies[level])
    return flow, texture


def double_flow(flow, shape):
    """flow (h, w, 2) of a halved picture -> flow of the picture (H, W, 2); the same size stays."""
    if flow.shape[:2] == shape:
        return flow
    larger = 2 * flow.repeat(2, 0).repeat(2, 1)
    missing = [(0, side - have) for side, have in zip(shape, larger.shape)]
    return np.pad(larger, [*missing, (0, 0)], mode="edge")


def improve_flow(flow, a, b, homography, steps=4):
    """Lucas and Kanade on one level: flow (H, W, 2) -> a better one, and the texture that it rests on."""
    # the structure tensor is that of a, so it is summed once
    down, right = np.gradient(a)
    xx = box_mean(right * right, WINDOW)
    xy = box_mean(right * down, WINDOW)
    yy = box_mean(down * down, WINDOW)
    texture = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    xx, yy = xx + 1e-3, yy + 1e-3
    determinant = xx * yy - xy**2

    x, y = move_points(homography, *pixel_grid(a.shape))
    for _ in range(steps):
        moved = sample(b, x + flow[..., 0], y + flow[..., 1])
        difference = np.nan_to_num(moved - a)
        along_x = box_mean(right * difference, WINDOW)
        along_y = box_mean(down * difference, WINDOW)
        step_x = (xy * along_y - yy * along_x) / determinant
        step_y = (xy * along_x - xx * along_y) / determinant
        flow = flow + np.stack([step_x, step_y], -1).clip(-1, 1)
    return median_of_neighbours(flow), texture


def median_of_neighbours(flow):
    """flow (H, W, 2) -> the median over 3 x 3 pixels, of x and of y by itself."""
    padded = np.pad(flow, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = flow.shape[:2]
    shifted = []
    for row in range(3):
        for column in range(3):
            shifted.append(padded[row : row + height, column : column + width])
    return np.median(shifted, 0)
