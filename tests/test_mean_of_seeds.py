"""tools/mean_of_seeds.py: the mean of several runs and its interval, worked by hand."""

import math

import pytest
from helpers import refused, run_script, write_answers

from tools import mean_of_seeds


@pytest.fixture
def runs(tmp_path):
    """Two runs of three questions: 1 right before; 2 and 3 after."""
    names = ["camera_pair", "camera_single", "object_speed"]
    for run, after in (("a", [1, 1, 0]), ("b", [1, 1, 1])):
        for kind in ("compound", "single"):
            write_answers(tmp_path / run / "before" / kind, zip(names, [1, 0, 0]))
            write_answers(tmp_path / run / "after" / kind, zip(names, after))
    return [str(tmp_path / name) for name in "ab"]


def test_rises_are_those_worked_by_hand(runs):
    """Changes by question are 0, 1 and a half: mean 50 points, standard deviation 50."""
    table = mean_of_seeds.rises(runs, "single")
    whole = table["single, all"]
    assert whole.n == 3
    assert (whole.before, whole.rise) == pytest.approx((100 / 3, 50))
    assert whole.after == pytest.approx([200 / 3, 100])
    assert whole.half == pytest.approx(1.96 * 50 / math.sqrt(3))
    assert table["camera (both)"].n == 2 and table["camera (both)"].rise == pytest.approx(50)
    assert table["object_speed"].after == [0, 100] and list(table)[-1] == "single, all"


def test_the_script_prints_both_kinds(runs, monkeypatch, capsys):
    run_script(monkeypatch, "tools/mean_of_seeds.py", f"RUNS={' '.join(runs)}")
    printed = capsys.readouterr().out
    assert "single, all" in printed and "compound, all" in printed and "+50.0 (-6.6 to +106.6)" in printed


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    write_answers(tmp_path / "c/before/compound", [("camera_pair", 0)])
    write_answers(tmp_path / "c/after/compound", [("camera_pair", 0)])
    refused(lambda: mean_of_seeds.rises([runs[0], str(tmp_path / "c")], "compound"), "from one model")
    refused(lambda: mean_of_seeds.rises([str(tmp_path / "none")], "compound"), "is missing")
