"""model.py: command line, rows, pixels, positions, samples, the forward pass, generation, checkpoints."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import N, draw_image, lively, make_world, refused, write_config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model as model_py
from assets import faster
from model import Images, checkpoint_layers, collate, encode_row, frame_sizes, generate, load_images
from model import init_distributed, load_model
from model import (
    load_optimizer,
    newest_checkpoint,
    pair_seconds,
    parse_constant,
    patchify,
    pick,
    pool_latents,
    read_rows,
)
from model import TiedTable, rope_positions, save_checkpoint, set_constants, token_logps


@pytest.fixture(scope="module")
def rows(tiny):
    return read_rows(tiny / "data" / "train_imagery.jsonl")


@pytest.fixture(scope="module")
def model(tiny):
    """The lively network; tests that change it make their own."""
    return lively(tiny)


def batch_of(model, rows, cache=False, **how):
    """Rows -> the batch that the forward pass takes."""
    return Images(model, cache).add(
        collate([encode_row(model, row, **how) for row in rows], model.ids["pad"])
    )


# ---------------------------------------------------------------- constants on the command line


def constants(*words):
    space = {
        "MODEL": "a",
        "STEPS": 10,
        "LR": 1e-3,
        "CLIP": 1.0,
        "CACHE": True,
        "PIXELS": None,
        "SIZES": (1, 2),
    }
    space |= {"lower": 3, "TABLE": {"a": 1}, "json": json}
    return set_constants(space, words), space


def test_constants_take_the_type_of_their_default():
    got, space = constants("MODEL=7", "STEPS=20", "LR=5", "CLIP=.5", "CACHE=False", "PIXELS=8", "SIZES=[3,4]")
    assert got == {
        "MODEL": "7",
        "STEPS": 20,
        "LR": 5.0,
        "CLIP": 0.5,
        "CACHE": False,
        "PIXELS": 8,
        "SIZES": (3, 4),
    }
    assert type(got["LR"]) is float and type(got["SIZES"]) is tuple
    assert space["STEPS"] == 20 and space["lower"] == 3
    assert constants("MODEL=a=b")[0]["MODEL"] == "a=b"
    assert constants("MODEL=")[0]["MODEL"] == ""
    assert constants("PIXELS=None")[0]["PIXELS"] is None
    assert constants()[0]["SIZES"] == (1, 2)


@pytest.mark.parametrize(
    "word",
    ["STEPS=1.5", "STEPS=ten", "STEPS=True", "STEPS=", "STEPS=1e3", "LR=fast", "LR=True"]
    + ["CACHE=1", "CACHE=yes", "SIZES=3", "SIZES=__import__('os')", "PIXELS=8*8", "PIXELS=words"],
)
def test_a_value_of_another_type_is_refused(word):
    name = word.split("=")[0]
    refused(lambda: constants(word), word, type(constants()[0][name]).__name__)


@pytest.mark.parametrize("word", ["MICRO_BATCH=0", "MICRO_BATCH=-1"])
def test_a_batch_of_nothing_is_refused(word):
    refused(lambda: set_constants({"MICRO_BATCH": 4}, [word]), word, "1 or more")
    name, value = word.split("=")
    refused(lambda: set_constants({name: int(value)}, []), word, "1 or more")  # edited at the top


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused(init_distributed, "--nproc_per_node", "1 GPUs")


@pytest.mark.parametrize("word, near", [("STEP=3", "STEPS"), ("steps=3", "STEPS"), ("PIXEL=1", "PIXELS")])
def test_an_unknown_constant_names_the_nearest(word, near):
    refused(lambda: constants(word), word.split("=")[0], f"nearest is {near},")


@pytest.mark.parametrize("word", ["STEPS", "--STEPS", "-h"])
def test_a_word_without_a_value_is_refused(word):
    refused(lambda: constants(word), f"'{word}'", "KEY=value")


@pytest.mark.parametrize("word", ["lower=3", "TABLE=3", "json=3"])
def test_only_constants_can_be_set(word):
    refused(lambda: constants(word), "no constant")


def test_parse_constant_reads_literals_only():
    assert parse_constant("X", "(1, 2)", (0, 0)) == (1, 2)
    refused(lambda: parse_constant("X", "open('x')", None), "X=open('x')", "int or float")


# ---------------------------------------------------------------- rows


def raw_row(**changes):
    row = {
        "id": "a",
        "text_input": "How?\n\nA. Left\nB. Right",
        "text_output": "<output_image> <answer>B. x</answer>",
    }
    row |= {
        "image_input": ["c/frames/0.jpg", "c/frames/1.jpg"],
        "image_output": ["c/o/0.jpg"],
        "times": [0, 1.5],
    }
    row |= changes
    return {name: value for name, value in row.items() if value != "absent"}


def read(folder, *raws):
    """Writes rows beside three images and reads them; a string is written as it is."""
    rng = np.random.default_rng(0)
    for name in ("c/frames/0.jpg", "c/frames/1.jpg", "c/o/0.jpg"):
        draw_image(folder / name, rng)
    lines = [raw if isinstance(raw, str) else json.dumps(raw) for raw in raws]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return read_rows(folder / "rows.jsonl")


def test_a_dift_row(tmp_path):
    row = read(tmp_path, raw_row())[0]
    assert row == {
        "id": "a",
        "where": f"{tmp_path}/rows.jsonl:1",
        "text_input": "How?\n\nA. Left\nB. Right",
        "text_output": "<output_image> <answer>B. x</answer>",
        "image_input": [f"{tmp_path}/c/frames/0.jpg", f"{tmp_path}/c/frames/1.jpg"],
        "image_output": [f"{tmp_path}/c/o/0.jpg"],
        "times": [0.0, 1.5],
        "subtask": "all",
        "clip": "c",
        "key": "B",
        "options": {"A": "Left", "B": "Right"},
        "video": "",
    }


def test_a_row_of_the_release_has_one_frame_a_second(tmp_path):
    row = read(tmp_path, raw_row(times="absent", id="absent"))[0]
    assert row["times"] == [0.0, 1.0] and row["id"] == row["where"]


def test_a_4drl_row(tmp_path):
    raw = {
        "Type": "abs_dir",
        "Question": "Where?",
        "A": "Left",
        "B": "B. Right",
        "C": "C) Up",
        "D": "A. Down",
    }
    raw |= {"Correct": "C", "video_path": "/x/y.mp4", "frame_paths": ["c/frames/0.jpg"], "times": [4]}
    row = read(tmp_path, raw, raw | {"E": "", "F": None, "D": 5})[0]
    assert row["text_input"] == "Where?\n\nA. Left\nB. Right\nC. Up\nD. A. Down"  # its own letter alone goes
    assert row["options"] == {"A": "Left", "B": "Right", "C": "Up", "D": "A. Down"}
    assert (row["subtask"], row["key"], row["text_output"]) == ("abs_dir", "C", "")
    assert (row["image_output"], row["times"], row["clip"]) == ([], [4.0], "c")
    assert row["image_input"] == [f"{tmp_path}/c/frames/0.jpg"]
    assert read_rows(tmp_path / "rows.jsonl")[1]["options"]["D"] == "5"


def test_a_4drl_row_may_name_only_a_video(tmp_path):
    """Relative paths count from the file, others stay; frames, if there are any, come first."""
    raw = {"Question": "?", "A": "x", "Correct": "A", "video_path": "v/abc_11.mp4"}
    framed = raw | {"frame_paths": ["c/frames/0.jpg"]}
    rows = read(tmp_path, raw, raw | {"video_path": "/x/y.mp4"}, framed)
    assert [row["video"] for row in rows] == [f"{tmp_path}/v/abc_11.mp4", "/x/y.mp4", ""]
    assert [row["clip"] for row in rows] == ["abc_11", "y", "c"] and rows[0]["image_input"] == []


@pytest.mark.parametrize(
    "name", ["{here}/c/o/0.jpg", "c/o/0.jpg", "./c/o/0.jpg", "./data/c/o/0.jpg", "data/c/o/0.jpg"]
)
def test_paths_are_found(tmp_path, name):
    row = read(tmp_path, raw_row(image_output=[name.format(here=tmp_path)]))[0]
    assert Image.open(row["image_output"][0]).size == (56, 42)


def test_a_path_counts_from_the_working_folder_first(tmp_path, monkeypatch):
    draw_image(tmp_path / "elsewhere" / "c" / "o" / "0.jpg", np.random.default_rng(1))
    monkeypatch.chdir(tmp_path / "elsewhere")
    row = read(tmp_path, raw_row())[0]
    assert row["image_output"] == [f"{tmp_path}/elsewhere/c/o/0.jpg"]
    assert row["image_input"][0] == f"{tmp_path}/c/frames/0.jpg"


@pytest.mark.parametrize(
    "bad, words",
    [
        ('{"id": "a",', "not valid JSON"),
        ("[1, 2]", "JSON object"),
        (raw_row(text_input="absent"), "'text_input'"),
        (raw_row(text_output=None), "'text_output'"),
        (raw_row(image_input="c/frames/0.jpg"), "'image_input'"),
        (raw_row(image_output="absent"), "'image_output'"),
        (raw_row(image_output=[]), "text_output has 1 <output_image>, image_output 0 files"),
        (raw_row(image_output=["c/o/0.jpg"] * 2), "text_output has 1 <output_image>, image_output 2 files"),
        (raw_row(image_output=["c/o/9.jpg"]), "no file c/o/9.jpg"),
        (raw_row(image_input=["c/frames/0.jpg", "c/frames"]), "no file c/frames"),
        (raw_row(image_input=["c/frames/0.jpg", 5]), "5"),
        (raw_row(times=[0, 1, 2]), "3 times for 2 frames"),
        (raw_row(times=[0, "late"]), "times"),
        (raw_row(times=[1, 0]), "times"),
        (raw_row(times=3), "times"),
        ({"Question": "?", "A": "x", "Correct": "B", "frame_paths": ["c/o/0.jpg"]}, "'Correct' is 'B'"),
        ({"Question": "?", "A": "x", "frame_paths": ["c/o/0.jpg"]}, "'Correct' is None"),
        ({"Question": "?", "A": "x", "Correct": "A", "video_path": ""}, "frame_paths"),
    ],
)
def test_a_malformed_row_is_named_by_its_place(tmp_path, bad, words):
    refused(lambda: read(tmp_path, raw_row(), "", bad, raw_row()), f"{tmp_path}/rows.jsonl:3: ", words)


def test_bytes_that_are_no_text_are_named_by_their_place(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"id": "\xff"}\n')
    refused(lambda: read_rows(tmp_path / "rows.jsonl"), "rows.jsonl:2: not valid JSON")


def test_a_line_ends_where_the_file_says(tmp_path):
    """U+2028 within a text is no end of a line."""
    text = json.dumps(raw_row(text_input="one\u2028two"), ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(text + "\n", encoding="utf-8")
    read(tmp_path, raw_row())  # makes the images
    (tmp_path / "rows.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl")[0]["text_input"] == "one\u2028two"


def test_missing_and_empty_files_are_refused(tmp_path):
    refused(lambda: read_rows(tmp_path / "none.jsonl"), "none.jsonl", "DATA")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(lambda: read_rows(tmp_path / "empty.jsonl"), "no rows")


def test_limit_reads_a_prefix(tmp_path):
    read(tmp_path, raw_row(id="a"), raw_row(id="b"), raw_row(id="c"))
    assert [row["id"] for row in read_rows(tmp_path / "rows.jsonl", 2)] == ["a", "b"]


# ---------------------------------------------------------------- pixels


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
    patches, grid = load_images([tmp_path / "a.png"], vision_config(tmp_path, patch, low, high))
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
    patches, grid = load_images([tmp_path / "a.png"], vision_config(tmp_path, 7))
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
    mean, std = np.array(model_py.MEAN).reshape(3, 1), np.array(model_py.STD).reshape(3, 1)
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
    patches, grid = load_images([tmp_path / "a.png", tmp_path / "b.png"], vision_config(tmp_path, 7))
    assert grid == (1, 6, 8) and patches.shape == (48, 294)


@pytest.mark.parametrize("content", ["", "no image", "cut.jpg", "cut.png"])
def test_an_unreadable_image_is_refused(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_text(content)
    if content.startswith("cut"):
        draw_image(tmp_path / content, np.random.default_rng(0))
        path.write_bytes((tmp_path / content).read_bytes()[:400])
    refused(
        lambda: load_images([path], vision_config(tmp_path, 7), "rows.jsonl:3"), "rows.jsonl:3: ", "a.jpg"
    )


# ---------------------------------------------------------------- positions and pooling


def test_positions_of_text_alone():
    assert rope_positions([4], 2).tolist() == [[0, 1, 2, 3]] * 3


def test_positions_of_one_video_by_hand():
    """Two words; two pairs of 2 x 3 tokens at 0 s and 1.5 s, 2 positions a second; three words."""
    table = rope_positions([2, ([0.0, 1.5], 2, 3), 3], 2)
    assert table.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5, 6, 7, 8],
        [0, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3, 6, 7, 8],
        [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 6, 7, 8],
    ]


def test_positions_of_uneven_seconds_are_floored():
    """0.9 s · 2 = 1.8 -> 1, 2.25 s -> 4, 7 s -> 14: text goes on at 15 + 1."""
    table = rope_positions([1, ([0.0, 0.9, 2.25, 7.0], 1, 1), 1], 2)
    assert table[0].tolist() == [0, 1, 2, 5, 15, 16]
    assert table[1:].tolist() == [[0, 1, 1, 1, 1, 16]] * 2
    assert rope_positions([([0.0, 0.7 - 0.2], 1, 1)], 2)[0].tolist() == [0, 1]  # 0.49999999999999994 s


def test_text_goes_on_after_the_widest_place():
    """One pair of 2 x 5 tokens: the largest position is the width's, 4."""
    assert rope_positions([([0.0], 2, 5), 2], 2)[:, -2:].tolist() == [[5, 6]] * 3
    assert rope_positions([0, ([0.0], 1, 2), 0, 1], 2)[2].tolist() == [0, 1, 2]  # no text around it
    assert rope_positions([([0.0], 5, 2), 2], 2)[:, -2:].tolist() == [[5, 6]] * 3


def test_positions_of_two_videos_by_hand():
    """One word, one pair of 1 x 2, one word, two pairs of 2 x 1 half a second apart, two words."""
    table = rope_positions([1, ([0.0], 1, 2), 1, ([0.0, 0.5], 2, 1), 2], 2)
    assert table.tolist() == [
        [0, 1, 1, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 1, 3, 4, 5, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 4, 4, 4, 6, 7],
    ]


def test_seconds_of_pairs():
    times = [3.0, 4.0, 5.5, 7.0, 9.0]
    assert pair_seconds(times) == [0.0, 2.5, 6.0]
    assert pair_seconds(times, 2, 1.0) == [0.0, 1.0, 2.0]
    assert pair_seconds(times, 2, 2.0) == [0.0, 2.0, 4.0]
    assert pair_seconds(times, 1) == [0.0, 1.0, 2.5, 4.0, 6.0]


@pytest.mark.parametrize("step, last", [(None, 5), (1.0, 2), (2.0, 4)])
def test_a_row_gets_its_positions_from_its_seconds(tiny, rows, step, last):
    """Four frames at 0, 1, 2.5 and 4 s: the second pair of 3 x 4 tokens starts 5 positions on."""
    model = load_model(tiny / "base", K=4, pooling="grid", seconds_per_pair=step)
    sample = encode_row(model, rows[0])
    visual = sample["positions"][:, sample["is_visual"]]
    before = int(sample["is_visual"].nonzero()[0])
    assert sample["positions"][:, :before].tolist() == [list(range(before))] * 3
    assert (visual[0] - before).tolist() == [0] * N + [last] * N
    assert (visual[1] - before).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4
    assert (visual[2] - before).tolist() == [0, 1, 2, 3] * 6
    after = before + max(last, 3) + 1
    rest = sample["positions"][:, before + 2 * N :]
    assert rest.tolist() == [list(range(after, after + rest.shape[1]))] * 3


def test_strips_are_contiguous_and_the_first_take_the_rest():
    x = torch.arange(7.0)[:, None]
    assert pool_latents(x, 3)[:, 0].tolist() == [1.0, 3.5, 5.5]  # 0 1 2 | 3 4 | 5 6
    assert pool_latents(x, 1)[:, 0].tolist() == [3.0]
    assert pool_latents(x, 7)[:, 0].tolist() == list(range(7))
    x = torch.randn(12, 5)
    assert torch.allclose(pool_latents(x, 4, "strips", (3, 4)), x.view(4, 3, 5).mean(dim=1))


def test_grid_keeps_both_axes():
    """3 x 4 tokens into 2 x 2 sets: rows 0-1 and 2, columns 0-1 and 2-3."""
    x = torch.arange(12.0)[:, None]
    assert pool_latents(x, 4, "grid", (3, 4))[:, 0].tolist() == [2.5, 4.5, 8.5, 10.5]
    assert pool_latents(x, 2, "grid", (3, 4))[:, 0].tolist() == [4.5, 6.5]  # wide: left and right
    assert pool_latents(x, 2, "grid", (4, 3))[:, 0].tolist() == [2.5, 8.5]  # tall: top and bottom
    assert pool_latents(x, 6, "grid", (3, 4)).shape == (6, 1)  # 2 x 3
    assert pool_latents(x, 12, "grid", (3, 4))[:, 0].tolist() == list(range(12))


def test_too_few_tokens_are_refused():
    refused(lambda: pool_latents(torch.zeros(3, 5), 4), "3 visual tokens", "K=4")
    refused(lambda: pool_latents(torch.zeros(12, 5), 5, "grid", (3, 4)), "3 x 4 tokens into 1 x 5")


# ---------------------------------------------------------------- samples


def full_text(model, row, answer=True):
    """A row as one string: with pads in place of the video and the latents."""
    video = "<|vision_start|>" + "<|video_pad|>" * 2 * N + "<|vision_end|>" if row["image_input"] else ""
    prompt = f"{video}{row['text_input']}{model.net.config.prompt_suffix}"
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text += f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant"
    if not answer:
        return text
    block = "<|latent_start|>" + "<|latent_pad|>" * model.K + "<|latent_end|>"
    return text + "\n" + row["text_output"].replace("<output_image>", block) + "<|im_end|>"


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("video", [True, False])
def test_pieces_tokenise_like_the_whole(model, rows, answer, video):
    for row in rows[:3]:
        row = row if video else row | {"image_input": [], "times": []}
        sample = encode_row(model, row, answer=answer)
        assert sample["ids"].tolist() == model.tok(full_text(model, row, answer))["input_ids"]


def test_masks_of_a_sample(model, rows):
    sample = encode_row(model, rows[2])  # three overlays
    text = full_text(model, rows[2]).split("<|im_start|>assistant")[1]
    assert text.startswith("\n<think>") and text.endswith("<|im_end|>")
    spoken = model.tok.decode(sample["ids"][sample["is_text"]])
    assert spoken == text.replace("<|latent_pad|>", "")  # delimiters and the first newline are supervised
    assert (sample["ids"][sample["is_latent"]] == model.ids["latent_pad"]).all()
    assert sample["is_latent"].sum() == 3 * model.K and sample["is_visual"].sum() == 2 * N
    assert not (sample["is_text"] & sample["is_latent"]).any() and sample["is_real"].all()
    starts = (sample["ids"] == model.ids["latent_start"]).nonzero()[:, 0]
    for start in starts:
        assert sample["is_latent"][start : start + model.K + 2].tolist() == [False] + [True] * model.K + [
            False
        ]
        assert sample["ids"][start + model.K + 1] == model.ids["latent_end"]
    assert len(starts) == 3
    prompt = len(encode_row(model, rows[2], answer=False)["ids"])
    assert not sample["is_text"][:prompt].any() and not sample["is_latent"][:prompt].any()
    assert (sample["is_text"] | sample["is_latent"])[prompt:].all()
    assert sample["overlays"] == tuple(rows[2]["image_output"])
    assert sample["video"] == tuple(rows[2]["image_input"])


def test_a_prompt_is_the_beginning_of_its_sample_and_ends_in_assistant(model, rows):
    sample, prompt = encode_row(model, rows[1]), encode_row(model, rows[1], answer=False)
    length = len(prompt["ids"])
    for name in ("ids", "positions", "is_visual", "is_latent", "is_text"):
        assert torch.equal(prompt[name], sample[name][..., :length]), name
    assert model.tok.decode(prompt["ids"]).endswith("<|im_end|>\n<|im_start|>assistant")
    assert prompt["overlays"] == () and not prompt["is_text"].any()


QWEN_TEMPLATE = (  # of Qwen2.5-VL's own tokenizer, less its numbering of pictures
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE])
def test_the_prompt_equals_the_chat_template(model, rows, template):
    text = rows[0]["text_input"] + model.net.config.prompt_suffix
    content = [{"type": "video", "video": "x"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if template is None:  # the tiny base's own template has no default system turn
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    how = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
    theirs = model.tok.apply_chat_template(messages, **how)
    ours = model.tok.decode(encode_row(model, rows[0], answer=False)["ids"])
    assert re.sub(r"(<\|video_pad\|>)+", "<|video_pad|>", ours) + "\n" == theirs


def test_collate_pads_either_side():
    def sample(n):
        one = {
            name: torch.ones(n, dtype=torch.bool) for name in ("is_text", "is_latent", "is_visual", "is_real")
        }
        return one | {
            "ids": torch.arange(1, n + 1),
            "positions": torch.arange(n).expand(3, -1) + 5,
            "video": (f"v{n}",),
            "overlays": (f"o{n}", "o"),
            "where": f"rows:{n}",
        }

    right, left = (collate([sample(3), sample(2)], 99, side) for side in ("right", "left"))
    assert right["ids"].tolist() == [[1, 2, 3], [1, 2, 99]]
    assert left["ids"].tolist() == [[1, 2, 3], [99, 1, 2]]
    for name in ("is_text", "is_latent", "is_visual", "is_real"):
        assert right[name].int().tolist() == [[1, 1, 1], [1, 1, 0]], name
        assert left[name].int().tolist() == [[1, 1, 1], [0, 1, 1]], name
    assert right["positions"].shape == (3, 2, 3)
    assert right["positions"][0].tolist() == [[5, 6, 7], [5, 6, 0]]
    assert left["positions"][2].tolist() == [[5, 6, 7], [0, 5, 6]]
    assert right["videos"] == [("v3",), ("v2",)] and right["overlays"] == [("o3",), ("o",), ("o2",), ("o",)]


# ---------------------------------------------------------------- vision


@pytest.mark.parametrize("sizes, windows", [([(56, 56), (28, 56)], {16}), ([(56, 42), (42, 70)], {4, 8, 16})])
def test_windowed_attention_equals_the_library(tiny, tmp_path, sizes, windows):
    """Windows of equal and of unequal length: outputs and gradients of the whole visual encoder."""
    model, rng, lengths = lively(tiny), np.random.default_rng(0), []
    loaded = []
    for index, size in enumerate(sizes):
        draw_image(tmp_path / f"{index}.png", rng, size)
        loaded.append(load_images([tmp_path / f"{index}.png"], model.net.config))
    pixels, grids = torch.cat([pixels for pixels, _ in loaded]), [grid for _, grid in loaded]
    visual = model.net.model.visual

    def run(forward):
        for block in visual.blocks:
            block.attn.forward = forward.__get__(block.attn)
        visual.zero_grad()
        features = torch.cat(model.encode(pixels, grids))
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        return features.detach(), [weight.grad.clone() for weight in visual.parameters()]

    def spied(self, hidden_states, cu_seqlens, *args, **kwargs):
        lengths.append(cu_seqlens.diff().tolist())
        return Qwen2_5_VLVisionAttention.forward(self, hidden_states, cu_seqlens, *args, **kwargs)

    theirs, their_grads = run(spied)
    ours, our_grads = run(model_py.windowed_attention)
    assert (
        set(lengths[0]) == windows and lengths[0] != lengths[1]
    )  # a layer of windows, a layer of whole images
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert max(grad.abs().max() for grad in their_grads) > 0.1
    for mine, grad in zip(our_grads, their_grads):
        assert torch.allclose(mine, grad, atol=1e-5 * max(1, grad.abs().max().item()))


def test_features_of_several_images_equal_those_of_each(model, rows):
    items = [tuple(rows[0]["image_input"]), (rows[0]["image_output"][0],), tuple(rows[1]["image_input"][:3])]
    loaded = [load_images(item, model.net.config) for item in items]
    together = model.encode(torch.cat([pixels for pixels, _ in loaded]), [grid for _, grid in loaded])
    for features, (pixels, grid) in zip(together, loaded):
        alone = model.net.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
        assert torch.allclose(features, alone, atol=1e-5)


def spy(monkeypatch, module, name="forward"):
    """Records the first argument of each call of a module's method."""
    calls, real = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(args[0] if args else kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


def test_vision_runs_once_per_distinct_image(tiny, rows, monkeypatch):
    model = lively(tiny)
    calls = spy(monkeypatch, model.net.model.visual)
    some = [rows[0], rows[4], rows[1], rows[0]]  # clips 0, 0, 1, 0; overlays 0 | 0 1 | 0 1 | 0 of their clip
    model(batch_of(model, some))
    assert [len(pixels) for pixels in calls] == [4 * N * (2 + 2 + 2 + 2)]  # 2 clips of 2 pairs, 4 overlays
    images = Images(model, cache=True)
    for batch in (some, some, rows[:2]):
        model(images.add(collate([encode_row(model, row) for row in batch], 0)))
    assert [len(pixels) for pixels in calls[1:]] == [4 * N * 8]


def test_cached_features_equal_uncached(tiny, rows):
    model, results = lively(tiny), []
    model.net.model.visual.requires_grad_(False)
    for cache in (False, True):
        model.zero_grad()
        logp, imagined, targets = model(batch_of(model, rows[:4], cache))
        (logp.sum() + imagined.sum()).backward()
        results.append([logp, imagined, targets, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) > 20
    for mine, theirs in zip(*results):
        assert torch.allclose(mine, theirs, atol=1e-5 * max(1, theirs.abs().max().item()))


def test_no_gradient_reaches_a_frozen_encoder_and_one_does_in_pretraining(tiny, rows):
    for trainable in (False, True):
        model = lively(tiny)
        model.net.model.visual.requires_grad_(trainable)
        logp, imagined, targets = model(batch_of(model, rows[:2]))
        assert targets.requires_grad is trainable
        logp.sum().backward()
        assert all((weight.grad is not None) is trainable for weight in model.net.model.visual.parameters())


# ---------------------------------------------------------------- the forward pass


def test_teacher_forced_latents_are_the_pooled_overlays(tiny, rows, monkeypatch):
    """Eq. 5 and 6: what stands at latent positions, and what is compared with the states before them."""
    model = lively(tiny)
    inputs = spy(monkeypatch, model.net.model.language_model)
    batch = batch_of(model, rows[:3])
    logp, imagined, targets = model(batch)
    true = []
    for row in rows[:3]:
        for path in row["image_output"]:
            pixels, grid = load_images([path], model.net.config)
            features = model.net.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
            raster = features.view(3, 4, -1)
            sets = [raster[:2, :2], raster[:2, 2:], raster[2:, :2], raster[2:, 2:]]
            true += [part.mean(dim=(0, 1)) for part in sets]
    x, ids = inputs[0]["inputs_embeds"], batch["ids"]
    assert torch.allclose(targets, torch.stack(true), atol=1e-5)
    assert torch.allclose(x[batch["is_latent"]], targets, atol=1e-6)  # fed, in row order
    videos = []
    for row in rows[:3]:
        pixels, grid = load_images(row["image_input"], model.net.config)
        videos.append(model.net.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output)
    assert torch.allclose(x[batch["is_visual"]], torch.cat(videos), atol=1e-5)
    words = ~batch["is_latent"] & ~batch["is_visual"]
    assert torch.equal(x[words], model.net.get_input_embeddings().weight[ids[words]])
    hidden = model.net.model.language_model(**inputs[0] | {"read": None}).last_hidden_state
    places = batch["is_latent"].nonzero().tolist()
    assert torch.allclose(imagined, torch.stack([hidden[b, t - 1] for b, t in places]), atol=1e-5)
    places = batch["is_text"].nonzero().tolist()
    table = torch.stack([hidden[b, t - 1] @ model.net.lm_head.weight.T for b, t in places]).log_softmax(
        dim=-1
    )
    expected = torch.stack([table[n, ids[b, t]] for n, (b, t) in enumerate(places)])
    assert torch.allclose(logp, expected, atol=1e-4)


def test_the_last_layer_is_the_librarys_where_it_is_read(tiny, rows):
    """States and all gradients equal those of the library's layer; its MLP works on no other token."""
    model, results, widths = lively(tiny), [], []
    batch, last = batch_of(model, rows[:3]), model.net.model.language_model.layers[-1]
    x = torch.randn(*batch["ids"].shape, model.net.config.text_config.hidden_size)
    read = batch["is_text"].flatten().nonzero()[:, 0] - 1
    last.mlp.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].numel()))
    for ours in (True, False):
        model.zero_grad()
        entry = x.clone().requires_grad_()
        if ours:
            hidden = model.text(entry, batch["positions"], read=read)
        else:
            del last.forward  # the class's own comes back
            last.forward = lambda hidden_states, read, **how: type(last).forward(last, hidden_states, **how)
            hidden = model.text(entry, batch["positions"]).flatten(0, 1)[read]
        (hidden * torch.arange(len(read))[:, None]).sum().backward()
        weights = dict(model.net.model.language_model.layers.named_parameters())
        results.append([hidden, entry.grad, *(weight.grad for weight in weights.values())])
    assert widths == [len(read) * x.shape[-1], x.numel()] and len(read) < 0.7 * x[..., 0].numel()
    for mine, expected in zip(*results):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_batch_equals_its_rows(model, rows):
    logp, imagined, _ = model(batch_of(model, rows[:4]))
    alone = [model(batch_of(model, [row])) for row in rows[:4]]
    assert torch.allclose(logp, torch.cat([one[0] for one in alone]), atol=1e-4)
    assert torch.allclose(imagined, torch.cat([one[1] for one in alone]), atol=1e-4)


class Wide(TorchDispatchMode):
    """Notes the rows of each result that is as wide as the vocabulary."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.ndim and result.shape[-1] == self.width:
            self.rows.append(result.numel() // self.width)
        return result


def test_the_head_sees_supervised_positions_only(tiny, rows):
    model = lively(tiny)
    batch = batch_of(model, rows[:3])
    with Wide(len(model.net.lm_head.weight)) as wide:
        model(batch)
    supervised, positions = batch["is_text"].sum(), batch["ids"].numel()
    assert supervised in wide.rows and max(wide.rows) == supervised < positions / 2


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("chunk", [512, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_read_and_spoken_from_gets_one_gradient(tied, chunk, half):
    """TiedTable and TargetLogps against autograd's own way; 5000 words, so that there are two blocks."""
    torch.manual_seed(0)
    table, other = (torch.randn(5000, 8, requires_grad=True) for _ in range(2))
    ids, targets = torch.randint(0, 60, (2, 6)), torch.randint(0, 5000, (12,))
    results = []
    for ours in (True, False):
        x, words = TiedTable.apply(table, ids) if ours else (F.embedding(ids, table), table)
        head, hidden = words if tied else other, torch.tanh(x).flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = None if ours else F.linear(hidden, head).float().log_softmax(dim=-1)
            logp = token_logps(hidden, head, targets, chunk=chunk) if ours else logits[range(12), targets]
        (logp * torch.arange(12)).sum().backward()
        results.append([logp, *(x.grad for x in (table, other) if x.grad is not None)])
        table.grad = other.grad = None
    assert len(results[0]) == len(results[1]) == (2 if tied else 3)
    for mine, expected in zip(*results):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine, expected, atol=0.01 * expected.abs().max().item() if half else 1e-4)


@pytest.mark.parametrize("temperature, ban", [(1.0, False), (0.7, True)])
def test_chunked_log_probabilities_equal_the_whole(temperature, ban):
    torch.manual_seed(0)
    head, ids = nn.Linear(16, 50, bias=False), torch.randint(3, 50, (23,))
    banned = torch.tensor([0, 2]) if ban else None
    results = []
    for chunk in (512, 23, 22, 5, 1, 0):
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if chunk:
            logp = token_logps(hidden, head.weight, ids, banned, temperature, chunk)
        else:
            logits = head(hidden) / temperature
            if ban:
                logits[:, [0, 2]] = -math.inf
            logp = logits.log_softmax(dim=-1)[range(23), ids]
        head.zero_grad()
        (logp * torch.arange(23)).sum().backward()
        results.append((logp, hidden.grad, head.weight.grad.clone()))
    for result in results[:-1]:
        for mine, expected in zip(result, results[-1]):
            assert torch.allclose(mine, expected, atol=1e-5)


class Answers(TorchDispatchMode):
    """Notes each operation whose result Python has to know, for which it would wait for a GPU."""

    asked = "_local_scalar_dense nonzero masked_select unique _unique2 unique_consecutive bincount".split()

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.__name__.split(".")[0]
        places = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        by_mask = any(x.dtype == torch.bool for x in places if torch.is_tensor(x))
        self.found += [name] * (name in self.asked or by_mask)
        return call(*args, **(kwargs or {}))


def test_forward_and_backward_do_not_wait_for_the_device(tiny, rows):
    model = lively(tiny)
    batch = Images(model, cache=True).add(
        collate([encode_row(model, row) for row in rows[:3]], model.ids["pad"])
    )
    with Answers() as answers:
        logp, imagined, targets = model(batch)
        (logp.sum() + F.cosine_similarity(imagined, targets, dim=-1).sum()).backward()
    assert answers.found == [] and model.net.get_input_embeddings().weight.grad.abs().sum() > 0
    with Answers() as answers:  # and the test can see it
        logp[logp > 0].sum().item()
    assert answers.found == ["index", "_local_scalar_dense"]


@pytest.mark.parametrize("given", [0, 4, 11, 13])
def test_another_number_of_latents_raises(model, rows, given):
    batch = batch_of(model, rows[:2])  # three overlays
    assert batch["is_latent"].sum() == 12
    with pytest.raises(ValueError, match=f"train_imagery.jsonl:1: 12 latent positions, {given} latents"):
        model(batch, latents=torch.zeros(given, 64))
    model(batch, latents=torch.zeros(12, 64))


def test_imagery_is_never_left_out_silently(model, rows):
    batch = batch_of(model, rows[:1])
    batch["overlay_items"] = []
    with pytest.raises(ValueError, match="4 latent positions, 0 latents"):
        model(batch)


def test_a_stage_without_imagery_takes_rows_with_overlays(tiny, rows):
    """K = 0, as in pretraining: delimiters stay, nothing stands between them, no overlay is encoded."""
    model = load_model(tiny / "base", K=0, pooling="grid")
    for cache in (False, True):
        logp, imagined, _ = model(batch_of(model, rows[:2], cache))
        assert len(imagined) == 0 and torch.isfinite(logp).all()


def test_more_memory_for_less_time_changes_nothing(tiny, rows):
    """Activation checkpointing, in training mode: the same numbers, and the imagery is still there."""
    results = []
    for on in (False, True):
        model = lively(tiny)
        if on:
            checkpoint_layers(model.net)
        model.train()
        logp, imagined, _ = model(batch_of(model, rows[:2]))
        (logp.sum() + imagined.sum()).backward()
        results.append([logp, imagined, model.net.get_input_embeddings().weight.grad])
    for plain, saved in zip(*results):
        assert torch.allclose(plain, saved, atol=1e-5 * max(1, plain.abs().max().item()))


# ---------------------------------------------------------------- generation


MAX_NEW = 26


def bias_head(model, **bonus):
    """Adds to the logits of some tokens; "word" stands for all other ones."""
    bias = torch.full((model.net.lm_head.weight.shape[0],), float(bonus.pop("word", 0)))
    for name, value in bonus.items():
        bias[model.ids[name]] += value
    model.net.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)


@pytest.fixture(scope="module")
def talker(tiny):
    """A network that often imagines and sometimes ends."""
    model = lively(tiny)
    bias_head(model, latent_start=8.0, im_end=7.5)
    return model


def prompts(model, rows):
    """Prompts of different lengths: short and long questions, two clips, three frames, no video."""
    some = [rows[0], rows[1] | {"text_input": "Why is the box red, and where?\n\nA. Pan Left\nB. Left"}]
    some += [rows[2] | {"image_input": rows[2]["image_input"][:3], "times": [0.0, 2.0, 9.5]}]
    some += [rows[3] | {"image_input": [], "times": []}, rows[4], rows[5] | {"text_input": "Where?"}]
    samples = [encode_row(model, row, answer=False) for row in some]
    assert len({len(sample["ids"]) for sample in samples}) >= 4
    return samples


@torch.no_grad()
def slow_generate(model, sample, max_new, temperature=0.0, uniform=None):
    """The reference: one row, no cache, no padding; the whole sequence runs again for each token (Eq. 8)."""
    net, ids = model.net, model.ids
    x = net.get_input_embeddings()(sample["ids"])
    if sample["video"]:
        pixels, grid = load_images(sample["video"], net.config)
        x[sample["is_visual"]] = net.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
    positions = sample["positions"]
    made = {"ids": [], "is_latent": [], "is_sampled": [], "latents": [], "logp": []}
    due = []  # what must come next: latents, then the end
    while len(made["ids"]) < max_new:
        hidden = net.model.language_model(inputs_embeds=x[None], position_ids=positions[:, None])
        hidden = hidden.last_hidden_state[0, -1]
        logits = net.lm_head(hidden)
        logits[[ids["latent_pad"], ids["latent_end"], ids["image_pad"], ids["video_pad"]]] = -math.inf
        logp = (logits / (temperature or 1)).log_softmax(dim=-1)
        kind = due.pop(0) if due else "sampled"
        embedding = None
        if kind == "latent":
            token, embedding = ids["latent_pad"], model.feedback(hidden)
            made["latents"].append(embedding)
        elif kind == "end":
            token = ids["latent_end"]
        elif temperature == 0:
            token = int(logits.argmax())
        else:  # inverse transform: the first token at which the summed probability exceeds the draw
            total = logp.double().exp().cumsum(dim=-1)
            token = int((total <= uniform[len(made["ids"])] * total[-1]).sum())
        if kind == "sampled":
            made["logp"].append(logp[token])
            due = ["latent"] * model.K + ["end"] if token == ids["latent_start"] else []
        made["ids"].append(token)
        made["is_latent"].append(kind == "latent")
        made["is_sampled"].append(kind == "sampled")
        if kind == "sampled" and token == ids["im_end"]:
            break
        embedding = net.get_input_embeddings().weight[token] if embedding is None else embedding
        x = torch.cat([x, embedding[None]])
        positions = torch.cat(
            [positions, positions[:, -1:].amax() + torch.ones(3, 1, dtype=torch.long)], dim=1
        )
    made["cut"] = made["ids"][-1] != ids["im_end"]
    made["latents"] = torch.stack(made["latents"]) if made["latents"] else torch.zeros(0, x.shape[-1])
    return made


def assert_same(mine, theirs):
    """Two answers of one row: tokens and masks equal, latents to 3e-4 (each is made from the one before)."""
    for name in ("ids", "is_latent", "is_sampled", "cut"):
        assert mine[name] == theirs[name], name
    assert mine["latents"].shape == theirs["latents"].shape
    assert torch.allclose(mine["latents"], theirs["latents"], atol=3e-4)


@pytest.fixture(scope="module")
def spoken(talker, rows):
    """(samples, their greedy answers as one batch)."""
    samples = prompts(talker, rows)
    return samples, generate(talker, samples, MAX_NEW)


def test_the_batch_holds_rows_in_every_state(spoken):
    """What the tests below rest on: blocks that start at various steps, rows that end early or are cut."""
    answers = spoken[1]
    length = max(len(answer["ids"]) for answer in answers)
    states = []
    for step in range(length):
        now = [a["is_latent"][step] if step < len(a["ids"]) else None for a in answers]
        states.append(set(now))
    assert sum({True, False} <= state for state in states) >= 5  # inside and outside at once
    assert sum({True, None} <= state for state in states) >= 1  # a row imagines, another has finished
    assert {answer["cut"] for answer in answers} == {True, False}
    assert len({len(answer["ids"]) for answer in answers}) >= 3
    assert sum(len(answer["latents"]) > 4 for answer in answers) >= 2  # several blocks


def test_generation_equals_the_slow_reference(talker, spoken):
    """Cached = uncached, batched = one by one, padded = unpadded."""
    for sample, answer in zip(*spoken):
        assert_same(answer, slow_generate(talker, sample, MAX_NEW))


def test_batched_equals_one_by_one(talker, spoken):
    samples, answers = spoken
    for sample, answer in zip(samples, answers):
        assert_same(generate(talker, [sample], MAX_NEW)[0], answer)
    for answer, reversed_answer in zip(answers, generate(talker, samples[::-1], MAX_NEW)[::-1]):
        assert_same(reversed_answer, answer)


def test_cached_features_do_not_change_an_answer(talker, spoken):
    images = Images(talker, cache=True)
    for _ in range(2):
        for mine, theirs in zip(generate(talker, spoken[0], MAX_NEW, images), spoken[1]):
            assert_same(mine, theirs)


def test_blocks_are_exactly_k_long_and_end_by_force(talker, spoken):
    ids, blocks = talker.ids, 0
    for answer in spoken[1]:
        assert len(answer["ids"]) == len(answer["is_latent"]) == len(answer["is_sampled"])
        for step, token in enumerate(answer["ids"]):
            if token == ids["latent_start"] and step + talker.K + 1 < len(answer["ids"]):
                inside = answer["ids"][step + 1 : step + talker.K + 2]
                assert inside == [ids["latent_pad"]] * talker.K + [ids["latent_end"]]
                blocks += 1
            assert answer["is_latent"][step] == (token == ids["latent_pad"])
            assert answer["is_sampled"][step] == (token not in (ids["latent_pad"], ids["latent_end"]))
        assert len(answer["latents"]) == sum(answer["is_latent"])
        assert answer["text"] == talker.tok.decode(answer["ids"])
        assert answer["text"].count("<|latent_pad|>") == len(answer["latents"])
    assert blocks >= 6


def test_latents_are_the_hidden_states_fed_back(talker, rows, monkeypatch):
    """Eq. 8: the input at a latent position is the output at the position before, elsewhere an embedding."""
    inputs, outputs = [], []
    real = talker.net.model.language_model.forward

    def call(**kwargs):
        out = real(**kwargs)
        inputs.append(kwargs["inputs_embeds"][0, -1])
        outputs.append(out.last_hidden_state[0, -1])
        return out

    monkeypatch.setattr(talker.net.model.language_model, "forward", call)
    answer = generate(talker, [encode_row(talker, rows[0], answer=False)], MAX_NEW)[0]
    table, latents = talker.net.get_input_embeddings().weight, iter(answer["latents"])
    assert sum(answer["is_latent"]) >= 4
    for step, token in enumerate(answer["ids"][:-1]):
        expected = outputs[step] if answer["is_latent"][step] else table[token]
        assert torch.equal(inputs[step + 1], expected)
        if answer["is_latent"][step]:
            assert torch.equal(next(latents), expected)


def test_fed_back_states_take_the_norm_of_the_targets(tiny, rows):
    model = lively(tiny)
    model.net.config.latent_norm = 2.5
    bias_head(model, latent_start=20.0)
    sample = encode_row(model, rows[0], answer=False)
    answer = generate(model, [sample], 12)[0]
    assert len(answer["latents"]) == 8
    assert torch.allclose(answer["latents"].norm(dim=-1), torch.full((8,), 2.5))
    assert_same(answer, slow_generate(model, sample, 12))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_some_ids_are_never_sampled(tiny, rows, temperature):
    model = lively(tiny)
    bias_head(model, latent_pad=30, latent_end=30, image_pad=30, video_pad=30, latent_start=6)
    samples = [encode_row(model, row, answer=False) for row in rows[:3]]
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    answers = generate(model, samples, 20, temperature=temperature, generators=generators)
    banned = {model.ids[name] for name in ("latent_pad", "latent_end", "image_pad", "video_pad")}
    assert banned == set(model.banned.tolist())
    for answer in answers:
        assert not banned & {t for t, sampled in zip(answer["ids"], answer["is_sampled"]) if sampled}


@pytest.mark.parametrize("rows, words", [(1, 1024), (5, 2500), (3, 40)])
def test_the_head_in_blocks_equals_the_whole(rows, words):
    """Blocks of 1,024 words, the last one shorter; where a gradient is asked for it is a plain product."""
    hidden, table = torch.randn(rows, 8), torch.randn(words, 8, requires_grad=True)
    plain = faster.head_logits(hidden, table)
    with torch.no_grad():
        assert torch.allclose(faster.head_logits(hidden, table), hidden @ table.T, atol=1e-6)
    plain.sum().backward()
    assert torch.allclose(table.grad, hidden.sum(dim=0).expand(words, 8))


def test_the_cache_grows_in_place(monkeypatch):
    """The library's keys and values, for prompts and tokens; they move only where room has run out."""
    monkeypatch.setattr(faster, "SPARE", 3)
    ours, theirs = faster.RoomyLayer(), DynamicLayer()
    places = []
    for number, length in enumerate([5, 1, 1, 1, 1, 1, 2, 1, 1]):
        new = torch.rand(2, 2 if number < 3 else 4, 2, length, 4)  # keys and values (B, heads, t, d)
        with torch.no_grad():
            got, true = ours.update(*new), theirs.update(*new)
            places.append(ours.keys.data_ptr())
            if number == 2:  # the prompt's answers, after two tokens: what was written in place is left
                for layer in (ours, theirs):
                    layer.batch_repeat_interleave(2)
        assert all(torch.equal(a, b) for a, b in zip(got, true)), number
        assert ours.get_seq_length() == theirs.get_seq_length() == [5, 6, 7, 8, 9, 10, 12, 13, 14][number]
    moved = [number for number in range(1, 9) if places[number] != places[number - 1]]
    assert moved == [1, 3, 6, 7]


def test_the_cache_keeps_a_graph():
    """A token through which a gradient goes is not written in place."""
    layer, new = faster.RoomyLayer(), torch.rand(3, 1, 2, 1, 4, requires_grad=True)
    for x in new:
        keys, _ = layer.update(x, x)
    keys.pow(2).sum().backward()
    assert torch.equal(new.grad, 2 * new.detach())


def test_the_cut_flag(tiny, rows):
    model = lively(tiny)
    bias_head(model, im_end=60)
    sample = encode_row(model, rows[0], answer=False)
    for max_new in (1, 5):
        answer = generate(model, [sample], max_new)[0]
        assert (answer["ids"], answer["cut"]) == ([model.ids["im_end"]], False)
    model = lively(tiny)
    bias_head(model, latent_start=60)
    for max_new in (1, 3, 5, 6, 8):
        answer = generate(model, [sample], max_new)[0]
        assert answer["cut"] and len(answer["ids"]) == max_new
        assert len(answer["latents"]) == sum(answer["is_latent"])


def test_a_feed_replaces_what_is_fed(talker, rows):
    seen = []

    def feed(hidden, block, k):
        seen.append((hidden, block.tolist(), k.tolist()))
        row = torch.arange(len(hidden))
        return (100 * row + 10 * block + k).float()[:, None].expand_as(hidden)

    samples = prompts(talker, rows)
    answers = generate(talker, samples, MAX_NEW, feed=feed)
    fed = 0
    for row, answer in enumerate(answers):
        marks = answer["latents"][:, 0].tolist()
        assert marks == [100 * row + 10 * (i // talker.K) + i % talker.K for i in range(len(marks))]
        assert answer["latents"].eq(answer["latents"][:, :1]).all()
        fed += len(marks)
    assert fed > 20
    plain = generate(talker, samples, MAX_NEW)
    first = plain[0]["is_latent"].index(True)
    assert answers[0]["ids"][:first] == plain[0]["ids"][:first]  # the same until something else was fed
    assert any(mine["ids"] != theirs["ids"] for mine, theirs in zip(answers, plain))


def test_what_is_fed_at_other_rows_does_not_leak(talker, rows, spoken):
    """A feed that breaks the first row's latents leaves the others as they were."""
    row = max(range(1, len(spoken[1])), key=lambda i: len(spoken[1][i]["latents"]))

    def feed(hidden, block, k):
        return torch.cat([torch.full_like(hidden[:1], 7.0), hidden[1:]])

    answers = generate(talker, spoken[0], MAX_NEW, feed=feed)
    assert answers[0]["latents"].eq(7).all() and len(answers[0]["latents"])
    assert_same(answers[row], spoken[1][row])


def test_generation_in_training_mode_raises(tiny, rows):
    model = lively(tiny).train()
    with pytest.raises(RuntimeError, match="eval"):
        generate(model, [encode_row(model, rows[0], answer=False)], 4)


def test_the_answer_depends_on_the_video(talker, rows):
    """Not blind: another clip's frames, their order, and their times each change what is said or thought."""
    row, other = rows[0], rows[1]
    variants = [
        row,
        row | {"image_input": other["image_input"]},
        row | {"image_input": row["image_input"][::-1]},
    ]
    variants += [row | {"times": [0.0, 1.0, 9.0, 10.0]}, row | {"image_input": [], "times": []}]
    hidden = []
    for variant in variants:
        fed = generate(talker, [encode_row(talker, variant, answer=False)], MAX_NEW)[0]
        hidden.append((tuple(fed["ids"]), fed["latents"].flatten()[:256].tolist()))
    assert len({str(one) for one in hidden}) == len(variants)


# sampling


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sampling_is_a_function_of_the_rows_generator(talker, rows):
    """The same again, alone, in another order, beside other rows: never another answer."""
    samples, seeds = prompts(talker, rows), [11, 12, 13, 14, 15, 16]
    how = {"max_new": 16, "temperature": 0.9}
    answers = generate(talker, samples, **how, generators=generators(*seeds))
    again = generate(talker, samples, **how, generators=generators(*seeds))
    back = generate(talker, samples[::-1], **how, generators=generators(*seeds[::-1]))[::-1]
    for row, answer in enumerate(answers):
        alone = generate(talker, [samples[row]], **how, generators=generators(seeds[row]))[0]
        for other in (again[row], back[row], alone):
            assert_same(other, answer)
    other = generate(talker, samples, **how, generators=generators(*range(6)))
    assert sum(mine["ids"] != theirs["ids"] for mine, theirs in zip(answers, other)) >= 5
    twins = generate(talker, [samples[0]] * 3, **how, generators=generators(1, 2, 1))
    assert twins[0]["ids"] == twins[2]["ids"] != twins[1]["ids"]


def test_sampling_equals_the_slow_reference(talker, rows):
    samples = prompts(talker, rows)[:3]
    answers = generate(talker, samples, 16, temperature=0.8, generators=generators(1, 2, 3))
    for sample, answer, generator in zip(samples, answers, generators(1, 2, 3)):
        uniform = torch.rand(16, generator=generator, dtype=torch.float64)
        assert_same(answer, slow_generate(talker, sample, 16, 0.8, uniform))


LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.0, -math.inf])


def shares(temperature, top_p, n=40000):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pick(LOGITS.expand(n, -1), uniform, temperature, top_p).bincount(minlength=6) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_full_softmax(temperature):
    p = (LOGITS / temperature).softmax(dim=-1)
    assert torch.allclose(shares(temperature, 1.0), p, atol=0.012) and shares(temperature, 1.0)[5] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    p = LOGITS.softmax(dim=-1)  # 0.45, 0.02, 0.27, 0.06, 0.17, 0
    kept = torch.tensor([1.0, 0, 1, 0, 1, 0]) * p
    assert torch.allclose(shares(1.0, 0.8), kept / kept.sum(), atol=0.012)
    assert shares(1.0, 0.8)[[1, 3, 5]].sum() == 0
    assert shares(1.0, 0.1).tolist() == [1, 0, 0, 0, 0, 0]


def test_draws_at_the_ends_give_tokens_that_exist():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([-math.inf, 0.0, 1.0, -math.inf]).expand(2, -1)
    assert pick(logits, ends, 1.0, 1.0).tolist() == [1, 2]
    assert pick(logits, ends, 1.0, 0.99).tolist() == [2, 1]  # sorted, the likelier one first
    assert pick(logits, ends, 0, 1.0).tolist() == [2, 2]


# replay, what 4DRL rests on


@pytest.mark.parametrize("norm", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replayed_log_probabilities_equal_the_samplers(tiny, rows, monkeypatch, norm, temperature):
    """forward over what was sampled, with the latents as they were fed, gives the sampler's own numbers."""
    model, seen = lively(tiny), []
    model.net.config.latent_norm = norm
    with torch.no_grad():
        for name in ("latent_start", "im_end"):  # long rows of the head are drawn more often
            model.net.get_input_embeddings().weight[model.ids[name]] *= 5
    real = model_py.pick

    def recorded(logits, *args):
        token = real(logits, *args)
        seen.append((logits / temperature).log_softmax(dim=-1)[range(len(token)), token])
        return token

    monkeypatch.setattr(model_py, "pick", recorded)
    samples = prompts(model, rows)
    answers = generate(model, samples, MAX_NEW, temperature=temperature, generators=generators(*range(6)))
    replay, expected = [], []
    for row, (sample, answer) in enumerate(zip(samples, answers)):
        n, old = len(answer["ids"]), len(sample["ids"])
        more = {"is_text": torch.tensor(answer["is_sampled"]), "is_latent": torch.tensor(answer["is_latent"])}
        more |= {"ids": torch.tensor(answer["ids"]), "is_visual": torch.zeros(n, dtype=torch.bool)}
        more["is_real"] = ~more["is_visual"]
        more["positions"] = (sample["positions"].max() + 1 + torch.arange(n)).expand(3, -1)
        replay.append(sample | {name: torch.cat([sample[name], x], dim=-1) for name, x in more.items()})
        assert len(replay[-1]["ids"]) == old + n
        expected += [seen[step][row] for step in range(n) if answer["is_sampled"][step]]
    batch = Images(model).add(collate(replay, model.ids["pad"]))
    fed = torch.cat([answer["latents"] for answer in answers])
    assert len(fed) > 10
    logp, imagined, targets = model(batch, latents=fed, ban=True, temperature=temperature)
    assert torch.allclose(logp, torch.stack(expected), atol=1e-4)
    assert torch.equal(targets, fed)
    assert torch.allclose(model.feedback(imagined), fed, atol=1e-4)  # h_{t-1} is what was fed at t
    pads = model.net.get_input_embeddings().weight[[model.ids["latent_pad"]]].expand_as(fed)
    wrong, _, _ = model(batch, latents=pads, ban=True, temperature=temperature)
    assert (wrong - logp).abs().max() > 0.01  # the pitfall would be seen


# ---------------------------------------------------------------- checkpoints


def outputs(model, rows):
    """What a checkpoint must keep: the forward pass of two rows."""
    with torch.no_grad():
        logp, imagined, targets = model(batch_of(model, rows[:2]))
    return torch.cat([logp, imagined.flatten(), targets.flatten()])


def test_a_checkpoint_keeps_weights_and_settings(tiny, rows, tmp_path):
    model = lively(tiny, K=3, pooling="strips", suffix="\nThink hard.", max_pixels=2000, seconds_per_pair=2.0)
    model.net.config.latent_norm = 1.25
    folder = save_checkpoint(tmp_path, 7, model, {"LR": 0.5, "K": 3, "MODEL": "assets/tiny"})
    assert folder == tmp_path / "step_000007"
    again = load_model(tmp_path)
    assert (again.K, again.net.config.latent_pooling, again.net.config.latent_norm) == (3, "strips", 1.25)
    assert again.net.config.prompt_suffix == "\nThink hard."
    assert (again.net.config.max_pixels, again.net.config.seconds_per_pair) == (2000, 2.0)
    assert again.ids == model.ids and not again.training
    for (name, mine), theirs in zip(model.net.state_dict().items(), again.net.state_dict().values()):
        assert torch.equal(mine, theirs), name
    assert torch.equal(outputs(model, rows), outputs(again, rows))
    config = json.loads((folder / "config.json").read_text())
    assert config["run"] == {"LR": 0.5, "K": 3, "MODEL": "assets/tiny", "step": 7}
    assert config["latent_size"] == 3 and config["latent_start_id"] == model.ids["latent_start"]
    changed = load_model(tmp_path, K=3, pooling="strips", suffix="", max_pixels=1500)
    assert changed.net.config.prompt_suffix == "\nThink hard." and changed.net.config.max_pixels == 1500


def test_the_newest_two_checkpoints_stay(tiny, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    for step in (1, 9, 10):
        save_checkpoint(tmp_path, step, model, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000009", "step_000010"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000010"
    assert newest_checkpoint(tmp_path / "step_000009") == tmp_path / "step_000009"
    (tmp_path / ".unfinished_000011").mkdir()
    (tmp_path / "step_000012").mkdir()  # without its config.json it is not one
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000010"
    refused(lambda: newest_checkpoint(tmp_path / "nothing"), "nothing", "MODEL")


def test_moments_come_back(tiny, rows, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    model.net.model.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        logp, _, _ = model(batch_of(model, rows[:2]))
        logp.sum().backward()
        optimizer.step()
    save_checkpoint(tmp_path, 2, model, {}, optimizer)
    again = load_model(tmp_path)
    again.net.model.visual.requires_grad_(False)
    other = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], 0.01)
    load_optimizer(tmp_path / "step_000002", again, other)
    old, new = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert old.keys() == new.keys() and len(new) > 20
    for index in old:
        assert old[index].keys() == new[index].keys()
        assert all(torch.equal(old[index][key], new[index][key]) for key in old[index])
    refused(lambda: load_optimizer(tmp_path, again, other), "optimizer.safetensors", "RESUME=never")


def test_plain_transformers_opens_our_checkpoint(tiny, rows, tmp_path):
    model = lively(tiny)
    folder = save_checkpoint(tmp_path, 1, model, {"LR": 0.1})
    net, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tok = AutoTokenizer.from_pretrained(folder)
    sample = encode_row(model, rows[0])
    assert tok(full_text(model, rows[0]))["input_ids"] == sample["ids"].tolist()
    assert tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        "<|im_start|>user\nHi"
    )
    plain = rows[3] | {"image_input": [], "times": []}
    ids = encode_row(model, plain, answer=False)["ids"]
    theirs = net.eval()(input_ids=ids[None]).logits
    x = model.net.get_input_embeddings()(ids)[None]
    ours = model.net.lm_head(model.text(x, torch.arange(len(ids)).expand(3, 1, -1)))
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert net.lm_head.weight is net.get_input_embeddings().weight


def write_legacy(source, folder):
    """A checkpoint as Qwen2.5-VL's authors wrote it: flat config, `visual.*` and `model.*` keys."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    for name in ("model_type", "layer_types"):
        text.pop(name, None)
    vision = config["vision_config"]
    for name in ("rope_parameters", "model_type", "in_channels"):
        vision.pop(name, None)
    vision |= {"in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    (folder / "config.json").write_text(json.dumps(config | text))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[name] = tensor
    assert any(name.startswith("visual.blocks.0") for name in tensors)
    assert any(name.startswith("model.layers.0") for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_current(source, folder, model):
    """A checkpoint with the module's own names, `model.visual.*` and `model.language_model.*`."""
    shutil.copytree(source, folder)
    tensors = {name: x.clone() for name, x in model.net.state_dict().items() if name != "lm_head.weight"}
    assert all(name.startswith(("model.visual.", "model.language_model.")) for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_both_key_layouts_load(tiny, rows, tmp_path):
    model = lively(tiny)
    source = save_checkpoint(tmp_path, 1, model, {})
    write_legacy(source, tmp_path / "legacy")
    write_current(source, tmp_path / "current", model)
    for name in ("legacy", "current"):
        assert torch.equal(outputs(load_model(tmp_path / name), rows), outputs(model, rows)), name


def test_a_checkpoint_of_the_release_has_strips(tiny, tmp_path):
    """Its config.json holds latent_size and the ids, but no name for the pooling and no pixel limits."""
    source = save_checkpoint(tmp_path, 1, lively(tiny), {})
    config = json.loads((source / "config.json").read_text())
    for name in ("latent_pooling", "prompt_suffix", "min_pixels", "max_pixels", "latent_norm", "run"):
        config.pop(name, None)
    (source / "config.json").write_text(
        json.dumps(config | {"compress_strategy": "average", "stage": "stage1"})
    )
    model = load_model(source)
    assert (model.K, model.net.config.latent_pooling, model.net.config.latent_norm) == (4, "strips", None)
    assert (model.net.config.min_pixels, model.net.config.max_pixels) == (784, 256 * 784)
    assert model.net.config.prompt_suffix == model_py.SUFFIX


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("untied"), tied=False)


def test_an_untied_head_gets_its_new_rows_too(untied, rows, tmp_path):
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(untied / "base")
    model = load_model(untied / "base", K=4, pooling="grid")
    start = model.ids["latent_pad"]
    assert [model.ids[name] - start for name in ("latent_pad", "latent_start", "latent_end")] == [0, 1, 2]
    tables = [net.get_input_embeddings().weight for net in (plain, model.net)]
    heads = [net.get_output_embeddings().weight for net in (plain, model.net)]
    assert not torch.equal(tables[1], heads[1])
    for old, new in (tables, heads):
        assert torch.equal(new[:start], old[:start]) and torch.equal(new[start + 3 :], old[start + 3 :])
        for row in range(start, start + 3):
            assert torch.allclose(new[row], old[:start].mean(dim=0), atol=1e-7)
            assert not torch.allclose(new[row], old[row], atol=1e-3)
    save_checkpoint(tmp_path, 1, model, {})
    assert torch.equal(outputs(load_model(tmp_path), rows), outputs(model, rows))


def test_new_rows_are_the_mean_of_those_before(tiny):
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny / "base")
    model = load_model(tiny / "base", K=4, pooling="grid")
    start, old = model.ids["latent_pad"], plain.get_input_embeddings().weight
    new = model.net.get_input_embeddings().weight
    assert start + 3 <= len(old) == len(new)  # spare rows, as Qwen2.5-VL has them
    assert torch.allclose(new[start : start + 3], old[:start].mean(dim=0).expand(3, -1), atol=1e-7)
    assert torch.equal(new[:start], old[:start])
    assert new is model.net.lm_head.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_when_it_must(tiny, untied, tmp_path, tied):
    source = tiny if tied else untied
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(source / "base")
    tok = AutoTokenizer.from_pretrained(source / "base")
    net.resize_token_embeddings(len(tok))
    net.save_pretrained(tmp_path / "full")
    tok.save_pretrained(tmp_path / "full")
    model = load_model(tmp_path / "full", K=4, pooling="grid")
    for new in (model.net.get_input_embeddings().weight, model.net.get_output_embeddings().weight):
        assert len(new) == len(tok) + 3 == model.net.config.text_config.vocab_size
        assert torch.allclose(new[-3:], new[:-3].mean(dim=0).expand(3, -1), atol=1e-6)
    assert (model.net.lm_head.weight is model.net.get_input_embeddings().weight) is tied
    save_checkpoint(tmp_path / "run", 1, model, {})
    assert torch.equal(load_model(tmp_path / "run").net.lm_head.weight, model.net.lm_head.weight)


def test_trained_latent_rows_are_kept(tiny, tmp_path):
    """Rows that a stage has trained do not start again at the mean, not even those of a K = 0 stage."""
    for K in (4, 0):
        model = load_model(tiny / "base", K=K, pooling="grid")
        with torch.no_grad():
            model.net.get_input_embeddings().weight[model.ids["latent_start"]] = 3.0
        save_checkpoint(tmp_path / str(K), 1, model, {})
        again = load_model(tmp_path / str(K), K=K, pooling="grid")
        assert again.net.get_input_embeddings().weight[model.ids["latent_start"]].eq(3).all()
    fresh = load_model(tmp_path / "0", K=4, pooling="grid")  # a stage without imagery taught them nothing
    assert fresh.K == 4
    assert not fresh.net.get_input_embeddings().weight[model.ids["latent_start"]].eq(3).any()


def test_other_settings_than_the_checkpoints_are_refused(tiny, tmp_path):
    folder = save_checkpoint(tmp_path, 1, load_model(tiny / "base", K=4, pooling="grid"), {})
    refused(lambda: load_model(folder, K=8), str(folder), "K=4", "8")
    refused(lambda: load_model(folder, K=0), "K=4", "0")
    refused(lambda: load_model(folder, K=4, pooling="strips"), "POOLING=grid", "strips")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_start_id": 3}))
    refused(lambda: load_model(folder, K=4, pooling="grid"), "latent_start_id=3")


def test_a_plain_checkpoint_is_refused_where_nothing_says_k(tiny):
    refused(lambda: load_model(tiny / "base"), "latent_size")


def test_a_folder_that_is_no_checkpoint_is_refused(tiny, tmp_path):
    refused(lambda: load_model(tmp_path / "none", K=4), "none", "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(lambda: load_model(tmp_path, K=4), "llama", "Qwen2.5-VL")


def test_missing_weights_are_refused(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    gone = next(name for name in tensors if "layers.1.mlp" in name)
    tensors.pop(gone)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(tmp_path / "base", K=4, pooling="grid"), "lacks weights", "layers.1.mlp")
    (tmp_path / "base" / "model.safetensors").unlink()
    refused(lambda: load_model(tmp_path / "base", K=4, pooling="grid"), "holds no weights", "base")


def test_the_instruction_comes_from_a_file(tiny, tmp_path):
    (tmp_path / "words").write_text("\nLook twice — then answer.", encoding="utf-8")
    model = load_model(tiny / "base", K=4, pooling="grid", suffix=f"@{tmp_path / 'words'}")
    assert model.net.config.prompt_suffix == "\nLook twice — then answer."
    refused(lambda: load_model(tiny / "base", K=4, suffix="@none"), "SUFFIX=@none", "no file")


def test_attention_is_pinned_and_weights_are_float32(tiny, model, tmp_path):
    assert model.net.config._attn_implementation == "sdpa"
    assert model.net.model.language_model.config._attn_implementation == "sdpa"
    assert model.net.model.visual.config._attn_implementation == "sdpa"
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny / "base").to(torch.bfloat16)
    shutil.copytree(tiny / "base", tmp_path / "half")
    net.save_pretrained(tmp_path / "half")
    assert {x.dtype for x in load_model(tmp_path / "half", K=4, pooling="grid").parameters()} == {
        torch.float32
    }
