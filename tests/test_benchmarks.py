"""evaluate.py on benchmarks: small files of their shapes, videos, two rules, determinism, tools, the page."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, lively, refused, run_script, two_processes
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
from evaluate import Settings, TrueLatents
from lib import benchmarks, report, scores, tables, videos
from lib.files import read_json, read_jsonl
from model import Completion, load_model
from tools.ask import toy_notes


def make_video(path, seconds=3, fps=4, seed=0, size=(64, 48)):
    """An mp4 of random coarse frames at whole seconds, still in between."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(seconds * fps):
            if number % fps == 0:
                small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
                image = np.asarray(small.resize(size))
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the four benchmarks, small


def dsr_file(folder, **change):
    """Letters in the options, a list's text, a dict, "A: x; B: y"; videos v_0 to v_3, and a missing one."""
    options = ["A. (1) Becomes larger.", "B. (1) Becomes smaller. (2) Stays.", "C. Stays.", "D. None."]
    rows = [
        {"type": "abs_spd", "options": options, "answer": "A", "videoID": "v_0"},
        {"type": "abs_dis", "options": str(options), "answer": "B. (1) Becomes smaller.", "videoID": "v_1"},
        {"type": "non_temp", "candidates": dict(zip("ABCD", "wxyz")), "answer": "C", "video": "v_2"},
        {"type": "abs_spd", "options": "A: up; B: down; then up; C: still", "answer": "B", "videoID": "v_3"},
        {"type": "rel_dir", "options": np.array(options).tolist(), "answer": "D", "videoID": "v_missing"},
        {"type": "abs_spd", "options": options, "answer": "A", "videoID": "v_0"},
    ]
    rows = [{"question": f"Between 0.0s and {n}.0s, how fast?"} | row for n, row in enumerate(rows)]
    rows[2] |= change
    return dump(folder / "benchmark.json", {row["question"]: row for row in rows})


def vlm4d_files(folder):
    """Web addresses, answers as text, integers, two options that say the same, ids in both files."""
    web = "https://huggingface.co/datasets/x/resolve/main/"
    abcd = {"A": "left", "B": "right", "C": "left", "D": "No"}
    real = [
        {"video": web + "videos_real/davis/a.mp4", "choices": abcd, "answer": "right"},
        {"video": web + "videos_real/ego4d/b.mp4", "choices": {"A": 1, "B": 2, "C": 3}, "answer": 2},
        {"video": web + "videos_real/youtube-vos/c.mp4", "choices": abcd, "answer": "left"},
    ]
    synthetic = [
        {"video": web + "videos_synthetic/d.mp4", "choices": abcd, "answer": "no"},
        {
            "video": web + "videos_synthetic/d.mp4",
            "choices": {"A": "north", "B": "no, left"},
            "answer": "north",
        },
        {"video": web + "videos_synthetic/d.mp4", "choices": {"A": "no one", "B": "one"}, "answer": "no one"},
    ]
    for name, rows in {"real": real, "synthetic": synthetic}.items():
        more = {"question_type": "multiple-choice", "question": "Where to?"}
        rows = [{"id": f"validation_{number}"} | more | row for number, row in enumerate(rows)]
        dump(folder / "QA" / f"{name}_mc.json", rows)
    return folder


def dsi_files(folder, count=3):
    """Four csv files with quotes and semicolons inside; the key of a question differs from file to file."""
    for version, name in enumerate(("std", "hflip", "reverse", "reverse_hflip")):
        path = folder / "metadatas" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow("cate relative_path video_type question options GT".split())
            for n in range(count):
                options = 'A: Left; then "up"; B: Right, fast; C: Forward; D: Still'
                writer.writerow([n % 6, "cam/a.mp4", "x", f"How,\n{n}?", options, "ABCD"[(n + version) % 4]])
    return folder


def dyn_files(folder):
    """Frames as images, one json a scene and kind of question; mask and sampling files in between."""
    options = ["A. near", "B. far", "C. left", "D. right"]
    for kind, count in {"qa": 2, "sceneqa": 1, "cameraqa": 1}.items():
        rows = [{"question": f"{kind} {n}?", "options": options, "answer": "B"} for n in range(count)]
        dump(folder / "multi_json" / "davis" / f"the_dog_{kind}.json", rows)
    dump(folder / "multi_json" / "davis" / "the_dog_objmask.json", {"object_1": {"question": "?"}})
    dump(folder / "multi_json" / "davis" / "the_dog_frame_sampling_qa.json", [{"question": "?"}])
    (folder / "frames" / "davis" / "the_dog").mkdir(parents=True)
    for number in range(7):
        image = np.full((48, 64, 3), 30 * number, np.uint8)
        Image.fromarray(image).save(folder / f"frames/davis/the_dog/frame_{number:04d}.png")
    return folder


def test_dsr_options_answers_and_order(tmp_path):
    rows = benchmarks.read_benchmark("dsr", str(dsr_file(tmp_path)))
    assert [row.key for row in rows] == ["A", "B", "C", "B", "D", "A"]
    assert [row.subtask for row in rows][:3] == ["Abs Spd", "Abs Dis", "Non-Temp Based"]
    assert rows[0].text_input == (
        "Between 0.0s and 0.0s, how fast?\n\nA. (1) Becomes larger.\nB. (1) Becomes smaller. (2) Stays.\n"
        "C. Stays.\nD. None."
    )
    assert rows[1].options == rows[0].options == rows[4].options
    assert rows[2].options == {"A": "w", "B": "x", "C": "y", "D": "z"}
    assert rows[3].options == {"A": "up", "B": "down; then up", "C": "still"}
    assert [row.video for row in rows][2:] == ["v_2.mp4", "v_3.mp4", "v_missing.mp4", "v_0.mp4"]
    assert rows[5].source.endswith("benchmark.json:6")
    assert benchmarks.parse_options(np.array(["A. x", "B. y"])) == {"A": "x", "B": "y"}
    assert benchmarks.parse_options(list("uvwxyz")) == dict(zip("ABCDEF", "uvwxyz"))
    assert benchmarks.parse_options(np.array([1, 2])) == {"A": "1", "B": "2"}
    assert benchmarks.parse_options({"A": 1, "B": 2, "C": None}) == {
        "A": "1",
        "B": "2",
    }  # parquet's empty field
    assert benchmarks.parse_options("{'A': 'x', 'B': 2}") == {"A": "x", "B": "2"}
    entries = list(json.loads((tmp_path / "benchmark.json").read_text()).values())
    lines = tmp_path / "benchmark.jsonl"
    lines.write_text("\n".join(json.dumps(entry) for entry in entries))
    again = benchmarks.read_benchmark("dsr", str(lines))
    assert [row.text_input for row in again] == [row.text_input for row in rows]


def test_dsr_mirror_as_a_table(tmp_path):
    """EASI's DSRBench.tsv: other column names, options as a JSON list or as Python writes one."""
    path = tmp_path / "DSRBench.tsv"
    options = ["A. up; left", "B. down", "C. it's still"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow("question options video task_type answer".split())
        writer.writerow(["How,\tfast?", json.dumps(options), "v_0.mp4", "abs_spd", "B"])
        writer.writerow(["Where to?", str(options), "v_1", "rel_dir", "C"])
    rows = benchmarks.read_benchmark("dsr", str(path))
    assert [row.key for row in rows] == ["B", "C"]
    assert [row.video for row in rows] == ["v_0.mp4", "v_1.mp4"]
    assert [row.subtask for row in rows] == ["Abs Spd", "Rel Dir"]
    assert rows[0].options == rows[1].options == {"A": "up; left", "B": "down", "C": "it's still"}
    assert rows[0].text_input.startswith("How,\tfast?\n\nA. up; left\n")


def test_parquet_goes_through_pyarrow(tmp_path, monkeypatch):
    """pyarrow is not among the requirements: a stand-in gives the rows as pyarrow's to_pylist does."""
    rows = list(json.loads(dsr_file(tmp_path).read_text()).values())
    (tmp_path / "benchmark.parquet").write_bytes(b"PAR1")
    table = type("Table", (), {"to_pylist": lambda self: rows})
    stand_in = type("Parquet", (), {"read_table": lambda self, path: table()})
    monkeypatch.setattr(tables, "find_spec", lambda name: True)
    monkeypatch.setattr(tables, "import_module", lambda name: stand_in())
    assert [row.key for row in benchmarks.read_benchmark("dsr", str(tmp_path))] == [
        "A",
        "B",
        "C",
        "B",
        "D",
        "A",
    ]


def test_vlm4d_keys_paths_and_kinds(tmp_path):
    rows = benchmarks.read_benchmark("vlm4d", str(vlm4d_files(tmp_path)))
    assert [row.key for row in rows] == ["B", "B", "AC", "D", "A", "A"]
    kinds = ["Real Exo", "Real Ego", "Real Exo", "Synthetic FP", "Synthetic Dir", "Synthetic FP"]
    assert [row.subtask for row in rows] == kinds
    assert rows[1].options == {"A": "1", "B": "2", "C": "3"}
    assert rows[0].video == "videos_real/davis/a.mp4"
    assert rows[0].id == rows[3].id and rows[0].source != rows[3].source


def test_dsi_options_and_versions(tmp_path):
    rows = benchmarks.read_benchmark("dsi", str(dsi_files(tmp_path)))
    assert len(rows) == 12 and [row.release_fields["twin"] for row in rows] == [1, 2, 3] * 4
    assert rows[0].options == {"A": 'Left; then "up"', "B": "Right, fast", "C": "Forward", "D": "Still"}
    assert [row.key for row in rows[::3]] == list("ABCD")
    assert rows[3].video == "hflip/cam/a.mp4" and rows[3].clip == rows[0].clip == "cam/a.mp4"
    assert rows[2].subtask == "Cam:static scene"


def whole_dsi_file(folder, order, change=None):
    """metadata_4aug.csv: the rows of the four files in another order, `aug` names their folder of videos."""
    dsi_files(folder)
    rows = []
    for version in ("std", "hflip", "reverse", "reverse_hflip"):
        with open(folder / "metadatas" / f"{version}.csv", newline="") as file:
            rows += [{"aug": version, "number": n} | row for n, row in enumerate(csv.DictReader(file))]
    rows.sort(key=order)
    rows = change(rows) if change else rows
    path = folder / "metadatas" / "metadata_4aug.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "number"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    "order", [lambda row: 0, lambda row: row["number"], lambda row: (row["number"], row["aug"])]
)
def test_dsi_in_one_file_equals_the_four(tmp_path, order):
    """Version by version or question by question, the groups and the videos are those of the four files."""
    path = whole_dsi_file(tmp_path, order)
    rows, four = benchmarks.read_benchmark("dsi", str(path)), benchmarks.read_benchmark("dsi", str(tmp_path))

    def facts(some):
        return sorted((row.release_fields["twin"], row.video, row.key, row.text_input) for row in some)

    assert len(rows) == 12 and facts(rows) == facts(four)
    assert rows[0].release_fields["index"] == 0 and rows[-1].source.endswith("metadata_4aug.csv:12")


def test_dsi_in_one_file_with_mixed_orders_or_without_versions_is_refused(tmp_path):
    def mixed(rows):
        return rows[:3] + rows[3:6][::-1] + rows[6:]

    path = whole_dsi_file(tmp_path, lambda row: 0, mixed)
    refused(
        lambda: benchmarks.read_benchmark("dsi", str(path)), "4aug.csv:4:", "different orders", "four files"
    )
    path = whole_dsi_file(tmp_path, lambda row: 0, lambda rows: [row | {"aug": None} for row in rows])
    refused(lambda: benchmarks.read_benchmark("dsi", str(path)), "4aug.csv:1", "/cam/a.mp4", "inside VIDEOS")


def test_dyn_scenes_and_frames(tmp_path):
    rows = benchmarks.read_benchmark("dyn", str(dyn_files(tmp_path)))
    assert sorted(row.subtask for row in rows) == [
        "Camera-Object",
        "Inter-Object",
        "Inter-Object",
        "Object-Scene",
    ]
    assert rows[0].options == {"A": "near", "B": "far", "C": "left", "D": "right"}
    videos.attach_frames(rows, root=tmp_path / "frames", cache=tmp_path / "cache", fps=2.0, most=4)
    assert rows[0].times == [0.0, 1.0, 2.0, 3.0] and not rows[0].skip_reason
    assert [path[-8:-4] for path in rows[0].image_input] == ["0000", "0002", "0004", "0006"]


# ---------------------------------------------------------------- two rules, and counts


@pytest.mark.parametrize(
    "text, strict, release",
    [
        ("<answer>B. x</answer><|im_end|>", "B", "B"),
        ("<answer>The answer is C</answer>", None, "C"),
        ("<answer>Best option: D</answer>", None, "D"),
        ("<answer>none of these</answer> so Analyzing", None, "A"),
        ("<think>Analyzing the", None, "A"),
        ("<ANSWER>b or D</ANSWER>", None, "D"),
        ("<answer>A</answer><answer>B</answer>", None, "A"),
        ("<answer>E</answer>", None, ""),
        ("<|latent_start|><|latent_pad|><|latent_end|>", None, ""),
        ("no<|im_end|>B", None, ""),
    ],
)
def test_both_rules(text, strict, release):
    assert evaluate.parse_answer(text, "ABCD") == strict
    assert evaluate.release_answer(text) == release


def judged(rows, texts):
    """Results of some answers' texts, as evaluate has them."""
    results = []
    for number, (row, text) in enumerate(zip(rows, texts)):
        completion = Completion([0], [False], [True], torch.zeros(0, 8), truncated=False, text=text)
        results.append(evaluate.score_answer(row, number, completion, 4))
    return results


def tagged(letters):
    return [f"<answer>{letter}</answer>" for letter in letters]


def test_dsr_counts(tmp_path):
    rows = benchmarks.read_benchmark("dsr", str(dsr_file(tmp_path)))
    texts = [*tagged("ABA"), "<think>Before", *tagged("D"), "So A"]
    summary = evaluate.summarise(judged(rows, texts))
    counted = {name: (s["n"], s["correct"], s["release"]) for name, s in summary["scores"].items()}
    assert list(counted) == ["Abs Dis", "Abs Spd", "Rel Dir", "Non-Temp Based", "micro"]
    assert counted["Abs Spd"] == (3, 1, 1.0) and counted["Abs Dis"] == (1, 1, 1.0)
    assert counted["Non-Temp Based"] == (1, 0, 0.0) and counted["micro"] == (6, 3, pytest.approx(5 / 6))
    assert summary["macro"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert summary["release_macro"] == pytest.approx(3 / 4) and summary["differ"] == pytest.approx(2 / 6)
    assert summary["no_answer"] == 2
    line = judged(rows, texts)[3].to_json()
    fields = {"index": 3, "video_id": "v_3", "gt": "B", "pred": "B", "hit": 1, "subtask_type": "abs_spd"}
    fields |= {"raw": "<think>Before", "question": rows[3].text_input}
    assert {name: line[name] for name in fields} == fields


RELEASE_FIELDS = (
    "total eval_count skipped correct accuracy subtask_accuracy subtask_correct subtask_total "
    "subtask_macro_avg subtask_columns_order"
).split()


def test_dsr_summary_as_the_release_writes_it(tmp_path):
    """By the release's rule: "<think>Before" counts as B, the key, so 5 of 6; two more have no video."""
    rows = benchmarks.read_benchmark("dsr", str(dsr_file(tmp_path)))
    results = judged(rows, [*tagged("ABA"), "<think>Before", *tagged("D"), "So A"])
    summary = scores.release_summary(results, evaluate.summarise(results) | {"left_out": ["x", "y"]})
    assert sorted(summary) == sorted(RELEASE_FIELDS)
    assert (summary["total"], summary["eval_count"], summary["skipped"], summary["correct"]) == (8, 6, 2, 5)
    assert summary["accuracy"] == pytest.approx(5 / 6)
    assert summary["subtask_macro_avg"] == pytest.approx(
        (1 + 1 + 1 + 0) / 4
    )  # of the four that are not empty
    order = summary["subtask_columns_order"]
    assert (order[0], order[3], order[-2:], len(order)) == (
        "Abs Dis",
        "Abs Spd",
        ["Non-Temp Based", "Avg"],
        14,
    )
    for field, none, some in (
        ("accuracy", None, {"Abs Dis": 1.0, "Abs Spd": 1.0, "Rel Dir": 1.0, "Non-Temp Based": 0.0}),
        ("correct", 0, {"Abs Dis": 1, "Abs Spd": 3, "Rel Dir": 1, "Non-Temp Based": 0}),
        ("total", 0, {"Abs Dis": 1, "Abs Spd": 3, "Rel Dir": 1, "Non-Temp Based": 1}),
    ):
        assert summary[f"subtask_{field}"] == {name: some.get(name, none) for name in order[:-1]}


def test_mean_and_spread_over_seeds(tmp_path, capsys):
    """Right answers 6, 5 and 3 of 6; in the second run one is a guess that only the release's rule sees."""
    rows = benchmarks.read_benchmark("dsr", str(dsr_file(tmp_path)))
    answers = [tagged("ABCBDA"), [*tagged("ABCBD"), "So A"], tagged("ABCAAB")]
    more = [{"settings": {"seed": seed}, "left_out": ["one"]} for seed in (4, 5, 6)]
    runs = [evaluate.summarise(judged(rows, texts)) | more[n] for n, texts in enumerate(answers)]
    for n, retrieval in enumerate((0.5, None, 1.0)):  # the second run imagined nothing
        runs[n]["imagery"] |= {"retrieval": retrieval, "cosine": [] if retrieval is None else [retrieval] * 2}
        runs[n]["imagery"]["object_by_block"] = [[0.5, 0.25], [], [1.0]][n]  # the first imagined further
    summary = scores.average_over_seeds(runs)
    micro = summary["scores"]["micro"]
    assert (micro["n"], micro["correct"]) == (6, pytest.approx(14 / 3))
    assert micro["accuracy"] == pytest.approx((6 / 6 + 5 / 6 + 3 / 6) / 3)
    assert micro["accuracy_spread"] == pytest.approx(math.sqrt((4**2 + 1 + 5**2) / 2) / 18)  # 18ths off 14
    assert micro["release"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert micro["release_spread"] == pytest.approx(math.sqrt(3 / 36))  # 1/6, 1/6 and -1/3 from 5/6
    assert (micro["low"], micro["high"]) == scores.wilson_interval(14 / 3, 6)
    speed = summary["scores"]["Abs Spd"]  # 3, 2 and 1 of 3 questions
    assert (speed["n"], speed["accuracy"]) == (3, pytest.approx(2 / 3))
    macros = [1, (1 + 2 / 3 + 1 + 1) / 4, (1 + 1 / 3 + 0 + 1) / 4]
    assert summary["macro"] == pytest.approx(sum(macros) / 3)
    assert summary["macro_spread"] == pytest.approx(np.std(macros, ddof=1))
    assert summary["no_answer"] == pytest.approx(1 / 3)
    assert summary["imagery"]["retrieval"] == pytest.approx(0.75)
    assert summary["imagery"]["cosine"] == [0.75, 0.75]
    assert summary["imagery"]["object_by_block"] == [0.75, 0.25]
    assert (summary["seeds"], summary["settings"], summary["left_out"]) == (3, {"seed": 4}, ["one"])
    assert "note" in runs[0]["scores"]["micro"] and runs[0]["scores"]["micro"]["note"] == ""
    evaluate.print_table(summary)
    assert re.search(r"micro +6 +4\.6667 +77\.8 .* ± 25\.5%, release ± 28\.9%", capsys.readouterr().out)


def test_vlm4d_counts_either_of_two_equal_options(tmp_path):
    rows = benchmarks.read_benchmark("vlm4d", str(vlm4d_files(tmp_path)))
    scored = evaluate.summarise(judged(rows, tagged("ABCDBA")))["scores"]
    assert {name: (s["n"], s["correct"]) for name, s in scored.items()} == {
        "Real Ego": (1, 1),
        "Real Exo": (2, 1),
        "Synthetic Dir": (1, 0),
        "Synthetic FP": (2, 2),
        "Real": (3, 2),
        "Synthetic": (3, 2),
        "micro": (6, 4),
    }
    assert "Key: A. left or C. left" in report.verdict(rows[2], judged(rows, tagged("ABCDBA"))[2])


def test_dsi_counts_samples_and_groups(tmp_path):
    rows = benchmarks.read_benchmark("dsi", str(dsi_files(tmp_path)))
    wrong = {0, 1, 4}  # of question 1 one version, of question 2 two
    texts = tagged("ABCD"["ABCD".index(row.key) - (n in wrong)] for n, row in enumerate(rows))
    scored = evaluate.summarise(judged(rows, texts))["scores"]
    assert (scored["micro"]["n"], scored["micro"]["correct"]) == (12, 9)
    assert (scored["micro, 3 of 4"]["n"], scored["micro, 3 of 4"]["correct"]) == (3, 2)
    assert scored["Obj:static cam, 3 of 4"]["correct"] == 1
    assert scored["Obj:moving cam, 3 of 4"]["correct"] == 0
    assert scored["micro, 3 of 4"]["chance"] == pytest.approx(4 * 0.25**3 * 0.75 + 0.25**4)
    fewer = evaluate.summarise(judged(rows[:-1], texts[:-1]))["scores"]  # a version is missing: no group
    assert fewer["micro, 3 of 4"]["n"] == 2


# ---------------------------------------------------------------- videos


def test_frames_have_their_true_times_and_are_decoded_once(tmp_path, monkeypatch):
    make_video(tmp_path / "a b/ü.mp4", seconds=5)
    make_video(tmp_path / "c/ü.mp4", seconds=5, seed=1)

    def frames_of(name, most=50):
        return videos.frames_on_disk(tmp_path / name, tmp_path / "cache", 1.0, most)

    frames, reason = frames_of("a b/ü.mp4")
    assert [time for _, time in frames] == [0, 1, 2, 3, 4] and reason == ""
    other = frames_of("c/ü.mp4")[0]
    assert not {path for path, _ in frames} & {path for path, _ in other}
    assert [time for _, time in frames_of("c/ü.mp4", most=3)[0]] == [0, 2, 4]
    monkeypatch.setattr(videos, "decode_frames", lambda *words: pytest.fail("decoded again"))
    assert frames_of("a b/ü.mp4") == (frames, "")


def test_times_stand_before_the_question_where_wanted(bench, monkeypatch):
    """What the model reads, in one run with and one without; what is not seen has no times."""
    rows = benchmarks.read_benchmark("dsr", str(bench / "benchmark.json"))
    videos.attach_frames(rows, root=bench / "videos", cache=bench / "cache", fps=1.0, most=50)
    prompts, encode_row = [], evaluate.encode_row

    def spy(model, row, answer):
        prompts.append(row.text_input)
        return encode_row(model, row, answer)

    monkeypatch.setattr(evaluate, "encode_row", spy)
    model, asked = load_model(bench / "model"), rows[1].text_input
    for timed in (False, True):
        settings = Settings(max_new=2, times_in_prompt=timed)
        evaluate.answer(model, rows, [1], settings, TrueLatents(model, rows))
    assert prompts == [asked, f"The frames of the video were taken at 0.0, 1.0, 2.0 seconds.\n{asked}"]

    def question(rows, index, video):
        settings = Settings(video=video, times_in_prompt=True)
        return evaluate.apply_video_control(rows, index, settings).text_input

    assert question(rows, 1, "none") == asked
    two = [rows[1], dataclasses.replace(rows[0], subtask=rows[1].subtask)]
    assert "taken at 0.0, 1.0 seconds" in question(two, 0, "other")
    assert "taken at 0.0, 1.0, 2.0 seconds" in question(rows, 1, "shuffled")


def test_videos_that_cannot_be_used_are_named_and_leave_nothing(tmp_path):
    make_video(tmp_path / "whole.mp4")
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    (tmp_path / "empty").mkdir()
    reasons = {name: "cannot be decoded" for name in ("zero.mp4", "noise.mp4", "cut.mp4")}
    reasons |= {"gone.mp4": "there is no", "empty": "frame_"}
    for name, expected in reasons.items():
        frames, reason = videos.frames_on_disk(tmp_path / name, tmp_path / "cache", 1.0, 50)
        assert expected in reason and frames == []
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- whole runs on a random network


@pytest.fixture(scope="module")
def bench(tiny, tmp_path_factory):
    """A folder with DSR-Bench (four videos, a missing one) and a checkpoint that says much: model/."""
    folder = tmp_path_factory.mktemp("bench")
    dsr_file(folder)
    for number in range(4):
        make_video(folder / "videos" / f"v_{number}.mp4", seconds=2 + number, seed=number)
    model = lively(tiny)
    model.qwen.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    return folder


def words(bench, out, *more):
    """The command line of a run."""
    line = [f"MODEL={bench / 'model'}", "BENCH=dsr", f"DATA={bench / 'benchmark.json'}"]
    line += [f"VIDEOS={bench / 'videos'}", f"CACHE={bench / 'cache'}", f"OUT={out}", "MAX_NEW=10"]
    return [*line, *more]


def lines(out):
    return read_jsonl(out / "results.jsonl")


def test_a_benchmark_from_the_command_line(bench, monkeypatch, capsys):
    out = bench / "whole"
    run_script(monkeypatch, "evaluate.py", *words(bench, out))
    printed = capsys.readouterr().out
    assert re.search(r"micro +5 .*1 left out: no video", printed)
    summary = read_json(out / "summary.json")
    assert summary["left_out"] == [f"{bench}/benchmark.json:5: there is no {bench}/videos/v_missing.mp4"]
    assert [line["row"] for line in lines(out)] == [0, 1, 2, 3, 5]
    release = "index video_id video_path question gt pred answer raw hit subtask_type".split()
    assert set(release) <= set(lines(out)[4]) and lines(out)[4]["index"] == 5
    assert lines(out)[4]["video_path"] == f"{bench}/videos/v_0.mp4"
    assert lines(out)[4]["raw"] == lines(out)[4]["text"]
    files = "picture.png report.html results.jsonl results_summary.json settings.json summary.json"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    of_release = read_json(out / "results_summary.json")
    assert (of_release["total"], of_release["eval_count"], of_release["skipped"]) == (6, 5, 1)
    assert of_release["correct"] == sum(line["hit"] for line in lines(out))
    page = (out / "report.html").read_text()
    assert "1 left out: no video" in page and page.count("<article") == 4  # all are wrong: half of SAMPLES
    assert not re.search(r"<script|(?:src|href)=[\"']?(?:https?:)?//", page)
    run_script(monkeypatch, "evaluate.py", *words(bench, bench / "few", "LIMIT=2"))
    assert lines(bench / "few") == lines(out)[:2]


def same(one, other):
    """Rows alike, whatever the batch: here no two logits are near enough to differ."""
    assert [line["text"] for line in one] == [line["text"] for line in other]
    assert one == other


def test_batches_processes_and_a_kill_change_no_answer(bench, monkeypatch):
    run_script(monkeypatch, "evaluate.py", *words(bench, bench / "one", "BATCH=1"))
    run_script(monkeypatch, "evaluate.py", *words(bench, bench / "sixteen", "BATCH=16"))
    same(lines(bench / "one"), lines(bench / "sixteen"))

    whole = (bench / "one" / "results.jsonl").read_text()
    (bench / "one" / "results.jsonl").write_text(whole[: whole.index("\n") + 100])  # one line and a piece
    (bench / "one" / "summary.json").unlink()
    run_script(monkeypatch, "evaluate.py", *words(bench, bench / "one", "BATCH=1"))
    assert (bench / "one" / "results.jsonl").read_text() == whole

    shutil.rmtree(bench / "cache")
    two_processes("evaluate.py", *words(bench, bench / "two", "BATCH=2", "SAMPLES=1"))
    same(lines(bench / "two"), lines(bench / "sixteen"))


def test_sampling_is_a_function_of_seed_and_row(bench, monkeypatch):
    hot = ("TEMPERATURE=0.9", "TOP_P=0.9")
    for name, *more in (("hot1", "BATCH=1"), ("hot16", "BATCH=16"), ("seed", "SEED=1")):
        run_script(monkeypatch, "evaluate.py", *words(bench, bench / name, *hot, *more))
    same(lines(bench / "hot1"), lines(bench / "hot16"))
    texts = [[line["text"] for line in lines(bench / name)] for name in ("hot1", "seed")]
    assert texts[0] != texts[1]
    for word in ("FPS=2.0", "SEED=2", "SECONDS_PER_PAIR=2.0", "SUFFIX=x", "TIMES_IN_PROMPT=True"):
        again = words(bench, bench / "hot1", *hot, word)
        refused(lambda again=again: run_script(monkeypatch, "evaluate.py", *again), "delete")


def test_several_seeds_in_one_run(bench, monkeypatch, capsys):
    """Each seed's rows are those of a run of its own, and stay; OUT holds the mean and the page."""
    hot, out = ("TEMPERATURE=0.9", "TOP_P=0.9", "SAMPLES=1"), bench / "seeds"
    run_script(monkeypatch, "tools/seeds.py", *words(bench, out, *hot, "SEED=3", "RUNS=2"))
    assert sorted(path.name for path in out.iterdir()) == [
        "picture.png",
        "report.html",
        "seed_3",
        "seed_4",
        "summary.json",
    ]
    run_script(monkeypatch, "evaluate.py", *words(bench, bench / "four", *hot, "SEED=4"))
    assert lines(out / "seed_4") == lines(bench / "four") and lines(out / "seed_3") != lines(out / "seed_4")
    runs = [read_json(out / name / "summary.json") for name in ("seed_3", "seed_4")]
    summary = read_json(out / "summary.json")
    assert summary["tokens"] == sum(run["tokens"] for run in runs) / 2 and summary["seeds"] == 2
    assert summary == scores.average_over_seeds(runs)
    assert "± " in (out / "report.html").read_text()

    kept = {name: (out / name / "results.jsonl").read_text() for name in ("seed_3", "seed_4")}
    (out / "seed_4" / "results.jsonl").write_text(kept["seed_4"][:-20])  # killed in the second run
    (out / "summary.json").unlink()
    capsys.readouterr()
    run_script(monkeypatch, "tools/seeds.py", *words(bench, out, *hot, "SEED=3", "RUNS=2"))
    printed = capsys.readouterr().out
    assert (
        "seed_3: 5 answers are there already" in printed and "seed_4: 4 answers are there already" in printed
    )
    assert {name: (out / name / "results.jsonl").read_text() for name in kept} == kept
    assert read_json(out / "summary.json") == summary
    for more, advice in {
        ("RUNS=0",): "2 or more",
        ("RUNS=-1", "TEMPERATURE=0.7"): "2 or more",
        ("RUNS=3", "TEMPERATURE=0"): "TEMPERATURE",
        ("RUNS=3", "TEMPERATURE=0", "VIDEO=none"): "TEMPERATURE",
        ("RUNS=3", "TEMPERATURE=0", "LATENTS=zero"): "TEMPERATURE",
    }.items():
        again = words(bench, bench / "none", *more)
        refused(lambda again=again: run_script(monkeypatch, "tools/seeds.py", *again), more[0], advice)


def test_controls_on_a_benchmark(bench, monkeypatch):
    for word in ("VIDEO=none", "VIDEO=other", "VIDEO=shuffled", "LATENTS=zero", "LATENTS=swap"):
        out = bench / f"whole_{word.lower().replace('=', '-')}"
        kinds = {"abs_spd"} if word in ("VIDEO=other", "LATENTS=swap") else {"abs_spd", "abs_dis", "non_temp"}
        rows = json.loads((bench / "benchmark.json").read_text()).values()
        data = dump(bench / f"{word}.json", [row for row in rows if row["type"] in kinds])
        more = [f"DATA={data}", word, "SAMPLES=1"]
        run_script(monkeypatch, "evaluate.py", *words(bench, out, *more))
        assert read_json(out / "settings.json")[word.split("=")[0].lower()]
        assert len(lines(out)) == (3 if len(kinds) == 1 else 5)
    oracle = words(bench, bench / "oracle", "LATENTS=oracle")
    refused(lambda: run_script(monkeypatch, "evaluate.py", *oracle), "LATENTS=oracle", "overlays")


@pytest.mark.parametrize("kind", ["vlm4d", "dsi", "dyn"])
def test_the_other_benchmarks_run_with_their_controls(bench, monkeypatch, tmp_path, kind):
    """From the files to summary.json; what a control changes is what it says, and no row is lost."""
    videos = {"vlm4d": tmp_path, "dsi": tmp_path / "videos", "dyn": tmp_path / "frames"}[kind]
    {"vlm4d": vlm4d_files, "dsi": dsi_files, "dyn": dyn_files}[kind](tmp_path)
    rows = benchmarks.read_benchmark(kind, str(tmp_path))
    for seed, video in enumerate(sorted({row.video for row in rows} if kind != "dyn" else ())):
        make_video(videos / video, seconds=2, seed=seed)
    here = [f"BENCH={kind}", f"DATA={tmp_path}", f"VIDEOS={videos}", "MAX_NEW=6", "SAMPLES=1"]
    for control in ("", "VIDEO=none", "VIDEO=shuffled", "LATENTS=noise", "LATENTS=pad"):
        out = tmp_path / f"out_{control}"
        more = [f"OUT={out}", *filter(None, [control])]
        run_script(monkeypatch, "evaluate.py", *words(bench, out, *here, *more))
        summary = read_json(out / "summary.json")
        assert summary["scores"]["micro"]["n"] == len(rows) == len(lines(out)) and not summary["left_out"]
        assert "micro, 3 of 4" in summary["scores"] or kind != "dsi"
    assert not (out / "results_summary.json").exists()  # that is DSR-Bench's


def test_ask_one_question_about_one_video(bench, monkeypatch, capsys):
    out, video = bench / "asked", bench / "videos" / "v_1.mp4"
    more = [
        "QUESTION=Where <to>?",
        f"VIDEO_FILE={video}",
        f"OUT={out}",
        "MAX_NEW=6",
        f"CACHE={bench / 'cache'}",
    ]
    run_script(monkeypatch, "tools/ask.py", f"MODEL={bench / 'model'}", "OPTIONS=left|right|up", *more)
    said = capsys.readouterr().out
    assert "answered: " in said
    page = (out / "report.html").read_text()
    # who reads either one is warned: a network of this size knows no real video
    for text in (said, page):
        assert "A toy answer: it is by a toy network of" in text
        assert "about real video it is right by chance at most" in text
    assert "Where &lt;to&gt;?" in page and "C. up" in page and 'data-mark="asked"' in page
    assert page.count("<img") >= 1
    run_script(monkeypatch, "tools/ask.py", f"MODEL={bench / 'model'}", *more)  # an open question
    gone = [f"MODEL={bench / 'model'}", *more, "VIDEO_FILE=gone.mp4"]
    refused(lambda: run_script(monkeypatch, "tools/ask.py", *gone), "gone.mp4")
    for options in ("left", "a|b|c|d|e|f|g"):
        wrong = [*gone, f"OPTIONS={options}"]
        refused(lambda wrong=wrong: run_script(monkeypatch, "tools/ask.py", *wrong), "OPTIONS=", "2 to 6")


def test_the_bundled_network_gives_toy_answers_and_a_large_one_does_not():
    """By the number of weights: those of assets/tiny are counted, a large network needs no notice."""
    (note,) = toy_notes(load_model(str(ROOT / "assets/tiny")))
    assert re.match(r"A toy answer: it is by a toy network of \d\.\d million weights, ", note)

    large = SimpleNamespace(numel=lambda: 3 * 10**9)
    assert toy_notes(SimpleNamespace(qwen=SimpleNamespace(parameters=lambda: [large]))) == []


# ---------------------------------------------------------------- the authors' checkpoint, imitated


def test_a_checkpoint_of_the_release_is_scored(bench, tiny, monkeypatch):
    """Random weights in its layout: legacy keys, a flat config, its fields, no preprocessor file.

    Its real vocabulary of 151,668 rows is not imitated, only that no row is left after the latent tokens.
    """
    folder = bench / "release"
    shutil.copytree(bench / "model", folder)
    config = read_json(folder / "config.json")
    model = load_model(folder)
    rows = max(model.token_id[name] for name in ("latent_pad", "latent_start", "latent_end")) + 1
    renamed = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[name] = weight[:rows].clone() if "embed_tokens" in name else weight
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    ours = ("latent_pooling", "prompt_suffix", "min_pixels", "max_pixels", "latent_norm", "seconds_per_pair")
    flat = {name: value for name, value in config.items() if name not in ours} | config.pop("text_config")
    flat |= {"model_type": "qwen2_5_vl", "vocab_size": rows, "tie_word_embeddings": True}
    flat |= {"compress_strategy": "average", "stage": "stage1", "ce_loss_weight": 0.1, "sim_loss_weight": 1.0}
    flat.pop("text_config")
    (folder / "config.json").write_text(json.dumps(flat))
    for name in ("generation_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    suffix = (ROOT / "assets" / "suffix_release.txt").read_text()
    more = [f"MODEL={folder}", f"SUFFIX={suffix}", "SECONDS_PER_PAIR=2.0", "TEMPERATURE=0.7", "TOP_P=0.9"]
    run_script(monkeypatch, "evaluate.py", *words(bench, bench / "of_release", *more))
    settings = read_json(bench / "of_release" / "settings.json")
    assert settings["prompt_suffix"].startswith("\nFirst, think") and settings["seconds_per_pair"] == 2.0
    loaded = load_model(folder)
    assert loaded.K == 4 and loaded.config.latent_pooling == "strips"
    assert loaded.qwen.get_input_embeddings().num_embeddings == rows
    assert len(lines(bench / "of_release")) == 5


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"type": "fast"}, ("fast", "BENCH=dsr")),
        ({"type": None}, ("no type",)),
        ({"question": None}, ("no question",)),
        ({"answer": "E"}, ("'E'", "none of the options")),
        ({"answer": "Wrong"}, ("'Wrong'", "none of the options")),
        ({"candidates": ["x"]}, ("2 to 6 options",)),
        ({"candidates": list("tuvwxyz")}, ("2 to 6 options",)),
        ({"candidates": "['x', "}, ("2 to 6 options",)),
        ({"candidates": 5}, ("2 to 6 options",)),
        ({"candidates": "{[1]: 2}"}, ("2 to 6 options",)),
        ({"type": 3}, ("'3'", "BENCH=dsr")),
        ({"candidates": {"A": "x", "C": "y"}}, ("2 to 6 options",)),
        ({"candidates": {"A": ["x"], "B": "y"}}, ("2 to 6 options",)),
        ({"candidates": "{'x', 'y'}"}, ("2 to 6 options",)),
        ({"candidates": "1+" * 5000 + "1"}, ("2 to 6 options",)),
        ({"candidates": [float("nan"), "y"]}, ("2 to 6 options",)),
        ({"candidates": ["B. x", "A. y"]}, ("letters", "not in order")),
        ({"candidates": ["A. x", "A. y"]}, ("letters", "not in order")),
        ({"answer": ["A"]}, ("the answer must be a text",)),
        ({"question": 5}, ("the question must be a text",)),
        ({"question": "a\0b"}, ("the question must be a text",)),
        ({"video": "../v_0.mp4"}, ("../v_0.mp4", "inside VIDEOS")),
        ({"video": "/v_0.mp4"}, ("/v_0.mp4", "inside VIDEOS")),
    ],
)
def test_a_bad_row_is_left_out_with_its_reason(tmp_path, change, expected):
    """The others are asked: one bad row does not end a benchmark."""
    rows = benchmarks.read_benchmark("dsr", str(dsr_file(tmp_path, **change)))
    assert [bool(row.skip_reason) for row in rows] == [False, False, True, False, False, False]
    assert rows[2].source.endswith("benchmark.json:3")
    for words in expected:
        assert words in rows[2].skip_reason


def test_a_table_that_was_cut_off_loses_no_rows_silently(tmp_path):
    """A quote that is not closed would take all lines after it into one cell."""
    head = "video,question,type,answer,options\n"
    line = "v,How?,abs_spd,B,\"['x', 'y']\"\n"
    cut = tmp_path / "b.csv"
    cut.write_text(head + line * 3 + line.rstrip('"\n') + "\n" + "v,How?,abs_spd,B,x\n" * 2)
    refused(lambda: benchmarks.read_benchmark("dsr", str(cut)), "b.csv")
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": \n')
    refused(lambda: benchmarks.read_benchmark("dsr", str(lines)), "b.jsonl:3", "JSON")


def test_stray_quotes_do_not_join_rows_of_a_tsv(tmp_path):
    """Two cells that begin with a quote join all rows between them; a line break alone is text."""
    head = "video\tquestion\ttype\tanswer\toptions\n"
    line = "v\tHow?\tabs_spd\tB\t['x', 'y']\n"
    stray = line.replace("How?", '"How?')
    end = line.replace("How?", '"Where"')
    path = tmp_path / "b.tsv"
    path.write_text(head + line + stray + line + end + line)
    refused(lambda: tables.read_table(path), "b.tsv", "quote")
    path.write_text(head + line + stray + line.replace("v\t", 'v"\t') + line)
    refused(lambda: tables.read_table(path), "b.tsv:2", "stray quote")
    path.write_text(head + line.replace("How?", '"How\nfast?"'))
    assert [row["question"] for row in tables.read_table(path)] == ["How\nfast?"]


def test_a_bad_row_of_a_version_is_one_of_four(tmp_path):
    """DSI-Bench: the n-th rows of the four versions stay together."""
    dsi_files(tmp_path)
    path = tmp_path / "metadatas" / "hflip.csv"
    lines = path.read_text().replace("C: Forward; D: Still", "", 1)
    path.write_text(lines)
    rows = benchmarks.read_benchmark("dsi", str(tmp_path))
    twins = [row.release_fields["twin"] for row in rows]
    assert twins == [1, 2, 3] * 4 and sum(bool(row.skip_reason) for row in rows) <= 1


def test_a_bad_file_is_one_sentence(tmp_path, monkeypatch):
    vlm4d_files(tmp_path), dsi_files(tmp_path)
    path = str(tmp_path / "QA" / "real_mc.json")
    refused(lambda: benchmarks.read_benchmark("dsr", path), "real_mc.json:1", "no type", "BENCH=dsr")
    path = str(tmp_path / "metadatas" / "std.csv")
    refused(lambda: benchmarks.read_benchmark("vlm4d", path), "std.csv:1", "BENCH=vlm4d")
    refused(lambda: benchmarks.read_benchmark("dyn", path), "std.csv:1", "'std'")
    refused(lambda: benchmarks.read_benchmark("dsb", path), "BENCH=dsb", "dsr, dyn, vlm4d, dsi")
    refused(lambda: benchmarks.read_benchmark("dyn", str(tmp_path)), "holds no")
    dump(tmp_path / "train.json", {"v_0": [{"Type": "abs_dis"}]})
    refused(lambda: benchmarks.read_benchmark("dsr", str(tmp_path / "train.json")), "train.json:1", "no type")
    dump(tmp_path / "five.json", 5)
    refused(
        lambda: benchmarks.read_benchmark("dsr", str(tmp_path / "five.json")), "five.json", "no valid json"
    )
    (tmp_path / "benchmark.json").write_text('[{"type": ')
    refused(lambda: benchmarks.read_benchmark("dsr", str(tmp_path / "benchmark.json")), "no valid json")
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    (tmp_path / "benchmark.parquet").write_bytes(b"PAR1")
    refused(lambda: benchmarks.read_benchmark("dsr", str(tmp_path)), "pip install pyarrow")


def test_a_benchmark_of_ones_own_is_a_function_and_an_entry(tmp_path, monkeypatch):
    """Its subtasks and groups are counted in their order; a file of it needs nothing else."""
    mine = benchmarks.Benchmark(
        entry=lambda raw, path: (raw["kind"], f"clips/{raw['video']}.mkv"),
        files=("mine.json",),
        subtasks={"b": "Second", "a": "First"},
        groups={"Both": ("First", "Second")},
    )
    monkeypatch.setitem(benchmarks.BENCHMARKS, "mine", mine)
    entry = {"question": "Where?", "choices": ["here", "there"], "GT": "there"}
    dump(tmp_path / "mine.json", [entry | {"kind": kind, "video": kind} for kind in "aab"])
    rows = benchmarks.read_benchmark("mine", str(tmp_path), "root")
    assert [row.video for row in rows] == ["clips/a.mkv", "clips/a.mkv", "clips/b.mkv"]
    assert rows[2].release_fields["video_path"] == "root/clips/b.mkv"
    summary = evaluate.summarise(judged(rows, tagged("BAB")))
    assert list(summary["scores"]) == ["Second", "First", "Both", "micro"]
    assert summary["scores"]["Both"]["correct"] == 2


def test_no_video_at_all_and_a_checkpoint_of_another_kind(bench, tmp_path, monkeypatch):
    lost = words(bench, tmp_path / "out", f"VIDEOS={tmp_path}")
    refused(lambda: run_script(monkeypatch, "evaluate.py", *lost), "No question of 6 has a video", "v_0.mp4")
    for kind in ("llama", "qwen3_vl"):
        dump(tmp_path / kind / "config.json", {"model_type": kind})
        other = words(bench, tmp_path / "out", f"MODEL={tmp_path / kind}")
        refused(lambda other=other: run_script(monkeypatch, "evaluate.py", *other), kind, "Qwen2.5-VL")


def test_a_kind_that_is_missing_is_named_by_the_measure_of_the_base(capsys):
    from tools.measure_base import show

    show("x words", 0, 0)
    show("y words", 3, 4)
    printed = capsys.readouterr().out.splitlines()
    assert "none" in printed[0] and "75.0 % of     4" in printed[1]


# ---------------------------------------------------------------- the page in a browser


LOOK = """<!doctype html><title>waiting</title><iframe src="report.html" style="width:WIDTHpx"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, seen = {};
  const cards = () => [...page.querySelectorAll("article")].filter((card) => card.offsetHeight).length;
  const cut = [...page.querySelectorAll("img, td, label, .question, .spoken")].filter(
    (x) => x.offsetHeight && x.getBoundingClientRect().right > WIDTH);
  for (const input of page.querySelectorAll("input")) {
    input.click();
    seen[`${input.name} ${input.value}`] = cards();
    page.querySelector(`[name=${input.name}][value=all]`).click();
  }
  const style = getComputedStyle(page.body), wide = page.documentElement.scrollWidth;
  const facts = {wide, cut: cut.length, seen, ink: style.color, ground: style.backgroundColor};
  document.title = JSON.stringify(facts);
};
</script>"""


def look(folder, width, *flags):
    """What a headless Chromium says of folder/report.html in a frame of this width -> dict."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium: the page was not looked at in a browser")
    (folder / "look.html").write_text(LOOK.replace("WIDTH", str(width)))
    flags += ("--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    run = [browser, *flags, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000"]
    run += ["--dump-dom", (folder / "look.html").as_uri()]
    env = os.environ | {"HOME": str(folder)}
    dom = subprocess.run(run, env=env, capture_output=True, text=True, timeout=240, check=True).stdout
    return json.loads(re.search("<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))


def test_the_page_in_a_browser(bench, monkeypatch, tmp_path):
    """At a phone's width nothing is cut off or scrolls sideways, the filters filter, dark mode is dark."""
    run_script(monkeypatch, "tools/seeds.py", *words(bench, tmp_path / "page", "TEMPERATURE=0.9", "RUNS=2"))
    page = tmp_path / "page"
    text = (page / "report.html").read_text()
    marks = re.findall(r'<article class="card" data-mark="(\w+)" data-subtask="([^"]+)"', text)
    phone, dark = look(page, 390), look(page, 390, "--force-dark-mode")
    assert phone["wide"] <= 390 and phone["cut"] == 0
    wanted = {f"mark {name}": sum(mark == name for mark, _ in marks) for name in ("right", "wrong")}
    wanted |= {f"subtask {name}": sum(kind == name for _, kind in marks) for name in {x for _, x in marks}}
    assert phone["seen"] == wanted | {"mark all": len(marks), "subtask all": len(marks)}
    assert len({kind for _, kind in marks}) > 1
    assert phone["ground"] == "rgb(251, 251, 249)" and dark["ground"] == "rgb(20, 23, 26)"
    assert look(page, 1200)["wide"] <= 1200
