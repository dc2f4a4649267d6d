"""Kinds of runs side by side, over several seeds: mean scores, their intervals, and differences.

    python -m tools.compare_runs RUNS="imagery=out/follow_imagery_*/eval noimage=out/follow_noimage_*/eval"

Each pattern names folders that evaluate.py wrote, one for each seed, all about the same questions. Prints two
tables in Markdown, by subtask and by group of subtasks: each kind's mean over its runs, in %, and what it is
below the first kind, in points; with half of the 95 % interval. That is 1.96 times √(s_q² / n + s_r² / runs):
s_q, the standard deviation over questions of the share of runs that are right, says how far other questions
could move the mean; s_r, that of the scores of the runs, how far other seeds could. One run has no s_r.
Where some answers of a run have imagery and some have none, a third table says which are right, run by run.
"""

import glob
import math
from pathlib import Path
from statistics import mean, stdev

from lib.benchmarks import TOY_GROUPS
from lib.command_line import override_constants, require
from lib.files import read_jsonl

RUNS = "imagery=out/dift*/eval"  # name=pattern of each kind, blanks between; the folders are its seeds


def read_answers(folder):
    """results.jsonl of a folder -> {id of a question: (subtask, 0 or 1, has the answer imagery?)}."""
    file = Path(folder, "results.jsonl")
    require(file.is_file(), f"{file} is missing: RUNS must name folders that evaluate.py wrote.")
    rows = read_jsonl(file)
    return {row["id"]: (row["subtask"], int(row["correct"]), row["blocks"] > 0) for row in rows}


def read_kinds(text):
    """RUNS -> {kind: [answers of each run]}, all about the same questions."""
    kinds = {}
    for word in text.split():
        kind, equals, pattern = word.partition("=")
        require(kind and equals, f"RUNS: {word!r} is not of the form name=pattern.")
        folders = sorted(glob.glob(pattern))
        require(folders, f"RUNS: no folder fits {pattern!r}, the pattern of {kind}.")
        kinds[kind] = [read_answers(folder) for folder in folders]
    require(kinds, "RUNS names no runs; give name=pattern of each kind.")
    questions = {frozenset(run) for runs in kinds.values() for run in runs}
    require(len(questions) == 1, "RUNS: not all runs answer the same questions; score them on the same DATA.")
    return kinds


def spread(values):
    """Standard deviation; 0 of a single value, which says nothing about others."""
    return stdev(values) if len(values) > 1 else 0.0


def score_questions(runs, names):
    """Runs and the ids of some questions -> (share of runs right of each question, score of each run)."""
    of_questions = [mean(run[name][1] for run in runs) for name in names]
    of_runs = [mean(run[name][1] for name in names) for run in runs]
    return of_questions, of_runs


def estimate(of_questions, spreads):
    """Values of questions, and (s_r, runs) of each kind in them -> (mean, half its interval), in %."""
    variance = spread(of_questions) ** 2 / len(of_questions)
    for of_runs, count in spreads:
        variance += of_runs**2 / count
    return 100 * mean(of_questions), 196 * math.sqrt(variance)


def group_questions(run):
    """Questions by subtask, by group and all: {name: ids}, in this order."""
    groups = {}
    for name, (subtask, _, _) in run.items():
        groups.setdefault(subtask, []).append(name)
    groups = dict(sorted(groups.items()))
    for group, subtasks in TOY_GROUPS.items():
        names = [name for subtask in subtasks for name in groups.get(subtask, [])]
        if names:
            groups[group] = names
    groups["all"] = list(run)
    return groups


def compare(kinds):
    """{kind: [answers of each run]} -> lines of two tables in Markdown."""
    first = next(iter(kinds))
    groups = group_questions(kinds[first][0])
    head = "".join(f" {kind} ({len(runs)}) |" for kind, runs in kinds.items())
    scores = [f"| right answers in % (runs) | n |{head}", "| --- " * (len(kinds) + 2) + "|"]
    others = "".join(f" {kind} |" for kind in kinds if kind != first)
    losses = [f"| points below {first} |{others}", "| --- " * len(kinds) + "|"]
    for group, names in groups.items():
        score_line, loss_line = f"| {group} | {len(names)} |", f"| {group} |"
        best, best_runs = score_questions(kinds[first], names)
        for kind, runs in kinds.items():
            shares, of_runs = score_questions(runs, names)
            middle, half = estimate(shares, [(spread(of_runs), len(runs))])
            score_line += f" {middle:.1f} ± {half:.1f} |"
            if kind == first:
                continue
            loss = [mine - theirs for mine, theirs in zip(best, shares)]
            both = [(spread(best_runs), len(best_runs)), (spread(of_runs), len(runs))]
            middle, half = estimate(loss, both)
            loss_line += f" {middle:+.1f} ± {half:.1f} |"
        scores.append(score_line)
        losses.append(loss_line)
    return scores, losses


def percent(values):
    """Zeros and ones -> the share of ones as text, in %; "" of none."""
    return f"{100 * mean(values):.1f}" if values else ""


def split_by_imagery(kinds):
    """{kind: [answers of each run]} -> lines of a table by run, of answers with imagery and without."""
    heads = ["answers with imagery in %", "right with", "right without", "all right"]
    lines = ["| run | " + " | ".join(heads) + " |", "| --- " * 5 + "|"]
    mixed = False
    for kind, runs in kinds.items():
        for index, run in enumerate(runs):
            answers = run.values()
            imagined = [right for _, right, has_imagery in answers if has_imagery]
            plain = [right for _, right, has_imagery in answers if not has_imagery]
            mixed = mixed or bool(imagined and plain)
            cells = [[has_imagery for _, _, has_imagery in answers], imagined, plain, imagined + plain]
            lines.append(f"| {kind} {index} | " + " | ".join(map(percent, cells)) + " |")
    return lines if mixed else []


if __name__ == "__main__":
    c = override_constants(globals())
    kinds = read_kinds(c.RUNS)
    scores, losses = compare(kinds)
    print("\n".join(scores))
    if len(kinds) > 1:
        print("\n" + "\n".join(losses))
    by_imagery = split_by_imagery(kinds)
    if by_imagery:
        print("\n" + "\n".join(by_imagery))
