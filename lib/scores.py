"""What was scored, and numbers about it: intervals, groups of four, means over seeds, summaries as text."""

import math
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from statistics import stdev

import torch

from lib.benchmarks import BENCHMARKS, known_subtasks
from lib.command_line import require
from lib.files import is_json, parse_json, read_json, read_jsonl

JSON_NAMES = {"source": "where", "truncated": "cut"}  # fields that have another name in results.jsonl


@dataclass
class Result:
    """An answer as it was scored, by the strict rule and by the release's: a line of results.jsonl."""

    row: int  # number of the question
    source: str  # "file:line" of the question
    id: str
    subtask: str
    options: int  # how many there are
    key: str | None  # all letters that are right
    answer: str | None  # strict rule: the letter, None without one
    correct: bool
    pred: str  # the release's rule: the letter, "" without one
    hit: int  # 1: pred is right
    truncated: bool  # MAX_NEW came before the end
    blocks: int  # whole blocks of latents
    tokens: int
    text: str
    release_fields: dict = field(default_factory=dict)  # what the release writes beside an answer
    imagery: list = field(default_factory=list)  # of each block: what lib/imagery.py compared
    latents: torch.Tensor | None = None  # (blocks, K, D), until they are compared

    def to_json(self):
        """The result as a line of results.jsonl."""
        entry = {}
        for name, value in vars(self).items():
            if name not in ("release_fields", "imagery", "latents"):
                entry[JSON_NAMES.get(name, name)] = value
        entry.update(self.release_fields)
        entry["imagery"] = self.imagery
        return entry

    @classmethod
    def from_json(cls, entry):
        """A line of results.jsonl as a result again; what is no field of its own is the release's."""
        entry = dict(entry)
        own = {}
        for name in cls.__dataclass_fields__:
            key = JSON_NAMES.get(name, name)
            if key in entry:
                own[name] = entry.pop(key)
        return cls(**own, release_fields=entry)


# ---------------------------------------------------------------- results that are there already


def read_results(path, count=None):
    """The entries of results.jsonl by their rows; exits on a damaged one, or one of no row below `count`."""
    kinds = {"row": int, "subtask": str, "options": (int, float), "correct": bool, "pred": str, "hit": int}
    kinds.update(cut=bool, blocks=int, tokens=int, text=str, imagery=list, where=str, id=str)
    kinds.update(key=(str, type(None)), answer=(str, type(None)))
    entries = {}
    for number, entry in enumerate(read_jsonl(path), 1):
        wrong = [name for name, kind in kinds.items() if not isinstance(entry.get(name, kind), kind)]
        wrong += [name for name in kinds if name not in entry and name not in ("key", "answer", "imagery")]
        where = f"{path}: entry {number} is damaged"
        remedy = "delete its line, and the question is answered again"
        require(not wrong, f"{where} ({wrong[0] if wrong else ''} is missing or of another type); {remedy}.")
        in_range = entry["row"] >= 0 and (count is None or entry["row"] < count)
        require(in_range, f"{where} (there is no question {entry['row']}); {remedy}.")
        entries[entry["row"]] = entry
    return entries


def read_settings(out):
    """The settings that the answers in a folder were given with; None if there are none yet.

    Exits if there are answers of something else, or if the settings are damaged.
    """
    file = Path(out) / "settings.json"
    answers = Path(out) / "results.jsonl"
    if file.is_file():
        return read_json(file, dict, f"delete {out} to answer again")
    is_free = not answers.is_file() or not answers.stat().st_size
    require(is_free, f"{answers} was not written by evaluate.py, which would overwrite it; set another OUT.")
    return None


def read_neighbour(file):
    """The summary of a control; None, said in a line, if it is damaged."""
    summary = parse_json(Path(file).read_text(encoding="utf-8"))[0] if is_json(file) else {}
    settings, scores = summary.get("settings"), summary.get("scores")
    micro = scores.get("micro") if isinstance(scores, dict) else None
    if isinstance(settings, dict) and "weights" in settings and isinstance(micro, dict):
        return summary
    print(f"{file} is damaged and is left out.")
    return None


# ---------------------------------------------------------------- numbers


def wilson_interval(correct, n, z=1.959964):
    """Wilson's 95 % interval of a share: (8, 10) -> (0.490, 0.943); n = 0 -> (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    room = z * z / n
    half = z * math.sqrt(share * (1 - share) / n + room / (4 * n))
    low = (share + room / 2 - half) / (1 + room)
    high = (share + room / 2 + half) / (1 + room)
    return max(0.0, low), min(1.0, high)


def mean(values):
    """Mean of some numbers; None if there are none."""
    values = list(values)
    return sum(values) / len(values) if values else None


def average(values):
    """Mean of numbers, or of dicts and lists entry by entry: [{"a": 1}, {"a": 2}] -> {"a": 1.5}.

    None and empty lists do not count; what is alike in all stays as it is.
    """
    if isinstance(values[0], dict):
        return {name: average([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        # one seed may imagine further than another: missing entries are None, and do not count
        columns = zip_longest(*(value for value in values if value))
        return [average(column) for column in columns]
    if len(set(values)) == 1:
        return values[0]
    return mean(value for value in values if value is not None)


def average_over_seeds(summaries):
    """The summaries of runs with several seeds over the same questions -> one with their means and spreads.

    `..._spread`: standard deviation of runs (divisor: runs - 1). The interval is for the mean share and the n
    questions, which more seeds do not make more.
    """
    summary = average(summaries)
    summary["settings"] = summaries[0]["settings"]
    summary["seeds"] = len(summaries)
    for name in ("macro", "release_macro"):
        summary[f"{name}_spread"] = stdev(one[name] for one in summaries)
    for name, score in summary["scores"].items():
        for rule in ("accuracy", "release"):
            score[f"{rule}_spread"] = stdev(one["scores"][name][rule] for one in summaries)
        score["low"], score["high"] = wilson_interval(score["correct"], score["n"])
        score["note"] += " ± {accuracy_spread:.1%}, release ± {release_spread:.1%}".format(**score)
    return summary


# ---------------------------------------------------------------- results in groups


def subtasks_in_order(results):
    """The subtasks of some results, in the order of their benchmark, else of the alphabet."""
    known = known_subtasks()

    def rank(name):
        return known.index(name) if name in known else 0, name

    return sorted({result.subtask for result in results}, key=rank)


def three_of_four(results):
    """DSI-Bench: the four versions of a question (one `twin`) as one result, right where three are.

    Not counted where a version is missing. Chance is that of three or four hits: 4p³(1 - p) + p⁴.
    """
    versions = {}
    for result in results:
        twin = result.release_fields.get("twin")
        if twin is not None:
            versions.setdefault(twin, []).append(result)

    joined = []
    for four in versions.values():
        if len(four) != 4:
            continue
        p = 1 / four[0].options
        question = replace(
            four[0],
            subtask=f"{four[0].subtask}, 3 of 4",
            options=1 / (p**3 * (4 - 3 * p)),  # as many as give that chance
            correct=sum(result.correct for result in four) >= 3,
            hit=sum(result.hit for result in four) >= 3,
            imagery=[],
        )
        joined.append(question)
    return joined


def is_dsr(subtask):
    """Whether a subtask is one of DSR-Bench, whose summary the release writes in a form of its own."""
    return subtask in BENCHMARKS["dsr"].subtasks.values()


def release_summary(results, summary):
    """DSR-Bench: what the release writes as its summary, by its rule; no question: null."""
    subtasks = list(BENCHMARKS["dsr"].subtasks.values())
    hits = {}
    for name in subtasks:
        hits[name] = [result.hit for result in results if result.subtask == name]
    skipped = len(summary["left_out"])
    return {
        "total": len(results) + skipped,
        "eval_count": len(results),
        "skipped": skipped,
        "accuracy": summary["scores"]["micro"]["release"],
        "correct": sum(result.hit for result in results),
        "subtask_accuracy": {name: mean(hits[name]) for name in subtasks},
        "subtask_correct": {name: sum(hits[name]) for name in subtasks},
        "subtask_total": {name: len(hits[name]) for name in subtasks},
        "subtask_macro_avg": summary["release_macro"],
        "subtask_columns_order": [*subtasks, "Avg"],
    }


# ---------------------------------------------------------------- summaries as text


def as_percent(score):
    """A score with its shares as text, in percent."""
    shares = {}
    for name in ("accuracy", "low", "high", "release", "chance"):
        shares[name] = f"{100 * score[name]:.1f}"
    return {**score, **shares}


def named_numbers(values):
    """The numbers of a dict as text: {"macro": 0.5, "scores": {...}} -> "macro 0.5"."""
    named = [f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, (int, float))]
    return ", ".join(named)


def describe_summary(summary):
    """The part of a summary that is no table, as lines of text with the names of summary.json."""
    imagery = summary["imagery"]
    lines = [named_numbers(summary)]
    if "readout" in summary:
        lines.append(describe_readout(summary["readout"]))
    if not imagery["compared"]:
        return lines
    lines.append(named_numbers(imagery))
    cosine = " ".join(f"{value:.3f}" for value in imagery["cosine"])
    lines.append(f"centred cosine per latent {cosine}")
    # a summary of before object@1 has none of it
    by_block = imagery.get("object_by_block", [])
    if any(value is not None for value in by_block):
        shares = " ".join("-" if value is None else f"{value:.3f}" for value in by_block)
        lines.append(f"object@1 by key frame {shares}")
    return lines


def describe_readout(readout):
    """The R² of a readout as a line: of held-out true latents, and of those that were imagined."""
    return f"readout, R² on held-out rows: {named_numbers(readout)}"
