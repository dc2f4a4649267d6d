"""Questions of others for 4DRL: the release's, and those of DSR-Train, about videos that are at hand."""

import os
from pathlib import Path

import lib.rows
from lib import vocabulary
from lib.clips import Draft
from lib.command_line import require
from lib.footage import ENDINGS
from lib.tables import read_table


def question_rows(c, jobs):
    """QUESTIONS of the release or DSR-Train about the jobs' videos -> {split: drafts}, {reason: clips}.

    A video is known by its name without folders; grpo4d.py takes the frames.
    """
    require(
        Path(c.QUESTIONS).is_file(), f"QUESTIONS={c.QUESTIONS} is no file; give a jsonl, json or parquet."
    )
    jobs_by_name = {Path(job.path).stem: job for job in jobs}
    drafts, missing = {}, []
    for number, entry in enumerate(read_table(Path(c.QUESTIONS)), 1):
        row = to_4drl_row(entry)
        flaw = lib.rows.find_flaw(row)
        require(not flaw, f"{c.QUESTIONS}: question {number} cannot be asked: {flaw}.")
        for name in ("Question", *lib.rows.options_of(row)):
            lib.rows.require_text(str(row[name]), name, f"{c.QUESTIONS}: question {number}")
        is_named = isinstance(row.get("video_path"), str) and row["video_path"]
        require(is_named, f"{c.QUESTIONS}: question {number} lacks its video's name.")

        # Paths of the release are those of another machine; only the video's name counts.
        path = Path(row["video_path"])
        name = path.stem if path.suffix.lower() in ENDINGS else path.name
        job = jobs_by_name.get(name)
        if job is None:
            missing.append(name)
            continue
        row["video_path"] = os.path.relpath(job.path, c.OUT)
        row["id"] = f"{name}_{number}"
        row["clip"] = name
        drafts.setdefault(f"rl_{job.split}", []).append(Draft(row, row["Correct"]))
    found = f"QUESTIONS={c.QUESTIONS} asks about no video in VIDEOS={c.VIDEOS}"
    require(drafts, f"{found}; set VIDEOS to their folder.")
    return drafts, {"questions are about videos that are not in VIDEOS": missing} if missing else {}


def to_4drl_row(entry):
    """A question of the release or of DSR-Train -> a row of the 4DRL schema; {} if it is something else."""
    if not isinstance(entry, dict):
        return {}
    row = {vocabulary.DSR_TRAIN_FIELDS.get(name, name): value for name, value in entry.items()}
    options = row.pop("options", None)
    if isinstance(options, (list, tuple)):
        # a seventh option is noticed by find_flaw
        row.update(zip(lib.rows.LETTERS + "GH", options))
    return row
