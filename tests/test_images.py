"""lib/images.py: sizes, resampling and patches, held against the library's own image processor."""

import numpy as np
import pytest
import torch
from helpers import draw_image, refused, write_config
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.images import MEAN, STD, frame_sizes, image_size, load_patches, patch_grid, patchify


def vision_config(folder, patch, low=196, high=3136):
    config = Qwen2_5_VLConfig.from_pretrained(write_config(folder / "config.json", patch_size=patch))
    config.min_pixels, config.max_pixels = low, high
    return config


def library(image, patch, low, high):
    """The library's PIL image processor -> patches, grid."""
    size = {"shortest_edge": low, "longest_edge": high}
    out = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)(
        images=[image], return_tensors="pt"
    )
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("patch, low, high", [(14, 784, 256 * 784), (7, 196, 3136)])
@pytest.mark.parametrize("size", [(56, 42), (61, 47), (30, 75), (9, 13), (28, 28), (100, 20)])
def test_patches_equal_the_library_processor(tmp_path, patch, low, high, size):
    draw_image(tmp_path / "a.png", np.random.default_rng(size[0]), size)
    image = Image.open(tmp_path / "a.png")
    patches, grid = load_patches([tmp_path / "a.png"], vision_config(tmp_path, patch, low, high))
    theirs, their_grid = library(image, patch, low, high)
    assert grid == their_grid and patches.dtype == torch.float32
    assert torch.allclose(patches, theirs, atol=1e-6)


def test_large_frames_shrink_as_in_the_release(tmp_path):
    """200 x 150 at 3136 pixels: sqrt(3136 / 30000) = 0.323 gives 64.7 x 48.5, in whole 14s 56 x 42."""
    config = vision_config(tmp_path, 7)  # 196 to 3136 pixels, tokens of 14
    assert frame_sizes((200, 150), config) == ((56, 42), (56, 42))
    assert frame_sizes((150, 200), config) == ((42, 56), (42, 56))
    assert frame_sizes((56, 56), config) == ((56, 56), (56, 56))
    assert frame_sizes((57, 56), config)[0] == (56, 42)  # 0.991 · (57, 56) = (56.5, 55.5)
    assert frame_sizes((4000, 10), config)[0] == (1106, 14)


def test_large_frames_are_lanczos_then_as_the_library(tmp_path):
    draw_image(tmp_path / "a.png", np.random.default_rng(0), (200, 150))
    image = Image.open(tmp_path / "a.png")
    patches, grid = load_patches([tmp_path / "a.png"], vision_config(tmp_path, 7))
    theirs, their_grid = library(image.resize((56, 42), Image.Resampling.LANCZOS), 7, 196, 3136)
    assert grid == their_grid == (1, 6, 8)
    assert torch.allclose(patches, theirs, atol=1e-6)
    bicubic, _ = library(image.resize((56, 42), Image.Resampling.BICUBIC), 7, 196, 3136)
    assert not torch.allclose(patches, bicubic, atol=1e-2)


def test_patch_order_and_pairs_by_hand():
    """4 x 4 patches of one grey each: merge windows of 2 x 2 stand together; two frames share a row."""
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4).repeat(7, axis=0).repeat(7, axis=1)  # (28, 28)
    first = np.stack([grey, grey + 20, grey + 40], axis=-1)
    second = first + 100
    third = first + 60
    patches, grid = patchify(np.stack([first, second, third]), 7, 2, 2)
    assert grid == (2, 4, 4) and patches.shape == (32, 3 * 2 * 49)
    mean, std = np.array(MEAN).reshape(3, 1), np.array(STD).reshape(3, 1)
    grey_back = patches.reshape(2, 16, 3, 2, 49).numpy() * std[:, :, None] + mean[:, :, None]
    assert np.ptp(grey_back, axis=-1).max() < 1e-6  # one grey a patch
    values = np.rint(grey_back[..., 0] * 255).astype(int)  # (pair, patch, channel, frame of the pair)
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert values[0, :, 0, 0].tolist() == order
    assert (values[0, :, 1] - values[0, :, 0] == 20).all() and (values[0, :, 2] - values[0, :, 0] == 40).all()
    assert (values[0, ..., 1] - values[0, ..., 0] == 100).all()  # second frame of the pair
    assert (values[1, ..., 0] - values[0, ..., 0] == 60).all()  # third frame
    assert (values[1, ..., 1] == values[1, ..., 0]).all()  # an odd last frame is repeated


def test_frames_of_a_video_have_the_first_ones_size(tmp_path):
    rng = np.random.default_rng(0)
    draw_image(tmp_path / "a.png", rng, (56, 42))
    draw_image(tmp_path / "b.png", rng, (28, 42))
    patches, grid = load_patches([tmp_path / "a.png", tmp_path / "b.png"], vision_config(tmp_path, 7))
    assert grid == (1, 6, 8) and patches.shape == (48, 294)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [(56, 42), (61, 47), (9, 13), (200, 150)])
def test_the_grid_is_known_from_the_first_size_alone(tmp_path, size, count):
    path = tmp_path / "a.png"
    draw_image(path, np.random.default_rng(0), size)
    config = vision_config(tmp_path, 7)
    assert image_size(path, "rows.jsonl:3") == size
    patches, grid = load_patches([path] * count, config)
    assert patch_grid([path] * count, config) == grid and len(patches) == np.prod(grid)


@pytest.mark.parametrize("content", ["", "no image", "cut.jpg", "cut.png"])
def test_an_unreadable_image_is_refused(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_text(content)
    if content.startswith("cut"):
        draw_image(tmp_path / content, np.random.default_rng(0))
        path.write_bytes((tmp_path / content).read_bytes()[:400])
    config = vision_config(tmp_path, 7)
    refused(lambda: load_patches([path], config, "rows.jsonl:3"), "rows.jsonl:3: ", "a.jpg")
    if not content.startswith("cut"):  # the size stands at the beginning of the file
        refused(lambda: patch_grid([path], config, "rows.jsonl:3"), "rows.jsonl:3: ", "a.jpg")
