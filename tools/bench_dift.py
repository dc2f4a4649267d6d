"""Time and memory of one DIFT step, ours against the common way, each in its own process.

    python tests/bench_dift.py

The step: forward and backward of a random 45 M Qwen2.5-VL over one sequence of 780 tokens, 288 of them
visual, 8 latents, 151 supervised; float32, one thread, no optimiser. Ours is model.py's forward and dift.py's
loss. The common way is the library's: vision window by window, layer-wise activation checkpointing, logits of
the whole vocabulary at every position in float32. Both start from the same weights and data; their losses and
gradients are compared. Time is the process's own (on an idle core that is the clock's, which is printed too);
memory is the peak above what the process holds after its imports.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

from dift import dift_loss
from model import Thinker, checkpoint_layers, rope_positions

REPEATS = 3  # after one step to warm up; the median counts
K, W_CE, W_SIM = 4, 0.1, 1.0
TIME_GOAL, MEMORY_GOAL = 0.25, 0.4  # of the common way
IDS = {"endoftext": 151643, "im_end": 151645, "image_pad": 151655, "video_pad": 151656}  # Qwen2.5-VL's
IDS |= {"latent_pad": 151665, "latent_start": 151666, "latent_end": 151667}
BEFORE, AFTER = 20, 313  # words of the prompt around the video
TIED = True  # the head is the table of words
PAIRS, HEIGHT, WIDTH = 4, 8, 9  # merged tokens of the video; an overlay is as large as one pair
SPOKEN = (60, 50, 37)  # words before, between and after the two latent blocks, less their 4 delimiters
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"mrope_section": [8, 12, 12], "rope_theta": 1e6, "rope_type": "default"},
    "vocab_size": 151668,
}
VISION = {
    "depth": 2,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_heads": 4,
    "out_hidden_size": 256,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}


class Words:
    """Stands in for a tokenizer: only the ids of special tokens are asked for."""

    def convert_tokens_to_ids(self, text):
        return IDS[text.strip("<|>")]


def build():
    """The random network, the same in both processes; vision is frozen."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=TIED)
    config.latent_size, config.latent_pooling = K, "strips"
    net = QwenVL._from_config(config, attn_implementation="sdpa").train()
    net.model.visual.requires_grad_(False)
    return net


def draw():
    """One row: ids and masks (1, T), positions (3, 1, T), patches and grids of a video and two overlays."""
    torch.manual_seed(1)
    block = [IDS["latent_start"], *[IDS["latent_pad"]] * K, IDS["latent_end"]]
    words = [torch.randint(0, IDS["endoftext"], (count,)).tolist() for count in (BEFORE, AFTER, *SPOKEN)]
    visual = [IDS["video_pad"]] * (PAIRS * HEIGHT * WIDTH)
    prompt = [*words[0], *visual, *words[1]]
    ids = torch.tensor([[*prompt, *words[2], *block, *words[3], *block, *words[4]]])
    batch = {
        "ids": ids,
        "is_visual": ids == IDS["video_pad"],
        "is_latent": ids == IDS["latent_pad"],
        "where": "row",
    }
    batch["is_text"] = (torch.arange(ids.shape[1]) >= len(prompt))[None] & ~batch["is_latent"]
    for name in ("text", "latent"):
        batch[f"{name}_at"] = batch[f"is_{name}"].flatten().nonzero()[:, 0]
    seconds = [2.0 * pair for pair in range(PAIRS)]
    segments = [BEFORE, (seconds, HEIGHT, WIDTH), ids.shape[1] - BEFORE - len(visual)]
    batch["positions"] = rope_positions(segments, 2)[:, None]
    batch["grids"] = [(PAIRS, 2 * HEIGHT, 2 * WIDTH)] + 2 * [(1, 2 * HEIGHT, 2 * WIDTH)]
    batch["pixels"] = torch.randn(sum(t * h * w for t, h, w in batch["grids"]), 3 * 2 * 14 * 14)
    return batch | {"video_items": [0], "overlay_items": [1, 2]}


def our_step(net, batch):
    """model.py and dift.py."""
    thinker = Thinker(net, Words()).train()

    def step():
        logp, imagined, targets = thinker(batch)
        loss, _, _ = dift_loss(logp, imagined, targets, len(logp), len(imagined), W_CE, W_SIM)
        loss.backward()
        return loss

    return step


def common_step(net, batch):
    """The library's modules and its loss."""
    checkpoint_layers(net)
    grids, first = torch.tensor(batch["grids"]), PAIRS * 4 * HEIGHT * WIDTH
    labels = batch["ids"].masked_fill(~batch["is_text"], -100)

    def step():
        video = net.model.visual(batch["pixels"][:first], grid_thw=grids[:1]).pooler_output
        overlays = net.model.visual(batch["pixels"][first:], grid_thw=grids[1:]).pooler_output
        targets = torch.cat([part.mean(dim=0, keepdim=True) for part in overlays.chunk(2 * K)])  # (8, D)
        x = net.get_input_embeddings()(batch["ids"])
        x = x.masked_scatter(batch["is_visual"][..., None], video)
        x = x.masked_scatter(batch["is_latent"][..., None], targets)
        out = net.model(inputs_embeds=x, position_ids=batch["positions"], use_cache=False)
        hidden = out.last_hidden_state
        logits = net.lm_head(hidden).float()  # (1, T, V)
        ce = net.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        imagined = hidden[:, :-1][batch["is_latent"][:, 1:]]
        sim = (1 - F.cosine_similarity(imagined, targets.detach(), dim=-1)).mean()
        loss = W_CE * ce + W_SIM * sim
        loss.backward()
        return loss

    return step


def memory():
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(make):
    """Runs one way in this process -> {"seconds", "bytes", "loss", "gradient", ...}."""
    torch.set_num_threads(1)
    start = memory()
    net, batch = build(), draw()
    step, seconds, clock = make(net, batch), [], []
    for _ in range(1 + REPEATS):
        net.zero_grad(set_to_none=True)
        began, clock_began = time.process_time(), time.perf_counter()
        loss = step().item()
        seconds.append(time.process_time() - began)
        clock.append(time.perf_counter() - clock_began)
    gradient = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm().item()
    counts = [int(batch[name].sum()) for name in ("is_text", "is_visual", "is_latent")]
    result = {"seconds": statistics.median(seconds[1:]), "clock": statistics.median(clock[1:])}
    result |= {"loss": loss, "gradient": gradient}
    result["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    result["weights"] = sum(weight.numel() for weight in net.parameters())
    return result | {"tokens": batch["ids"].shape[1], "counts": counts}


if __name__ == "__main__":
    ways = {"ours": our_step, "common": common_step}
    if len(sys.argv) == 2:
        print(json.dumps(measure(ways[sys.argv[1]])))
        sys.exit()
    results = {}
    for way in ways:
        command, env = [sys.executable, __file__, way], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    ours, common = results["ours"], results["common"]
    print("{:.1f} M weights, {} tokens, supervised, visual and latent: {}".format(
        ours["weights"] / 1e6, ours["tokens"], ours["counts"]
    ))  # fmt: skip
    for way, one in results.items():
        seconds, megabytes = one["seconds"], one["bytes"] / 2**20
        numbers = f"{seconds:7.3f} s ({one['clock']:.3f} s by the clock) {megabytes:7.0f} MiB"
        print(f"{way:7} {numbers}   loss {one['loss']:.6f}")
    assert (ours["tokens"], ours["counts"]) == (780, [151, 288, 8])
    assert abs(ours["loss"] - common["loss"]) < 1e-4, "the two ways compute different losses"
    assert abs(ours["gradient"] / common["gradient"] - 1) < 1e-4, "the two ways compute different gradients"
    for name, goal in (("seconds", TIME_GOAL), ("bytes", MEMORY_GOAL)):
        ratio = ours[name] / common[name]
        print(f"{name:8} ratio {ratio:.3f}, goal {goal}: {'reached' if ratio <= goal else 'missed'}")
