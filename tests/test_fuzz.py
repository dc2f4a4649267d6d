"""Bad input of every kind, made from seeds: a sentence, or counted, or harmless; no traceback, nothing wrong.

FUZZ=20000 pytest tests/test_fuzz.py -s    makes that many variants; without it there are about 1,700

With -s it prints how many of each kind ended in a sentence and how many were taken.
"""

import importlib
import io
import json
import math
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from lib import benchmarks
from lib.command_line import numbers_in, override_constants, read_ranges
from lib.geometry import object_labels
from lib.images import load_patches, patch_grid
from lib.pictures import BadImage, read_image
from lib.rows import LETTERS, NO_TEXT, PLACEHOLDER, read_rows
from lib.segmenters.files import read_mask
from lib.spatialvid import BadAnnotation, camera_segments, has_one_note_per_frame, read_notes
from lib.tables import read_table
from lib.text import as_text
from lib.vocabulary import MOVES
from model import encode_row, load_model

VARIANTS = int(os.environ.get("FUZZ", 1700))  # of all kinds together
LONGEST = 700  # characters of a sentence; a path of pytest's is a part of many
SHARES = {"rows": 0.3, "tables": 0.24, "images": 0.16, "annotations": 0.14, "constants": 0.16}
SCRIPTS = ("dift", "grpo4d", "evaluate", "generate_data", "tools.ask", "tools.seeds", "tools.make_tiny")


def deep(levels):
    """A list in a list in a list ..."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


ODD = [None, True, False, -1, 0, 1, 5, 1.5, -0.5, math.nan, math.inf, -math.inf, 10**300, -(10**20), 1e-320]
ODD += [
    "",
    " ",
    "\n",
    "x" * 300,
    "y" * 5000,
    "a\0b",
    "\ud800",
    "<|video_pad|>",
    "<|im_end|>\n<|im_start|>user",
]
ODD += ["<|latent_start|><|latent_pad|>", "../x", "/x", "~", "~/x", "A", "B", "Z", "AB", "a", "b. right", "7"]
ODD += ["<output_image>", "<answer>Q</answer>", "ü", "🙂", "\u2028", "1e5", "None", "{'A': 'x', 'B': 'y'}"]
ODD += ["1+" * 3000 + "1", "[" * 3000, "('x', 'y')", [], ["A"], [None], [[1]], ["a", 1], list("abcdefgh"), {}]
ODD += [{"A": 1}, {"A": [1], "B": 2}, {"A": "x", "C": "y"}, deep(50), deep(900), [math.nan], [10**400]]


def pick(rng, items):
    """One of some items."""
    return items[int(rng.integers(len(items)))]


tally = Counter()  # (kind, "sentence" or "taken"): how often


@pytest.fixture(scope="module", autouse=True)
def print_tally():
    yield
    for kind in dict.fromkeys(kind for kind, _ in tally):
        print(f"\n| {kind} | {tally[kind, 'sentence']} | {tally[kind, 'taken']} |", end="")
    print()


def outcome(kind, call):
    """What a call gives, and None; or None, and the one sentence that it ends the program with.

    Of an annotation the sentence is that of a BadAnnotation, which a run counts. Any other exception is a
    traceback: it fails the test.
    """
    try:
        found = call()
        tally[kind, "taken"] += 1
        return found, None
    except SystemExit as stop:
        sentence = stop.code
    except BadAnnotation as error:
        sentence = f"clips are unreadable ({error})."
    tally[kind, "sentence"] += 1
    assert isinstance(sentence, str) and "\n" not in sentence and sentence.endswith((".", "?")), sentence
    assert len(sentence) <= LONGEST, sentence
    return None, sentence


def mutate(rng, entry):
    """An entry with one to three fields set to something odd, left out, or added; which ones."""
    entry = dict(entry)
    changed = set()
    for _ in range(rng.integers(1, 4)):
        name = pick(rng, [*entry, "extra", "key", "G", "times", "video"])
        changed.add(name)
        if rng.random() < 0.15:
            entry.pop(name, None)
        elif rng.random() < 0.2 and isinstance(entry.get(name), list) and entry[name]:
            entry[name] = [*entry[name][:-1], pick(rng, ODD)]
        else:
            entry[name] = pick(rng, ODD)
    return entry, changed


def dump(value):
    """JSON of anything, NaN and surrogates included."""
    try:
        return json.dumps(value)
    except ValueError:  # a number that Python does not write out
        return "[" * 5000


def damage(rng, data):
    """Bytes with some of them changed, cut off or repeated."""
    data = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(data[: rng.integers(len(data) + 1)])
    if kind == 1:
        at = int(rng.integers(len(data)))
        return bytes(data[:at] + data[at : at + 40] * 3 + data[at:])
    for _ in range(1 if kind == 2 else 30):
        data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data)


def seeds(kind):
    """The seeds of a kind, in ten parts, so that a failure names a few of them."""
    count = round(VARIANTS * SHARES[kind])
    return [range(part, count, 10) for part in range(10)]


@pytest.fixture(scope="module")
def model(tiny):
    """The random network with latents; encode_row needs its tokenizer and its config."""
    return load_model(tiny / "base", K=4, pooling="grid")


# ---------------------------------------------------------------- rows


def good_rows(rng):
    """A DIFT row and a 4DRL row whose files are there."""
    text = f"<think>Left {PLACEHOLDER} then.</think>\n<answer>B. right</answer>"
    dift = {"id": "a", "text_input": "How?\n\nA. left\nB. right", "text_output": text, "subtask": "s"}
    dift |= {"image_input": ["f0.png", "f1.png"], "image_output": ["o.png"], "times": [0, 1.5], "clip": "c"}
    rl = {"Type": "t", "Question": "How?", "A": "left", "B": "right", "Correct": "B", "id": "b"}
    rl |= {"frame_paths": ["f0.png", "f1.png"], "times": [0, 1], "video_path": ""}
    return pick(rng, [dift, rl])


def check_row(row, model):
    """What every row that is taken must be, whatever was in the file."""
    assert not NO_TEXT.search(row.text_input + row.text_output + row.id + row.subtask + row.clip)
    assert len(row.times) == len(row.image_input) and row.times == sorted(row.times)
    assert all(math.isfinite(t) for t in row.times)
    assert row.key is None or isinstance(row.key, str)
    sample = encode_row(model, row)
    t, h, w = patch_grid(row.image_input, model.config) if row.image_input else (0, 0, 0)
    assert sample.is_visual.sum() == t * h * w // 4
    assert sample.is_latent.sum() == model.K * row.text_output.count(PLACEHOLDER)
    # the prompt's own: two turns of system and user, one beginning of an answer, one end
    ids = sample.ids.tolist()
    assert ids.count(model.token_id["im_end"]) == 3
    assert ids.count(model.token_id["latent_start"]) == row.text_output.count(PLACEHOLDER)
    text = model.tokenizer.decode(sample.ids)
    assert row.text_input in text and torch.isfinite(sample.positions.float()).all()


@pytest.mark.parametrize("numbers", seeds("rows"), ids=str)
def test_rows(tmp_path, model, numbers):
    for name in ("f0.png", "f1.png", "o.png"):
        Image.new("RGB", (28, 28), "red").save(tmp_path / name)
    path = tmp_path / "rows.jsonl"
    for seed in numbers:
        rng = np.random.default_rng([1, seed])
        row, _ = mutate(rng, good_rows(rng))
        data = dump(row).encode()
        if rng.random() < 0.2:
            data = damage(rng, data)
        path.write_bytes(data + b"\n")
        rows, sentence = outcome("rows", lambda trained=bool(seed % 2): read_rows(path, None, trained))
        if sentence:
            assert "rows.jsonl" in sentence, (seed, sentence)
        for row in rows or []:
            if all(file.endswith(".png") for file in row.image_input) and len(row.text_input) < 4000:
                check_row(row, model)


# ---------------------------------------------------------------- benchmarks


def good_entries():
    """Three questions of DSR-Bench."""
    entry = {
        "videoID": "v",
        "question": "How fast?",
        "options": ["up", "down"],
        "answer": "B",
        "type": "abs_spd",
    }
    return [entry | {"question": f"How fast, {n}?"} for n in range(3)]


@pytest.mark.parametrize("numbers", seeds("tables"), ids=str)
def test_tables(tmp_path, numbers):
    for seed in numbers:
        rng = np.random.default_rng([2, seed])
        entries = good_entries()
        entries[1], _ = mutate(rng, entries[1])
        path = tmp_path / pick(rng, ["b.json", "b.jsonl", "b.csv", "b.tsv"])
        is_whole = rng.random() < 0.7
        if path.suffix in (".csv", ".tsv"):
            comma = "," if path.suffix == ".csv" else "\t"
            names = list(good_entries()[0])
            cells = [[dump(entry.get(name)) for name in names] for entry in entries]
            text = "\n".join(comma.join(row) for row in [names, *cells])
            is_whole = False  # what a comma in a cell means is the table's affair
        else:
            text = dump(entries) if path.suffix == ".json" else "\n".join(map(dump, entries))
        data = text.encode() if is_whole else damage(rng, text.encode())
        path.write_bytes(data)
        rows, sentence = outcome("tables", lambda file=path: benchmarks.read_benchmark("dsr", str(file)))
        for row in rows or []:
            if not row.skip_reason:
                assert row.key and set(row.key) <= set(row.options) <= set(LETTERS)
                assert ".." not in row.video and not NO_TEXT.search(row.text_input)
        # one bad question takes no other with it
        is_readable = is_whole and path.suffix in (".json", ".jsonl") and "[" * 900 not in text
        if is_readable:
            assert sentence is None, (seed, sentence)
            good = [rows[0], rows[2]]
            assert [row.key for row in good] == ["B", "B"] and not good[0].skip_reason, seed


@pytest.mark.parametrize("numbers", seeds("tables"), ids=str)
def test_damaged_parquet(tmp_path, numbers):
    """A sentence, or a table: parquet has no checksum of its text, so a wrong byte may be another letter."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = importlib.import_module("pyarrow")
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(good_entries() * 20), whole)
    assert read_table(whole) == good_entries() * 20
    for seed in numbers:
        rng = np.random.default_rng([6, seed])
        path = tmp_path / "b.parquet"
        path.write_bytes(damage(rng, whole.read_bytes()))
        entries, sentence = outcome("parquet", partial(read_table, path))
        if sentence:
            assert "b.parquet" in sentence, (seed, sentence)
            continue
        rows, sentence = outcome("parquet", lambda file=path: benchmarks.read_benchmark("dsr", str(file)))
        for row in rows or []:
            assert row.skip_reason or set(row.key) <= set(row.options), seed


# ---------------------------------------------------------------- images

RED, BLUE = (250, 10, 10), (10, 10, 250)


def encode_image(rng, image):
    """An image, red above blue, in one of many encodings -> bytes, whether its colours are grey."""
    kind = pick(rng, ["RGB", "P", "RGBA", "L", "LA", "1", "I;16", "CMYK", "turned", "P alpha"])
    format = "JPEG" if kind in ("CMYK", "turned") else "PNG"
    options = {}
    if kind == "turned":
        note = Image.Exif()
        number = int(rng.integers(1, 9))
        note[0x0112] = number
        turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes the viewer's turn
        if number > 1:
            image = image.transpose(Image.Transpose(turns[number]))
        options["exif"] = note
    elif kind == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(grey)
    elif kind == "P alpha":
        image = image.convert("P")
        options["transparency"] = 255
    else:
        image = image.convert(kind)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue(), kind in ("L", "LA", "1", "I;16")


def check_colours(image, is_grey, seed):
    """The upper half is red and the lower one blue, or of the grey that these have."""
    pixels = np.asarray(image).astype(int)
    upper, lower = pixels[2:5].mean((0, 1)), pixels[-5:-2].mean((0, 1))
    if is_grey:
        assert upper.mean() > lower.mean() + 5, seed
    else:
        assert upper[0] > 200 and upper[2] < 60 and lower[2] > 200 and lower[0] < 60, (seed, upper, lower)


@pytest.mark.parametrize("numbers", seeds("images"), ids=str)
def test_images(tmp_path, model, numbers):
    for seed in numbers:
        rng = np.random.default_rng([3, seed])
        w, h = (int(side) for side in rng.integers(14, 60, 2))
        h += h % 2
        picture = np.zeros((h, w, 3), np.uint8)
        picture[: h // 2], picture[h // 2 :] = RED, BLUE
        data, is_grey = encode_image(rng, Image.fromarray(picture))
        path = tmp_path / f"{seed}.img"
        if rng.random() < 0.4:
            path.write_bytes(data)
            check_colours(read_image(path), is_grey, seed)
            assert patch_grid([path], model.config) == load_patches([path], model.config)[1], seed
            continue
        if rng.random() < 0.3:  # sides out of all proportion
            size = pick(
                rng, [(1, 1), (1, 300), (3000, 1), (2, 999), (28, 28 * 200), (5601, 28), (150, 29999)]
            )
            file = io.BytesIO()
            Image.new("RGB", size).save(file, "PNG")
            data = file.getvalue()
        elif rng.random() < 0.3 and data[:4] == b"\x89PNG":  # a header that claims other sides
            claimed = int(pick(rng, [0, 1, 2**15, 2**20, 2**31 - 1])).to_bytes(4, "big")
            data = data[:16] + claimed + claimed + data[24:]
        else:
            data = damage(rng, data)
        path.write_bytes(data)
        loaded, sentence = outcome(
            "images", lambda file=path: load_patches([file], model.config, "rows.jsonl:1")
        )
        if sentence:
            assert "rows.jsonl:1" in sentence and ".img" in sentence, (seed, sentence)
        else:
            assert torch.isfinite(loaded[0]).all() and len(loaded[0]) == math.prod(loaded[1])
        outcome("images", lambda file=path: patch_grid([file], model.config, "rows.jsonl:1"))


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "0 and 1", "dark", "transparent", "0 and 1 in 16 bits", "I"],
)
def test_a_mask_is_read_or_refused_in_every_encoding(tmp_path, mode):
    """ "No object" is never the answer to an encoding."""
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10, 5:25] = 255
    image = Image.fromarray(mask)
    if mode == "0 and 1":
        image = Image.fromarray(mask // 255)
    elif mode == "0 and 1 in 16 bits":  # numbers of objects
        image = Image.fromarray((mask // 255).astype(np.uint16))
    elif mode == "dark":  # a colour of a data set's palette
        image = Image.merge("RGB", [Image.fromarray(mask // 2), *[Image.new("L", image.size)] * 2])
    elif mode == "transparent":
        image = Image.merge("LA", [Image.new("L", image.size, 255), image])
    elif mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "mask.png", "TIFF" if mode == "I" else "PNG")
    if mode == "I":  # a TIFF of 32 bits
        with pytest.raises(BadImage, match="32 bits"):
            read_mask(tmp_path / "mask.png", (30, 20))
    elif mode.startswith("0 and 1") or mode == "dark":
        with pytest.raises(BadImage, match="brightest"):
            read_mask(tmp_path / "mask.png", (30, 20))
    else:
        assert (read_mask(tmp_path / "mask.png", (30, 20)) == (mask > 0)).all()


# ---------------------------------------------------------------- annotations


def moving_square(count=8):
    """Masks (T, H, W) of a square that goes right, and poses, intrinsics and depths of a camera at rest."""
    masks = np.zeros((count, 42, 56), bool)
    for t in range(count):
        masks[t, 15:25, 5 + 5 * t : 15 + 5 * t] = True
    poses = np.tile(np.eye(7)[6], (count, 1))
    intrinsics = np.tile([0.8, 1.0, 0.5, 0.5], (count, 1))
    return masks, {"poses": poses, "intrinsics": intrinsics, "depths": np.full((count, 21, 28), 4.0)}


def spoil(rng, array):
    """An array with some values that are none, or of another shape or type."""
    array = array.copy()
    kind = rng.integers(6)
    if kind < 3:
        places = tuple(rng.integers(side, size=rng.integers(1, 30)) for side in array.shape)
        array[places[0][:1] if kind == 2 else tuple(place[:1] for place in places)] = pick(
            rng, [np.nan, np.inf, -np.inf, 0, -1, 1e30]
        )
        return array
    if kind == 3:
        return array[: rng.integers(len(array) + 1)]
    if kind == 4:
        return array.reshape(-1) if rng.random() < 0.5 else array[..., :1]
    return array.astype(pick(rng, ["S8", "c16", "O", "f2", "i4"]))


def annotated(folder, masks):
    """What a run takes from a folder: the notes, camera movements, whether they fit the masks, and labels."""
    notes = read_notes(folder, folder / "none", is_whole=True)
    segments = camera_segments(notes["instructions"], len(masks), MOVES)
    fits = has_one_note_per_frame(notes, len(masks))
    return notes, segments, fits, object_labels(masks, notes, 70) if fits else {}


@pytest.mark.parametrize("numbers", seeds("annotations"), ids=str)
def test_annotations(tmp_path, numbers):
    """What cannot be meant is a BadAnnotation that names the file; labels are never wrong."""
    masks, clean = moving_square()
    right = object_labels(masks, clean, 70)
    assert right == {"direction": "Moving Right", "distance": "Maintaining Roughly the Same Distance"}
    for seed in numbers:
        rng = np.random.default_rng([4, seed])
        folder = tmp_path / str(seed)
        folder.mkdir()
        name = pick(rng, ["poses", "intrinsics", "depths", "instructions", "objects", "indexes"])
        arrays = {other: clean[other] for other in ("poses", "intrinsics", "depths")}
        labels = {"0->7": ["Pan Left"], "2->5": ["Stay"]}
        names = {"static_object": "tall yellow box", "dynamic_object": "small ball"}
        indexes = "".join(f"{n} {3 * n}\n" for n in range(8)).encode()
        texts = {"instructions.json": dump(labels).encode(), "objects.json": dump(names).encode()}
        texts["indexes.txt"] = indexes
        if name in arrays:
            arrays[name] = spoil(rng, arrays[name])
        elif name == "indexes":
            texts["indexes.txt"] = damage(rng, indexes)
        else:
            whole = {"instructions": labels, "objects": names}[name]
            changed, _ = mutate(rng, whole)
            if rng.random() < 0.3:
                changed[pick(rng, ["-3->5", "0->99999", "7->0", "a->b", "1.5->2"])] = ["Tilt Up"]
            texts[f"{name}.json"] = dump(changed).encode()
        for other, array in arrays.items():
            np.save(folder / f"{other}.npy", array, allow_pickle=True)
        for file, data in texts.items():
            (folder / file).write_bytes(data)
        read, sentence = outcome("annotations", partial(annotated, folder, masks))
        if sentence:
            assert name in sentence, (seed, sentence)
            continue
        notes, segments, fits, found = read
        assert (np.diff(notes["indexes"]) > 0).all() and notes["indexes"][0] >= 0
        assert all(0 <= start < end < 8 for start, end, _ in segments), seed
        assert all(text.isprintable() and text for text in notes.get("objects", {}).values()), seed
        if name == "depths":
            assert found.items() <= right.items() or 1e30 in arrays[name], (seed, found)
        if fits:
            assert all(np.isfinite(notes[other]).all() for other in ("poses", "intrinsics")), seed


# ---------------------------------------------------------------- constants

WORDS = [
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "-0.1",
    "1e999",
    "-1e999",
    "nan",
    "inf",
    "1e-320",
    "9" * 30,
    "9" * 5000,
    "",
]
WORDS += [
    "None",
    "True",
    "()",
    "(1,)",
    "(2, 3)",
    "(3, 2)",
    "((1, 2),)",
    "[1e999]",
    "{}",
    "{[]: 1}",
    "'a'",
    "x",
]
WORDS += ["(" * 5000, "-" * 5000 + "1", "1+" * 5000 + "1", "a\nb", "a\0b", "\ud800", "~", "~/x", "../x", "1j"]
WORDS += ["{'acc': 1e999, 'fmt': 0}", "{'acc': -1, 'fmt': 0}", "x" * 9999, "b'x'", "...", "(1e999, 2)", "1_0"]


@pytest.mark.parametrize("numbers", seeds("constants"), ids=str)
def test_constants(numbers):
    for seed in numbers:
        rng = np.random.default_rng([5, seed])
        module = importlib.import_module(pick(rng, SCRIPTS))
        names = [*read_ranges(module.__file__), "STEP", "", "x" * 500, "SEED "]
        word = f"{pick(rng, names)}={pick(rng, WORDS)}"
        c, sentence = outcome("constants", lambda m=module, w=word: override_constants(vars(m), [w]))
        if sentence is None:
            for value in vars(c).values():
                assert all(math.isfinite(number) and abs(number) <= 1e15 for number in numbers_in(value)), (
                    seed
                )
            assert all(value > 0 for key, value in vars(c).items() if key.endswith("BATCH")), seed


# ---------------------------------------------------------------- text is text


@pytest.mark.parametrize(
    "words", ["<|video_pad|>", "<|latent_pad|>", "<|im_end|>\n<|im_start|>system", "<|x|> <|"]
)
def test_special_tokens_in_words_are_text(tmp_path, model, words):
    """The masks and all other ids are those of a row with other words; the words come back when decoded."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "f.png")
    text = f"<think>{words} {PLACEHOLDER} {words}</think>\n<answer>A. {words}</answer>"
    row = {"text_input": f"{words}?\n\nA. {words}\nB. b", "text_output": text, "times": [0]}
    row |= {"image_input": ["f.png"], "image_output": ["f.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    read = read_rows(tmp_path / "rows.jsonl")[0]
    check_row(read, model)
    assert read.key == "A" and read.options == {"A": words.split("\n")[0], "B": "b"}
    answer = model.tokenizer.decode(encode_row(model, read).ids).split("assistant\n")[-1]
    block = "<|latent_start|>" + "<|latent_pad|>" * 4 + "<|latent_end|>"
    assert answer == text.replace(PLACEHOLDER, block) + "<|im_end|>"


def test_ids_of_ordinary_words_stay_as_they_are(model):
    """By the tokenizer's own call, and piece by piece: both give one result."""
    text = (
        "<|im_start|>user\nHow does  the ball\tmove, ünd <b>?\n\nA. left{}<|im_end|>\n<|im_start|>assistant"
    )
    plain = model.tokenizer(text.format(""), add_special_tokens=False)["input_ids"]
    assert model.tokenize(text.format("")) == plain
    # "<|" hidden and "<|" as it is have the same ids where no special token begins
    hidden = text.format(as_text(" <| b"))
    assert (
        model.tokenize(hidden) == model.tokenizer(text.format(" <| b"), add_special_tokens=False)["input_ids"]
    )
