"""lib/command_line.py: constants set by KEY=value words, and the one sentence that refuses bad ones."""

import importlib
import json
import runpy
import sys

import pytest
from helpers import ROOT, refused

from lib.command_line import numbers_in, override_constants, parse_constant, parse_range, quote, read_ranges
from lib.command_line import require, require_choice

TOOLS = sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py"))


def script_globals():
    """The globals of a script: constants of every type, and what is no constant."""
    return {
        "MODEL": "a",
        "STEPS": 10,
        "LR": 1e-3,
        "CLIP": 1.0,
        "CACHE": True,
        "PIXELS": None,
        "SIZES": (1, 2),
        "FILES": ["a"],
        "WEIGHTS": {"answer": 1.0, "format": 0.5},
        "lower": 3,
        "FUNCTION": len,
        "MODULE": json,
    }


def constants(*words):
    """All constants as a dict after these words."""
    return vars(override_constants(script_globals(), words))


def test_constants_take_the_type_of_their_default():
    words = ["MODEL=7", "STEPS=20", "LR=5", "CLIP=.5", "CACHE=False", "PIXELS=8", "SIZES=[3,4]"]
    words += ["FILES=['b', 'c']", "WEIGHTS={'answer': 2, 'format': 0.0}"]
    found = constants(*words)
    assert found == {
        "MODEL": "7",
        "STEPS": 20,
        "LR": 5.0,
        "CLIP": 0.5,
        "CACHE": False,
        "PIXELS": 8,
        "SIZES": (3, 4),
        "FILES": ["b", "c"],
        "WEIGHTS": {"answer": 2, "format": 0.0},
    }
    assert type(found["LR"]) is float and type(found["SIZES"]) is tuple
    assert constants("MODEL=a=b")["MODEL"] == "a=b"
    assert constants("MODEL=")["MODEL"] == ""
    assert constants("PIXELS=None")["PIXELS"] is None
    assert constants("STEPS=1", "STEPS=2")["STEPS"] == 2  # the last one wins
    assert constants()["SIZES"] == (1, 2)


def test_the_globals_stay_as_they_are():
    """The constants are handed on as `c`: no function can find an overridden one among the globals."""
    namespace = script_globals()
    c = override_constants(namespace, ["STEPS=20", "MODEL=b", "WEIGHTS={'answer': 3.0, 'format': 4.0}"])
    assert (c.STEPS, c.MODEL, c.WEIGHTS) == (20, "b", {"answer": 3.0, "format": 4.0})
    assert namespace == script_globals()
    assert set(vars(c)) == {name for name in namespace if name.isupper()} - {"FUNCTION", "MODULE"}


def test_a_list_that_the_script_fills_is_not_saved_with_the_run():
    namespace = script_globals()
    c = override_constants(namespace, [])
    namespace["FILES"].append(len)
    assert json.loads(json.dumps(vars(c)))["FILES"] == ["a"]


def test_without_a_list_of_words_they_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "STEPS=3"])
    assert override_constants(script_globals()).STEPS == 3


@pytest.mark.parametrize(
    "word",
    ["STEPS=1.5", "STEPS=ten", "STEPS=True", "STEPS=", "STEPS=1e3", "LR=fast", "LR=True"]
    + ["CACHE=1", "CACHE=yes", "SIZES=3", "SIZES=__import__('os')", "PIXELS=8*8", "PIXELS=words"]
    + ["FILES=(1, 2)", "WEIGHTS=3", "WEIGHTS=answer", "WEIGHTS={'answer'}"],
)
def test_a_value_of_another_type_is_refused(word):
    name = word.split("=")[0]
    default = script_globals()[name]
    kind = "an int, a float or None" if default is None else type(default).__name__
    refused(lambda: constants(word), word, kind)


@pytest.mark.parametrize("text", ["{'answer': 'x', 'format': 1}", "{'answer': True, 'format': 1}"])
def test_a_dict_holds_numbers(text):
    refused(lambda: constants(f"WEIGHTS={text}"), "must hold numbers")
    assert constants("WEIGHTS={'answer': 1, 'format': 2}")["WEIGHTS"] == {"answer": 1.0, "format": 2.0}


@pytest.mark.parametrize("text", ["{}", "{'answer': 1.0}", "{'answer': 1, 'format': 1, 'more': 1}", "{1: 2}"])
def test_a_dict_keeps_its_keys(text):
    refused(lambda: constants(f"WEIGHTS={text}"), f"WEIGHTS={text}", "the keys answer, format")


SCRIPT = """
GLOBAL_BATCH = 4  # >= 1; rows of a step
LR = 1e-3  # > 0, <= 100; peak
SHARE = 0.5  # 0 to 1; of something (ours)
PIXELS = None  # >= 1, whole; None: all
HEAT = 0.0  # 0 or 0.01 to 100; 0: greedy
SIZES = (2, 3)  # >= 2, rising; fewest and most
WAITS = (0, 2, 6)  # 0 to 60, any length; seconds
SHARES = (0.5, 0.5)  # 0 to 1, sum 1; of both kinds
TURNS = ((1.0, 2.0), (3.0, 4.0))  # 0 to 90, rising; degrees
WEIGHTS = {"acc": 1.0, "fmt": 0.2}  # >= 0; of the parts
KIND = "k3"  # k3 (ours) | k1: the other; (release)
SHOWN = ""  # "" | none | other (another clip's)
WAY = "free"  # left|right, or anything
FREE = 1.0  # without a range; 0 to 1
LOOSE = 3
"""


def script(tmp_path, *words, text=SCRIPT):
    """The constants of a script that stands in a file, with words applied."""
    file = tmp_path / "script.py"
    file.write_text(text)
    return override_constants(runpy.run_path(str(file)), words)


@pytest.mark.parametrize(
    "word, advice",
    [
        ("GLOBAL_BATCH=0", "1 or more"),
        ("GLOBAL_BATCH=-1", "1 or more"),
        ("GLOBAL_BATCH=" + "9" * 300, "finite number"),
        ("LR=0", "above 0 and at most 100"),
        ("LR=-1e-3", "above 0"),
        ("LR=1e9", "at most 100"),
        ("LR=1e999", "finite number"),
        ("LR=-1e999", "finite number"),
        ("LR=" + "9" * 400, "type float"),
        ("SHARE=1.01", "0 to 1"),
        ("PIXELS=0", "1 or more and a whole number"),
        ("PIXELS=1.5", "a whole number"),
        ("PIXELS=1e999", "finite number"),
        ("HEAT=0.001", "0 or 0.01 to 100"),
        ("HEAT=-1", "0 or 0.01 to 100"),
        ("SIZES=(1,3)", "2 or more"),
        ("SIZES=(3,2)", "rising"),
        ("SIZES=(2,)", "the shape of (2, 3)"),
        ("SIZES=(2,3,4)", "the shape of"),
        ("SIZES=(2,3.5)", "the shape of"),
        ("SIZES=(2,'a')", "the shape of"),
        ("SIZES=(True,True)", "the shape of"),
        ("SIZES=()", "the shape of"),
        ("WAITS=()", "the shape of"),
        ("WAITS=(1,-2)", "0 to 60"),
        ("SHARES=(0.5,0.6)", "whose sum is 1"),
        ("TURNS=((1,2),(4,3))", "rising"),
        ("TURNS=((1,2),3)", "the shape of"),
        ("TURNS=((1,2),(3,1e999))", "finite number"),
        ("WEIGHTS={'acc': -1, 'fmt': 0}", "0 or more"),
        ("WEIGHTS={'acc': 1e999, 'fmt': 0}", "finite number"),
        ("KIND=k2", "k3, k1"),
        ("SHOWN=noen", '"", none, other'),
        ("FREE=1e999", "finite number"),
        ("LOOSE=" + "-" * 9999 + "1", "type int"),
        ("SIZES=" + "(" * 9999, "type tuple"),
        ("WEIGHTS={[]: 1}", "type dict"),
        ("WAY=a\0b", "NUL"),
    ],
)
def test_a_value_out_of_its_range_is_refused(tmp_path, word, advice):
    sentence = refused(lambda: script(tmp_path, word), word.split("=")[0], advice)
    assert len(sentence) < 220


def test_values_at_the_ends_of_their_ranges_are_taken(tmp_path):
    words = ["GLOBAL_BATCH=1", "LR=100", "SHARE=0", "PIXELS=1", "HEAT=0.01", "SIZES=(2,2)", "WAITS=(60,)"]
    words += [
        "SHARES=(0,1)",
        "TURNS=[(0,90),(1,1)]",
        "KIND=k1",
        "SHOWN=other",
        "FREE=-7",
        "WAY=x",
        "LOOSE=-1",
    ]
    c = script(tmp_path, *words)
    assert (c.LR, c.SHARE, c.HEAT, c.WAITS, c.SHOWN) == (100.0, 0.0, 0.01, (60,), "other")
    assert script(tmp_path, "HEAT=0", "PIXELS=None").PIXELS is None


def test_a_constant_that_was_edited_at_the_top_is_checked_too(tmp_path):
    text = SCRIPT.replace("LR = 1e-3", "LR = -1e-3")
    refused(lambda: script(tmp_path, text=text), "LR=-0.001", "above 0")
    assert script(tmp_path, "LR=1", text=text).LR == 1.0


def test_without_a_file_there_are_no_ranges():
    assert override_constants({"MICRO_BATCH": 4}, ["MICRO_BATCH=0"]).MICRO_BATCH == 0
    refused(lambda: override_constants({"LR": 1.0}, ["LR=1e999"]), "finite number")


def test_a_home_folder_is_a_folder(monkeypatch, tmp_path):
    """Unlike a shell, which leaves KEY=~/x as it is."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert script(tmp_path, "WAY=~/x").WAY == "/somewhere/x"
    assert script(tmp_path, "WAY=~x").WAY == "~x" and script(tmp_path, "WAY=a/~/x").WAY == "a/~/x"


def test_a_bad_value_is_quoted_on_one_short_line():
    assert quote("a\nb\ud800") == "a\\nb\\ud800" and quote([1, "x"]) == "[1, 'x']"
    deep = []
    for _ in range(9999):
        deep = [deep]
    for value in ("x" * 10**6, deep, {"a": "y" * 999}, 10**4000, list(range(999)), "\n" * 300):
        assert len(quote(value)) <= 80


@pytest.mark.parametrize("name", ["dift", "grpo4d", "evaluate", "generate_data", *TOOLS])
def test_every_numeric_constant_has_a_range(name):
    """Where it stands: at the beginning of its comment. Its default lies in it."""
    module = importlib.import_module(name)
    ranges = read_ranges(module.__file__)
    own = {key: value for key, value in vars(module).items() if key in ranges}
    for key, value in own.items():
        if value is None or numbers_in(value):
            assert parse_range(ranges[key]) or isinstance(value, list), f"{name}.{key}: {ranges[key]}"
    override_constants({"__file__": module.__file__, **own}, [])


def question(word):
    """What the program asks as it ends at an unknown constant: the one sentence without a full stop."""
    with pytest.raises(SystemExit) as stop:
        constants(word)
    return stop.value.code


@pytest.mark.parametrize("word, near", [("STEP=3", "STEPS"), ("steps=3", "STEPS"), ("PIXEL=1", "PIXELS")])
def test_an_unknown_constant_names_the_nearest(word, near):
    name = word.split("=")[0]
    assert question(word) == f"Unknown constant {name}. Did you mean {near}?"


@pytest.mark.parametrize("word", ["STEPS", "--STEPS", "-h"])
def test_a_word_without_a_value_is_refused(word):
    refused(lambda: constants(word), f"'{word}'", "KEY=value")


@pytest.mark.parametrize("word", ["lower=3", "FUNCTION=3", "MODULE=3"])
def test_only_constants_can_be_set(word):
    assert question(word).startswith(f"Unknown constant {word[:-2]}. Did you mean ")


def test_parse_constant_reads_literals_only():
    assert parse_constant("X", "(1, 2)", (0, 0)) == (1, 2)
    refused(lambda: parse_constant("X", "open('x')", None), "X=open('x')", "an int, a float or None")


def test_what_is_required_ends_the_program_where_it_does_not_hold():
    require(True, "Nothing happens.")
    assert refused(lambda: require(False, "Set STEPS.")) == "Set STEPS."
    require_choice("RESUME", "auto", ("auto", "never"))
    sentence = refused(lambda: require_choice("RESUME", "some", ("auto", "never", "")))
    assert sentence == 'RESUME=some is not one of auto, never, "".'


def test_texts_that_are_no_names_are_refused():
    """Halves of characters stand for bytes that are not UTF-8; an empty OUT is an unset variable."""
    script = {"OUT": "out/x", "DATA": ""}
    refused(lambda: override_constants(script, ["DATA=a\udcff"]), "DATA=a\\udcff", "is not UTF-8")
    refused(lambda: override_constants(script, ["OUT="]), "OUT= is empty")
    assert override_constants(script, ["OUT=ü'\" 🙂", "DATA="]).OUT == "ü'\" 🙂"


def test_a_sentence_stands_on_one_line():
    refused(lambda: require(False, "a\nb\u2028.jsonl holds no rows."), "a\\nb\\u2028.jsonl holds no rows.")
