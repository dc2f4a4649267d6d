"""evaluate.py: parser, counts, controls, retrieval, resume, picture, report; one test really generates."""

import dataclasses
import importlib
import json
import math
import re
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
from evaluate import Settings, TrueLatents
from helpers import ROOT, refused, run_script, two_processes
from lib import imagery, report, scores
from lib.files import read_json, read_jsonl
from lib.rows import read_rows
from lib.scores import Result
from model import Completion, load_model
from tools.make_tiny import make_network


# ---------------------------------------------------------------- a small world: 6 clips, 12 questions


def make_rows(folder):
    """Clips of four random frames, two questions on each, each overlay another random image."""
    generator = torch.Generator().manual_seed(0)

    def image(name):
        small = torch.randint(0, 255, (4, 4, 3), generator=generator, dtype=torch.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small.numpy()).resize((28, 28)).save(folder / name)
        return name

    rows = []
    for clip in range(6):
        frames = [image(f"clips/{clip}/frames/{t}.png") for t in range(4)]
        for subtask, label in (("camera_single", "Pan <b>Left</b>"), ("object_direction", "Moving Up")):
            question = f"What moves in clip {clip} & how?"
            overlays = [image(f"clips/{clip}/overlays/{subtask}_{n}.png") for n in range(2)]
            rows.append(
                {
                    "id": f"{clip}_{subtask}",
                    "text_input": f"{question}\n\nA. {label}\nB. Stay\nC. Roll\nD. Dolly In",
                    "text_output": "<think>It <output_image>is <output_image></think>\n<answer>A. x</answer>",
                    "image_input": frames,
                    "image_output": overlays,
                    "times": [0.0, 1.0, 2.0, 3.5],
                    "subtask": subtask,
                    "clip": str(clip),
                }
            )
    path = folder / "test_imagery.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(rows, random tiny model, folder with the data in data/ and the checkpoint in model/)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluate")
    path = make_rows(folder / "data")
    make_network(folder / "base", folder / "data")
    model = load_model(folder / "base", K=4, pooling="grid")
    model.qwen.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    return read_rows(path), model, folder


def number_of(text):
    return zlib.crc32(text.encode())


def answer_text(letter, blocks, K=4):
    """An answer as generate decodes it."""
    block = "<|latent_start|>" + "<|latent_pad|>" * K + "<|latent_end|>"
    return f"<think>I <look> {block * blocks} so</think>\n<answer>{letter}. x</answer><|im_end|>"


def fake_generate(model, samples, max_new, vision, temperature, top_p, generators, feed):
    """Two blocks a row; hidden states and the letter depend on the question alone, never on batch-mates."""
    fed = []
    for block in range(2):
        for k in range(model.K):
            seeds = [number_of(f"{sample.source} {block} {k}") for sample in samples]
            hidden = torch.stack(
                [torch.randn(128, generator=torch.Generator().manual_seed(s)) for s in seeds]
            )
            places = [torch.full((len(samples),), place) for place in (block, k)]
            fed.append(hidden if feed is None else feed(hidden, *places))
    answers = []
    for row, sample in enumerate(samples):
        letter = "AB"[number_of(sample.source.split(":")[-1]) % 2]
        latents = torch.stack([step[row] for step in fed])
        answer = Completion([0] * 20, [], [], latents, truncated=False, text=answer_text(letter, 2))
        answers.append(answer)
    return answers


@pytest.fixture
def faked(monkeypatch):
    """Counts the calls of a fake generate."""
    calls = []

    def counted(model, samples, *args, **kwargs):
        calls.append([sample.source for sample in samples])
        return fake_generate(model, samples, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", counted)
    return calls


# ---------------------------------------------------------------- parser and counts


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B. Pan Left", "B"),
        ("(B)", "B"),
        ("(B) Pan Left", "B"),
        ("B: Pan Left", "B"),
        ("B) Pan Left", "B"),
        (" B\n", "B"),
        ("F", "F"),
        ("Backward", None),
        ("b", None),
        ("Analyzing", None),
        ("G", None),
        ("The answer is B", None),
        ("B, I think", None),
        ("(Backward)", None),
        ("(B", None),
        ("", None),
    ],
)
def test_parser_takes_a_leading_capital_option_letter_only(answer, letter):
    assert evaluate.parse_answer(f"<think>A or C</think>\n<answer>{answer}</answer><|im_end|>") == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", None),
        ("<answer>B", None),
        ("B</answer>", None),
        ("</answer>B<answer>", None),
        ("<answer>A</answer><answer>A</answer>", None),
        ("<answer>A <answer>B</answer>", None),
        ("<answer>B</answer> and A besides", "B"),
        ("<answer>B. a\nb</answer>", "B"),
        ("<ANSWER>B</ANSWER>", None),
    ],
)
def test_parser_wants_exactly_one_closed_answer(text, letter):
    assert evaluate.parse_answer(text) == letter


def test_parser_knows_the_letters_of_the_question():
    assert evaluate.parse_answer("<answer>E</answer>", "ABCD") is None
    assert evaluate.parse_answer("<answer>E</answer>", "ABCDE") == "E"


def test_wilson_interval_of_known_counts():
    assert scores.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert scores.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert scores.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert scores.wilson_interval(425, 500) == pytest.approx((0.8161, 0.8786), abs=1e-4)
    assert scores.wilson_interval(0, 0) == (0.0, 1.0)


def result(subtask, answer, options=4, **more):
    pred = answer or "A"
    values = {"row": 0, "source": "", "id": "", "subtask": subtask, "options": options, "key": "A"}
    values |= {"answer": answer, "correct": answer == "A", "pred": pred, "hit": int(pred == "A")}
    values |= {"truncated": False, "blocks": 2, "tokens": 30, "text": ""}
    return Result(**values | more)


def test_summary_equals_a_hand_count():
    block = {"retrieval": True, "chance": 0.25, "cosine": [0.5, 0.1]}
    other = {"retrieval": False, "chance": 0.5, "cosine": [0.3, 0.3]}
    results = [result("camera_single", "A", imagery=[block]), result("camera_single", "B", imagery=[other])]
    results += [result("camera_pair", "A"), result("camera_pair", "A"), result("camera_pair", "A", blocks=3)]
    results += [result("speed", None, 2, truncated=True, blocks=0, tokens=90)]
    summary = evaluate.summarise(results)
    scored = summary["scores"]
    assert {name: (s["n"], s["correct"]) for name, s in scored.items()} == {
        "camera_pair": (3, 3),
        "camera_single": (2, 1),
        "speed": (1, 0),
        "camera (both)": (5, 4),
        "micro": (6, 4),
    }
    assert summary["macro"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert scored["micro"]["accuracy"] == pytest.approx(4 / 6)
    assert scored["micro"]["chance"] == pytest.approx((5 * 0.25 + 0.5) / 6)
    assert (scored["micro"]["low"], scored["micro"]["high"]) == scores.wilson_interval(4, 6)
    assert (summary["no_answer"], summary["cut"]) == (1, 1)
    assert scored["micro"]["release"] == pytest.approx(5 / 6)  # its rule guesses A where there is no answer
    assert summary["release_macro"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert summary["differ"] == pytest.approx(1 / 6)
    assert summary["blocks"] == pytest.approx(11 / 6)
    assert summary["tokens"] == pytest.approx(40)
    found = summary["imagery"]
    assert (found["retrieval"], found["compared"]) == (0.5, 2)
    assert found["chance"] == pytest.approx(0.375)
    assert found["cosine"] == pytest.approx([0.4, 0.2])
    assert found["object"] is None and found["object_by_block"] == []  # results of an earlier version
    assert scored["camera_single"]["retrieval"] == 0.5
    assert scored["speed"]["retrieval"] is None
    json.dumps(summary, allow_nan=False)


# ---------------------------------------------------------------- controls


def show(rows, index, video, seed=0):
    return evaluate.apply_video_control(rows, index, Settings(video=video, seed=seed))


def test_other_shows_another_clip_and_always_the_same_one(world):
    rows = world[0]
    for index, row in enumerate(rows):
        shown = show(rows, index, "other")
        assert shown.image_input != row.image_input
        assert shown.image_output == row.image_output and shown.text_input == row.text_input
        assert shown == show(rows, index, "other")
    with pytest.raises(SystemExit, match="another clip"):
        show([row for row in rows if row.clip == "0"], 0, "other")


def test_shuffled_is_never_the_clip_itself_and_keeps_the_times(world):
    rows = [dataclasses.replace(world[0][0], image_input=list(frames)) for frames in ("ab", "abc", "aab")]
    for seed in range(20):
        for index, row in enumerate(rows):
            shown = show(rows, index, "shuffled", seed)
            assert sorted(shown.image_input) == sorted(row.image_input)
            assert shown.image_input != row.image_input
            assert shown.times == row.times
            assert shown == show(rows, index, "shuffled", seed)
    with pytest.raises(SystemExit, match="two frames"):
        show([dataclasses.replace(rows[0], image_input=["a"])], 0, "shuffled")


def test_none_drops_the_video_and_plain_changes_nothing(world):
    rows = world[0]
    assert show(rows, 3, "none").image_input == []
    assert show(rows, 3, "") == rows[3]


def feed_once(kind, names=(7, 8, 9), tables=None):
    """Feeds three rows: row 0 in its block 0 at k 1, row 1 in its block 2 at k 0, row 2 after a block."""
    hidden = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [5.0, 6.0, 7.0]])
    feed = evaluate.make_feed(kind, names, tables, torch.tensor([9.0, 9.0, 9.0]), K=2, seed=0)
    fed = feed(hidden, torch.tensor([0, 2, 0]), torch.tensor([1, 0, 3]))
    assert torch.equal(fed[2], hidden[2])
    return hidden[:2], fed[:2]


def test_zero_and_pad_are_fed():
    assert feed_once("zero")[1].eq(0).all()
    assert feed_once("pad")[1].eq(9).all()
    assert evaluate.make_feed("", (), None, None, 2, 0) is None


def test_noise_keeps_the_norm_and_does_not_depend_on_the_batch():
    hidden, fed = feed_once("noise")
    assert torch.allclose(fed.norm(dim=-1), hidden.norm(dim=-1))
    assert not torch.allclose(fed, hidden)
    assert torch.equal(fed, feed_once("noise")[1])
    assert not torch.allclose(fed, feed_once("noise", names=(4, 5, 6))[1])


def test_swap_and_oracle_take_block_and_k_from_their_tables():
    tables = [torch.arange(6.0).view(1, 2, 3), torch.arange(12.0).view(2, 2, 3), None]
    hidden, fed = feed_once("swap", tables=tables)
    assert torch.equal(
        fed, torch.stack([tables[0][0, 1], tables[1][0, 0]])
    )  # block 2 of 2: from the first again
    hidden, fed = feed_once("oracle", tables=tables)
    assert torch.equal(
        fed, torch.stack([tables[0][0, 1], hidden[1]])
    )  # no third true block: own hidden state
    hidden, fed = feed_once("swap", tables=[torch.zeros(0, 2, 3), tables[1], None])
    assert fed[0].eq(0).all()


def latents_of(world, kind):
    """What evaluate's answers were fed under LATENTS=kind -> {row: (n, K, D)}, truth."""
    rows, model, _ = world
    truth = TrueLatents(model, rows)
    results = evaluate.answer(model, rows, range(len(rows)), Settings(latents=kind), truth)
    return {one.row: one.latents for one in results}


def test_swap_feeds_what_a_question_of_the_same_kind_on_another_clip_made(world, faked):
    rows = world[0]
    plain, swapped = latents_of(world, ""), latents_of(world, "swap")
    for index, fed in swapped.items():
        donor = next(i for i, latents in plain.items() if torch.equal(latents, fed))
        assert rows[donor].clip != rows[index].clip
        assert rows[donor].subtask == rows[index].subtask


def test_oracle_feeds_the_true_latents_and_finds_them(world, faked):
    rows, model, _ = world
    for index, fed in latents_of(world, "oracle").items():
        assert torch.equal(fed, TrueLatents(model, rows)([index])[0])
    found = evaluate.evaluate(model, rows, settings=Settings(latents="oracle"))["imagery"]
    assert found["retrieval"] == 1.0
    assert found["cosine"] == pytest.approx([1.0] * 4, abs=1e-4)
    assert found["chance"] == pytest.approx(1 / 6)  # its own and those of the five other clips


# ---------------------------------------------------------------- retrieval


def vectors(seed, n=64):
    return torch.randn(n, 4, 16, generator=torch.Generator().manual_seed(seed))


def test_identical_latents_are_all_found_whatever_their_length():
    hit, cosine = imagery.retrieval(3 * vectors(0), vectors(0))
    assert hit.all() and torch.allclose(cosine, torch.ones(64, 4), atol=1e-5)


def test_unrelated_latents_are_found_by_chance_and_a_shared_direction_does_not_help():
    found = [imagery.retrieval(vectors(seed), vectors(seed + 100))[0] for seed in range(20)]
    assert torch.cat(found).float().mean() == pytest.approx(1 / 64, abs=0.012)
    shared = 20 * vectors(7, 1)
    found = [imagery.retrieval(vectors(seed) + shared, vectors(seed + 100) + shared) for seed in range(20)]
    assert torch.cat([hit for hit, _ in found]).float().mean() == pytest.approx(1 / 64, abs=0.012)
    assert torch.cat([cosine for _, cosine in found]).mean().abs() < 0.05
    plain = torch.cosine_similarity(vectors(0) + shared, vectors(100) + shared, dim=-1)
    assert plain.mean() > 0.9  # what the plain cosine would have said


def test_a_tie_is_a_miss_and_a_constant_finds_one_at_most():
    assert imagery.retrieval(torch.zeros(64, 4, 16), vectors(0))[0].sum() <= 1
    assert not imagery.retrieval(vectors(1, 2), vectors(0, 1).repeat(2, 1, 1))[0].any()


def test_gallery_holds_one_question_a_clip_of_the_same_kind(world):
    rows = world[0]
    gallery = imagery.gallery_of(rows + rows, 3, block=1)
    assert gallery[0] == 3 and len(gallery) == 6
    assert len({rows[i % 12].clip for i in gallery}) == 6
    assert {rows[i % 12].subtask for i in gallery} == {rows[3].subtask}
    assert imagery.gallery_of(rows, 3, block=2) == [3]  # no other row has a third block
    assert len(imagery.gallery_of(rows, 3, block=0, size=4)) == 4


# ---------------------------------------------------------------- files: resume, refusal, the same digits


def test_a_killed_run_goes_on_and_equals_an_uninterrupted_one(world, faked, tmp_path):
    rows, model, _ = world
    whole = evaluate.evaluate(model, rows, tmp_path / "whole", Settings(batch=3))
    assert len(faked) == 4
    lines = (tmp_path / "whole" / "results.jsonl").read_text().splitlines(keepends=True)
    evaluate.evaluate(model, rows, tmp_path / "killed", Settings(batch=3))
    (tmp_path / "killed" / "results.jsonl").write_text("".join(lines[:5]) + lines[5][:-1])  # no newline yet
    (tmp_path / "killed" / "summary.json").unlink()
    faked.clear()
    again = evaluate.evaluate(model, rows, tmp_path / "killed", Settings(batch=3))
    assert 2 <= len(faked) <= 4
    assert again == whole
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_half_a_line_is_answered_again(world, faked, tmp_path):
    rows, model, _ = world
    whole = evaluate.evaluate(model, rows, tmp_path, Settings(batch=4))
    lines = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(lines[: -len(lines) // 3])
    assert evaluate.evaluate(model, rows, tmp_path, Settings(batch=4)) == whole
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_the_same_command_asks_nothing_again_and_says_so(world, faked, tmp_path, capsys):
    rows, model, _ = world
    first = evaluate.evaluate(model, rows, tmp_path)
    faked.clear()
    capsys.readouterr()
    assert evaluate.evaluate(model, rows, tmp_path) == first
    assert faked == [] and "already" in capsys.readouterr().out
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept.pop("times_in_prompt") is False  # a folder from before this constant goes on as well
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    assert evaluate.evaluate(model, rows, tmp_path) == first and faked == []
    assert evaluate.evaluate(model, rows, tmp_path, resume=False) == first
    assert len(faked) == 1


def test_results_of_other_settings_are_refused(world, faked, tmp_path):
    rows, model, _ = world
    evaluate.evaluate(model, rows, tmp_path)
    for change in ({"latents": "zero"}, {"video": "none"}, {"max_new": 9}, {"seed": 1}):
        with pytest.raises(SystemExit, match=f"{next(iter(change))}=.*delete {tmp_path}"):
            evaluate.evaluate(model, rows, tmp_path, Settings(**change))
    with pytest.raises(SystemExit, match="questions="):
        evaluate.evaluate(model, rows[:-1], tmp_path)
    weight = model.qwen.get_input_embeddings().weight
    before = weight.detach().clone()
    weight.data += 1e-3
    with pytest.raises(SystemExit, match="weights="):
        evaluate.evaluate(model, rows, tmp_path)
    weight.data.copy_(before)
    evaluate.evaluate(model, rows, tmp_path, Settings(latents="zero"), resume=False)


def test_limit_is_a_prefix_and_batches_do_not_change_an_answer(world, faked, tmp_path):
    rows, model, _ = world
    assert evaluate.evaluate(model, rows, tmp_path, limit=5)["scores"]["micro"]["n"] == 5
    few = read_jsonl(tmp_path / "results.jsonl")
    evaluate.evaluate(model, rows, tmp_path)
    many = read_jsonl(tmp_path / "results.jsonl")
    assert many[:5] == few and [one["row"] for one in many] == list(range(12))
    assert [one["where"] for one in many][:2] == ["test_imagery.jsonl:1", "test_imagery.jsonl:2"]


def test_the_bench_counts_answers_that_differ(world, faked, monkeypatch, capsys):
    from tools import bench

    _, model, folder = world
    bench.by_batch(model, str(folder / "data"), [1, 5], 6)
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [len(call) for call in faked] == 4 * [1] + 6 * [1] + [5, 1]
    assert [line.split()[:2] for line in lines] == [["1", "6"], ["5", "6"]]
    assert [line.split()[-1] for line in lines] == ["0", "0"]
    plain = evaluate.generate

    def other(model, samples, *words, **more):
        completions = plain(model, samples, *words, **more)
        if len(completions) > 1:
            completions[0].text = "x"
        return completions

    monkeypatch.setattr(evaluate, "generate", other)
    bench.by_batch(model, str(folder / "data"), [1, 5], 6)
    assert re.search(r" 1 \[\d+\]$", capsys.readouterr().out.rstrip())
    assert evaluate.generate is other


def test_without_out_nothing_is_written(world, faked, tmp_path, monkeypatch):
    rows, model, _ = world
    monkeypatch.chdir(tmp_path)
    model.train()
    summary = evaluate.evaluate(model, rows, limit=4)
    assert model.training and model.eval() is model
    assert summary["scores"]["micro"]["n"] == 4 and list(tmp_path.iterdir()) == []


def test_a_row_without_a_key_is_refused_by_its_place(world):
    rows, model, _ = world
    with pytest.raises(SystemExit, match=r"test_imagery\.jsonl:1: "):
        evaluate.evaluate(model, [dataclasses.replace(rows[0], key=None)])


# ---------------------------------------------------------------- picture and report


def test_picture_and_report(world, faked, tmp_path):
    rows, model, _ = world
    log = [{"step": n, "ce": 2 / n, "retrieval": math.nan, "cosine": 0.1 * n} for n in range(1, 9)]
    log = "".join(json.dumps(entry) + "\n" for entry in log) + '{"step": 9, "ce'
    (tmp_path / "log.jsonl").write_text(log)
    evaluate.evaluate(model, rows, tmp_path)
    train_rows = [dataclasses.replace(row, image_output=row.image_input) for row in rows]
    evaluate.draw(model, rows, tmp_path, tmp_path / "log.jsonl", samples=4, train_rows=train_rows)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert "Pan &lt;b&gt;Left&lt;/b&gt;" in page and "<b>Left" not in page
    assert "clip 0 &amp; how" in page or "&amp; how" in page
    assert "I &lt;look&gt;" in page and "<look>" not in page
    assert page.count("<article") == 4
    assert page.count("<img") == 4 * (4 + 2 * 3)  # four frames and two blocks each
    for kind in report.KINDS:
        assert page.count(f'alt="{kind}"') == 4 * 2
    assert "latent_start" not in page and "$" not in page
    assert page.count("<polyline") == 2  # ce and cosine; retrieval has no finite value
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width > 1000 and image.height > 500


def test_one_answer_is_drawn_once(world, faked, tmp_path):
    rows, model, _ = world
    widths = []
    for name, limit in {"one": 1, "more": 4}.items():
        evaluate.evaluate(model, rows, tmp_path / name, limit=limit)
        evaluate.draw(model, rows, tmp_path / name)
        with Image.open(tmp_path / name / "picture.png") as image:
            widths.append(image.width)
    assert widths[1] > 2 * widths[0]


def test_draw_without_a_video_or_a_log(world, faked, tmp_path):
    rows, model, _ = world
    evaluate.evaluate(model, rows, tmp_path, Settings(video="none"), limit=3)
    evaluate.draw(model, rows, tmp_path)
    assert "<polyline" not in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "picture.png").exists()  # nothing was seen, so nothing can be drawn


def test_the_page_shows_controls_of_these_weights_alone(world, faked, tmp_path):
    rows, model, _ = world
    for name, video in {"eval": "", "eval_video-none": "none", "eval_video-other": "other"}.items():
        evaluate.evaluate(model, rows, tmp_path / name, Settings(video=video), limit=3)
    file = tmp_path / "eval_video-other" / "summary.json"
    other = json.loads(file.read_text())
    other["settings"]["weights"] += 1
    file.write_text(json.dumps(other))  # of a model that was trained again since
    evaluate.draw(model, rows, tmp_path / "eval")
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "eval_video-none" in page and "eval_video-other" not in page


def test_without_training_rows_the_readout_is_fitted_on_half_of_the_clips(world, faked, tmp_path):
    rows, model, _ = world
    evaluate.evaluate(model, rows, tmp_path)
    evaluate.draw(model, rows, tmp_path, samples=100)
    page = (tmp_path / "report.html").read_text()
    drawn = {clip for clip in range(6) if f"in clip {clip} " in page}
    assert drawn == {0, 2, 4}
    found = read_json(tmp_path / "summary.json")["readout"]
    assert found["rows"] == 6 and found["true_r2"] < 1
    assert "R² on held-out rows: true_r2" in page


def test_without_a_readout_the_page_shows_true_overlays_alone(world, faked, tmp_path):
    rows, model, _ = world
    evaluate.evaluate(model, rows, tmp_path)
    evaluate.draw(model, rows, tmp_path, samples=4, overlays=0)
    page = (tmp_path / "report.html").read_text()
    assert page.count('alt="true overlay"') == 8 and 'alt="imagined"' not in page
    assert "readout" not in read_json(tmp_path / "summary.json")


def test_many_key_frames_are_drawn_in_groups_of_lines():
    image = Image.new("RGB", (report.FRAME_WIDTH, 100))
    blocks = [{kind: image for kind in report.KINDS} for _ in range(14)]
    lines = report.draw_blocks(blocks, 788)
    assert len(lines) == 6 and {line.width for line in lines} == {788}  # seven in each
    lines = report.draw_blocks([*blocks[:2], {"imagined": image}], 788)
    assert len(lines) == 3  # a block that is imagined beyond the true ones
    assert report.draw_blocks([], 788) == []


def test_a_block_too_many_has_the_shape_of_the_frames(world, tmp_path):
    rows, _, _ = world
    wide = tmp_path / "wide.png"
    Image.new("RGB", (160, 90)).save(wide)
    row = dataclasses.replace(rows[0], image_input=[str(wide)], image_output=[])
    readout = SimpleNamespace(draw=lambda latents, size: Image.new("RGB", size))
    drawn = report.draw_block(row, 0, None, [], readout)
    width, height = drawn["imagined"].size
    assert list(drawn) == ["imagined"] and width / height == pytest.approx(160 / 90, rel=0.02)


def things_of(rows):
    """The rows with what their overlays show: two questions a clip are about two things."""
    return [dataclasses.replace(row, overlay_frames=[0, 3], overlay_things=[row.subtask] * 2) for row in rows]


def test_true_latents_are_found_among_things_and_moments(world, faked, tmp_path):
    rows, model, _ = world
    summary = evaluate.evaluate(model, things_of(rows), tmp_path, Settings(latents="oracle"), limit=4)
    found = summary["imagery"]
    assert (found["object"], found["moment"], found["object_by_block"]) == (1.0, 1.0, [1.0, 1.0])
    assert (found["object_chance"], found["moment_chance"]) == (0.5, 0.5)  # also of rows beyond the limit
    block = read_jsonl(tmp_path / "results.jsonl")[0]["imagery"][1]
    assert (block["block"], block["object"], block["moment"]) == (1, True, True)


def test_results_of_before_object_at_1_are_read(world, faked, tmp_path, capsys):
    rows, model, _ = world
    rows = things_of(rows)
    whole = evaluate.evaluate(model, rows, tmp_path, limit=4)
    assert whole["imagery"]["object"] is not None
    lines = read_jsonl(tmp_path / "results.jsonl")
    for line in lines:
        line["imagery"] = [{n: b[n] for n in ("retrieval", "chance", "cosine")} for b in line["imagery"]]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = evaluate.evaluate(model, rows, tmp_path, limit=4)
    assert summary["imagery"]["object"] is None and summary["imagery"]["moment"] is None
    assert summary["imagery"]["retrieval"] == whole["imagery"]["retrieval"]
    evaluate.print_table(summary)
    evaluate.draw(model, rows, tmp_path, train_rows=rows)  # its own rows: half of the clips are held out
    assert capsys.readouterr().out.count("true_r2") == 1


def test_the_sheet_of_what_is_imagined(world, tmp_path, monkeypatch, capsys):
    folder = world[2]
    lines = [json.loads(line) for line in (folder / "data" / "test_imagery.jsonl").read_text().splitlines()]
    data = folder / "data" / "some_test.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines[:6]))
    words = [f"MODEL={folder}/model", f"DATA={data}", f"OUT={tmp_path}/sheet.png", "N=2", "MAX_NEW=8"]
    run_script(monkeypatch, "tools/imagined.py", *words, "SUBTASKS=camera")
    printed = capsys.readouterr().out
    assert "object@1 hits at all key frames in 0 of 0" in printed and "2 questions are in" in printed
    refused(lambda: run_script(monkeypatch, "tools/imagined.py", *words, "SUBTASKS=x"), "SUBTASKS=x")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 1280


# ---------------------------------------------------------------- the real thing, small


@pytest.mark.parametrize("kind", ["zero", "noise", "pad", "swap", "oracle"])
def test_generate_takes_every_feed_with_rows_in_different_states(world, monkeypatch, kind):
    rows, thinker, _ = world
    monkeypatch.setattr(thinker.config, "latent_norm", 6.0)
    starts = {row: (row + 1, row + 9) for row in range(3)}  # the steps at which a row begins a block
    step = iter(range(1000))

    def scripted(logits, *args):
        now = next(step) % 20
        word, start = thinker.tokenize("a")[0], thinker.token_id["latent_start"]
        return torch.tensor([start if now in starts[row] else word for row in range(len(logits))])

    monkeypatch.setattr("model.sample_token", scripted)
    truth = TrueLatents(thinker, rows)
    results = evaluate.answer(thinker, rows, [0, 2, 4], Settings(latents=kind, max_new=20), truth)
    assert [one.blocks for one in results] == [2, 2, 2]
    assert all(one.truncated for one in results)
    for one in results:
        if kind == "zero":
            assert one.latents.eq(0).all()
        if kind == "noise":  # as long as what would be fed else, not as the hidden state
            assert one.latents.norm(dim=-1) == pytest.approx(6.0, rel=1e-5)
        if kind == "oracle":
            assert torch.allclose(one.latents, truth([one.row])[0])


def test_command_line_and_two_processes_give_the_same_answers(world):
    rows, model, folder = world
    words = [f"MODEL={folder / 'model'}", f"DATA={folder / 'data'}", "MAX_NEW=12", "BATCH=4"]
    printed = two_processes("evaluate.py", *words, f"OUT={folder / 'two'}")
    assert "micro" in printed and "report.html" in printed
    evaluate.evaluate(model, rows, folder / "one", Settings(max_new=12, batch=4))
    one, both = (read_jsonl(folder / name / "results.jsonl") for name in ("one", "two"))
    assert one == both and len(one) == 12
    assert read_json(folder / "two" / "settings.json")["max_new"] == 12


def test_oracle_without_overlays_is_one_sentence(world, tmp_path, monkeypatch):
    folder = world[2]
    rows = [json.loads(line) for line in (folder / "data" / "test_imagery.jsonl").read_text().splitlines()]
    for row in rows:
        row["text_output"] = row["text_output"].replace(" <output_image>", "")
        row["image_output"] = []
        for name in ("overlay_frames", "overlay_things"):
            row.pop(name, None)
        row["image_input"] = [str(folder / "data" / name) for name in row["image_input"]]
    data = tmp_path / "plain.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"MODEL={folder / 'model'}", f"DATA={data}", "LATENTS=oracle", f"OUT={tmp_path / 'out'}"]
    refused(lambda: run_script(monkeypatch, "evaluate.py", *words), "LATENTS=oracle needs", "plain.jsonl")


def test_bad_control_is_one_sentence(monkeypatch):
    noen = refused(lambda: run_script(monkeypatch, "evaluate.py", "VIDEO=noen"), "none, other, shuffled")
    assert noen.startswith("VIDEO=noen is not one of")


def test_an_edited_constant_is_the_default_of_every_evaluation(tmp_path, monkeypatch):
    """MAX_NEW edited at the top of a copy of the file: Settings(), which dift.py takes, follows it."""
    source = (ROOT / "evaluate.py").read_text()
    copy = tmp_path / "edited.py"
    copy.write_text(source.replace("MAX_NEW = 512", "MAX_NEW = 7"))
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited")
    assert edited.Settings().max_new == 7 and Settings().max_new == 512
    names = [field.name for field in dataclasses.fields(Settings)]
    constants = {name: getattr(evaluate, name.upper()) for name in names}
    assert dataclasses.asdict(Settings()) == constants


def test_a_result_is_its_line_of_the_file_and_back():
    fields = {"index": 3, "video_id": "v", "gt": "A", "subtask_type": "x", "question": "?", "raw": "t"}
    one = result("speed", "A", release_fields=fields, imagery=[{"retrieval": True}])
    line = one.to_json()
    assert list(line)[:2] == ["row", "where"] and list(line)[-2:] == ["raw", "imagery"]
    assert line["cut"] is False and "latents" not in line and "release_fields" not in line
    assert Result.from_json(json.loads(json.dumps(line))) == one
