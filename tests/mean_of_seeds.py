"""Before and after of several grpo4d.py runs from one model: the mean over their seeds, with intervals.

    python grpo4d.py SEED=0 OUT=out/grpo4d_0            # and so on with SEED=1, SEED=2
    python tests/mean_of_seeds.py RUNS="out/grpo4d_0 out/grpo4d_1 out/grpo4d_2"

Prints for each subtask, and for each kind of question as a whole: questions, % right before, after by run,
the mean of the runs, and its rise in points with a 95 % interval. That is 1.96 standard errors over questions
of (share of runs right after - right before): how far other questions could move it, not other seeds.
"""

import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import check, set_constants

RUNS = "out/grpo4d_0 out/grpo4d_1 out/grpo4d_2"  # folders written by grpo4d.py
GROUPS = {"camera_single": "camera (both)", "camera_pair": "camera (both)"}  # counted together as well


def right(folder):
    """Answers of one evaluation -> {id: (subtask, 0 or 1)}."""
    file = Path(folder, "results.jsonl")
    check(file.is_file(), f"{file} is missing: RUNS must name finished runs of grpo4d.py.")
    rows = (json.loads(line) for line in file.read_text().splitlines())
    return {row["id"]: (row["subtask"], int(row["correct"])) for row in rows}


def rises(runs, kind):
    """Runs' folders, "compound" or "single" -> {subtask: (n, before, [after of each run], rise, half width)}.

    All but n in percent and points. Exits where the runs have not the same answers before.
    """
    befores, afters = ([right(Path(run, when, kind)) for run in runs] for when in ("before", "after"))
    same = all(one == befores[0] for one in befores) and all(set(one) == set(befores[0]) for one in afters)
    check(same, f"RUNS={' '.join(runs)}: give runs from one model, scored before on the same questions.")
    table, members = {}, {}
    for name, (subtask, _) in befores[0].items():
        for group in {subtask, GROUPS.get(subtask, subtask), f"{kind}, all"}:
            members.setdefault(group, []).append(name)
    for group in sorted(members, key=lambda group: (group.endswith("all"), group)):
        names = members[group]
        before = [befores[0][name][1] for name in names]
        after = [[one[name][1] for name in names] for one in afters]
        change = [statistics.mean(column) - was for was, *column in zip(before, *after)]
        half = 1.96 * statistics.stdev(change) / math.sqrt(len(names)) if len(names) > 1 else math.nan
        shares = [100 * statistics.mean(one) for one in (before, *after)]
        table[group] = len(names), shares[0], shares[1:], 100 * statistics.mean(change), 100 * half
    return table


if __name__ == "__main__":
    set_constants(globals())
    print(f"{'':20}{'n':>5}{'before':>8}   after by run | mean | points (95 % interval)")
    for kind in ("compound", "single"):
        for name, (n, before, after, rise, half) in rises(RUNS.split(), kind).items():
            each = "".join(f"{share:6.1f}" for share in after)
            line = f"{name:20}{n:5}{before:8.1f}  {each} |{statistics.mean(after):6.1f} | {rise:+.1f}"
            print(f"{line} ({rise - half:+.1f} to {rise + half:+.1f})")
