"""Each edit that the README promises to be one: made on a copy of the tree, then two steps are run."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, draw_image, make_world, one_thread

STEPS = ["STEPS=2", "GLOBAL_BATCH=2", "MICRO_BATCH=2", "TEST_ROWS=0", "EVAL_EVERY=0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a random base, and a run of two steps from it."""
    folder = make_world(tmp_path_factory.mktemp("hack"))
    run(ROOT, folder, "dift.py", "MODEL=base", "DATA=data", "OUT=run", *STEPS)
    return folder


@pytest.fixture
def copy(tmp_path):
    """A copy of the code, to be edited."""
    for name in ("model.py", "dift.py", "grpo4d.py", "evaluate.py", "generate_data.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    shutil.copytree(ROOT / "assets", tmp_path / "assets", ignore=shutil.ignore_patterns("tiny", "*.png"))
    return tmp_path


def edit(file, before, after):
    """One edit: text that stands in the file once is replaced."""
    source = file.read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{file.name} holds {source.count(before)} times: {before}"
    file.write_text(source.replace(before, after), encoding="utf-8")


def run(code, folder, script, *words):
    """Runs a script of a copy of the code in a folder -> what it printed."""
    environment = one_thread()
    environment["PYTHONPATH"] = str(code)
    command = [sys.executable, str(code / script), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log(folder, name):
    """The entries of a run's log."""
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def test_a_pooling_is_an_edit_of_pool_latents(world, copy):
    edit(
        copy / "model.py",
        '    require(pooling == "grid"',
        '    if pooling == "first":\n        return features[:K]\n    require(pooling == "grid"',
    )
    run(copy, world, "dift.py", "MODEL=base", "DATA=data", "OUT=pooling", "POOLING=first", *STEPS)
    assert [entry["sim"] for entry in log(world, "pooling")] != [entry["sim"] for entry in log(world, "run")]


def test_a_loss_term_is_an_edit_of_dift_loss(world, copy):
    edit(
        copy / "dift.py",
        'return w_ce * ce + w_sim * sim, {"ce": ce, "sim": sim}',
        "size = logp.square().mean()\n"
        '    return w_ce * ce + w_sim * sim + 0.5 * size, {"ce": ce, "sim": sim, "size": size}',
    )
    printed = run(copy, world, "dift.py", "MODEL=base", "DATA=data", "OUT=loss", *STEPS)
    assert "+ size " in printed
    for entry in log(world, "loss"):
        assert entry["loss"] == pytest.approx(entry["ce"] + 3 * entry["sim"] + 0.5 * entry["size"], rel=1e-5)


def test_a_reward_term_is_an_edit_of_reward_and_its_weight(world, copy):
    edit(
        copy / "grpo4d.py",
        'return {"acc": float(letter == row.key), "fmt": float(has_format)}',
        'short = float(len(completion.ids) < 9)\n    return {"acc": 1.0, "fmt": 0.5, "short": short}',
    )
    edit(copy / "grpo4d.py", '{"acc": 1.0, "fmt": 0.2}  #', '{"acc": 1.0, "fmt": 0.2, "short": 2.0}  #')
    words = ["MODEL=run", "DATA=data/train_imagery.jsonl", "OUT=reward", "HOLDOUT=", "SINGLES=", "STEPS=2"]
    words += ["GLOBAL_BATCH=2", "G=2", "MAX_NEW=12", "SAMPLE_EVERY=0"]
    printed = run(copy, world, "grpo4d.py", *words)
    assert "2 x short" in printed
    for entry in log(world, "reward"):
        assert entry["reward"] == pytest.approx(1.1 + 2 * entry["short"])


def test_a_base_model_is_a_constant(world, copy):
    """Another network, with an untied head."""
    make_world(copy / "other", tied=False)
    printed = run(
        copy, world, "dift.py", f"MODEL={copy / 'other' / 'base'}", "DATA=data", "OUT=base2", *STEPS
    )
    assert "other" in printed.splitlines()[0] and len(log(world, "base2")) == 2


def test_a_data_set_is_a_jsonl(world, copy):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        for name in ("a.jpg", "b.jpg", "lit.jpg"):
            draw_image(world / "mine" / str(number) / name, rng)
        rows.append(
            {
                "text_input": f"Where to, {number}?\n\nA. Left\nB. Right",
                "text_output": "<think>See <output_image> there.</think>\n<answer>A. Left</answer>",
                "image_input": [f"{number}/a.jpg", f"{number}/b.jpg"],
                "image_output": [f"{number}/lit.jpg"],
            }
        )
    (world / "mine" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(copy, world, "dift.py", "MODEL=base", "DATA=mine/rows.jsonl", "OUT=mine_run", *STEPS)
    assert log(world, "mine_run")[-1]["latents"] == 8.0  # one overlay a row


def test_a_benchmark_is_one_function_and_its_entry(world, copy):
    edit(
        copy / "lib" / "benchmarks.py",
        "BENCHMARKS = {\n",
        'def mine_entry(raw, path):\n    return "easy", f"{raw[\'video\']}"\n\n\nBENCHMARKS = {\n'
        '    "mine": Benchmark(\n        entry=mine_entry,\n        files=("mine.json",),\n'
        '        subtasks={"easy": "Easy"},\n        required=("question", "options", "answer"),\n    ),\n',
    )
    frames = world / "videos" / "clip"
    for number in range(3):
        draw_image(frames / f"frame_{number}.png", np.random.default_rng(number))
    entry = {"video": "clip", "question": "Where?", "options": ["left", "right"], "answer": "left"}
    (world / "mine.json").write_text(json.dumps([entry, entry]))
    words = [
        "MODEL=run",
        "BENCH=mine",
        "DATA=mine.json",
        "VIDEOS=videos",
        "OUT=bench",
        "MAX_NEW=8",
        "VIDEO=none",
    ]
    assert "Easy" in run(copy, world, "evaluate.py", *words)


def test_a_segmenter_is_one_file(copy):
    (copy / "lib" / "segmenters" / "middle.py").write_text(
        '"""SEGMENTER="middle": the middle of the frame."""\n\nimport numpy as np\n\n\n'
        "def masks(frames, phrase, files, weights):\n"
        "    found = np.zeros(frames.shape[:3], bool)\n"
        "    found[:, 10:20, 10:20] = True\n    return found\n"
    )
    lines = ["from lib.footage import list_segmenters, load_segmenter", "import numpy as np"]
    lines += ["assert 'middle' in list_segmenters()"]
    lines += ["frames = np.zeros((2, 30, 30, 3), np.uint8)"]
    lines += ["print(load_segmenter('middle').masks(frames, '', [], '').sum())"]
    (copy / "try.py").write_text("\n".join(lines))
    assert run(copy, copy, "try.py").strip() == "200"
