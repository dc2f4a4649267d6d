"""Work on several processes: a pool that ends with its parent, progress lines, timings."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from lib.files import parse_json

KEPT_BLOCK = 30 * 2**20  # bytes; glibc's limit is 32 MiB
timings = Counter()  # what this process did and the seconds it took, since take_timings


@dataclass
class Job:
    """A clip to be made: of the toy world by its number, or of a video file."""

    split: str  # of lib.vocabulary.SPLITS
    number: int  # names the clip's folder and seeds what is drawn for it
    path: str = ""  # video file; "": a toy clip


@dataclass
class Result:
    """What became of a job."""

    job: Job
    drafts: list  # [lib.clips.Draft], rows that were made
    dropped: dict  # {reason: how many clips or rows were left out for it}
    timings: Counter  # as take_timings gives them; nothing for a job that was finished before


def read_record(file):
    """A clip's rows.json {"rows": [{"row", "label", ...}], "dropped": {reason: count}}; None if damaged."""
    record, wrong = parse_json(Path(file).read_text(encoding="utf-8", errors="replace"))
    is_whole = not wrong and isinstance(record, dict) and isinstance(record.get("dropped"), dict)
    if not is_whole or not isinstance(record.get("rows"), list):
        return None
    for entry in record["rows"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("row"), dict) or "label" not in entry:
            return None
    return record


def start_worker():
    """Lets a worker process finish its job on Ctrl-C, and ends it when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which lets jobs be finished
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Once so large a block is freed, glibc keeps memory for the next pictures: twice as fast to fill.
    bytearray(KEPT_BLOCK)


def end_with_parent():
    """Waits for the parent process's end, then ends this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_jobs(jobs, do, workers):
    """Does jobs on worker processes -> their results, in the jobs' order.

    `do` must be picklable: a function of a module, with functools.partial for its other arguments.
    """
    begun = time.time()
    results = []
    try:
        with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
            for result in pool.map(do, jobs, chunksize=1):
                results.append(result)
                print_progress(len(results), len(jobs), time.time() - begun)
    except KeyboardInterrupt:
        sys.exit("Stopped. What is finished is kept; the same command goes on from there.")
    except BrokenProcessPool:
        cause = "A worker process was killed, perhaps because memory ran out"
        sys.exit(f"{cause}; the same command goes on from what is finished, with fewer WORKERS if need be.")
    return results


def print_progress(number, count, elapsed):
    """Clips done and their rate: on a terminal one line that changes, in a file few lines."""
    on_terminal = sys.stdout.isatty()
    every = 8 if on_terminal else 500
    if number % every and number != count:
        return
    line = f"clip {number:6d}/{count} | {number / elapsed:.1f} a second"
    if on_terminal:
        print(f"\r{line}", end="\n" if number == count else "", flush=True)
    else:
        print(line, flush=True)


def add_timing(unit, count, begun):
    """Counts work of this process and its seconds since `begun`, for `print_rates` at the end."""
    timings[unit] += count
    timings[f"seconds of {unit}"] += time.time() - begun


def take_timings():
    """What was counted since the last call -> Counter; counting begins anew."""
    taken = Counter(timings)
    timings.clear()
    return taken


def print_rates(total, has_annotator):
    """Prints what was decoded, segmented and asked, and how much of it one worker does in a second."""
    for stage, unit in {"decoded": "frames", "segmented": "masks", "annotator": "requests"}.items():
        is_asked = stage == "annotator" and has_annotator
        if not total[unit] and not is_asked:
            continue
        tokens = f", {total['tokens']} tokens" if stage == "annotator" else ""
        rate = total[unit] / (total[f"seconds of {unit}"] or 1)
        print(f"{stage}: {total[unit]} {unit}{tokens}, {rate:.1f} {unit}/s/worker")
