"""SOURCE="questions": 4DRL rows that name a video, from the release's and DSR-Train's files to a step."""

import json

import numpy as np
import pytest
from helpers import refused, run_script
from test_real_data import write_video

from lib import tables
from lib.rows import read_rows
from lib.videos import attach_video_rows

ASK = {"Type": "abs_dir", "Question": "Where to?", "A": "A. Left", "B": "Right", "C": "Up", "D": "Down"}
NAMES = ("abc_11", "def_2", "ghi_3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos of four seconds; questions about them and about one that is not there, in each shape."""
    root = tmp_path_factory.mktemp("questions")
    frames = np.random.default_rng(0).integers(0, 255, (8, 42, 56, 3), dtype=np.uint8)
    for number, name in enumerate(NAMES):
        write_video(root / f"videos/deep/{name}.mp4", np.repeat(frames[number:][:4], 10, 0), 10)
    rows = [ASK | {"Correct": "C", "video_path": f"/x/DSR-data/video/{n}.mp4"} for n in (*NAMES, "no_1")]
    (root / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    (root / "dsr.json").write_text(json.dumps({name: [ASK | {"Correct": "B"}] * 2 for name in NAMES}))
    (root / "train_qa_pairs.parquet").write_bytes(b"PAR1")
    return root


def generate(monkeypatch, folder, out, file):
    """Runs the stage -> the rows of both splits as the stages read them."""
    words = (f"VIDEOS={folder / 'videos'}", f"QUESTIONS={folder / file}", f"OUT={out}")
    run_script(monkeypatch, "generate_data.py", "SOURCE=questions", *words)
    return [row for path in sorted(out.glob("rl_*.jsonl")) for row in read_rows(path)]


@pytest.mark.parametrize(
    ("file", "count", "key"), [("rl.jsonl", 4, "C"), ("dsr.json", 6, "B"), ("train_qa_pairs.parquet", 2, "D")]
)
def test_questions_become_4drl_rows(folder, monkeypatch, tmp_path, capsys, file, count, key):
    """Every shape gives the same rows; each gets a frame a second with true times; others are counted."""
    row = {"videoID": "def_2", "type": "abs_spd", "question": "How fast?", "answer": "D"}
    row["options"] = ["A. Left", "B. (1) up. (2) down.", "C. x", "D. y"]
    table = type("Table", (), {"to_pylist": lambda self: [dict(row), row | {"videoID": "ghi_3"}]})
    monkeypatch.setattr(tables, "find_spec", lambda name: True)
    parquet = type("Parquet", (), {"read_table": lambda self, path: table()})
    whole = tables.import_module
    monkeypatch.setattr(tables, "import_module", lambda name: parquet() if "pyarrow" in name else whole(name))
    rows = generate(monkeypatch, folder, tmp_path / "out", file)
    assert len(rows) == count == len({row.id for row in rows}) and {row.key for row in rows} == {key}
    assert all(row.options["A"] == "Left" and not row.image_input for row in rows)
    assert ("1 questions are about videos that are not" in capsys.readouterr().out) == (file == "rl.jsonl")
    with_frames = attach_video_rows(rows, cache=str(tmp_path / "frames"))
    assert len(with_frames) == count and all(row.times == [0.0, 1.0, 2.0, 3.0] for row in with_frames)
    splits = [{row.clip for row in read_rows(path)} for path in (tmp_path / "out").glob("rl_*.jsonl")]
    assert not set.intersection(*splits) if len(splits) > 1 else splits


def test_the_releases_questions_train_a_4drl_step_as_they_are(tiny, folder, monkeypatch, tmp_path, capsys):
    """4drl_data_filtered.jsonl with nothing but foreign video paths, and VIDEOS: one question is left out."""
    cache = f"CACHE={tmp_path / 'frames'}"
    few = (cache, "STEPS=1", "HOLDOUT=", "SINGLES=", "GLOBAL_BATCH=2", "G=2", "MAX_NEW=8", "SAMPLE_EVERY=0")
    base = json.loads((tiny / "base/config.json").read_text())
    dift = ("STEPS=1", "TEST_ROWS=0", "GLOBAL_BATCH=2", f"OUT={tmp_path / 'dift'}", f"DATA={tiny / 'data'}")
    run_script(monkeypatch, "dift.py", f"MODEL={tiny / 'base'}", *dift)
    words = (f"MODEL={tmp_path / 'dift'}", f"DATA={folder / 'rl.jsonl'}", f"OUT={tmp_path / 'rl'}", *few)
    run_script(monkeypatch, "grpo4d.py", f"VIDEOS={folder / 'videos/deep'}", *words)
    told = capsys.readouterr().out
    assert "1 of 5 questions are left out" in told and "no_1.mp4" in told and "4 rows" in told
    entry = json.loads((tmp_path / "rl/log.jsonl").read_text().splitlines()[0])
    assert np.isfinite(entry["loss"]) and base["model_type"] == "qwen2_5_vl"
    refused(lambda: run_script(monkeypatch, "grpo4d.py", *words), "DATA=", "set VIDEOS")


def test_questions_of_another_kind_are_one_sentence(folder, monkeypatch, tmp_path):
    """A list of numbers, a question without a key, no file, no video of any question."""
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "keyless.json").write_text(json.dumps({"abc_11": [ASK]}))
    seven = ASK | {"options": list("abcdefg"), "answer": "A"}
    (tmp_path / "seven.json").write_text(json.dumps({"abc_11": [seven]}))
    nul = ASK | {"question": "How\0?", "Correct": "A"}
    (tmp_path / "nul.json").write_text(json.dumps({"abc_11": [nul]}))
    (tmp_path / "away.json").write_text(json.dumps({"else_1": [ASK | {"Correct": "A"}]}))
    for file, words in {
        "list.json": ("list.json", "question 1"),
        "keyless.json": ("keyless.json", "question 1", "'Correct' is None"),
        "seven.json": ("seven.json", "question 1", "an option G"),
        "nul.json": ("nul.json", "question 1", "a NUL"),
        "away.json": ("away.json", "no video", "VIDEOS"),
        "none.json": ("QUESTIONS=", "no file"),
    }.items():
        refused(
            lambda file=file: generate(monkeypatch, folder, tmp_path / file[:-5], tmp_path / file), *words
        )
