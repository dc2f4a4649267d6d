"""Files of entries as users have them, whatever their format: benchmarks and lists of questions."""

import csv
import json
import sys
from importlib import import_module
from importlib.util import find_spec


def read_table(path):
    """A file's entries: parquet, csv, tsv, jsonl or json (a list, a dict of them or of lists) -> [dict].

    Exits with one sentence on a file that is no such table, or on parquet without pyarrow.
    """
    if path.suffix == ".parquet" and not find_spec("pyarrow"):
        sys.exit(f"{path} needs pyarrow: pip install pyarrow.")
    try:
        if path.suffix == ".parquet":
            return import_module("pyarrow.parquet").read_table(path).to_pylist()
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".csv", ".tsv"):
                return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
            lines = path.suffix == ".jsonl"
            entries = [json.loads(line) for line in file if line.strip()] if lines else json.load(file)
        if isinstance(entries, dict) and all(isinstance(some, list) for some in entries.values()):
            # DSR-Train: the questions of each video
            return [{"videoID": name, **entry} for name, some in entries.items() for entry in some]
        return list(entries.values() if isinstance(entries, dict) else entries)
    except (TypeError, ValueError, csv.Error) as error:
        sys.exit(f"{path} is no valid {path.suffix[1:]} file ({error}); download it again.")
