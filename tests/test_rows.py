"""lib/rows.py: rows of the release's two schemas, read into one shape."""

import json

import numpy as np
import pytest
from helpers import draw_image, refused
from PIL import Image

from lib.rows import LATENT_BLOCK, Row, read_rows, read_twin


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
    assert row == Row(
        id="a",
        source=f"{tmp_path}/rows.jsonl:1",
        text_input="How?\n\nA. Left\nB. Right",
        text_output="<output_image> <answer>B. x</answer>",
        image_input=[f"{tmp_path}/c/frames/0.jpg", f"{tmp_path}/c/frames/1.jpg"],
        image_output=[f"{tmp_path}/c/o/0.jpg"],
        times=[0.0, 1.5],
        subtask="all",
        clip="c",
        key="B",
        options={"A": "Left", "B": "Right"},
        video="",
        supervise="all",
        skip_reason="",
        release_fields={},
    )


def test_a_row_may_ask_for_its_letters_alone(tmp_path):
    assert read(tmp_path, raw_row(supervise="letters"))[0].supervise == "letters"


def test_a_row_may_say_what_its_overlays_show(tmp_path):
    first, second = read(tmp_path, raw_row(), raw_row(overlay_frames=[1], overlay_things=["red ball"]))
    assert (first.overlay_frames, first.overlay_things) == ([], [])
    assert (second.overlay_frames, second.overlay_things) == ([1], ["red ball"])


def test_a_row_of_the_release_has_one_frame_a_second(tmp_path):
    row = read(tmp_path, raw_row(times="absent", id="absent"))[0]
    assert row.times == [0.0, 1.0] and row.id == row.source


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
    assert row.text_input == "Where?\n\nA. Left\nB. Right\nC. Up\nD. A. Down"  # its own letter alone goes
    assert row.options == {"A": "Left", "B": "Right", "C": "Up", "D": "A. Down"}
    assert (row.subtask, row.key, row.text_output) == ("abs_dir", "C", "")
    assert (row.image_output, row.times, row.clip) == ([], [4.0], "c")
    assert row.image_input == [f"{tmp_path}/c/frames/0.jpg"]
    assert read_rows(tmp_path / "rows.jsonl")[1].options["D"] == "5"


def test_a_4drl_row_may_name_only_a_video(tmp_path):
    """Relative paths count from the file, others stay; frames, if there are any, come first."""
    raw = {"Question": "?", "A": "x", "Correct": "A", "video_path": "v/abc_11.mp4"}
    framed = raw | {"frame_paths": ["c/frames/0.jpg"]}
    rows = read(tmp_path, raw, raw | {"video_path": "/x/y.mp4"}, framed)
    assert [row.video for row in rows] == [f"{tmp_path}/v/abc_11.mp4", "/x/y.mp4", ""]
    assert [row.clip for row in rows] == ["abc_11", "y", "c"] and rows[0].image_input == []


@pytest.mark.parametrize(
    "name", ["{here}/c/o/0.jpg", "c/o/0.jpg", "./c/o/0.jpg", "./data/c/o/0.jpg", "data/c/o/0.jpg"]
)
def test_paths_are_found(tmp_path, name):
    row = read(tmp_path, raw_row(image_output=[name.format(here=tmp_path)]))[0]
    assert Image.open(row.image_output[0]).size == (56, 42)


def test_paths_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    """As on the command line; "~" was a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    frames = ["~/c/frames/0.jpg", "~/c/frames/1.jpg"]
    row = read(tmp_path, raw_row(image_input=frames, image_output=["~/c/o/0.jpg"]))[0]
    assert row.image_input[0] == str(tmp_path / "c/frames/0.jpg")
    assert row.image_output == [str(tmp_path / "c/o/0.jpg")]
    entry = {"Question": "How?", "A": "left", "B": "right", "Correct": "A", "video_path": "~/v.mp4"}
    assert read(tmp_path, entry)[0].video == str(tmp_path / "v.mp4")


def test_a_path_counts_from_the_working_folder_first(tmp_path, monkeypatch):
    draw_image(tmp_path / "elsewhere" / "c" / "o" / "0.jpg", np.random.default_rng(1))
    monkeypatch.chdir(tmp_path / "elsewhere")
    row = read(tmp_path, raw_row())[0]
    assert row.image_output == [f"{tmp_path}/elsewhere/c/o/0.jpg"]
    assert row.image_input[0] == f"{tmp_path}/c/frames/0.jpg"


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
        (raw_row(overlay_frames=[2]), "'overlay_frames' must be a list of indices of image_input, got [2]"),
        (raw_row(overlay_frames=[True]), "overlay_frames"),
        (raw_row(overlay_frames=0), "overlay_frames"),
        (raw_row(overlay_frames=[0, 1]), "2 overlay_frames for 1 overlays"),
        (raw_row(overlay_things="ball"), "'overlay_things' must be a list of texts, got ball"),
        (raw_row(overlay_things=[3]), "overlay_things"),
        (raw_row(overlay_things=[]), "0 overlay_things for 1 overlays"),
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
    assert read_rows(tmp_path / "rows.jsonl")[0].text_input == "one\u2028two"


def test_missing_and_empty_files_are_refused(tmp_path):
    refused(lambda: read_rows(tmp_path / "none.jsonl"), "none.jsonl", "DATA")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(lambda: read_rows(tmp_path / "empty.jsonl"), "no rows")


def test_limit_reads_a_prefix(tmp_path):
    read(tmp_path, raw_row(id="a"), raw_row(id="b"), raw_row(id="c"))
    assert [row.id for row in read_rows(tmp_path / "rows.jsonl", 2)] == ["a", "b"]


# ---------------------------------------------------------------- latent blocks in decoded text


def test_a_latent_block_is_found_whole_empty_or_cut_off():
    pad = "<|latent_pad|>"
    text = (
        f"a <|latent_start|>{pad}{pad}<|latent_end|> b <|latent_start|><|latent_end|> c <|latent_start|>{pad}"
    )
    found = [(block[1].count("pad"), block[2]) for block in LATENT_BLOCK.finditer(text)]
    assert found == [(2, "<|latent_end|>"), (0, "<|latent_end|>"), (1, None)]
    assert LATENT_BLOCK.sub("", text) == "a  b  c "


def test_what_is_supervised_is_all_or_letters(tmp_path):
    refused(lambda: read(tmp_path, raw_row(supervise="lettres")), "rows.jsonl:1", "'supervise'", "'lettres'")


@pytest.mark.parametrize("train", ["train_imagery.jsonl", "real.jsonl"])
def test_training_rows_beside_held_out_ones(tmp_path, train):
    read(tmp_path, raw_row())
    held_out = tmp_path / ("real_test.jsonl" if train == "real.jsonl" else "test_imagery.jsonl")
    assert read_twin(str(held_out)) == [] and read_twin(str(tmp_path)) == []
    (tmp_path / "rows.jsonl").rename(tmp_path / train)
    assert [row.id for row in read_twin(str(held_out))] == ["a"]
    if train == "train_imagery.jsonl":
        assert len(read_twin(str(tmp_path))) == 1
    assert read_twin(str(tmp_path / train)) == []  # no twin of its own


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"key": "A"}, "the key is A, but text_output answers B"),
        ({"text_input": "How?\n\nA. Left\nB. Right\nA. Up"}, "two options A"),
        ({"text_input": "How?\nB) Up\n\nA. Left\nB. Right"}, "two options B"),
        ({"text_output": "<output_image> <answer>E"}, "none of the options A, B"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(tmp_path, changes, words):
    refused(lambda: read(tmp_path, raw_row(**changes)), "rows.jsonl:1", words)


def test_an_option_of_4drl_is_one_text(tmp_path):
    """Neither NaN nor two lines of which the second looks like another option."""
    row = {"Question": "How?", "A": "left", "B": "right", "Correct": "B", "frame_paths": ["c/frames/0.jpg"]}
    refused(lambda: read(tmp_path, row | {"A": float("nan")}), "rows.jsonl:1", "the option A is NaN")
    refused(lambda: read(tmp_path, row | {"A": "left\nB. up"}), "rows.jsonl:1", "two options B")
    assert read(tmp_path, row | {"Question": "How?\nA. left\nB. right"})[0].options == {
        "A": "left",
        "B": "right",
    }
