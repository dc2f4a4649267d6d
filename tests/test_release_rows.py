"""Rows as the release ships them, three of each kind, train one DIFT step and one 4DRL step."""

import json

import numpy as np
import pytest
from helpers import draw_image, run_script
from safetensors.torch import load_file

from lib.checkpoints import newest_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dift_data.jsonl and 4drl_data_filtered.jsonl beside processed_data/, paths from the project's root."""
    root, rng = tmp_path_factory.mktemp("release"), np.random.default_rng(0)
    dift, rl = [], []
    for number, video in enumerate(("1f2e-uuid", "2a3b-uuid", "9c8d-uuid")):
        clip = f"processed_data/{video}"
        frames = [f"{clip}/frames/frame_{t:04d}.jpg" for t in range(4)]
        overlays = [f"{clip}/masked_static_overlays/seg_0_to_3_f{t:04d}.jpg" for t in (0, 3)]
        for path in (*frames, *overlays):
            draw_image(root / path, rng)
        row = {"id": f"{video}_0->3", "text_input": "How did the camera move?\n\nA. Pan Left\nB. Pan Right"}
        row["text_output"] = "<think>The wall in <output_image> shifts to <output_image> here.</think>\n"
        row["text_output"] += "<answer>B. Pan Right</answer>"
        row["image_input"] = [f"./data/{path}" for path in frames]
        dift.append(row | {"image_output": [f"./data/{path}" for path in overlays]})
        row = {"Type": "abs_dir", "Question": "Where does it go?", "A": "Left", "B": "Right", "C": "Up"}
        row |= {"D": "Down", "Correct": "ABC"[number], "video_path": f"/x/DSR-data/video/{video}_11.mp4"}
        rl.append(row | {"frame_paths": [f"./data/{path}" for path in frames]})
    for name, rows in (("dift_data", dift), ("4drl_data_filtered", rl)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(monkeypatch, name, out, *words):
    """One step of a stage -> (its log entry, the weights)."""
    run_script(monkeypatch, name, f"OUT={out}", "STEPS=1", "LR=1e-3", "WARMUP=1", *words)
    entry = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    return entry, load_file(newest_checkpoint(out) / "model.safetensors")


def test_rows_of_the_release_train_both_stages(tiny, folder, monkeypatch, tmp_path):
    """DIFT sees two overlays a row; 4DRL goes on from its checkpoint; both change the weights."""
    base = load_file(tiny / "base" / "model.safetensors")
    few = ("TEST_ROWS=0", "EVAL_EVERY=0", "GLOBAL_BATCH=3", "MICRO_BATCH=3", "LOG_EVERY=1")
    data = f"DATA={folder / 'dift_data.jsonl'}"
    entry, dift = run(monkeypatch, "dift.py", tmp_path / "dift", f"MODEL={tiny / 'base'}", data, "K=4", *few)
    assert np.isfinite(entry["loss"]) and entry["latents"] == 8  # two overlays of K = 4
    assert any((dift[name] != base[name]).any() for name in dift if name in base)
    few = ("HOLDOUT=", "SINGLES=", "GLOBAL_BATCH=3", "G=2", "MAX_NEW=12", "SAMPLE_EVERY=0")
    words = (f"MODEL={tmp_path / 'dift'}", f"DATA={folder / '4drl_data_filtered.jsonl'}", *few)
    entry, rl = run(monkeypatch, "grpo4d.py", tmp_path / "rl", *words)
    assert np.isfinite(entry["loss"]) and set(rl) == set(dift)
