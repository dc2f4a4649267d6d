"""Shared by the tests: a network of 0.1 M random weights, a few random clips, and rows about them."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.checkpoints import newest_checkpoint
from model import load_model
from tools.make_tiny import make_network

ROOT = Path(__file__).parent.parent
SIZE = (56, 42)  # width, height: 4 x 3 merged tokens with patches of 7 and a merge of 2
N = 12  # of one pair of frames, and of an overlay
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 10000.0, "rope_type": "default"},
    "vocab_size": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 7,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 28,  # 2 x 2 merged tokens: windows of 4, 4, 2 and 2 tokens
    "fullatt_block_indexes": [1],
}


def write_config(path, tied=True, text=(), **vision):
    """A config.json of the small network, with changes."""
    config = {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, "min_pixels": 196, "max_pixels": 3136}
    config |= {"text_config": TEXT | dict(text), "vision_config": VISION | vision}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def draw_image(path, rng, size=SIZE):
    """A random JPEG of coarse patches, so that images differ after every resize."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    small.resize(size).save(path, quality=95, subsampling=0)


def write_data(folder, count=8, clips=4, frames=4, seed=0):
    """A folder like generate_data's: rows with one to three overlays and answers of different lengths."""
    rng, rows = np.random.default_rng(seed), []
    for clip in range(clips):
        for t in range(frames):
            draw_image(folder / f"processed_data/c{clip}/frames/frame_{t:04d}.jpg", rng)
            draw_image(folder / f"processed_data/c{clip}/masked_static_overlays/static_f{t:04d}.jpg", rng)
    for index in range(count):
        clip, overlays = index % clips, 1 + index % 3
        paths = [f"processed_data/c{clip}/{{}}{t:04d}.jpg" for t in range(frames)]
        steps = " ".join(f"At {t}s the red box is here <output_image>, near." for t in range(overlays))
        more = " So it goes left." * (index % 4)
        row = {"id": f"c{clip}_{index}", "text_input": f"How does the camera move, question {index}?\n\n"}
        row["text_input"] += "A. Pan Left\nB. Pan Right\nC. Tilt Up\nD. Dolly In"
        row["text_output"] = f"<think>{steps}{more}</think>\n<answer>B. Pan Right</answer>"
        row["image_input"] = [path.format("frames/frame_") for path in paths]
        row["image_output"] = [path.format("masked_static_overlays/static_f") for path in paths[:overlays]]
        row |= {
            "times": [0.0, 1.0, 2.5, 4.0, 6.0, 7.0][:frames],
            "subtask": "camera_single",
            "clip": f"c{clip}",
        }
        rows.append(row)
    for name in ("train_imagery", "test_imagery"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def make_world(folder, tied=True, text=(), **vision):
    """folder/data with rows, folder/base with the random network -> folder."""
    write_data(folder / "data")
    config = write_config(folder / "config.json", tied, text, **vision)
    make_network(folder / "base", folder / "data", config, prompts=0)
    return folder


def lively(folder, K=4, pooling="grid", **settings):
    """The base with larger weights: what it says depends on all that it reads, near-ties are rare."""
    model = load_model(folder / "base", K=K, pooling=pooling, **settings)
    generator = torch.Generator().manual_seed(10)
    with torch.no_grad():
        for name, weight in model.qwen.named_parameters():
            if weight.ndim > 1:
                scale = (
                    0.5 if "embed_tokens" in name or "lm_head" in name else 1.5 * weight[0].numel() ** -0.5
                )
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def imaginative(folder):
    """The lively network, such that it often imagines and sometimes ends its turn."""
    model = lively(folder)
    model.config.latent_norm = 6.0
    with torch.no_grad():
        for name in ("latent_start", "im_end"):  # longer rows of the tied table: likelier at some places
            model.qwen.get_input_embeddings().weight[model.token_id[name]] *= 4
    return model


def run_script(monkeypatch, name, *words):
    """Runs a script in this process as `python name KEY=value ...` would."""
    monkeypatch.setattr(sys, "argv", [name, *(str(word) for word in words)])
    return runpy.run_path(str(ROOT / name), run_name="__main__")


def refused(call, *words):
    """The call ends the program with one sentence that holds the words -> the sentence."""
    with pytest.raises(SystemExit) as stop:
        call()
    sentence = stop.value.code  # a string: printed to stderr, exit code 1
    assert isinstance(sentence, str) and "\n" not in sentence and sentence.endswith((".", "?")), sentence
    for word in words:
        assert word in sentence, sentence
    return sentence


def one_thread():
    """The environment of a subprocess: one thread, and this folder's modules."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def two_processes(script, *words):
    """Runs a script on two processes, as torchrun would -> what it printed."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    run += [str(word) for word in words]
    done = subprocess.run(run, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def forget_last(out):
    """A run's folder as if it had been killed in its last step."""
    shutil.rmtree(newest_checkpoint(out))
    log = Path(out) / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))


def write_answers(folder, right, blocks=(1,) * 100):
    """Answers with ids in order; (subtask, right) and the number of latent blocks each."""
    folder.mkdir(parents=True)
    rows = (
        {"id": n, "subtask": name, "correct": bool(good), "blocks": count}
        for n, ((name, good), count) in enumerate(zip(right, blocks))
    )
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
