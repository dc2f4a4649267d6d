"""Files of entries as users have them, whatever their format: benchmarks and lists of questions."""

import csv
import json
from importlib import import_module
from importlib.util import find_spec

from lib.command_line import exit_with, quote, require
from lib.files import parse_json


def read_table(path):
    """A file's entries: parquet, csv, tsv, jsonl or json (a list, a dict of them or of lists) -> [dict].

    Exits with one sentence on a file that is no such table, or on parquet without pyarrow.
    """
    if path.suffix == ".parquet" and not find_spec("pyarrow"):
        exit_with(f"{path} needs pyarrow: pip install pyarrow.")
    try:
        return parse_table(path)
    except OSError as error:
        # of the disk, or of a parquet file with a wrong byte
        exit_with(f"{path} cannot be read ({quote(str(error))}); download it again.")
    except Exception as error:  # of many libraries, or of JSON nested too deeply
        exit_with(f"{path} is no valid {path.suffix[1:]} file ({quote(str(error))}); download it again.")


def parse_table(path):
    """The same, with the errors of the format's own reader."""
    if path.suffix == ".parquet":
        return import_module("pyarrow.parquet").read_table(path).to_pylist()
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file, strict=True))
        if path.suffix == ".tsv":
            return whole_rows(path, csv.DictReader(file, delimiter="\t", strict=True))
        if path.suffix == ".jsonl":
            return parse_lines(path, file)
        entries = json.load(file)

    if not isinstance(entries, dict):
        return list(entries)
    if all(isinstance(value, list) for value in entries.values()):
        # DSR-Train: a dict of videos, each with a list of its questions
        return [{"videoID": name, **entry} for name, questions in entries.items() for entry in questions]
    return list(entries.values())


def whole_rows(path, rows):
    """Rows of a tsv file -> the same as a list; exits where a stray quote joins several rows to one."""
    entries = []
    for number, row in enumerate(rows, 1):
        is_joined = any("\n" in (cell or "") and "\t" in cell for cell in row.values())
        wrong = f"{path}:{number}: a cell goes on in the next line, which a stray quote causes"
        require(not is_joined, f"{wrong}; write two quotes for each that is meant.")
        entries.append(row)
    return entries


def parse_lines(path, file):
    """A jsonl file's entries; exits with the number of the first line that is no JSON."""
    entries = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        entry, wrong = parse_json(line)
        require(not wrong, f"{path}:{number} is not valid JSON ({quote(wrong)}); correct or delete the line.")
        entries.append(entry)
    return entries
