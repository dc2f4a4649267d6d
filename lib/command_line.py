"""Constants on the command line, and the one way in which bad input is reported."""

import ast
import difflib
import sys
from types import SimpleNamespace

SETTABLE = (str, int, float, tuple, list, dict, type(None))


def require(condition, message):
    """Ends the program with one sentence and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit(message)


def require_choice(name, value, choices):
    """Ends the program unless the constant's value is one of the choices."""
    known = ", ".join(choice or '""' for choice in choices)
    require(value in choices, f"{name}={value} is not one of {known}.")


def override_constants(namespace, argv=None):
    """A script's UPPERCASE constants with KEY=value words applied -> SimpleNamespace, handed on as `c`.

    namespace: the script's globals(), which stay as they are. A value has the type of the default: an int may
    stand for a float, and a None default takes numbers. Exits with one sentence on a word that is not
    KEY=value, on an unknown key (it names the nearest), on another type, and on a batch of nothing.
    """
    constants = {
        name: value for name, value in namespace.items() if name.isupper() and isinstance(value, SETTABLE)
    }
    for word in sys.argv[1:] if argv is None else argv:
        key, equals, text = word.partition("=")
        require(equals, f"'{word}' is not KEY=value; write for example SEED=1.")
        if key not in constants:
            near = difflib.get_close_matches(key.upper(), constants, n=1, cutoff=0)
            require(False, f"Unknown constant {key}. Did you mean {near[0]}?")
        constants[key] = parse_constant(key, text, constants[key])

    # a constant that was edited at the top is checked like one from the command line
    for name, value in constants.items():
        if name.endswith("BATCH"):
            require(value > 0, f"{name}={value}: set it to 1 or more.")
    return SimpleNamespace(**constants)


def parse_constant(key, text, default):
    """One value of the default's type: "8", 4 -> 8; exits if the type differs."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if default is None:
        is_number = value is None or type(value) in (int, float)
        require(is_number, f"{key}={text} must be an int, a float or None.")
        return value
    expected = type(default).__name__
    require(type(value) is type(default), f"{key}={text} must be of type {expected}, like {default!r}.")
    if isinstance(default, dict):
        same = set(value) == set(default)
        require(same, f"{key}={text} must have the keys {', '.join(default)}, like {default!r}.")
        are_numbers = all(type(entry) in (int, float) for entry in value.values())
        require(are_numbers, f"{key}={text} must hold numbers, like {default!r}.")
        return {name: float(value[name]) for name in default}
    return value
