"""Constants on the command line, their ranges, and the one way in which bad input is reported.

A constant's range is the beginning of its trailing comment, up to the first semicolon:

    LR = 2e-3  # > 0; peak learning rate
    TOP_P = 1.0  # 0 to 1; share of the probability that is sampled from
    OVERLAYS = (2, 3)  # >= 2, rising; fewest and most overlays
    MIN_PIXELS = None  # >= 1, whole; None: the checkpoint's own
    KL = "k3"  # k3 (ours) | k1: logp - logp_ref (release)

Of a number: `> a`, `>= a`, `< a`, `<= a`, `a to b` (both ends included) and `whole`; all of several, with
commas between them, must hold; `0 or ...` also allows 0. The range of a tuple or dict is that of each number
in it; `rising` and `sum 1` speak of a whole tuple, which has the shape of its default unless `any length`
says otherwise. The comment of a text lists its choices if it has ` | `: the first word of each part, `""` for
none. NaN and infinity are always refused.
"""

import ast
import copy
import difflib
import io
import math
import operator
import os
import re
import reprlib
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace

SETTABLE = (str, int, float, tuple, list, dict, type(None))
LARGEST = 10**15  # a whole number beyond it is a slip of the finger
QUOTED = 80  # characters of a bad value that a sentence repeats at most
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
WORDS = ("whole", "rising", "sum 1", "any length")


def require(condition, message):
    """Ends the program with one sentence and exit code 1 unless the condition holds."""
    if not condition:
        exit_with(message)


def exit_with(message):
    """Ends the program with one sentence, on one line whatever the names of files in it hold."""
    sys.exit(printable(message))


def printable(text):
    """A text on one line: what cannot be printed, such as a line break in a file's name, is written out."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def quote(value):
    """A bad value as a sentence repeats it: on one line, at most 80 characters that can be printed."""
    limits = reprlib.Repr()
    limits.maxstring = limits.maxother = limits.maxlong = QUOTED
    text = value if isinstance(value, str) else limits.repr(value)
    # twice as much is enough to cut from, whatever its length
    text = printable(text[: 2 * QUOTED])
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def quote_path(path):
    """A path as a sentence repeats it: of a long one the end, which tells most."""
    text = str(path)
    if len(text) <= QUOTED:
        return quote(text)
    return f"...{quote(text[3 - QUOTED :])}"


def expand_home(path):
    """A path in the home folder, "~/a", written out; any other as it is, also "~a" and "~1"."""
    return os.path.expanduser(path) if re.match("~(/|$)", path) else path


def require_choice(name, value, choices):
    """Ends the program unless the constant's value is one of the choices."""
    known = ", ".join(choice or '""' for choice in choices)
    require(value in choices, f"{name}={quote(value)} is not one of {known}.")


# ---------------------------------------------------------------- words of the command line


def override_constants(namespace, argv=None, base=None):
    """A script's UPPERCASE constants with KEY=value words applied -> SimpleNamespace, handed on as `c`.

    namespace: the script's globals(), which stay as they are; base: those of a script whose constants can be
    set as well. A value has the type of the default: an int may stand for a float, and a None default takes
    numbers. Exits with one sentence on a word that is not KEY=value, on an unknown key (it names the
    nearest), on another type, and on a value outside the constant's range.
    """
    defaults = {}
    ranges = {}
    for globals_of in (base or {}, namespace):
        ranges.update(read_ranges(globals_of.get("__file__")))
        for name, value in globals_of.items():
            if name.isupper() and isinstance(value, SETTABLE):
                # a list that the script fills later is not saved with the run
                defaults[name] = copy.deepcopy(value)

    constants = dict(defaults)
    for word in sys.argv[1:] if argv is None else argv:
        key, equals, text = word.partition("=")
        require(equals, f"'{quote(word)}' is not KEY=value; write for example SEED=1.")
        if key not in constants:
            near = difflib.get_close_matches(key[:QUOTED].upper(), constants, n=1, cutoff=0)
            require(False, f"Unknown constant {quote(key)}. Did you mean {near[0]}?")
        constants[key] = parse_constant(key, text, defaults[key])

    # a constant that was edited at the top is checked like one from the command line
    for name, value in constants.items():
        check_range(name, value, defaults[name], ranges.get(name, ""))
    return SimpleNamespace(**constants)


def parse_constant(key, text, default):
    """One value of the default's type: "8", 4 -> 8; "~/a" is in the home folder; exits on another type."""
    shown = f"{key}={quote(text)}"
    if isinstance(default, str):
        require("\0" not in text, f"{shown} holds a NUL character; leave it out.")
        # what the command line holds beside UTF-8 comes as halves of characters
        require(not re.search("[\ud800-\udfff]", text), f"{shown} is not UTF-8; rename the file or folder.")
        return expand_home(text)
    # what is no literal, or a very deep one, stays text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if isinstance(default, float) and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if default is None:
        is_number = value is None or type(value) in (int, float)
        require(is_number, f"{shown} must be an int, a float or None.")
        return value
    expected = type(default).__name__
    require(type(value) is type(default), f"{shown} must be of type {expected}, like {quote(default)}.")
    if isinstance(default, dict):
        same = set(value) == set(default)
        require(same, f"{shown} must have the keys {', '.join(default)}, like {default!r}.")
        are_numbers = all(type(entry) in (int, float) for entry in value.values())
        require(are_numbers, f"{shown} must hold numbers, like {default!r}.")
        return {name: to_float(value[name]) for name in default}
    return value


def to_float(number):
    """A number as a float; one that no float can hold is infinite, which every range refuses."""
    return float(number) if abs(number) <= LARGEST else math.inf


# ---------------------------------------------------------------- ranges


def read_ranges(file):
    """A script's file -> {constant: its range, which is the beginning of its comment}; {} without a file."""
    if not file or not Path(file).is_file():
        return {}
    ranges = {}
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(Path(file).read_text(encoding="utf-8")).readline):
        begins = token.start[1] == 0 and token.type == tokenize.NAME
        if begins:
            name = token.string if token.string.isupper() else ""
        if token.type == tokenize.COMMENT and name and token.line.startswith(f"{name} = "):
            ranges[name] = token.string.lstrip("# ")
            name = ""
    return ranges


def parse_range(comment):
    """A number's comment -> its conditions, such as ["> 0", "whole"]; [] if it begins with no range."""
    conditions = [part.strip() for part in comment.partition(";")[0].split(",")]
    pattern = rf"({NUMBER} or )?([<>]=? {NUMBER}|{NUMBER} to {NUMBER}|{'|'.join(WORDS)})"
    are_known = all(re.fullmatch(pattern, condition) for condition in conditions)
    return conditions if are_known else []


def parse_choices(comment):
    """A text's comment -> its choices: `"" | none | other (another clip's)` -> ["", "none", "other"]."""
    if " | " not in comment:
        return []
    words = [re.match(r'"?([\w-]*)', part.strip()) for part in comment.split(" | ")]
    return [word[1] for word in words]


def holds(condition, number):
    """Whether a number meets one condition of a range."""
    exception, _, rest = condition.rpartition(" or ")
    if exception and number == float(exception):
        return True
    if rest == "whole":
        return type(number) is int
    if rest in WORDS:  # of a tuple as a whole
        return True
    if " to " in rest:
        low, high = rest.split(" to ")
        return float(low) <= number <= float(high)
    sign, limit = rest.split(" ")
    return COMPARISONS[sign](number, float(limit))


def in_words(conditions):
    """A range as a sentence says it: [">= 2", "whole"] -> "2 or more and a whole number"."""
    words = []
    for condition in conditions:
        condition = re.sub(r">= (\S+)", r"\1 or more", condition)
        condition = condition.replace("<= ", "at most ").replace("> ", "above ").replace("< ", "below ")
        if condition not in WORDS[1:]:
            words.append(condition.replace("whole", "a whole number"))
    return " and ".join(words)


def has_shape(value, default, any_length=False):
    """Whether a tuple has the shape and the types of its default; an int may stand for a float.

    With any_length it may hold any numbers, but not none.
    """
    if any_length:
        return isinstance(value, tuple) and value and all(type(entry) in (int, float) for entry in value)
    if isinstance(default, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(default):
            return False
        return all(has_shape(entry, expected) for entry, expected in zip(value, default))
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def numbers_in(value):
    """All numbers in a constant: of a tuple or dict those in it, at any depth; truth values are none."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [number for entry in value for number in numbers_in(entry)]
    return [value] if type(value) in (int, float) else []


def check_range(name, value, default, comment):
    """Ends the program unless a constant is finite and in the range that its comment begins with."""
    shown = f"{name}={quote(value)}"
    if isinstance(default, str):
        # "OUT=$RUN" without RUN would write to where one stands
        is_given = value.strip() or not default or name != "OUT" or '""' in comment
        require(is_given, f"{name}= is empty; set it to a folder.")
        choices = parse_choices(comment)
        if choices:
            require_choice(name, value, choices)
        return
    conditions = parse_range(comment)
    if isinstance(default, tuple):
        same = has_shape(value, default, "any length" in conditions)
        require(same, f"{shown} must have the shape of {quote(default)}.")
    numbers = numbers_in(value)
    for number in numbers:
        is_usual = abs(number) <= LARGEST  # NaN and infinity are not
        require(is_usual, f"{shown}: set it to a finite number of at most 15 digits.")
    for condition in conditions:
        is_met = all(holds(condition, number) for number in numbers)
        require(is_met, f"{shown} is out of range: set it to {in_words(conditions)}.")
    rows = value if isinstance(value, tuple) and value and isinstance(value[0], tuple) else [value]
    for row in rows:
        in_order = "rising" not in conditions or list(row) == sorted(row)
        require(in_order, f"{shown} must hold rising numbers.")
        is_whole = "sum 1" not in conditions or abs(sum(row) - 1) < 1e-6
        require(is_whole, f"{shown} must hold shares whose sum is 1.")
