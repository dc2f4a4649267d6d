"""Files and lists, for every stage: what is written appears whole or not at all, what is damaged is named."""

import json
import os
import shutil
import uuid
from pathlib import Path

from lib.command_line import require

UNFINISHED = ".tmp"  # ending of what a kill may leave behind; never read, removed by the next run
REMOVED = ".removed"  # a folder that is being removed


def evenly_spaced(items, most):
    """At most `most` items, evenly spaced, the first and the last among them: 0..9, 4 -> [0, 3, 6, 9]."""
    count = min(most, len(items))
    last = len(items) - 1
    return [items[round(i * last / max(count - 1, 1))] for i in range(count)]


# ---------------------------------------------------------------- writing


def write_text(path, text):
    """Writes a file whole: under a temporary name first, then renamed. Makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # two processes may write the same file, also on two machines
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{UNFINISHED}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        force_to_disk(unfinished)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def force_to_disk(path):
    """Waits until a file, or the names in a folder, are on the disk.

    Without it a loss of power may leave an empty file under a new name. Some file systems cannot force a
    folder: then nothing happens.
    """
    is_folder = os.path.isdir(path)
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(number)


def write_json(path, value):
    """Writes a value as JSON that people can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def to_jsonl(entries):
    """Entries as text, one JSON object a line."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def append_jsonl(path, entries):
    """Adds entries to the end of a jsonl file; `read_jsonl` leaves a line out that a kill cut short."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_jsonl(entries))


def remove_folder(folder):
    """Removes a folder, renamed first: a kill leaves no half of it under its name. None there is no error."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    leaving = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}{REMOVED}")
    os.replace(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def replace_folder(unfinished, folder):
    """Gives a finished folder its name; one that has this name already is removed."""
    remove_folder(folder)
    os.replace(unfinished, folder)


def keep_first(unfinished, folder):
    """Gives a finished folder its name, unless another process has made the same one: then that is used."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not Path(folder).is_dir():
            raise
        shutil.rmtree(unfinished, ignore_errors=True)


def is_leftover(path):
    """Whether a kill, or a run that goes on, left this file or folder, which no stage ever reads."""
    name = Path(path).name
    return name == ".lock" or name.startswith(".unfinished_") or name.endswith((UNFINISHED, REMOVED))


def remove_leftovers(folder):
    """Removes what kills left in a folder; only by a run that holds its lock."""
    for path in Path(folder).glob("*"):
        if not is_leftover(path) or path.name == ".lock":
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- reading


def parse_json(text):
    """JSON text -> (its value, ""), or (None, what is wrong with it)."""
    try:
        return json.loads(text), ""
    except (ValueError, RecursionError) as error:
        return None, str(error)[:80]


def read_json(path, kind=None, remedy="restore it or delete it"):
    """What a JSON file holds; exits if it is damaged, or no `kind` (dict or list)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = ""
    value, wrong = parse_json(text)
    require(not wrong, f"{path} is damaged ({wrong}); {remedy}.")
    names = {dict: "object", list: "list"}
    is_right = kind is None or isinstance(value, kind)
    require(is_right, f"{path} is damaged (it holds no JSON {names.get(kind)}); {remedy}.")
    return value


def is_json(path):
    """Whether a file is there and holds a JSON object, which a file that was cut short does not."""
    path = Path(path)
    if not path.is_file():
        return False
    value, _ = parse_json(path.read_text(encoding="utf-8", errors="replace"))
    return isinstance(value, dict)


def read_jsonl(path):
    """The entries of a jsonl file; none if there is no file. A line that a kill cut short is left out.

    Any other line that is no JSON object ends the program.
    """
    path = Path(path)
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"}\n"):
            is_cut = not line.endswith(b"\n")
            require(is_cut or not line.strip(), f"{path}:{number} is damaged; delete this line.")
            continue
        entry, wrong = parse_json(line)
        is_right = isinstance(entry, dict)
        require(is_right, f"{path}:{number} is damaged ({wrong or 'no object'}); delete this line.")
        entries.append(entry)
    return entries
