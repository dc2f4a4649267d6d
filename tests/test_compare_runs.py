"""tools/compare_runs.py: means over seeds, their intervals and differences, worked by hand."""

import math

import numpy as np
import pytest
from helpers import refused, run_script, write_answers

from tools import compare_runs

NAMES = ["follow_1", "follow_2", "follow_2", "follow_3"]


@pytest.fixture
def runs(tmp_path):
    """Four questions: two seeds with imagery, which disagree on the last; one of a control."""
    write_answers(tmp_path / "good_0/eval", zip(NAMES, [1, 1, 0, 1]))
    write_answers(tmp_path / "good_1/eval", zip(NAMES, [1, 1, 0, 0]))
    write_answers(tmp_path / "poor_0/eval", zip(NAMES, [1, 0, 0, 0]))
    return f"good={tmp_path}/good_*/eval poor={tmp_path}/poor_*/eval"


def test_the_table_is_the_one_worked_by_hand(runs):
    """Shares right are 1, 1, 0, 0.5 with imagery: mean 62.5; the runs have 75 and 50."""
    scores, losses = compare_runs.compare(compare_runs.read_kinds(runs))
    of_questions = (0.375**2 * 2 + 0.625**2 + 0.125**2) / 3
    of_runs = 0.125**2 * 2
    freedom = (of_questions / 4 + of_runs / 2) ** 2 / ((of_questions / 4) ** 2 / 3 + (of_runs / 2) ** 2)
    assert 3 < freedom < 4  # Student's t with 3 is 3.18
    half = 318 * math.sqrt(of_questions / 4 + of_runs / 2)
    assert scores[0] == "| right answers in % (runs) | n | good (2) | poor (1) |"
    assert scores[-1].startswith(f"| all | 4 | 62.5 ± {half:.1f} | 25.0 ± ")
    # below: 0, 1, 0, 0.5 of four questions, which vary as much as the shares
    assert losses[-1] == f"| all | +37.5 ± {half:.1f} |"
    names = [line.split(" | ")[0] for line in scores[2:]]
    assert names == ["| follow_1", "| follow_2", "| follow_3", "| follow, 2 or more", "| all"]
    assert scores[5].startswith("| follow, 2 or more | 3 | 50.0 ± ")
    # the same runs, named one by one
    listed = runs.replace("good_*/eval", "good_0/eval," + runs.split()[0].split("=")[1].replace("*", "1"))
    assert compare_runs.compare(compare_runs.read_kinds(listed)) == (scores, losses)


@pytest.mark.parametrize("freedom", [*range(1, 11), 11, 15, 40, 1000])
def test_the_factor_is_students(freedom):
    """95 % of Student's density lie within it."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    x = np.linspace(0, compare_runs.t_95(freedom + 0.5), 20001)
    density = math.exp(log_scale) * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-3)


def test_one_kind_has_no_second_table(runs, monkeypatch, capsys):
    run_script(monkeypatch, "tools/compare_runs.py", f"RUNS={runs.split()[0]}")
    printed = capsys.readouterr().out
    assert "| all | 4 | 62.5" in printed and "points below" not in printed and "imagery" not in printed


def test_answers_with_imagery_and_without_are_told_apart(tmp_path, monkeypatch, capsys):
    """One run imagines in two of four answers, both right; one in all, of which three are right."""
    write_answers(tmp_path / "before_0", zip(NAMES, [1, 1, 0, 1]), blocks=[2, 0, 0, 1])
    write_answers(tmp_path / "after_0", zip(NAMES, [1, 1, 0, 1]))
    run_script(
        monkeypatch, "tools/compare_runs.py", f"RUNS=before={tmp_path}/before_* after={tmp_path}/after_*"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "| run | answers with imagery in % | right with | right without | all right |"
    assert lines[-2:] == ["| before 0 | 50.0 | 100.0 | 50.0 | 75.0 |", "| after 0 | 100.0 | 75.0 |  | 75.0 |"]


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    write_answers(tmp_path / "other/eval", [("follow_1", 0)])
    refused(lambda: compare_runs.read_kinds(f"{runs} x={tmp_path}/other/eval"), "same questions")
    refused(lambda: compare_runs.read_kinds(f"x={tmp_path}/none*"), "no folder fits")
    refused(lambda: compare_runs.read_kinds("x"), "name=pattern")
    refused(lambda: compare_runs.read_kinds(f"x={tmp_path}/good_0"), "results.jsonl is missing")
