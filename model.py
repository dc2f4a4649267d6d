"""What the stages of nano4DThinker share: constants, rows, preprocessing, positions, the model, generation.

4DThinker (arXiv 2605.05997) lets a vision-language model (Qwen2.5-VL) *imagine* in the middle of its chain of
thought: after `<|latent_start|>` it reads its own last hidden state K times instead of a token, then goes on
with `<|latent_end|>`. This file holds everything about that which training, RL and evaluation must agree on.
Top to bottom: command line, devices, rows, pixels, positions, samples, the module, generation, checkpoints.
It is imported by the stages.

Letters in shape comments: B rows, T tokens, D width, V vocabulary, K latents per image, N visual tokens of
one image or video, P patches (before the 2 x 2 merge), n any count.

Differs from the paper:
- a latent block is exactly K long: its logits are not supervised, so `<|latent_end|>` is forced (ours)
- `grid` pooling beside the paper's `strips` (ours); temporal positions come from real seconds (ours)
- text after a video starts at the largest position + 1, as Qwen2.5-VL was trained; the library differs
"""

import ast
import atexit
import datetime
import difflib
import functools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AddedToken, AutoTokenizer, Cache
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from assets import faster, fsdp

transformers.utils.logging.disable_progress_bar()

LATENT_TOKENS = {name: f"<|{name}|>" for name in ("latent_pad", "latent_start", "latent_end")}
LATENT_FIELDS = ("latent_token_id", "latent_start_id", "latent_end_id")  # release: their names in config.json
PROMPT = (  # release: ends in "assistant", the newline after it is the first supervised token
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{video}{text}<|im_end|>\n<|im_start|>assistant"
)
PLACEHOLDER = "<output_image>"  # in a row's text_output: here stands an overlay
SUFFIX = "\nThink in <think>, imagining the object in view where it helps, then answer in <answer>."  # ours
DEFAULTS = {  # settings of a checkpoint that has none of its own
    "min_pixels": 28 * 28,  # (release)
    "max_pixels": 256 * 28 * 28,  # of one frame (release)
    "seconds_per_pair": None,  # None: real time (ours)
    "latent_norm": None,  # None: hidden states are fed back as they are (paper)
}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's channel means, as Qwen2.5-VL was trained
STD = (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------- constants on the command line


def check(fine, sentence):
    """Ends the program with one sentence and exit code 1 unless `fine`: how all bad input is reported."""
    if not fine:
        sys.exit(sentence)


def set_constants(namespace, argv=None):
    """Sets a script's UPPERCASE constants from KEY=value words; returns all of them as a dict.

    A value has the type of the default (an int may stand for a float, a None default takes numbers). Exits
    with one sentence on a word that is not KEY=value, an unknown key (naming the nearest), another type, or a
    batch of nothing.
    """
    kinds = (str, int, float, tuple, list, type(None))
    names = [name for name, value in namespace.items() if name.isupper() and isinstance(value, kinds)]
    for word in sys.argv[1:] if argv is None else argv:
        key, equals, text = word.partition("=")
        check(equals, f"'{word}' is not KEY=value; write for example SEED=1.")
        near = difflib.get_close_matches(key.upper(), names, n=1, cutoff=0)
        check(key in names, f"There is no constant {key}; the nearest is {near[0]}, they stand at the top.")
        namespace[key] = parse_constant(key, text, namespace[key])
    for name in (name for name in names if name.endswith("BATCH")):  # edited ones too
        check(namespace[name] > 0, f"{name}={namespace[name]}: set it to 1 or more.")
    return {name: namespace[name] for name in names}


def parse_constant(key, text, default):
    """One value of the default's type: "8", 4 -> 8; exits if the type differs."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if (type(default), type(value)) in ((float, int), (tuple, list)):
        value = type(default)(value)
    kinds = ["int", "float", "NoneType"] if default is None else [type(default).__name__]
    check(type(value).__name__ in kinds, f"{key}={text} is no {' or '.join(kinds)} (default {default!r}).")
    return value


# ---------------------------------------------------------------- devices and processes


def init_distributed():
    """Joins the torchrun group if there is one -> (rank, world, device); nccl on CUDA, gloo on CPU."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world, gpus = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.device_count()
    check(local < gpus or not gpus, f"--nproc_per_node is above the {gpus} GPUs here; set it to that.")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    torch.cuda.set_device(local if gpus else -1)  # -1: none
    if world > 1 and not dist.is_initialized():
        # nccl gives up after ten minutes: too soon for those that wait while rank 0 writes a large checkpoint
        dist.init_process_group("nccl" if gpus else "gloo", timeout=datetime.timedelta(hours=3))
        # gloo's threads let go of tensors a moment after a collective; once Python is ending, that aborts it
        atexit.register(time.sleep, 0.5)
    return rank, world, device


def all_sum(values, device="cpu"):
    """A list of numbers summed over all processes -> list of floats: how counts and losses meet."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def parallelise(model, how, device):
    """Spreads a Thinker over the torchrun processes, if there are any -> what training calls.

    ddp: DDP's wrapper; every process holds all, gradients are averaged. fsdp: assets/fsdp.py cuts it up.
    """
    if how == "fsdp" and dist.is_initialized():
        return fsdp.shard(model, device)
    seeing = any(parameter.requires_grad for parameter in model.net.model.visual.parameters())
    ddp = functools.partial(nn.parallel.DistributedDataParallel, find_unused_parameters=seeing)
    return ddp(model) if dist.is_initialized() else model


def to_rank_0(tensors):
    """Whole tensors by name on the CPU, of rank 0; nothing on the others, which all take part."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    wholes = ((name, fsdp.full(x.detach())) for name, x in tensors.items())
    return {name: x.cpu().contiguous() for name, x in wholes if main}


# ---------------------------------------------------------------- rows


def read_rows(path, limit=None):
    """Reads a DIFT or 4DRL jsonl -> rows of one shape; exits with "file:line: ..." on the first bad one.

    Keys of a row: id, where ("file:line"), text_input, text_output ("" if there is none), image_input and
    image_output (absolute paths), times (seconds per frame), subtask, clip, key ("B"), options {"A": ".."},
    video ("" if there are frames; a 4DRL row may name only a video, whose frames evaluate.film adds).
    """
    path = Path(path)
    check(path.is_file(), f"There is no file {path}; make it with generate_data.py or set DATA.")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip() or len(rows) == limit:
            continue
        where = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except ValueError as error:  # of JSON or of UTF-8
            sys.exit(f"{where}: not valid JSON ({error}); mend or delete the line.")
        check(isinstance(raw, dict), f"{where}: a row must be a JSON object.")
        rows.append(normalise_row(raw, where, path.parent))
    check(rows, f"{path} holds no rows; make it again with generate_data.py.")
    return rows


def normalise_row(raw, where, folder):
    """One JSON row of the release's DIFT or 4DRL schema -> the shape that read_rows promises."""
    raw = from_rl_row(raw, where) if "Question" in raw else raw
    kinds = {"text_input": str, "text_output": str, "image_input": list, "image_output": list}
    for field, kind in kinds.items():
        check(isinstance(raw.get(field), kind), f"{where}: '{field}' is missing or not a {kind.__name__}.")
    row = {"where": where, "text_input": raw["text_input"], "text_output": raw["text_output"]}
    row["id"], row["subtask"] = str(raw.get("id", where)), str(raw.get("subtask", "all"))
    for field in ("image_input", "image_output"):
        check({*map(type, raw[field])} <= {str}, f"{where}: '{field}' must hold paths, got {raw[field]}.")
        row[field] = [find_file(name, folder, where) for name in raw[field]]
    frames, images = len(row["image_input"]), len(row["image_output"])
    times = raw.get("times") or list(range(frames))  # release: 1 frame a second
    fine = isinstance(times, list) and all(type(t) in (int, float) for t in times) and times == sorted(times)
    check(fine, f"{where}: 'times' must be a list of rising seconds, got {times}.")
    check(len(times) == frames, f"{where}: {len(times)} times for {frames} frames.")
    row["times"] = [float(t) for t in times]
    places = row["text_output"].count(PLACEHOLDER)
    fine = places == images or not row["text_output"]
    check(fine, f"{where}: text_output has {places} {PLACEHOLDER}, image_output {images} files.")
    row["video"] = "" if frames or not raw.get("video_path") else str(folder / str(raw["video_path"]))
    clip = Path(raw["image_input"][0]).parent.parent.name if frames else Path(row["video"]).stem
    row["clip"] = str(raw.get("clip") or clip)
    row["options"] = dict(re.findall(r"^([A-F])\. (.*)$", row["text_input"], flags=re.M))
    answer = re.search(r"<answer>\s*([A-F])\b", row["text_output"])
    row["key"] = raw.get("key") or (answer.group(1) if answer else None)
    return row


def from_rl_row(raw, where):
    """A 4DRL row {"Type", "Question", "A".."F", "Correct", "frame_paths"} -> the fields of a DIFT row."""
    letters = [letter for letter in "ABCDEF" if raw.get(letter) not in (None, "")]
    key = raw.get("Correct")
    check(key in letters, f"{where}: the key 'Correct' is {key!r}, the options are {letters}.")
    frames = raw.get("frame_paths") or []
    check(frames or raw.get("video_path"), f"{where}: there is neither 'frame_paths' nor 'video_path'.")
    texts = [re.sub(rf"^{letter}[.)]\s+", "", str(raw[letter])) for letter in letters]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts))
    row = {"text_input": f"{raw['Question']}\n\n{options}", "text_output": "", "image_output": []}
    row |= {"image_input": frames, "subtask": raw.get("Type", "all"), "key": key}
    return row | {name: raw[name] for name in ("id", "times", "clip", "video_path") if name in raw}


def find_file(name, folder, where):
    """The path as it is, else from the row's file, else without a leading ./data/ (the release's root)."""
    for candidate in (name, f"{folder}/{name}", f"{folder}/" + re.sub(r"^(\./)?data/", "", name)):
        if os.path.isfile(candidate):  # a data set has ten thousands of files: pathlib takes thrice as long
            return os.path.abspath(candidate)
    sys.exit(f"{where}: there is no file {name}, neither as written nor beside {folder}.")


@functools.lru_cache(2)
def order_of_epoch(count, epoch, seed):
    """A shuffle of range(count); kept, for every step of the epoch asks for it."""
    return random.Random(f"{seed}-{epoch}").sample(range(count), count)


def rows_of_step(step, count, batch, seed):
    """Indices of a step's global batch: a walk through one shuffle per epoch, a function of (seed, step)."""
    walk = (divmod(position, count) for position in range(step * batch, (step + 1) * batch))
    return [order_of_epoch(count, epoch, seed)[position] for epoch, position in walk]


# ---------------------------------------------------------------- pixels


def frame_sizes(size, config):
    """(width, height) of a frame after the release's step and after the library's smart_resize.

    Release: a frame of more than max_pixels is scaled down to them, its sides floored to whole tokens.
    """
    factor = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    scale = math.sqrt(config.max_pixels / math.prod(size))
    if scale < 1:
        size = tuple(max(factor, int(side * scale) // factor * factor) for side in size)
    smart = smart_resize(size[1], size[0], factor, config.min_pixels, config.max_pixels)
    return size, smart[::-1]


def patchify(frames, patch, merge, pair):
    """Frames (n, H, W, 3) uint8 -> patches (P, 3·pair·patch²) float32 in merge order, grid (t, h, w).

    One image, or an odd last frame, is repeated to fill its pair. Patches of one merge window stand together:
    with merge 2 the rows are (0,0) (0,1) (1,0) (1,1) of the first window, then of the next one to the right.
    """
    frames = (frames.astype(np.float32) * (1 / 255) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    frames = np.concatenate([frames, frames[-1:].repeat(-len(frames) % pair, axis=0)])  # (t·pair, H, W, 3)
    t, h, w = len(frames) // pair, frames.shape[1] // patch, frames.shape[2] // patch
    x = frames.reshape(t, pair, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/m, w/m, m, m, 3, pair, patch, patch)
    return torch.from_numpy(np.ascontiguousarray(x).reshape(t * h * w, -1)), (t, h, w)


def open_image(path, where, only_size=False):
    """An image file -> PIL image, RGB, or its (width, height) without decoding it; exits on a bad one."""
    try:
        return Image.open(path).size if only_size else Image.open(path).convert("RGB")
    except (OSError, SyntaxError):  # a broken PNG is a SyntaxError to PIL
        sys.exit(f"{where}: {path} is not a readable image; make it again or drop the row.")


def load_images(paths, config, where=""):
    """Files of one video or overlay -> patches (P, 3·pair·patch²), grid (t, h, w); exits on a bad file.

    Lanczos where a frame is too large (release), then bicubic (library); all get the size of the first.
    """
    vision, images = config.vision_config, [open_image(path, where) for path in paths]
    sizes = frame_sizes(images[0].size, config)
    for size, how in zip(sizes, (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)):
        images = [image if image.size == size else image.resize(size, how) for image in images]
    frames = np.stack([np.asarray(image) for image in images])
    return patchify(frames, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


# ---------------------------------------------------------------- positions and pooling


def pair_seconds(times, pair=2, seconds_per_pair=None):
    """Seconds of each frame pair since the start: [0, 1, 2, 3.5] -> [0, 2]; or a given step instead."""
    step, starts = seconds_per_pair, times[::pair]
    return [start - starts[0] if step is None else index * step for index, start in enumerate(starts)]


def rope_positions(segments, tokens_per_second):
    """3-D rotary positions (time, height, width) of a sequence -> (3, T) long.

    `segments` lists what the sequence holds: a number of text tokens, or (seconds of each pair, h, w) of a
    video in merged tokens. With 2 tokens a second, [2, ([0.0, 1.5], 1, 2), 1] gives (columns are tokens)

        text  text | pair 0        pair 1      | text
        0     1    | 2 2           5 5         | 6       time: 2 + floor(1.5 · 2)
        0     1    | 2 2           2 2         | 6       height
        0     1    | 2 3           2 3         | 6       width; text goes on at the largest position + 1
    """
    columns, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            axes, length = (torch.arange(segment),) * 3, segment
        else:
            seconds, h, w = segment
            ticks = [math.floor(second * tokens_per_second + 1e-6) for second in seconds]
            axes = torch.meshgrid(torch.tensor(ticks), torch.arange(h), torch.arange(w), indexing="ij")
            length = max(ticks[-1] + 1, h, w)
        columns.append(start + torch.stack(axes).flatten(1))  # (3, n) or (3, t·h·w)
        start += length
    return torch.cat(columns, dim=1)


def pool_latents(features, K, how="strips", grid=None):
    """Eq. 5: visual tokens (N, D) in raster order -> (K, D), the mean over each of K sets.

    `strips` (paper): K contiguous runs; when K does not divide N, the first N mod K runs hold one token more.
    `grid` (ours): a raster of rows x columns sets over the h x w tokens, as square as K allows (4 -> 2 x 2);
    sides that do not divide give their rest to the first rows and columns. N < K is refused.
    """
    count = len(features)
    check(count >= K, f"{count} visual tokens cannot give K={K} latents; lower K or raise MAX_PIXELS.")
    if how == "strips":
        return torch.stack([part.mean(dim=0) for part in torch.tensor_split(features, K)])  # (K, D)
    h, w = grid
    rows = max(r for r in range(1, math.isqrt(K) + 1) if K % r == 0)
    rows, columns = (rows, K // rows) if w >= h else (K // rows, rows)
    fine = rows <= h and columns <= w
    check(fine, f"POOLING=grid cannot part {h} x {w} tokens into {rows} x {columns} sets; lower K.")
    bands = torch.tensor_split(features.view(h, w, -1), rows, dim=0)
    cells = [cell for band in bands for cell in torch.tensor_split(band, columns, dim=1)]
    return torch.stack([cell.mean(dim=(0, 1)) for cell in cells])  # (K, D)


# ---------------------------------------------------------------- samples


def encode_row(model, row, answer=True):
    """One row -> its tokens with masks and positions; `answer=False` stops where the model is to speak.

    ids (T,); is_text (supervised: the answer's tokens, delimiters too, latents not), is_latent, is_visual,
    is_real (T,) bool; positions (3, T); video: frame paths; overlays: a path per latent block. For K = 2:

        ids        <user> v v v v How? <assistant> \\n The ball <start> . . <end> moves left <im_end>
        is_visual         1 1 1 1
        is_latent                                                      1 1
        is_text                                    1   1   1     1         1     1    1      1
    """
    config, vision = model.net.config, model.net.config.vision_config
    head, tail = PROMPT.format(video="\0", text=row["text_input"] + config.prompt_suffix).split("\0")
    ids, segments = [], []
    if row["image_input"]:
        t, h, w = video_grid(row, config)
        h, w = h // vision.spatial_merge_size, w // vision.spatial_merge_size
        seconds = pair_seconds(row["times"], vision.temporal_patch_size, config.seconds_per_pair)
        ids += model.tokenize(head + "<|vision_start|>")
        segments += [len(ids), (seconds, h, w)]
        ids += [model.ids["video_pad"]] * (t * h * w)
        head, tail = "", "<|vision_end|>" + tail
    before_text = len(ids)
    ids += model.tokenize(head + tail)
    is_text = [False] * len(ids)
    if answer:
        start, pad, end = (LATENT_TOKENS[name] for name in ("latent_start", "latent_pad", "latent_end"))
        text = row["text_output"].replace(PLACEHOLDER, start + pad * model.K + end)
        ids += model.tokenize(f"\n{text}<|im_end|>")
        is_text += [token != model.ids["latent_pad"] for token in ids[len(is_text) :]]
    segments.append(len(ids) - before_text)
    sample = {"ids": torch.tensor(ids), "is_text": torch.tensor(is_text), "where": row["where"]}
    sample["is_real"] = torch.ones(len(ids), dtype=torch.bool)
    sample["positions"] = rope_positions(segments, vision.tokens_per_second)
    sample["is_latent"] = sample["ids"] == model.ids["latent_pad"]
    sample["is_visual"] = sample["ids"] == model.ids["video_pad"]
    sample["video"], sample["overlays"] = tuple(row["image_input"]), tuple(row["image_output"])
    sample["overlays"] *= bool(answer and model.K)
    return sample


def video_grid(row, config):
    """Patches (t, h, w) of a row's video from the size of its first frame alone."""
    vision, size = config.vision_config, open_image(row["image_input"][0], row["where"], only_size=True)
    _, (width, height) = frame_sizes(size, config)
    t = math.ceil(len(row["image_input"]) / vision.temporal_patch_size)
    return t, height // vision.patch_size, width // vision.patch_size


def collate(samples, pad_id, side="right"):
    """Samples -> ids, is_text, is_latent, is_visual, is_real (B, T), positions (3, B, T), videos, overlays.

    text_at, latent_at (n,): where is_text and is_latent are true in the B · T tokens, row after row.
    is_real of rows of 3 and 2 tokens: [[1, 1, 1], [1, 1, 0]]; padded left: [[1, 1, 1], [0, 1, 1]].
    """
    length = max(len(sample["ids"]) for sample in samples)

    def stack(name, value, dim=0):
        rooms = [length - sample[name].shape[-1] for sample in samples]
        pads = [(0, room) if side == "right" else (room, 0) for room in rooms]
        return torch.stack([F.pad(s[name], pad, value=value) for s, pad in zip(samples, pads)], dim)

    batch = {"ids": stack("ids", pad_id), "positions": stack("positions", 0, dim=1)}
    batch |= {name: stack(name, False) for name in ("is_text", "is_latent", "is_visual", "is_real")}  # (B, T)
    # (n,) in all B · T: the same masks as places, found here, so that the device need not be asked
    batch |= {f"{name}_at": batch[f"is_{name}"].flatten().nonzero()[:, 0] for name in ("text", "latent")}
    batch["videos"] = [sample["video"] for sample in samples if sample["video"]]
    batch["overlays"] = [(path,) for sample in samples for path in sample["overlays"]]
    return batch | {"where": samples[0]["where"]}


class Images:
    """Turns the image files of a batch into what the model's forward takes, each distinct image once.

    With `cache=True` (frozen vision only) features of videos and pooled latents of overlays stay in memory,
    so a clip is encoded once in a whole run. Otherwise the pixels go into the forward pass.
    """

    def __init__(self, model, cache=False):
        self.model, self.cache, self.kept = model, cache, {}

    def add(self, batch, device="cpu"):
        """Adds `pixels`, `grids` and which image goes where; or, cached, `features` and `latents` (n, D)."""
        videos, overlays = batch["videos"], batch["overlays"]
        items = list(dict.fromkeys([*videos, *overlays]))
        if self.cache:
            self.fill(items, batch["where"], device)
            for name, some in (("features", videos), ("latents", overlays)):
                batch |= {name: torch.cat([self.kept[item][name] for item in some])} if some else {}
        elif items:
            batch |= self.load(items, batch["where"])
            batch["video_items"] = [items.index(video) for video in videos]
            batch["overlay_items"] = [items.index(overlay) for overlay in overlays]
        return {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}

    def load(self, items, where):
        """Patches of several videos and overlays, one after the other, and their grids (n, 3)."""
        loaded = [load_images(item, self.model.net.config, where) for item in items]
        return {"pixels": torch.cat([pixels for pixels, _ in loaded]), "grids": [grid for _, grid in loaded]}

    @torch.no_grad()
    def fill(self, items, where, device):
        """Encodes the items not kept yet in one call; keeps features (N, D), an overlay's latents (K, D)."""
        new = [item for item in items if item not in self.kept]
        if not new:
            return
        loaded = self.load(new, where)
        features = self.model.encode(loaded["pixels"].to(device), loaded["grids"])
        for item, feature, grid in zip(new, features, loaded["grids"]):
            pooled = self.model.pool(feature, grid).cpu() if len(item) == 1 and self.model.K else None
            self.kept[item] = {"features": feature.cpu(), "latents": pooled}


# ---------------------------------------------------------------- the model


def checkpoint_layers(net):
    """Activation checkpointing of every layer, by the library's name for it from 5.23 on, or the old one."""
    enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def embed_patches(self, pixels):
    """The visual encoder's first layer (P, d) -> (P, width) as the product that its convolution is."""
    return F.linear(pixels, self.proj.weight.flatten(1))


def windowed_attention(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    """The visual encoder's attention, all windows of one length in one call -> (P, width).

    In place of the library's loop of one call per window, where a toy run spent half its time; same numbers.
    """
    q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (P, heads, d) each
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    lengths, starts, out = cu_seqlens.diff(), cu_seqlens[:-1], torch.empty_like(v)
    for length in lengths.unique().tolist():
        index = (starts[lengths == length, None] + torch.arange(length, device=starts.device)).flatten()
        window = [x.index_select(0, index).view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        out[index] = F.scaled_dot_product_attention(*window).transpose(1, 2).flatten(0, 1)
    return self.proj(out.flatten(1))  # (P, width)


def last_layer(self, hidden_states, read=None, **how):
    """The language model's last layer (B, T, D) -> (n, D): its MLP only where a hidden state will be read.

    `read` (n,) counts in all B · T tokens; None: everywhere, (B, T, D) as in the library's own.
    """
    mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **how)
    x = hidden_states + mixed
    x = x if read is None else x.flatten(0, 1)[read]  # (n, D)
    return x + self.mlp(self.post_attention_layernorm(x))


class TiedTable(torch.autograd.Function):
    """Rows of the table of words, and the table for a tied head: (V, D), (B, T) -> (B, T, D), (V, D).

    Its backward adds the rows' gradient into the one that the head made of the table, in place, where
    autograd would copy the whole table first: only a head, or another lookup, may use the second output.
    """

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, rows, table):
        return table.index_add_(0, ctx.saved_tensors[0].flatten(), rows.flatten(0, 1)), None


class TargetLogps(torch.autograd.Function):
    """log softmax(hidden · tableᵀ) at one id a row, banned ids left out -> (n,) float32.

    hidden (n, D), table (V, D) of the head, ids (n,). The logits' memory becomes exp(logits - largest) and in
    the backward pass their gradient, for a row g (onehot - softmax): no second tensor of this size (with bf16
    arithmetic a copy of half of it).
    """

    @staticmethod
    def forward(ctx, table, banned, hidden, ids):
        x = faster.head_logits(hidden, table).float()
        x = x if banned is None else x.index_fill_(-1, banned, -torch.inf)
        x.sub_(x.amax(dim=-1, keepdim=True))
        target = x.gather(-1, ids[:, None])  # (n, 1)
        total = x.exp_().sum(dim=-1, keepdim=True)
        ctx.save_for_backward(hidden, table, x, ids[:, None], total)
        return (target - total.log())[:, 0]

    @staticmethod
    def backward(ctx, g):
        hidden, table, x, ids, total = ctx.saved_tensors
        g = g[:, None]
        g = x.mul_(-g / total).scatter_add_(-1, ids, g).to(hidden.dtype)  # (n, V)
        return g.T @ hidden, None, g @ table, None


def token_logps(hidden, table, targets, banned=None, temperature=1.0, chunk=1024):
    """Log-probability of each target token under its hidden state, in chunks: (n, D), (n,) -> (n,) float32.

    Only supervised positions come here, so no (B, T, V) tensor exists; beyond one chunk, logits are made
    again in the backward pass instead of being kept. table (V, D): the head's weights.
    """
    hidden = hidden / temperature  # here a few rows, there all their logits
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, table = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, table))
    one = functools.partial(TargetLogps.apply, table, banned)
    again = functools.partial(checkpoint, one, use_reentrant=False) if len(targets) > chunk else one
    return torch.cat([again(rows, ids) for rows, ids in zip(hidden.split(chunk), targets.split(chunk))])


class Thinker(nn.Module):
    """Qwen2.5-VL with latent tokens; one forward for vision, text and head, so DDP and FSDP2 can wrap it."""

    def __init__(self, net, tok):
        super().__init__()
        self.net, self.tok, config = net, tok, net.config
        self.K, self.tied = config.latent_size, config.tie_word_embeddings
        names = {name: f"<|{name}|>" for name in ("im_end", "video_pad", "image_pad", *LATENT_TOKENS)}
        names["pad"] = "<|endoftext|>"
        self.ids = {name: tok.convert_tokens_to_ids(text) for name, text in names.items()}
        never = [self.ids[name] for name in ("latent_pad", "latent_end", "image_pad", "video_pad")]
        self.register_buffer("banned", torch.tensor(never), persistent=False)
        visual, last = net.model.visual, net.model.language_model.layers[-1]
        leaner = {visual.patch_embed: embed_patches, last: last_layer}  # the same numbers, from less work
        leaner |= {net.lm_head: faster.head}
        leaner |= {block.attn: windowed_attention for block in visual.blocks}
        for part, forward in leaner.items():
            part.forward = forward.__get__(part)

    def tokenize(self, text):
        """Text, special tokens included, -> list of ids."""
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def encode(self, pixels, grids):
        """Patches (P, d) and grids [(t, h, w)] of several images -> list of (N, D), each in raster order."""
        merge = self.net.config.vision_config.spatial_merge_size
        # a thread that prepares the next step has no autocast of the step's
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
            features = self.net.model.visual(pixels, torch.tensor(grids, device=pixels.device)).pooler_output
        return list(features.split([t * h * w // merge**2 for t, h, w in grids]))

    def pool(self, features, grid):
        """Eq. 5 for one overlay: (N, D), grid (1, h, w) in patches -> (K, D)."""
        config = self.net.config
        raster = [side // config.vision_config.spatial_merge_size for side in grid[1:]]
        return pool_latents(features, self.K, config.latent_pooling, raster)

    def visual_inputs(self, batch):
        """Features of the videos (n, D), latents of the overlays (n, D); vision once per distinct image."""
        if "pixels" not in batch:
            return batch.get("features"), batch.get("latents")
        encoded = self.encode(batch["pixels"], batch["grids"])  # without a graph where vision is frozen
        videos = [encoded[item] for item in batch["video_items"]]
        latents = [self.pool(encoded[item], batch["grids"][item]) for item in batch["overlay_items"]]
        return torch.cat(videos) if videos else None, torch.cat(latents) if latents else None

    def feedback(self, hidden):
        """What a latent position reads: the hidden state (Eq. 8), scaled to `latent_norm` if one is set."""
        norm = self.net.config.latent_norm
        return hidden if norm is None else F.normalize(hidden, dim=-1) * norm

    def embed(self, ids, is_visual, features, is_latent=None, latents=None, table=None):
        """Token embeddings (B, T, D) with visual features and latents (n, D), in row order, put in place.

        With them comes the table of words (V, D), for another lookup or for the head if that is tied to it.
        """
        table = self.net.get_input_embeddings().weight if table is None else table
        x, words = TiedTable.apply(table, ids) if self.tied else (F.embedding(ids, table), table)  # (B, T, D)
        for places, values in ((is_visual, features), (is_latent, latents)):
            if values is not None:
                x = x.masked_scatter(places[..., None], values.to(x.dtype))
        return x, words

    def text(self, x, positions, is_real=None, past=None, read=None):
        """The language model: x (B, T, D), positions (3, B, T) -> hidden states after the norm (B, T, D).

        With `read` (n,), places in all B · T tokens, only those there (n, D): no more is computed at the end.
        Rows padded on the right need no mask: causal attention never looks at what follows.
        """
        inputs = {"inputs_embeds": x, "position_ids": positions, "read": read}
        inputs |= {"past_key_values": past, "use_cache": past is not None}
        inputs["attention_mask"] = None if is_real is None else is_real.long()
        return self.net.model.language_model(**inputs).last_hidden_state

    def prefill(self, batch, copies=1):
        """Reads left-padded prompts once, for `copies` answers to each, side by side: B = rows · copies.

        -> their cache, last hidden state (B, 1, D), is_real (B, T), largest position (B,), and the table of
        words (V, D) as `embed` hands it on. RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("Call eval() first: activation checkpointing drops the cache and the imagery.")
        x, words = self.embed(batch["ids"], batch["is_visual"], self.visual_inputs(batch)[0])
        past = Cache(layer_class_to_replicate=faster.RoomyLayer)
        last = torch.arange(1, len(x) + 1, device=x.device) * x.shape[1] - 1  # (rows,)
        hidden = self.text(x, batch["positions"], batch["is_real"], past, last)[:, None]  # (rows, 1, D)
        past.batch_repeat_interleave(copies)
        shared = (hidden, batch["is_real"], batch["positions"].amax(dim=(0, 2)))
        return past, *(x.repeat_interleave(copies, dim=0) for x in shared), words

    def forward(self, batch, latents=None, ban=False, temperature=1.0):
        """Teacher-forced pass over right-padded rows -> logp (n_text,), imagined and targets (n_latent, D).

        logp: of every supervised token given what stands before it; imagined: h_{t-1} at latent positions t;
        targets: z_t, also the input at t (Eq. 7), or the given `latents` (n, D) as they were sampled (4DRL).
        With batch["prompts"] (padded left) the rows are answers to them, G to each, and each prompt is read
        once.
        """
        ids, text_at, latent_at, is_real = batch["ids"], batch["text_at"], batch["latent_at"], None
        features, targets, past, words, prompts = None, None, None, None, batch.get("prompts")
        if prompts:
            past, before, is_real, _, words = self.prefill(prompts, len(ids) // len(prompts["ids"]))
            is_real = torch.cat([is_real, batch["is_real"]], dim=1) if len(prompts["ids"]) > 1 else None
        else:
            features, targets = self.visual_inputs(batch)
        targets = targets if latents is None else latents
        given, places = 0 if targets is None else len(targets), len(latent_at)
        if given != places:  # the pitfall: imagery silently left out
            raise ValueError(f"{batch['where']}: {places} latent positions, {given} latents.")
        x, words = self.embed(ids, batch["is_visual"], features, batch["is_latent"], targets, words)
        at = torch.cat([text_at, latent_at])  # t-1 speaks about token t; nobody asks for a row's first
        if prompts:
            hidden = self.text(x, batch["positions"], is_real, past)  # (B, T, D)
            hidden = torch.cat([before, hidden[:, :-1]], dim=1).flatten(0, 1)[at]
        else:
            hidden = self.text(x, batch["positions"], read=at - 1)
        spoken, imagined = hidden.split([len(text_at), places])  # (n_text, D), (n_latent, D)
        table, banned = words if self.tied else self.net.lm_head.weight, self.banned if ban else None
        return token_logps(spoken, table, ids.flatten()[text_at], banned, temperature), imagined, targets


# ---------------------------------------------------------------- generation


def pick(logits, uniform, temperature, top_p):
    """One token a row: greedy at temperature 0, else by inverse transform from the softmax or its top-p part.

    logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,) long
    """
    if temperature == 0:  # numpy's search through a row takes a tenth of torch's on a CPU
        return torch.from_numpy(logits.numpy().argmax(-1)) if logits.is_cpu else logits.argmax(dim=-1)
    p, order = (logits.double() / temperature).softmax(dim=-1), None
    if top_p < 1:
        p, order = p.sort(dim=-1, descending=True)
        p = p * (p.cumsum(dim=-1) - p < top_p)
    upto = p.cumsum(dim=-1)
    index = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return (index if order is None else order.gather(1, index))[:, 0]


@torch.no_grad()
def generate(model, samples, max_new, images=None, temperature=0.0, top_p=1.0, generators=None, feed=None):
    """Recurrent generation (Eq. 8), batched with left padding -> one dict per answer.

    After a sampled `<|latent_start|>` a row's next K inputs are its own last hidden states, then
    `<|latent_end|>` is forced; each row is in its own state. `generators`: one CPU torch.Generator an answer,
    for temperature > 0; G times as many as samples give G answers to each, whose prompt is read once.
    `feed` (hidden (B, D), block (B,), k (B,), counted from 0) -> (B, D) replaces what is fed inside blocks
    (controls); it is called for all rows, those outside a block (k >= K) do not use it.
    A dict holds, over the new tokens with the end of turn: ids (latents recorded as latent_pad), is_latent,
    is_sampled (lists), latents (n, D) as fed, text, cut (max_new came first). RuntimeError in training mode.
    """
    device, ids = model.banned.device, model.ids
    batch = (images or Images(model)).add(collate(samples, ids["pad"], "left"), device)
    past, hidden, is_real, position, _ = model.prefill(batch, max(1, len(generators or ()) // len(samples)))
    hidden, B = hidden[:, 0], len(hidden)  # (B, D)
    dice = [torch.rand(max_new, generator=g, dtype=torch.float64) for g in generators or ()]
    uniform = torch.stack(dice).to(device) if temperature > 0 else torch.zeros(B, max_new, device=device)
    # left: latents to feed; 0: the end is due, -1: outside a block
    left, block = torch.full((2, B), -1, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    tokens, fed, thinking = [], [], False
    for step in range(max_new):
        logits = model.net.lm_head(hidden).float().index_fill_(-1, model.banned, -torch.inf)  # (B, V)
        token = pick(logits, uniform[:, step], temperature, top_p)
        inside, ending = left > 0, left == 0
        token = token.masked_fill(inside, ids["latent_pad"]).masked_fill(ending, ids["latent_end"])
        token = token.masked_fill(done, ids["pad"])
        tokens.append(torch.stack([token, inside, ending, done]))
        starts = (token == ids["latent_start"]) & ~done
        x = model.net.model.language_model.embed_tokens(token)  # (B, D)
        if thinking:
            thought = model.feedback(hidden) if feed is None else feed(hidden, block, model.K - left)
            x = torch.where(inside[:, None], thought.to(x.dtype), x)
            fed.append((step, x.float()))
        block = block + starts
        left = torch.where(starts, model.K, torch.where(left >= 0, left - 1, left))
        done = done | ((token == ids["im_end"]) & ~inside & ~ending)
        thinking, finished = torch.stack([(left > 0).any(), done.all()]).tolist()  # the one wait of a step
        if finished or step == max_new - 1:
            break
        is_real = torch.cat([is_real, ~done[:, None]], dim=1)
        position = position + 1
        hidden = model.text(x[:, None], position.expand(3, -1)[..., None], is_real, past)[:, -1]
    tokens, fed = torch.stack(tokens).cpu(), [(step, x.cpu()) for step, x in fed]
    return [unpack_row(model, tokens[..., row], fed, row) for row in range(B)]


def unpack_row(model, columns, fed, row):
    """What one row generated: columns (steps, 4) of token, latent?, forced end?, done before? -> dict."""
    steps = int((columns[:, 3] == 0).sum())
    token, is_latent, is_forced, _ = columns[:steps].T
    latents = [x[row] for step, x in fed if step < steps and is_latent[step]]
    empty = torch.zeros(0, model.net.config.text_config.hidden_size)
    ids, is_sampled = token.tolist(), ((is_latent == 0) & (is_forced == 0)).tolist()
    made = {"ids": ids, "is_latent": is_latent.bool().tolist(), "is_sampled": is_sampled}
    made |= {"latents": torch.stack(latents) if latents else empty, "cut": ids[-1] != model.ids["im_end"]}
    return made | {"text": model.tok.decode(ids)}


# ---------------------------------------------------------------- checkpoints


def newest_checkpoint(path):
    """A checkpoint folder itself, or the newest step_* of a run's folder; exits if neither is there."""
    folders = [file.parent for file in sorted(Path(path).glob("step_*/config.json"))]
    folders += [Path(path)] * (Path(path) / "config.json").is_file()
    check(folders, f"{path} holds no config.json and no step_*/; train one with dift.py or set MODEL.")
    return folders[-1]


def load_model(path, device="cpu", K=None, pooling=None, suffix=None, **settings):
    """Loads a Qwen2.5-VL folder (any key layout, tied or not) as a Thinker; fp32 weights, sdpa attention.

    The checkpoint's config holds latent_size, latent_pooling, the latent ids and prompt_suffix; a given K or
    pooling that differs is refused in one sentence; a checkpoint without them (a plain Qwen2.5-VL, the tiny
    base) takes the given ones and gets new token rows. suffix: words, or @ and the path of a file of words.
    `settings`: any of DEFAULTS; None keeps the stored.
    """
    path, suffix = newest_checkpoint(path), suffix or ""
    if suffix.startswith("@"):
        check(Path(suffix[1:]).is_file(), f"SUFFIX={suffix} names no file; write the words or @ and a path.")
        suffix = Path(suffix[1:]).read_text(encoding="utf-8")
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    check(kind == "qwen2_5_vl", f"{path}/config.json says {kind}; this code reads Qwen2.5-VL checkpoints.")
    some = any(file.suffix in (".safetensors", ".bin") for file in path.iterdir())
    check(some, f"{path} holds no weights (*.safetensors or *.bin); download or train it again.")
    how = {"dtype": torch.float32, "attn_implementation": "sdpa", "output_loading_info": True}
    net, info = QwenVL.from_pretrained(path, **how)
    lost = sorted(info["missing_keys"])
    check(not lost, f"{path} lacks weights of a Qwen2.5-VL, such as {lost[:1]}; download it again.")
    tok = AutoTokenizer.from_pretrained(path)
    tok.add_tokens([AddedToken(text, special=True) for text in LATENT_TOKENS.values()])
    set_latent_config(net, tok, path, K, pooling)
    for name, default in {**DEFAULTS, "prompt_suffix": SUFFIX}.items():
        given = suffix if name == "prompt_suffix" else settings.get(name)
        setattr(net.config, name, getattr(net.config, name, default) if given in (None, "") else given)
    return Thinker(net, tok).to(device).eval()


def set_latent_config(net, tok, path, K, pooling):
    """Checks the checkpoint's latent settings against the given ones, or sets them and starts new rows."""
    config, stored = net.config, getattr(net.config, "latent_size", None)
    ids = dict(zip(LATENT_FIELDS, tok.convert_tokens_to_ids(list(LATENT_TOKENS.values()))))
    if stored or (stored == 0 and not K):
        config.latent_pooling = getattr(config, "latent_pooling", "strips")  # release: contiguous groups
        pairs = {"K": (K, stored), "POOLING": (pooling, config.latent_pooling)}
        pairs |= {field: (token, getattr(config, field, token)) for field, token in ids.items()}
        for name, (given, kept) in pairs.items():
            fine = given is None or given == kept
            check(fine, f"{path} was made with {name}={kept}, not {given}; set it so or change MODEL.")
    else:
        check(K is not None, f"{path}/config.json has no latent_size; give a checkpoint of dift.py.")
        check(not K or pooling in ("grid", "strips"), f"POOLING={pooling} is neither grid nor strips.")
        config.latent_size, config.latent_pooling = K, pooling
        if len(tok) > net.get_input_embeddings().num_embeddings:
            net.resize_token_embeddings(len(tok), mean_resizing=False)
        with torch.no_grad():  # new rows start at the mean of those before them, in an untied head too
            for table in {net.get_input_embeddings().weight, net.get_output_embeddings().weight}:
                table[list(ids.values())] = table[: min(ids.values())].mean(dim=0)
    for field, token in ids.items():
        setattr(config, field, token)


def save_checkpoint(out, step, model, run, optimizer=None, keep=2):
    """Writes out/step_000500/: weights, tokenizer (save_pretrained layout), config.json with `run`, moments.

    Written under a temporary name, then renamed; only the newest `keep` stay. All processes call it, rank 0
    writes: the same files for one process, DDP and FSDP.
    """
    folder, unfinished = Path(out) / f"step_{step:06d}", Path(out) / f".unfinished_{step:06d}"
    weights, states = dict(model.net.named_parameters()), optimizer.state if optimizer else {}
    moments = {f"{name}.{key}": v for name, x in weights.items() for key, v in states.get(x, {}).items()}
    weights, moments = to_rank_0(weights), to_rank_0(moments)
    if weights:
        shutil.rmtree(unfinished, ignore_errors=True)
        model.net.save_pretrained(unfinished, state_dict=weights)
        model.tok.save_pretrained(unfinished)
        config = json.loads((unfinished / "config.json").read_text()) | {"run": run | {"step": step}}
        (unfinished / "config.json").write_text(json.dumps(config, indent=1))
        if optimizer:
            save_file(moments, unfinished / "optimizer.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        steps = sorted(Path(out).glob("step_*"))
        kept = [path for path in steps if path <= folder][-keep:]  # a later step is of a run that was left
        for old in set(steps) - set(kept):
            shutil.rmtree(old)
    all_sum([0], model.banned.device)  # all wait for it
    return folder


def load_optimizer(folder, model, optimizer):
    """Puts the saved moments back, so that training goes on exactly; exits if the file is not there."""
    path = Path(folder) / "optimizer.safetensors"
    check(path.is_file(), f"There is no {path}, so training cannot go on; set RESUME=never to start afresh.")
    parameters, fused = dict(model.net.named_parameters()), optimizer.defaults["fused"]
    for file_name, x in load_file(path).items():
        name, _, key = file_name.rpartition(".")  # "<name>.exp_avg", "<name>.exp_avg_sq", "<name>.step"
        x = x.to("cpu" if key == "step" and not fused else parameters[name].device)
        optimizer.state[parameters[name]][key] = x if key == "step" else fsdp.cut_like(x, parameters[name])
