"""Rows: the questions of a jsonl file, in the release's DIFT or 4DRL schema, read into one shape."""

import functools
import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from lib.command_line import exit_with, expand_home, quote, quote_path, require

PLACEHOLDER = "<output_image>"  # in a row's text_output: here stands an overlay
LETTERS = "ABCDEF"  # of options
# a latent block in decoded text: group 1 holds its latents, group 2 its end, None where it was cut off
LATENT_BLOCK = re.compile(r"<\|latent_start\|>((?:<\|latent_pad\|>)*)(<\|latent_end\|>)?")
# an option in a question's text, a line each: "A. left", "A) left" or "(A) left"
OPTION = re.compile(r"^(?:([A-F])[.)]|\(([A-F])\)) (.*)$", flags=re.M)
# NUL, and halves of characters: no tokenizer and no file takes them
NO_TEXT = re.compile("[\0\ud800-\udfff]")
LONGEST_VIDEO = 1e7  # seconds


@dataclass
class Row:
    """A question as it was read. Its first fields have the release's names."""

    id: str
    text_input: str  # the question and its options
    text_output: str = ""  # chain of thought and answer; "" in 4DRL rows
    image_input: list = field(default_factory=list)  # frame files, absolute paths
    image_output: list = field(default_factory=list)  # an overlay file for each placeholder
    times: list = field(default_factory=list)  # seconds of each frame
    subtask: str = "all"
    clip: str = ""  # the clip that the question is about
    key: str | None = None  # the right letter; all right letters of a benchmark's question, such as "AC"
    options: dict = field(default_factory=dict)  # {"A": "left", ...}
    video: str = ""  # video file of a row that has no frames yet
    source: str = ""  # "file:line", for error sentences
    supervise: str = "all"  # all | letters: which of the answer's tokens the text loss sees
    confidence: dict = field(default_factory=dict)  # {score: 0 to 1}, of an object in real footage
    skip_reason: str = ""  # why a benchmark's question cannot be asked
    overlay_frames: list = field(default_factory=list)  # of each overlay the index of its frame, if known
    overlay_things: list = field(default_factory=list)  # of each overlay what it highlights, if known
    release_fields: dict = field(default_factory=dict)  # what the release writes beside an answer (DSR)


def read_rows(path, limit=None, with_answers=False):
    """Reads a DIFT or 4DRL jsonl -> [Row]; exits with "file:line: ..." on the first bad one.

    with_answers: each row needs a text_output to learn from, as 4DRL rows have none.
    """
    path = Path(path)
    there = os.path.isfile(path)
    require(there, f"There is no file {quote_path(path)}; make it with generate_data.py or set DATA.")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip() or len(rows) == limit:
            continue
        source = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:  # of JSON or of UTF-8, or nested too deeply
            exit_with(f"{source}: not valid JSON ({quote(str(error))}); correct or delete the line.")
        require(isinstance(raw, dict), f"{source}: a row must be a JSON object.")
        row = to_row(raw, source, path.parent)
        has_answer = row.text_output or not with_answers
        require(has_answer, f"{source}: there is no text_output to learn from; 4DRL rows are for grpo4d.py.")
        rows.append(row)
    require(rows, f"{path} holds no rows; make it again with generate_data.py.")
    return rows


def read_twin(data):
    """The training rows beside held-out ones, if there are: out/toy, test_imagery.jsonl, name_test.jsonl."""
    data = Path(data)
    if data.is_dir():
        twin = data / "train_imagery.jsonl"
    elif data.name.startswith("test_"):
        twin = data.with_name(data.name.replace("test_", "train_", 1))
    elif data.stem.endswith("_test"):
        twin = data.with_name(data.name.replace("_test.jsonl", ".jsonl"))
    else:
        return []
    return read_rows(twin) if twin.is_file() else []


def to_row(raw, source, folder):
    """One JSON object of the DIFT or 4DRL schema -> Row; paths count from the folder."""
    if "Question" in raw:
        raw = from_4drl_schema(raw, source)
    kinds = {"text_input": str, "text_output": str, "image_input": list, "image_output": list}
    for name, kind in kinds.items():
        correct = isinstance(raw.get(name), kind)
        require(correct, f"{source}: '{name}' is missing or not a {kind.__name__}.")
    require_names(raw, source)
    for name in ("text_input", "text_output"):
        require_text(raw[name], name, source)
    question, text = raw["text_input"], raw["text_output"]

    images = {}
    for name in ("image_input", "image_output"):
        are_paths = all(type(path) is str for path in raw[name])
        require(are_paths, f"{source}: '{name}' must hold paths, got {quote(raw[name])}.")
        images[name] = [find_file(path, folder, source) for path in raw[name]]
    frames, overlays = images["image_input"], images["image_output"]

    placeholders = text.count(PLACEHOLDER)
    matches = placeholders == len(overlays) or not text
    counts = f"text_output has {placeholders} {PLACEHOLDER}, image_output {len(overlays)} files"
    require(matches, f"{source}: {counts}.")

    supervise = raw.get("supervise", "all")
    known = supervise in ("all", "letters")
    shown = quote(supervise)
    require(known, f"{source}: 'supervise' is '{shown}'; it must be \"all\" or \"letters\".")

    confidence = raw.get("confidence", {})
    is_known = isinstance(confidence, dict)
    require(is_known, f"{source}: 'confidence' must be an object, got {quote(confidence)}; correct the row.")
    video = ""
    if not frames and raw.get("video_path"):
        video = str(folder / expand_home(str(raw["video_path"])))
    clip = Path(raw["image_input"][0]).parent.parent.name if frames else Path(video).stem
    answer = re.search(r"<answer>\s*([A-F])\b", text)
    options = read_options(question)
    # a text about no video may hold several lists of options, as rows for the making of the base do
    has_video = bool(frames or video)
    twice = find_twofold_option(question) if has_video else ""
    require(not twice, f"{source}: there are two options {twice}, which differ; correct or drop the row.")
    key = raw.get("key") or (answer.group(1) if answer else None)
    said = answer.group(1) if answer else key
    differs = f"the key is {quote(str(key))}, but text_output answers {said}"
    require(key == said, f"{source}: {differs}; correct or drop the row.")
    if key and options and (has_video or raw.get("key")):
        shown = f"'{quote(str(key))}' is none of the options {', '.join(options)}"
        require(key in options, f"{source}: the key {shown}; correct or drop the row.")
    return Row(
        id=str(raw.get("id", source)),
        text_input=question,
        text_output=text,
        image_input=frames,
        image_output=overlays,
        times=read_times(raw, source, len(frames)),
        subtask=str(raw.get("subtask", "all")),
        clip=str(raw.get("clip") or clip),
        key=key,
        options=options,
        video=video,
        source=source,
        supervise=supervise,
        overlay_frames=read_overlay_frames(raw, source, len(overlays)),
        overlay_things=read_overlay_things(raw, source, len(overlays)),
        confidence=confidence,
    )


def read_options(question):
    """The options in a question's text -> {"A": "left", ...}."""
    return {bare or bracketed: text for bare, bracketed, text in OPTION.findall(question)}


def find_twofold_option(question):
    """The letter that two different options in a question's text have, or ""."""
    options = read_options(question)
    for bare, bracketed, text in OPTION.findall(question):
        if options[bare or bracketed] != text:
            return bare or bracketed
    return ""


def require_text(text, name, source):
    """Ends the program unless a text can be written and tokenized whole."""
    bad = NO_TEXT.search(text)
    place = bad.start() if bad else 0
    kind = "a NUL" if bad and bad[0] == "\0" else "half of a character (a lone surrogate)"
    require(not bad, f"{source}: '{name}' holds {kind} at place {place}; correct the text.")


def require_names(raw, source):
    """Ends the program unless what names a row, its clip and its video is a text or a number."""
    for name in ("id", "subtask", "Type", "clip", "video_path", "key"):
        value = raw.get(name)
        kinds = str if name in ("video_path", "key") else (str, int, float)
        is_name = value is None or isinstance(value, kinds)
        require(is_name, f"{source}: '{name}' must be a text, got {quote(value)}; correct the row.")
        require_text(str(value), name, source)


def read_times(raw, source, count):
    """The seconds of a row's frames; those of the release, which has none, are a second apart."""
    times = raw.get("times") or list(range(count))
    rising = isinstance(times, list) and all(type(t) in (int, float) for t in times)
    # NaN and infinity are no seconds either
    rising = rising and all(abs(t) <= LONGEST_VIDEO for t in times) and times == sorted(times)
    require(rising, f"{source}: 'times' must be a list of rising seconds, got {quote(times)}.")
    require(len(times) == count, f"{source}: {len(times)} times for {count} frames.")
    return [float(t) for t in times]


def read_overlay_frames(raw, source, count):
    """Of each overlay the index of its frame in image_input; [] for a row that does not say."""
    frames = raw.get("overlay_frames")
    if frames is None:
        return []
    # the frames of a row that names a video alone are not there yet
    most = len(raw["image_input"]) or LONGEST_VIDEO
    are_indices = isinstance(frames, list) and all(type(n) is int and 0 <= n < most for n in frames)
    needs = "'overlay_frames' must be a list of indices of image_input"
    require(are_indices, f"{source}: {needs}, got {quote(frames)}.")
    require(len(frames) == count, f"{source}: {len(frames)} overlay_frames for {count} overlays.")
    return frames


def read_overlay_things(raw, source, count):
    """Of each overlay the name of what it highlights; [] for a row that does not say."""
    things = raw.get("overlay_things")
    if things is None:
        return []
    are_texts = isinstance(things, list) and all(type(thing) is str for thing in things)
    require(are_texts, f"{source}: 'overlay_things' must be a list of texts, got {quote(things)}.")
    require(len(things) == count, f"{source}: {len(things)} overlay_things for {count} overlays.")
    return things


def from_4drl_schema(raw, source):
    """A 4DRL row {"Type", "Question", "A".."F", "Correct", "frame_paths"} -> the fields of a DIFT row."""
    flaw = find_flaw(raw)
    require(not flaw, f"{source}: {flaw}.")
    letters = options_of(raw)
    key = raw["Correct"]
    frames = raw.get("frame_paths") or []
    has_video = frames or raw.get("video_path")
    require(has_video, f"{source}: there is neither 'frame_paths' nor 'video_path'.")
    lines = []
    for letter in letters:
        text = re.sub(rf"^{letter}[.)]\s+", "", str(raw[letter]))
        lines.append(f"{letter}. {text}")
    row = {
        "text_input": f"{raw['Question']}\n\n" + "\n".join(lines),
        "text_output": "",
        "image_input": frames,
        "image_output": [],
        "subtask": raw.get("Type", "all"),
        "key": key,
    }
    for name in ("id", "times", "clip", "video_path"):
        if name in raw:
            row[name] = raw[name]
    return row


def options_of(raw):
    """The letters of a 4DRL row's options that hold something."""
    return [letter for letter in LETTERS if raw.get(letter) not in (None, "")]


def find_flaw(raw):
    """Why a 4DRL row cannot be asked, or "": its question, its options and its key."""
    if not isinstance(raw.get("Question"), str) or not raw["Question"].strip():
        return f"'Question' must be a text, got {quote(raw.get('Question'))}"
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        option = raw.get(letter)
        if option is not None and type(option) not in (str, int, float):
            return f"the option {letter} must be a text, got {quote(option)}"
        if option not in (None, "") and letter not in LETTERS:
            return f"there is an option {letter}, but options go from A to {LETTERS[-1]}; drop the row"
        if option != option:
            return f"the option {letter} is NaN; drop the row"
    letters = options_of(raw)
    key = raw.get("Correct")
    if not isinstance(key, str) or key not in letters:
        shown = f"'{key}'" if isinstance(key, str) else quote(key)
        return f"the key 'Correct' is {quote(shown)}, the options are {letters}"
    return ""


def with_keys(rows, print=print):
    """The rows that can be scored, whose key is one of their options; others are counted in one line."""
    scored = [row for row in rows if row.key in row.options]
    left_out = [row for row in rows if row.key not in row.options]
    if left_out:
        first = left_out[0]
        options = ", ".join(first.options) or "none"
        reason = f"the first is {first.source} (key {first.key}, options {options})"
        print(f"{len(left_out)} of {len(rows)} rows have no options with a key and are not scored; {reason}.")
    return scored


def find_file(name, folder, source):
    """The path as it is, else from the row's file, else without a leading ./data/ (the release's root).

    "~/a" is in the home folder, as on the command line.
    """
    name = expand_home(name)
    without_root = re.sub(r"^(\./)?data/", "", name)
    # a data set has tens of thousands of files: pathlib takes three times as long
    for candidate in (name, f"{folder}/{name}", f"{folder}/{without_root}"):
        if os.path.isfile(candidate):
            return os.path.abspath(candidate)
    exit_with(f"{source}: there is no file {quote_path(name)}, neither as written nor beside {folder}.")


@functools.lru_cache(2)
def order_of_epoch(count, epoch, seed):
    """A shuffle of range(count); kept, for every step of the epoch asks for it."""
    return random.Random(f"{seed}-{epoch}").sample(range(count), count)


def rows_of_step(step, count, batch, seed):
    """Indices of a step's global batch: a walk through one shuffle per epoch, a function of (seed, step)."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        indices.append(order_of_epoch(count, epoch, seed)[place])
    return indices
