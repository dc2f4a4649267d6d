"""Benchmarks as rows: DSR-Bench, Dyn-Bench, VLM4D and DSI-Bench, read from their authors' files.

A further benchmark is one function, which tells the kind of a question and the path of its video, and one
entry of BENCHMARKS. `python evaluate.py BENCH=<its name> DATA=... VIDEOS=...` then answers it.
"""

import ast
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lib.command_line import quote, require, require_choice
from lib.rows import LETTERS, NO_TEXT, Row, read_rows
from lib.tables import read_table

COLUMNS = {  # names that some files have for the same thing
    "candidates": "options",
    "choices": "options",
    "GT": "answer",
    "task_type": "type",
    "cate": "type",
    "videoID": "video",
    "relative_path": "video",
}
TOY_GROUPS = {  # of generate_data.py's toy questions
    "camera (both)": ("camera_single", "camera_pair"),
    "follow, 2 or more": tuple(f"follow_{count}" for count in range(2, 21)),  # as EXCHANGES allows
}


# ---------------------------------------------------------------- one function a benchmark


def dsr_entry(raw, path):
    """DSR-Bench: `type` is the kind; the video's name may lack its ending."""
    name = str(raw["video"]).removesuffix(".mp4")
    return str(raw["type"]).strip().lower(), f"{name}.mp4"


def dyn_entry(raw, path):
    """Dyn-Bench: the file davis/the_dog_cameraqa.json -> cameraqa, and the frames' folder davis/the_dog."""
    scene, _, kind = path.stem.rpartition("_")
    return kind, f"{path.parent.name}/{scene}"


def vlm4d_entry(raw, path):
    """VLM4D: the video's web address holds its path; the kind is the folder, or "no" for a false premise."""
    video = str(raw["video"]).rpartition("resolve/main/")[2]
    is_synthetic = video.startswith("videos_synthetic/")
    if is_synthetic and re.match("no( |$)", str(raw["answer"]).lower()):
        return "no", video
    return str(Path(video).parent), video


def dsi_entry(raw, path):
    """DSI-Bench: a version's file std.csv, or a column `aug`, names the folder of its videos."""
    version = raw.get("aug", path.stem)
    return str(raw["type"]), f"{version}/{raw['video']}"


def join_versions(rows):
    """DSI-Bench: the n-th rows of all versions, which are folders of videos, are one question: `twin` n.

    Of one file with all versions (metadata_4aug.csv) the order is not known, so it is checked.
    """
    files = {row.source.rpartition(":")[0] for row in rows}
    counts = {}  # rows so far of each version
    questions = {}  # the n-th question, as the first version has it
    for row in rows:
        version = row.video.partition("/")[0]
        number = counts.get(version, 0) + 1
        counts[version] = number
        row.release_fields["twin"] = number
        question = (row.clip, row.subtask)
        if row.skip_reason:  # a bad row counts as one, but what it asks is not known
            continue
        same = len(files) > 1 or questions.setdefault(number, question) == question
        require(same, f"{row.source}: its versions stand in different orders; give the four files instead.")


# ---------------------------------------------------------------- the table of benchmarks


@dataclass
class Benchmark:
    """Where a benchmark's questions are, what kinds there are, and the function that reads one entry."""

    entry: Callable  # entry(raw, path) -> kind of question, path of its video below VIDEOS
    files: tuple  # names or patterns of the files that hold the questions
    subtasks: dict  # kind -> subtask, in the order of the authors' table
    groups: dict = field(default_factory=dict)  # subtasks that are counted together as well
    required: tuple = ("question", "options", "answer", "video")  # fields of each entry, see COLUMNS
    join: Callable | None = None  # join(rows), called once all are read


BENCHMARKS = {
    "dsr": Benchmark(
        entry=dsr_entry,
        files=("benchmark.parquet",),
        required=("type", "question", "options", "answer", "video"),
        subtasks={
            "abs_dis": "Abs Dis",
            "abs_dir": "Abs Dir",
            "abs_ori": "Abs Ori",
            "abs_spd": "Abs Spd",
            "abs_spd_comp": "Abs Spd Comp",
            "abs_dir_pred": "Abs Dir Pred",
            "rel_dis": "Rel Dis",
            "rel_dir": "Rel Dir",
            "rel_ori": "Rel Ori",
            "rel_spd": "Rel Spd",
            "rel_spd_comp": "Rel Spd Comp",
            "rel_dir_pred": "Rel Dir Pred",
            "non_temp": "Non-Temp Based",
        },
    ),
    "dyn": Benchmark(
        entry=dyn_entry,
        files=("*qa.json",),
        required=("question", "options", "answer"),  # the file's name tells the rest
        subtasks={"qa": "Inter-Object", "sceneqa": "Object-Scene", "cameraqa": "Camera-Object"},
    ),
    "vlm4d": Benchmark(
        entry=vlm4d_entry,
        files=("real_mc.json", "synthetic_mc.json"),
        subtasks={
            "videos_real/ego4d": "Real Ego",
            "videos_real/davis": "Real Exo",
            "videos_real/youtube-vos": "Real Exo",
            "videos_synthetic": "Synthetic Dir",
            "no": "Synthetic FP",
        },
        groups={
            "Real": ("Real Ego", "Real Exo"),
            "Synthetic": ("Synthetic Dir", "Synthetic FP"),
        },
    ),
    "dsi": Benchmark(
        entry=dsi_entry,
        files=("std.csv", "hflip.csv", "reverse.csv", "reverse_hflip.csv"),
        required=("type", "question", "options", "answer", "video"),
        subtasks={
            "0": "Obj:static cam",
            "1": "Obj:moving cam",
            "2": "Cam:static scene",
            "3": "Cam:dynamic scene",
            "4": "Obj-Cam distance",
            "5": "Obj-Cam orientation",
        },
        join=join_versions,
    ),
}


def known_subtasks():
    """The subtasks of all benchmarks, in the order of their tables."""
    return [name for benchmark in BENCHMARKS.values() for name in benchmark.subtasks.values()]


def known_groups():
    """Subtasks that are counted together as well, of the toy questions and of all benchmarks."""
    groups = dict(TOY_GROUPS)
    for benchmark in BENCHMARKS.values():
        groups.update(benchmark.groups)
    return groups


# ---------------------------------------------------------------- files to rows


def read_benchmark(bench, data, videos=""):
    """The rows of a benchmark's files, or of generate_data.py (toy), in order.

    data: the folder, or one file; videos: the folder that the paths of the videos start from. An entry that
    cannot be asked is a row with a skip_reason; exits if there is no other.
    """
    if bench == "toy":
        return read_rows(data if data.endswith(".jsonl") else Path(data) / "test_imagery.jsonl")
    require_choice("BENCH", bench, ("toy", *BENCHMARKS))
    benchmark = BENCHMARKS[bench]
    rows = []
    for path in find_question_files(benchmark, data):
        entries = read_table(path)
        require(entries, f"{path} holds no questions; download it again.")
        for number, raw in enumerate(entries, 1):
            rows.append(row_or_reason(bench, raw, path, number))
    can_be_asked = any(not row.skip_reason for row in rows)
    require(can_be_asked, f"{rows[0].source}: {rows[0].skip_reason}.")
    if benchmark.join:
        benchmark.join(rows)
    for row in rows:
        row.release_fields["video_path"] = str(Path(videos) / row.video)
    return rows


def find_question_files(benchmark, data):
    """DATA itself if it is a file, else the benchmark's files anywhere in that folder; exits without one."""
    data = Path(data)
    paths = [data] if data.is_file() else []
    if not paths:
        for name in benchmark.files:
            paths += sorted(data.rglob(name))
    # Dyn-Bench's files of this name hold no questions
    paths = [path for path in paths if "frame_sampling" not in path.name]
    names = " or ".join(benchmark.files)
    require(paths, f"DATA={data} holds no {names}; set it to the benchmark's folder or file.")
    return paths


class BadEntry(ValueError):
    """An entry of a benchmark that cannot be asked; the text says where it stands and why."""


def need(condition, message):
    """Raises BadEntry with the message unless the condition holds."""
    if not condition:
        raise BadEntry(message)


def row_or_reason(bench, raw, path, number):
    """A benchmark file's entry -> Row without frames, or with the reason why it cannot be asked."""
    source = f"{path}:{number}"
    try:
        return entry_to_row(bench, raw, path, source, number)
    except BadEntry as error:
        version = raw.get("aug", path.stem) if isinstance(raw, dict) else path.stem
        video = f"{quote(version)}/"
        return Row(id=source, text_input="", video=video, source=source, skip_reason=str(error))


def entry_to_row(bench, raw, path, source, number):
    """A benchmark file's entry -> Row without frames; its key holds all right letters. Raises BadEntry."""
    benchmark = BENCHMARKS[bench]
    need(isinstance(raw, dict), f"an entry must be an object, not a {type(raw).__name__}")
    raw = {COLUMNS.get(name, name): value for name, value in raw.items() if value is not None}
    missing = ", ".join(name for name in benchmark.required if name not in raw)
    need(not missing, f"there is no {missing}, so it is no row of BENCH={bench}")
    for name in ("question", "answer", "type", "video", "aug", "id"):
        value = raw.get(name, "")
        is_text = type(value) in (str, int, float) and not NO_TEXT.search(str(value))
        need(is_text, f"the {name} must be a text, this one is {quote(value)}")
    need(isinstance(raw["question"], str), f"the question must be a text, this one is {raw['question']}")
    kind, video = benchmark.entry(raw, path)
    need(kind in benchmark.subtasks, f"'{quote(kind)}' is no kind of question of BENCH={bench}")
    is_inside = not Path(video).is_absolute() and ".." not in Path(video).parts
    need(is_inside, f"the video {quote(video)} is not inside VIDEOS")

    options = parse_options(raw["options"])
    letters = "".join(options)
    in_order = 2 <= len(options) <= len(LETTERS) and LETTERS.startswith(letters)
    need(in_order, f"a question has 2 to 6 options, this one has {quote(raw['options'])!r}")
    is_text = not NO_TEXT.search("".join(options.values()))
    need(is_text, "an option holds a NUL or half of a character")
    mislabelled = [text for letter, text in options.items() if find_label(text, letter)]
    need(not mislabelled, f"the letters of its options are not in order: {quote(raw['options'])}")
    key = find_keys(raw["answer"], options)
    shown = f"'{quote(raw['answer'])}' is none of the options {quote(options)}"
    need(key, f"the answer {shown}")

    row = question_row(raw["question"], options, video, source)
    row.id = str(raw.get("id", source))
    row.clip = str(raw.get("video", video))
    row.subtask = benchmark.subtasks[kind]
    row.key = key
    row.release_fields = {
        "index": number - 1,
        "video_id": video.removesuffix(".mp4"),
        "gt": key[0],
        "subtask_type": kind,
    }
    return row


def question_row(question, options, video, source):
    """A question about a video and its options {"A": "left", ...} -> Row without frames and without a key."""
    lines = [f"{question}\n"]
    for letter, text in options.items():
        lines.append(f"{letter}. {text}")
    return Row(
        id=source,
        text_input="\n".join(lines),
        subtask="asked",
        clip=video,
        options=options,
        video=video,
        source=source,
    )


def parse_options(value):
    """Options in any shape -> {"A": "left", ...}: list, array, dict, text of one, "A: left; B: right"."""
    # what is no text of a list or dict stays as it is; a long expression is no list either
    with contextlib.suppress(AttributeError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        value = ast.literal_eval(value.strip())
    if isinstance(value, (str, int, float)):
        value = dict(re.findall(r"\b([A-F]):\s*(.*?)\s*(?=;\s*[A-F]:|$)", str(value), flags=re.S))
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (dict, list, tuple)):
        return {}
    # one letter more than there may be, so that a seventh option is noticed
    pairs = value.items() if isinstance(value, dict) else zip(LETTERS + "G", value)
    options = {}
    for letter, text in pairs:
        if text is not None and text == text:  # an empty field of parquet is None or NaN
            if not isinstance(letter, str) or type(text) not in (str, int, float):
                return {}
            options[str(letter)] = re.sub(rf"^\(?{letter}[.):]\s+", "", str(text))
    return options


def find_label(text, letter):
    """The letter of another option that an option's text begins with, or "": "B. up" as option A -> "B"."""
    label = re.match(r"\(?([A-F])[.)]\s", text)
    return label[1] if label and label[1] != letter else ""


def find_keys(answer, options):
    """All letters that are right, for an answer as text or letter: "left" or "A" -> "AC" if C says so too."""
    answer = str(answer).strip().lower()
    texts = {letter: text.strip().lower() for letter, text in options.items()}
    named = re.match(r"\(?([a-f])(?=[.):]|$)", answer)
    if answer not in texts.values() and named:
        answer = texts.get(named[1].upper())
    return "".join(letter for letter, text in texts.items() if text == answer)
