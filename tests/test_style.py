"""The house rules: rooms, arrows, lines, tokens a line, comments, README, constants, traces of a machine."""

import ast
import io
import itertools
import re
import shutil
import socket
import subprocess
import tokenize

import pytest
from helpers import ROOT

BUDGETS = {"model.py": 470, "dift.py": 210, "grpo4d.py": 310, "evaluate.py": 430, "generate_data.py": 640}
FIVE = list(BUDGETS)
SCRIPTS = [name for name in FIVE if name != "model.py"]
ROOMS = {"lib", "tools", "assets", "docs", "tests", ".ci"}
LAYOUT = {*FIVE, *ROOMS, "README.md", "requirements.txt", "requirements-dev.txt", "pyproject.toml", "LICENSE"}
LAYOUT |= {".gitignore"}
LIB = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "lib").rglob("*.py"))
TOOLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.py"))
CODE = FIVE + LIB + TOOLS
DENSE = 28  # tokens of a line that is hard to read
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstring_lines(source):
    """Line numbers of all docstrings."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def tokens_by_line(source):
    """{line of code: tokens that begin there}; comments, docstrings and blank lines are no code."""
    silent_lines = docstring_lines(source)
    tokens = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SILENT or token.start[0] in silent_lines:
            continue
        for line in range(token.start[0], token.end[0] + 1):
            tokens.setdefault(line, 0)
        tokens[token.start[0]] += 1
    return tokens


def comment_lines(source):
    """How many lines hold a comment and nothing else."""
    return sum(line.strip().startswith("#") for line in source.splitlines())


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def tracked():
    """What git tracks, or what it would: paths from the root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what belongs to the project is not known")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


# ---------------------------------------------------------------- lines and tokens


def test_lines_and_tokens_are_counted_as_the_house_says():
    source = '"""Doc.\n\nMore."""\n\n# comment\nx = 1  # counted\n\n\ndef f():\n    """Doc."""\n'
    source += '    y = """a\n\n# b"""\n    return (\n        y\n    )\n'
    counts = tokens_by_line(source)
    assert len(counts) == 8
    # "x = 1", "def f ( ) :", 'y = """...', nothing in the rest of the text, "return (", "y", ")"
    assert list(counts.values()) == [3, 5, 3, 0, 0, 2, 1, 1]


@pytest.mark.parametrize("name", FIVE)
def test_a_file_keeps_to_its_budget(name):
    assert len(tokens_by_line(read(name))) <= BUDGETS[name]


@pytest.mark.parametrize("name", CODE)
def test_lines_are_light(name):
    counts = list(tokens_by_line(read(name)).values())
    most = 11.0 if name in FIVE else 13.0
    assert sum(counts) / len(counts) <= most
    if name in FIVE:
        assert sum(count >= DENSE for count in counts) <= 0.03 * len(counts)


@pytest.mark.parametrize("name", FIVE)
def test_a_paragraph_of_code_says_what_follows(name):
    source = read(name)
    assert comment_lines(source) >= 0.10 * len(tokens_by_line(source))


@pytest.mark.parametrize("name", CODE)
def test_no_line_is_wider_than_a_screen(name):
    assert max(len(line) for line in read(name).splitlines()) <= 110


@pytest.mark.parametrize("function, name, line", [("pool_latents", "model.py", 60)])
def test_the_method_begins_early(function, name, line):
    tree = ast.parse(read(name))
    found = [node.lineno for node in tree.body if getattr(node, "name", "") == function]
    assert found[0] <= line


@pytest.mark.parametrize("name", ["dift.py", "grpo4d.py"])
def test_the_training_loop_is_flat_and_fits_a_screen_or_two(name):
    """The one loop over steps has at most 80 lines of code."""
    source = read(name)
    main = [node for node in ast.parse(source).body if isinstance(node, ast.If)][-1]
    loops = [node for node in main.body if isinstance(node, ast.For) and ast.unparse(node.target) == "step"]
    lines = set(range(loops[0].lineno, loops[0].end_lineno + 1))
    assert len(loops) == 1 and len(lines & set(tokens_by_line(source))) <= 80


# ---------------------------------------------------------------- rooms and arrows


def imports_of(name):
    """Our own modules that a file imports: "model", "lib.rows"."""
    modules = set()
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removesuffix(".py") for name in FIVE} | ROOMS
    return {module for module in modules if module.split(".")[0] in ours}


def test_the_top_level_is_the_cards():
    top = {name.split("/")[0] for name in tracked()}
    assert top == LAYOUT


def test_data_folders_hold_no_programs():
    names = tracked()
    assert [name for name in names if re.match(r"(assets|docs)/.*\.(py|sh)$", name)] == []
    others = [name for name in names if name.startswith("tests/") and name.endswith(".py")]
    allowed = re.compile(r"tests/(test_\w+|helpers|conftest)\.py$")
    assert [name for name in others if not allowed.match(name)] == []


@pytest.mark.parametrize("name", LIB)
def test_the_cellar_stands_on_itself_alone(name):
    assert {module.split(".")[0] for module in imports_of(name)} <= {"lib"}


@pytest.mark.parametrize("name", FIVE)
def test_arrows_between_stages_go_down(name):
    allowed = {
        "model.py": set(),
        "generate_data.py": set(),
        "evaluate.py": {"model"},
        "dift.py": {"model", "evaluate"},
        "grpo4d.py": {"model", "evaluate"},
    }
    assert {module.split(".")[0] for module in imports_of(name)} <= allowed[name] | {"lib"}


def test_the_cellar_is_not_run_and_the_shed_is_run():
    for name in LIB:
        assert "__main__" not in read(name), name
    for name in TOOLS:
        assert "__main__" in read(name), name


@pytest.mark.parametrize("name", LIB)
def test_no_equation_is_in_the_cellar(name):
    """Equations are numbered where they stand: a number in lib/ would be one that left the five files."""
    assert re.findall(r"^# Eq\. \d|\"\"\"Eq\. \d", read(name), flags=re.M) == []


@pytest.mark.parametrize("number", range(1, 11))
def test_every_equation_is_in_the_five_files(number):
    assert any(re.search(rf"Eq\. {number}\b|Eq\. \d and {number}\b", read(name)) for name in FIVE)


@pytest.mark.parametrize("name", CODE)
def test_no_trick_stands_for_a_statement(name):
    source = read(name)
    tree = ast.parse(source)
    assert "sys.path" not in source and "globals().update" not in source
    for node in ast.walk(tree):
        # x *= bool(...) and [a] * flag
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult):
            assert not re.match(r"bool\(|\(?not ", ast.unparse(node.value)), ast.unparse(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = (node.left, node.right)
            texts = [side for side in sides if isinstance(side, (ast.List, ast.Tuple, ast.JoinedStr))]
            flags = [side for side in sides if isinstance(side, (ast.Compare, ast.BoolOp))]
            flags += [side for side in sides if ast.unparse(side).startswith("bool(")]
            assert not (texts and flags) and not ast.unparse(node).startswith("bool("), ast.unparse(node)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.args.args and f.args.args[0].arg == "self"] == []


@pytest.mark.parametrize("name", FIVE + LIB)
def test_nothing_happens_at_import(name):
    """Only imports, definitions, constants and the main block stand at the top level."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in ast.parse(read(name)).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, kinds), ast.unparse(node)
        if isinstance(node, ast.If):
            assert "__main__" in ast.unparse(node.test)
        if isinstance(node, ast.Assign):
            calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
            reads = [call for call in calls if re.search(r"open|read|load|listdir|glob", call)]
            assert reads == [], ast.unparse(node)


# ---------------------------------------------------------------- the README


def test_the_readme_is_a_page():
    text = read("README.md")
    lines = text.splitlines()
    assert len(lines) <= 180 and len(text.encode()) <= 12 * 1024
    first = next(number for number, line in enumerate(lines, 1) if "torchrun dift.py" in line)
    assert first <= 22


def test_sentences_of_the_first_screen_are_short():
    screen = "\n".join(read("README.md").splitlines()[:45])
    prose = re.sub(r"```.*?(```|$)|!\[.*?\]\(.*?\)|^\|.*$|^ {4}.*$|^#.*$", "", screen, flags=re.S | re.M)
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", "]", prose)
    for sentence in re.split(r"(?<=[.:!?])\s+|\n\s*\n|\n[-*\d]", prose):
        assert len(sentence.split()) <= 25, sentence


def test_ci_runs_the_readmes_two_commands():
    readme = read("README.md")
    ci = read(".ci/run")
    assert "pip install -r requirements.txt && torchrun dift.py" in readme
    assert "pip install -r requirements-dev.txt && pytest" in readme
    assert re.search(r"^pip install -q -r requirements.txt\ntorchrun dift.py", ci, flags=re.M)
    assert re.search(r"^pip install -q -r requirements-dev.txt\npytest$", ci, flags=re.M)


def documents():
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def test_every_link_and_file_of_the_documents_is_there():
    names = set(tracked())
    for document in documents():
        text = read(document)
        folder = (ROOT / document).parent
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (folder / link).exists(), f"{document}: {link}"
        for file in re.findall(r"\b(?:lib|tools|assets|docs|tests)/[\w./-]*\w\.\w+", text):
            assert file in names, f"{document}: {file}"


def test_every_command_of_the_documents_names_what_there_is():
    """Scripts and tools exist, and so do the constants that are set: `python dift.py KEY=value`."""
    for document in [*documents(), *(str(p.relative_to(ROOT)) for p in (ROOT / "tools").glob("*.sh"))]:
        text = read(document).replace("\\\n", " ")
        for script, words in re.findall(
            r"\b(?:python|torchrun|nproc_per_node=\d) (\w+\.py|-m tools\.\w+)(.*)", text
        ):
            file = script.replace("-m tools.", "tools/") + ("" if script.endswith(".py") else ".py")
            assert (ROOT / file).is_file(), f"{document}: {script}"
            known = set(re.findall(r"^([A-Z_0-9]+) = ", read(file), flags=re.M))
            if file == "tools/seeds.py":  # its other constants are evaluate.py's
                known |= set(re.findall(r"^([A-Z_0-9]+) = ", read("evaluate.py"), flags=re.M))
            set_here = set(re.findall(r"(?<![\w$\"{])([A-Z][A-Z_0-9]*)=", words.split("`")[0].split("#")[0]))
            assert set_here <= known, f"{document}: {script} has no {set_here - known}"


@pytest.mark.parametrize("name", FIVE)
def test_the_readme_names_the_function_of_each_equation(name):
    """Each `file.function` of the README's table exists."""
    named = re.findall(rf"`{name.removesuffix('.py')}\.(\w+(?:\.\w+)?)", read("README.md"))
    defined = set()
    for node in ast.parse(read(name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
            inner = [f.name for f in getattr(node, "body", []) if isinstance(f, ast.FunctionDef)]
            defined |= {f"{node.name}.{function}" for function in inner}
    assert {function for function in named if function != "py"} <= defined


# ---------------------------------------------------------------- ruff


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_content(command):
    if shutil.which("ruff") is None:
        pytest.skip("ruff is not installed; pip install -r requirements-dev.txt")
    done = subprocess.run(["ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- inside a file


@pytest.mark.parametrize("name", FIVE)
def test_a_file_opens_with_what_differs_from_the_paper(name):
    source = read(name)
    # commands in several lines can be copied from the file as they stand
    assert source.startswith(('"""', 'r"""')) and "\\\\\n" not in source.split('"""')[1]
    doc = ast.get_docstring(ast.parse(source))
    items = doc.split("\nDiffers from the paper:\n")[1].splitlines()
    assert sum(item.startswith("- ") for item in items) >= 2
    if name in SCRIPTS:
        assert re.search(r"^In: .*^Out: ", doc, flags=re.M | re.S)
        assert f"python {name}" in doc


@pytest.mark.parametrize("name", CODE)
def test_every_function_and_class_says_what_it_does(name):
    """Backward and forward of an autograd function and __init__ speak for themselves."""
    tree = ast.parse(read(name))
    assert ast.get_docstring(tree)
    named = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [node.name for node in named if not ast.get_docstring(node)] == []


def constants_block(name):
    """The lines from the first UPPERCASE constant to the next blank line: what a user sets."""
    lines = read(name).splitlines()
    first = next(number for number, line in enumerate(lines) if re.match(r"[A-Z_0-9]+ = ", line))
    return [lines[first - 1], *itertools.takewhile(str.strip, lines[first:])]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_constant_says_what_it_is(name):
    constants = [line for line in constants_block(name) if not line.startswith("#")]
    assert len(constants) > 8
    assert [line for line in constants if not re.match(r"[A-Z_0-9]+ = .*\S  # \S", line)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_constants_stand_in_the_cards_groups(name):
    order = ["paths", "data", "model", "optimisation", "RL", "logging", "system"]
    heads = [line.strip("# -") for line in constants_block(name) if line.startswith("#")]
    known = [head for head in heads if head in order]
    assert heads[0] == "paths" and heads[-1] == "system"
    assert known == sorted(known, key=order.index)


@pytest.mark.parametrize("name", SCRIPTS)
def test_constants_are_handed_on(name):
    """Nothing reads a constant by its bare name, which the command line does not change.

    Only a dataclass of settings may take its defaults from them.
    """
    constants = {line.split(" = ")[0] for line in constants_block(name) if not line.startswith("#")}
    tree = ast.parse(read(name))
    places = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.If))]
    for place in places:
        parameters = {node.arg for node in ast.walk(place) if isinstance(node, ast.arg)}
        assigned = {n.id for n in ast.walk(place) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(place):
            if isinstance(node, ast.Name) and node.id in constants - parameters - assigned:
                raise AssertionError(f"{name}:{node.lineno} reads {node.id} as a global")


@pytest.mark.parametrize("name", CODE)
def test_nothing_hides_an_error_or_runs_what_it_reads(name):
    tree = ast.parse(read(name))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"eval", "exec", "torch.load"} & {ast.unparse(call.func) for call in calls}
    words = {keyword.arg for call in calls for keyword in call.keywords}
    assert "trust_remote_code" not in words
    imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imports += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {"pickle", "dill", "joblib"} & set(imports)
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type for handler in handlers)


# ---------------------------------------------------------------- no traces of a machine


def test_no_file_names_a_machine():
    """No absolute path of somebody's disk, no address, no name of this host."""
    roots = "|".join(("work", "root", "home", "Users", "tmp", "mnt"))
    bad = [rf"(?<![\w.$}}/-])/(?:{roots})/\w", r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "local" + "host"]
    host = socket.gethostname()
    if len(host) > 5:
        bad.append(re.escape(host))
    found = []
    for name in tracked():
        if name.endswith((".safetensors", ".png", ".jpg", ".gif", "tokenizer.json")):
            continue
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", read(name))
        found += [f"{name}: {hit[0]}" for pattern in bad for hit in re.finditer(pattern, text)]
    assert found == []


def test_a_page_fetches_nothing():
    page = read("assets/report.html")
    assert not re.search(r"<script|<link|@import|(?:src|href)=[\"']?(?:https?:)?//", page)
