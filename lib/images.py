"""Image files to the patches that Qwen2.5-VL reads; tested against the library's own processor."""

import math

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lib.command_line import exit_with
from lib.pictures import BadImage, open_header, open_image, read_orientation

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's channel means, as Qwen2.5-VL was trained
STD = (0.26862954, 0.26130258, 0.27577711)


def frame_sizes(size, config, name="A frame"):
    """(width, height) of a frame after the release's step and after the library's smart_resize.

    Release: a frame of more than max_pixels is scaled down to them, its sides floored to whole tokens. Exits,
    with the frame's name, on sides that the library refuses: one more than 200 times the other.
    """
    original = size
    factor = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    scale = math.sqrt(config.max_pixels / math.prod(size))
    if scale < 1:
        size = tuple(max(factor, int(side * scale) // factor * factor) for side in size)
    width, height = size
    try:
        smart_height, smart_width = smart_resize(height, width, factor, config.min_pixels, config.max_pixels)
    except ValueError:
        shape = f"{original[0]} x {original[1]} pixels"
        exit_with(f"{name} has {shape}, too thin to be read; crop it, or drop the row.")
    return size, (smart_width, smart_height)


def patchify(frames, patch, merge, pair):
    """Frames (n, H, W, 3) uint8 -> patches (P, 3·pair·patch²) float32 in merge order, grid (t, h, w).

    One image, or an odd last frame, is repeated to fill its pair. Patches of one merge window stand together:
    with merge 2 the rows are (0,0) (0,1) (1,0) (1,1) of the first window, then of the next one to the right.
    """
    frames = frames.astype(np.float32) * (1 / 255)
    frames = (frames - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    missing = -len(frames) % pair
    frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])  # (t·pair, H, W, 3)
    t = len(frames) // pair
    h, w = frames.shape[1] // patch, frames.shape[2] // patch
    x = frames.reshape(t, pair, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/m, w/m, m, m, 3, pair, patch, patch)
    patches = np.ascontiguousarray(x).reshape(t * h * w, -1)
    return torch.from_numpy(patches), (t, h, w)


def image_size(path, source):
    """(width, height) of an image file as it is shown, without decoding it; exits on a bad one."""
    try:
        with open_header(path) as image:
            width, height = image.size
            is_turned = read_orientation(image) in (5, 6, 7, 8)
    except BadImage as error:
        exit_with(f"{source}: {error}; make it again or drop the row.")
    return (height, width) if is_turned else (width, height)


def load_patches(paths, config, source=""):
    """Files of one video or overlay -> patches (P, 3·pair·patch²), grid (t, h, w); exits on a bad file.

    Lanczos where a frame is too large (release), then bicubic (library); all get the size of the first.
    """
    images = [open_image(path, source) for path in paths]
    release_size, smart_size = frame_sizes(images[0].size, config, f"{source}: {paths[0]}")
    images = [resized(image, release_size, Image.Resampling.LANCZOS) for image in images]
    images = [resized(image, smart_size, Image.Resampling.BICUBIC) for image in images]
    frames = np.stack([np.asarray(image) for image in images])
    vision = config.vision_config
    return patchify(frames, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


def resized(image, size, filter):
    """The image at a size; itself where it has that size."""
    return image if image.size == size else image.resize(size, filter)


def patch_grid(paths, config, source=""):
    """Patches (t, h, w) of a video's frames from the size of the first file alone."""
    vision = config.vision_config
    size = image_size(paths[0], source)
    _, (width, height) = frame_sizes(size, config, f"{source}: {paths[0]}")
    t = math.ceil(len(paths) / vision.temporal_patch_size)
    return t, height // vision.patch_size, width // vision.patch_size
