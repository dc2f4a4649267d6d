"""Before and after of several grpo4d.py runs from one model: the mean over their seeds, with intervals.

    python grpo4d.py SEED=0 OUT=out/grpo4d_0            # and so on with SEED=1, SEED=2
    python -m tools.mean_of_seeds RUNS="out/grpo4d_0 out/grpo4d_1 out/grpo4d_2"

Prints for each subtask, and for each kind of question as a whole: questions, % right before, after by run,
the mean of the runs, and its rise in points with a 95 % interval. That is 1.96 standard errors over questions
of (share of runs right after - right before): how far other questions could move it, not other seeds.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lib.command_line import override_constants, require
from lib.files import read_jsonl

RUNS = "out/grpo4d_0 out/grpo4d_1 out/grpo4d_2"  # folders written by grpo4d.py

# subtasks that are counted together as well
groups = {"camera_single": "camera (both)", "camera_pair": "camera (both)"}


@dataclass
class Rise:
    """Scores of one group of questions in percent, and how much they rise in points."""

    n: int  # questions
    before: float
    after: list  # of each run
    rise: float  # mean over runs
    half: float  # half the width of its 95 % interval


def read_answers(folder):
    """Answers of one evaluation -> {id: (subtask, 0 or 1)}."""
    file = Path(folder, "results.jsonl")
    require(file.is_file(), f"{file} is missing: RUNS must name finished runs of grpo4d.py.")
    return {row["id"]: (row["subtask"], int(row["correct"])) for row in read_jsonl(file)}


def measure_rise(before, afters, names):
    """Rise of some questions: answers before, and after of each run, {id: (subtask, 0 or 1)}."""
    right_before = [before[name][1] for name in names]
    right_after = []
    for answers in afters:
        right_after.append([answers[name][1] for name in names])

    # change of a question: its share of right runs after, less right before
    changes = []
    for was, *runs in zip(right_before, *right_after):
        changes.append(mean(runs) - was)
    half = 1.96 * stdev(changes) / math.sqrt(len(names)) if len(names) > 1 else math.nan
    return Rise(
        n=len(names),
        before=100 * mean(right_before),
        after=[100 * mean(answers) for answers in right_after],
        rise=100 * mean(changes),
        half=100 * half,
    )


def rises(runs, kind):
    """Runs' folders, "compound" or "single" -> {subtask or group: Rise}, the group of all at the end.

    Exits where the runs have not the same answers before.
    """
    befores = [read_answers(Path(run, "before", kind)) for run in runs]
    afters = [read_answers(Path(run, "after", kind)) for run in runs]
    same_before = all(answers == befores[0] for answers in befores)
    same_questions = all(set(answers) == set(befores[0]) for answers in afters)
    advice = "give runs from one model, scored before on the same questions"
    require(same_before and same_questions, f"RUNS={' '.join(runs)}: {advice}.")

    whole = f"{kind}, all"
    members = {}
    for name, (subtask, _) in befores[0].items():
        for group in {subtask, groups.get(subtask, subtask), whole}:
            members.setdefault(group, []).append(name)
    in_order = sorted(members, key=lambda group: (group == whole, group))
    return {group: measure_rise(befores[0], afters, members[group]) for group in in_order}


if __name__ == "__main__":
    c = override_constants(globals())
    print(f"{'':20}{'n':>5}{'before':>8}   after by run | mean | points (95 % interval)")
    for kind in ("compound", "single"):
        for name, found in rises(c.RUNS.split(), kind).items():
            after = "".join(f"{share:6.1f}" for share in found.after)
            low = found.rise - found.half
            high = found.rise + found.half
            line = f"{name:20}{found.n:5}{found.before:8.1f}  {after} |{mean(found.after):6.1f}"
            print(f"{line} | {found.rise:+.1f} ({low:+.1f} to {high:+.1f})")
