"""Small helpers for files and lists that every stage uses."""

import json
import os
from pathlib import Path


def evenly_spaced(items, most):
    """At most `most` items, evenly spaced, the first and the last among them: 0..9, 4 -> [0, 3, 6, 9]."""
    count = min(most, len(items))
    last = len(items) - 1
    return [items[round(i * last / max(count - 1, 1))] for i in range(count)]


def write_text(path, text):
    """Writes a file whole: under a temporary name first, then renamed. Makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_json(path, value):
    """Writes a value as JSON that people can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def to_jsonl(entries):
    """Entries as text, one JSON object a line."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def read_jsonl(path):
    """The entries of a jsonl file; none if there is no file. A line that a kill cut short is left out."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]
