"""lib/command_line.py: constants set by KEY=value words, and the one sentence that refuses bad ones."""

import json
import sys

import pytest
from helpers import refused

from lib.command_line import override_constants, parse_constant, require, require_choice


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


@pytest.mark.parametrize("word", ["MICRO_BATCH=0", "MICRO_BATCH=-1"])
def test_a_batch_of_nothing_is_refused(word):
    refused(lambda: override_constants({"MICRO_BATCH": 4}, [word]), word, "1 or more")
    name, value = word.split("=")
    refused(lambda: override_constants({name: int(value)}, []), word, "1 or more")  # edited at the top


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
