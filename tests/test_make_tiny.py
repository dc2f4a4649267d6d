"""assets/make_tiny.py: rows that ground and bind letters, the random network, the chain of stages."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refused, run_script, write_data
from transformers import AutoTokenizer

import generate_data as gd
import make_tiny
from model import read_rows

FEW = ["CLIPS=4", "TEST_CLIPS=2", "OPTION_ROWS=60", "OPTION_TEST_ROWS=6", "TOY_CLIPS=(4, 2, 1, 1)"]
FEW += ["VOCAB=512", "MICRO_BATCH=4", "PROCESSES=1", "WORKERS=2"]
STAGES = [("ground", "grounding cells", 2, 1e-3, "all"), ("easy", "plain", 3, 5e-4, "letters")]
MOTION_WORDS = "mov|pan|tilt|roll|dolly|truck|pedestal|toward|away|closer|farther|speed|up\\b|down"


def make(patch, out, *words):
    """Runs the script in this process; what it sets in generate_data.py is put back when `patch` ends."""
    for name in ("OUT", "SEED", "WORKERS"):
        patch.setattr(gd, name, getattr(gd, name))
    run_script(patch, "assets/make_tiny.py", f"OUT={out}", *FEW, *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, random network and a first stage of two real steps."""
    out = tmp_path_factory.mktemp("make_tiny") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        make(patch, out, f"STAGES={STAGES[:1]}")
    return out


# ---------------------------------------------------------------- rows


def test_every_kind_of_row_is_there_and_read_by_the_stages(folder):
    """Splits share no clip; ids are unique; only drills and tracks have no option letter for a key."""
    no_key, clips, kinds = ("grounding", "fine", "near", "far", "cells"), [], set()
    for name in ("pretrain", "pretrain_test", "train_imagery", "test_imagery"):
        rows = read_rows(folder / f"rows/{name}.jsonl")
        assert len({row["id"] for row in rows}) == len(rows)
        assert all(row["key"] in row["options"] or row["subtask"] in no_key for row in rows)
        clips += {row["clip"] for row in rows}
        kinds |= {row["subtask"] for row in rows}
    assert len(clips) == len(set(clips)) and {*no_key, "options", "colour"} <= kinds


def test_cells_name_what_covers_them():
    """Worked by hand: 28 pixels are 2 x 2 cells; under a quarter is hidden, the larger of two things wins."""
    masks = {name: np.zeros((4, 28, 28), bool) for name in ("green box", "white ball", "sun")}
    masks["green box"][:2, :14, :14] = True
    masks["sun"][:, :14, 14:21] = True
    masks["white ball"][2:, 14:, :14] = True
    masks["white ball"][2:, 14:, 14:17] = True  # three columns of fourteen
    masks["white ball"][2:, :14, 14:18] = True  # less than the sun's seven columns
    clip = {"masks": masks, "times": [0, 1, 2, 3]}
    assert (
        make_tiny.cells(clip, 0) == "1.1: green sun\n1.2: hidden hidden\n2.1: hidden sun\n2.2: white hidden"
    )
    assert make_tiny.cells(clip, 1) == "1.1: box sun\n1.2: hidden hidden\n2.1: hidden sun\n2.2: ball hidden"


def test_cells_follow_the_size_of_the_frame(monkeypatch):
    """Cells are about 14 pixels wide: 6 x 6 of a frame of 84, and every line has a word for each."""
    monkeypatch.setattr(gd, "SIZE", 84)
    clip = gd.toy_clip("pretrain", 0)[0][0][0]
    lines = make_tiny.cells(clip, 1).split("\n")
    assert len(lines) == 6 * gd.FRAMES // 2 and all(len(line.split(": ")[1].split()) == 6 for line in lines)
    assert lines[0].startswith("1.1: ") and lines[-1].startswith("4.6: ")
    assert {word for line in lines for word in line.split()[1:]} <= {*gd.SHAPES, "sun", "hidden"}


def test_grounding_rows_name_no_motion(folder):
    """Pretraining rows track things over frame pairs without any word of motion."""
    rows = [row for row in read_rows(folder / "rows/pretrain.jsonl") if row["image_input"]]
    assert {row["subtask"] for row in rows} >= {"grounding", "fine", "cells"}
    for row in rows:
        assert not re.search(
            MOTION_WORDS, (row["text_input"] + row["text_output"]).lower().replace("upper", "")
        )
        if row["subtask"] == "grounding":
            lines = re.search("<answer>(.*)</answer>", row["text_output"], flags=re.S)[1].split("\n")
            assert all(len(line.split(": ")[1].split(", ")) == gd.FRAMES // 2 for line in lines)


def test_option_rows_are_answered():
    """Every third text-only question names an option, which answers it; the others are drills."""
    for number in range(0, 90, 3):
        rows = [make_tiny.option_row("pretrain", number + turn)["row"] for turn in range(3)]
        assert [row["subtask"] for row in rows] == ["near", "far", "options"]
        assert all(row["image_input"] == [] for row in rows)
        asked = re.search(r'says "(.*)"\.', rows[2]["text_input"])[1]
        answer = re.search("<answer>(.*)</answer>", rows[2]["text_output"])[1]
        assert answer.endswith(". " + asked) and answer in rows[2]["text_input"].split("\n")


def check_pairs(text, options, gaps):
    """Every label of a drill's text, with one of the gaps and its letter, is in the list -> the letters."""
    letters = []
    for gap in gaps:
        label = next(x[3:] for x in options if text.startswith(x[3:] + gap + x[0]))
        letters.append(text[len(label + gap)])
        assert f"{letters[-1]}. {label}" in options
        text = text[len(label + gap) + 1 :].removeprefix("\n")
    assert text == ""
    return letters


def test_a_far_drill_names_the_letters_of_its_options():
    """Eight labels of the question's list with their letters, at growing distances."""
    seen = set()
    for number in range(60):
        question, answer = make_tiny.drill(np.random.default_rng(number), near=False)
        options = question.split("\n\n")[1].split("\n")
        assert len(options) == len(set(options)) == 4
        seen |= set(check_pairs(answer, options, ("", "\n", ".\n", ".</think>\n<answer>") * 2))
    assert seen == set("ABCD")


def test_a_near_drill_copies_each_list_before_its_labels():
    """Three lists of four as in the question, after each six labels with their letters."""
    seen = set()
    for number in range(20):
        question, answer = make_tiny.drill(np.random.default_rng(number), near=True)
        lists, parts = question.split("\n\n")[1:], answer.split("\n\n")
        assert len(lists) == len(parts) == 3
        for listed, part in zip(lists, parts):
            assert part.startswith(listed + "\n")
            options = listed.split("\n")
            seen |= set(check_pairs(part.removeprefix(listed + "\n"), options, ("", "\n") * 3))
    assert seen == set("ABCD")


# ---------------------------------------------------------------- stages


def test_a_stage_is_a_real_run_of_dift(folder):
    """Two steps from the random network on the stage's own rows, without imagery, vision trained."""
    run = json.loads((folder / "ground/step_000002/config.json").read_text())["run"]
    assert run["K"] == 0 and run["TRAIN_VISION"] is True and run["STEPS"] == 2 and run["SUPERVISE"] == "all"
    assert Path(run["MODEL"]).name == "random" and Path(run["DATA"]).name == "stage_ground.jsonl"
    kinds = {row["subtask"] for row in read_rows(folder / "rows/stage_ground.jsonl")}
    assert kinds == {"grounding", "cells"}


def test_a_chain_goes_on_where_it_stopped(folder, monkeypatch, capsys):
    """The finished stage is skipped, the next starts from it on its own rows; a failed one is named."""
    asked, run = [], subprocess.run

    def fake(command, **how):
        if "torch.distributed.run" not in command:
            return run(command, **how)
        asked.append(dict(word.split("=", 1) for word in command if re.match("[A-Z_]+=", word)))
        return subprocess.CompletedProcess(command, len(asked) - 1)

    monkeypatch.setattr(subprocess, "run", fake)
    before = (folder / "rows/pretrain.jsonl").stat().st_mtime_ns
    make(monkeypatch, folder, f"STAGES={STAGES}", "MOST_STEPS=2")
    assert "tests/measure_base.py" in capsys.readouterr().out
    assert asked[0]["MODEL"] == str(folder / "ground") and asked[0]["SUPERVISE"] == "letters"
    assert asked[0]["GLOBAL_BATCH"] == "32"  # the stages' own, whatever dift.py's default is
    assert asked[0]["STEPS"] == "2" and float(asked[0]["LR"]) == 5e-4
    assert (folder / "rows/pretrain.jsonl").stat().st_mtime_ns == before
    plain = read_rows(Path(asked[0]["DATA"]))
    assert plain and all(row["subtask"] == "far" for row in plain)
    assert not any(re.search(" and [A-Z]|First|Camera: ", row["text_input"]) for row in plain)
    refused(lambda: make(monkeypatch, folder, f"STAGES={STAGES}"), "stage easy failed")
    refused(lambda: make(monkeypatch, folder, "SEED=2"), "another SEED")
    assert len(asked) == 2


# ---------------------------------------------------------------- the network


def test_a_letter_is_one_token_wherever_it_stands(tiny, tmp_path):
    """Even if the corpus has "blueB" so often that the tokenizer would merge it; "-Clockwise" stays whole."""
    (tmp_path / "data").mkdir()
    row = {"text": "<answer>B</answer> blueB whiteC LeftA\nblueB whiteC LeftA Counter-Clockwise"}
    (tmp_path / "data" / "rows.jsonl").write_text((json.dumps(row) + "\n") * 50)
    make_tiny.make_network(tmp_path / "base", tmp_path / "data", tiny / "config.json")
    tok = AutoTokenizer.from_pretrained(tmp_path / "base")
    pieces = tok.tokenize(row["text"])
    assert [piece for piece in pieces if piece in "ABC"] == list("BBCABCA")
    assert "-Clockwise" in pieces and tok.decode(tok(row["text"])["input_ids"]) == row["text"]


def test_a_tiny_network_is_reproducible_and_speaks_its_data(tiny, tmp_path):
    rows = read_rows(tiny / "data" / "train_imagery.jsonl")
    write_data(tmp_path / "data")
    make_tiny.make_network(tmp_path / "base", tmp_path / "data", tiny / "config.json")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tiny / "base" / name).read_bytes()
    tok = AutoTokenizer.from_pretrained(tiny / "base")
    assert tok.decode(tok(rows[0]["text_output"])["input_ids"]) == rows[0]["text_output"]
    assert len(tok("<|im_start|><|video_pad|><|vision_end|>")["input_ids"]) == 3
    for text in ("\nB. Pan Right", "<answer>B. Pan Right"):  # one token for a letter, wherever it stands
        assert "B" in tok.tokenize(text)
    config = json.loads((tiny / "base" / "config.json").read_text())
    assert config["video_token_id"] == tok.convert_tokens_to_ids("<|video_pad|>")
    assert F.one_hot(torch.tensor(tok("é 字")["input_ids"])).sum() > 2  # any text has tokens
