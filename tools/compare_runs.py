"""Kinds of runs side by side, over several seeds: mean scores, their intervals, and differences.

    python -m tools.compare_runs RUNS="imagery=out/follow_imagery_*/eval noimage=out/follow_noimage_*/eval"

Each pattern names folders that evaluate.py wrote, one for each seed, all about the same questions. Prints two
tables in Markdown, by subtask and by group of subtasks: each kind's mean over its runs, in %, and what it is
below the first kind, in points; with half of the 95 % interval, t · √(s_q² / n + s_r² / runs). s_q, the
standard deviation over questions of the share of runs that are right, says how far other questions could move
the mean; s_r, that of the scores of the runs, how far other seeds could. t is Student's, with the degrees of
freedom of Welch and Satterthwaite: 1.96 where questions decide, 4.3 where three seeds do. One run has no s_r:
its interval says nothing about other seeds. Questions count as independent, though some share a clip.
Where some answers have imagery and some have none, a third table says which are right, run by run.
"""

import glob
import math
from pathlib import Path
from statistics import mean, stdev

from lib.benchmarks import TOY_GROUPS
from lib.command_line import override_constants, require
from lib.files import read_jsonl

# name=patterns of each kind, commas between its patterns, blanks between kinds; the folders are its seeds
RUNS = "imagery=out/dift*/eval"

# how many standard errors half of a 95 % interval has with 1, 2, ... 10 degrees of freedom (Student's t)
t_table = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]


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
        kind, equals, patterns = word.partition("=")
        require(kind and equals, f"RUNS: {word!r} is not of the form name=pattern.")
        kinds[kind] = []
        for pattern in patterns.split(","):
            folders = sorted(glob.glob(pattern))
            require(folders, f"RUNS: no folder fits {pattern!r}, a pattern of {kind}.")
            kinds[kind] += [read_answers(folder) for folder in folders]
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


def t_95(freedom):
    """Student's t of a 95 % interval, for fractions of a degree that of the whole number below."""
    whole = max(1, int(freedom))
    return t_table[whole - 1] if whole <= len(t_table) else 1.96 + 2.65 / whole  # right to 0.01


def estimate(of_questions, spreads):
    """Values of questions, and (s_r, runs) of each kind in them -> (mean, half its interval), in %."""
    parts = [(spread(of_questions) ** 2 / len(of_questions), len(of_questions))]
    parts += [(of_runs**2 / count, count) for of_runs, count in spreads]
    variance = sum(part for part, _ in parts)
    # each part, estimated from `count` values, is uncertain itself
    doubt = sum(part**2 / (count - 1) for part, count in parts if count > 1)
    t = t_95(variance**2 / doubt) if doubt else 0.0
    return 100 * mean(of_questions), 100 * t * math.sqrt(variance)


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
