"""The rules of the house: what keeps one long file readable, checked instead of hoped for."""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ROOT / "gitops_hook.py"

# One person reads one file in an afternoon. What needs more lines than this earns them by removing
# others, or makes the case for a higher number here.
# The aim is half of it. What is promised and tested about safety takes more, and so does one
# statement a line.
MAX_LINES = 16508
MAX_FUNCTION_LINES = 40
MEDIAN_FUNCTION_LINES = 8
MAX_ARGUMENTS = 5
# An except that takes everything is a boundary: a thread's loop, the HTTP handler, main.
MAX_BROAD_EXCEPTS = 6
# The list of exemptions is the list of the program's edges.
MAX_EXEMPTIONS = 8

MAX_CLASS_LINES = 300

# Names that fit every value, and so tell nothing about this one.
VAGUE_NAMES = {"found", "told", "known", "given", "made", "got", "res"}

SECTIONS = [
    "command line",
    "constants", "errors", "configuration", "logging", "metrics", "signatures", "pushes", "spool",
    "kubectl", "git", "retry", "job manifests", "app manifests", "objects", "informers", "decide",
    "state", "reports", "statuses", "health", "live service", "rollout", "companions", "bake",
    "deploy", "intake", "controller", "page", "http", "commands", "main",
]  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sections(source: str) -> list[tuple[str, int]]:
    """The banners, lower-cased and without what stands in parentheses, with their lines."""
    found = re.finditer(r"(?m)^# =+ (?P<title>.+?) =+$", source)
    return [
        (
            re.sub(r"\s*\(.*\)", "", match["title"]).lower(),
            source.count("\n", 0, match.start()) + 1,
        )
        for match in found
    ]


@cache
def parsed(source: str) -> ast.Module:
    """A file's tree; the same text is parsed once."""
    return ast.parse(source)


@cache
def nodes(source: str) -> list[ast.AST]:
    """All nodes of a file; of the same text, they are looked for once."""
    return [*ast.walk(parsed(source))]


def functions(source: str) -> Iterator[Function]:
    for node in nodes(source):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    """Lines from `def` to the end; decorators and the docstring are not counted."""
    first = function.body[0]
    prose = first if ast.get_docstring(function, clean=False) is not None else None
    assert function.end_lineno is not None
    assert first.end_lineno is not None
    told = first.end_lineno - first.lineno + 1 if prose else 0
    return function.end_lineno - function.lineno + 1 - told


def class_lengths(source: str) -> dict[str, int]:
    """Lines of each class from `class` to its end, with all that stands in between."""
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in nodes(source)
        if isinstance(node, ast.ClassDef) and node.end_lineno is not None
    }


def declared_twice(source: str) -> set[str]:
    """Return the names that a module gives to two things: the later one is meant everywhere."""
    names = Counter(name for node in parsed(source).body for name in declared(node))
    return {name for name, count in names.items() if count > 1}


def declared(node: ast.stmt) -> list[str]:
    """Return the names of a function, a class or values."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [target.id for target in targets if isinstance(target, ast.Name)]


def argument_count(function: Function) -> int:
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([argument for argument in named if argument.arg not in {"self", "cls"}])


def called(node: ast.AST) -> str:
    """The dotted name that a call calls, or an empty string."""
    return dotted(node.func) if isinstance(node, ast.Call) else ""


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written, or an empty string for what is no such name."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return left and f"{left}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


# === Names and assignments ===


def vague_names(source: str) -> list[str]:
    """Where a variable or a parameter gets one of the names that tell nothing."""
    bound = [
        (node.lineno, node.arg if isinstance(node, ast.arg) else node.id)
        for node in nodes(source)
        if isinstance(node, ast.arg)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    ]
    return [f"line {line}: {name}" for line, name in sorted(bound) if name in VAGUE_NAMES]


def packed_assignments(source: str) -> list[str]:
    """Where one statement assigns several values that it lists itself; swaps are not meant."""
    return [
        f"line {node.lineno}: {ast.unparse(target)}"
        for node in nodes(source)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if is_packed(target, node.value)
    ]


def is_packed(target: ast.expr, value: ast.expr) -> bool:
    if not (isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List)):
        return False
    names = [ast.unparse(element) for element in target.elts]
    values = [ast.unparse(element) for element in value.elts]
    return len(names) == len(values) and sorted(names) != sorted(values)


# === Names are used below where they are defined ===


def bound_in(function: Function | ast.Lambda) -> set[str]:
    """The names that are local to a function: arguments, and all it binds itself."""
    names = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    body = function.body if isinstance(function.body, list) else [function.body]
    for statement in body:
        names |= bound_by(statement)
    return names


def bound_by(node: ast.AST) -> set[str]:
    names: set[str] = set()
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        names.add(node.id)
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        names.add(node.name)
    if isinstance(node, ast.Import | ast.ImportFrom):
        names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            names |= bound_by(child)
    return names


def global_uses(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every use of a name that is not local where it stands, annotations included."""
    if isinstance(node, Function | ast.Lambda):
        local |= bound_in(node)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        local |= {name for generator in node.generators for name in bound_by(generator.target)}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from global_uses(child, local)


def definitions(tree: ast.Module) -> dict[str, int]:
    """What the module itself defines, imports aside, with the line of the first definition."""
    lines: dict[str, int] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Import | ast.ImportFrom | ast.Expr | ast.If):
            for name in bound_by(statement):
                lines.setdefault(name, statement.lineno)
    return lines


def used_before_its_section(source: str) -> list[str]:
    """The uses of names that a later section defines."""
    starts = [line for _, line in sections(source)]
    tree = parsed(source)
    defined = definitions(tree)

    def section_of(line: int) -> int:
        return sum(start <= line for start in starts)

    return [
        f"line {use.lineno} uses {use.id}, which line {defined[use.id]} defines"
        for use in global_uses(tree)
        if use.id in defined and section_of(defined[use.id]) > section_of(use.lineno)
    ]


# === Doors ===

STARTS_A_PROCESS = re.compile(
    r"subprocess\.(run|Popen|call|check_\w+|getoutput|getstatusoutput)"
    r"|os\.(system|popen|exec\w+|spawn\w+|fork)"
)


def doors(source: str) -> list[tuple[str, str]]:
    """Every call that starts a process, with the section it stands in."""
    banners = [("before any section", 0), *sections(source)]
    calls = sorted(
        (node.lineno, called(node))
        for node in nodes(source)
        if isinstance(node, ast.Call) and STARTS_A_PROCESS.fullmatch(called(node))
    )
    return [
        (name, [title for title, start in banners if start <= line][-1]) for line, name in calls
    ]


def broad_handlers(source: str) -> list[ast.ExceptHandler]:
    def is_broad(kind: ast.expr | None) -> bool:
        if isinstance(kind, ast.Tuple):
            return any(is_broad(element) for element in kind.elts)
        return kind is None or ast.unparse(kind) in {"Exception", "BaseException"}

    return [
        node
        for node in nodes(source)
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type)
    ]


def logs(handler: ast.ExceptHandler) -> bool:
    return any(
        re.match(r"error$|(self\._?)?log\.(exception|error|critical|warning)$", called(node))
        for node in ast.walk(handler)
    )


# === Comments ===


@cache
def comments(source: str) -> list[tuple[int, str]]:
    return [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]


def exemptions(source: str) -> list[tuple[int, str]]:
    if "noqa" not in source:  # as in most files, whose comments need not be looked for
        return []
    return [(line, text) for line, text in comments(source) if re.search(r"#\s*noqa", text)]


def unexplained(source: str) -> list[tuple[int, str]]:
    """The exemptions that do not name their rule and, after it, a reason."""
    explained = re.compile(r"#\s*noqa: [A-Z]+[0-9]+(, ?[A-Z]+[0-9]+)*\W+\w+ \w+")
    return [(line, text) for line, text in exemptions(source) if not explained.search(text)]


# === Tests ===

WAYS_OUT = re.compile(r"(pytest(\.mark)?|unittest)\.(skip\w*|xfail|importorskip)|.*\.skipTest")
PATCHERS = re.compile(r"(\w+\.)*(patch(\.\w+)?|setattr|setitem|delattr|create_autospec)")


def ways_out(source: str) -> list[str]:
    """Where a test file lets a test not run."""
    found: list[str] = []
    if not re.search("skip|xfail", source):  # as in most files, which need not be parsed
        return found
    for node in nodes(source):
        if isinstance(node, ast.Attribute):
            names = [dotted(node) or ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in names if WAYS_OUT.fullmatch(name)]
    return found


def patches_of_ours(source: str) -> list[str]:
    """Where a test replaces a name of the program instead of talking to it."""

    def is_ours(target: ast.expr) -> bool:
        if isinstance(target, ast.Constant):
            return str(target.value).startswith("gitops_hook")
        return re.match(r"gitops_hook\b", ast.unparse(target)) is not None

    if not re.search("patch|attr|setitem|autospec", source):
        return []
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in nodes(source)
        if isinstance(node, ast.Call)
        and PATCHERS.fullmatch(called(node))
        and node.args
        and is_ours(node.args[0])
    ]


# === The program ===


@pytest.fixture(scope="module")
def source() -> str:
    return PRODUCT.read_text("utf-8")


def test_the_program_stays_within_its_lines(source: str) -> None:
    assert len(source.splitlines()) <= MAX_LINES


def test_its_sections_are_those_of_the_design_in_that_order(source: str) -> None:
    titles = [title for title, _ in sections(source)]
    assert titles == SECTIONS


def test_each_section_uses_only_those_above_it(source: str) -> None:
    assert not used_before_its_section(source)


def test_no_name_is_declared_twice(source: str) -> None:
    assert not declared_twice(source)


def test_a_name_that_is_declared_twice_is_noticed() -> None:
    assert declared_twice("A = 1\nB: int = 2\ndef f(): ...\nA = 3\nclass B: ...\n") == {"A", "B"}


def test_functions_are_short(source: str) -> None:
    too_long = {f.name: length(f) for f in functions(source) if length(f) > MAX_FUNCTION_LINES}
    assert not too_long
    assert statistics.median(length(f) for f in functions(source)) <= MEDIAN_FUNCTION_LINES


def test_functions_take_few_arguments(source: str) -> None:
    assert not {
        f.name: argument_count(f) for f in functions(source) if argument_count(f) > MAX_ARGUMENTS
    }


def test_classes_are_short(source: str) -> None:
    lengths = class_lengths(source)
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_CLASS_LINES}
    assert not too_long


def test_names_say_what_a_thing_is(source: str) -> None:
    assert not vague_names(source)


def test_one_statement_assigns_one_value(source: str) -> None:
    assert not packed_assignments(source)


def test_processes_start_behind_one_door_for_each_tool(source: str) -> None:
    found = doors(source)
    assert {section for _, section in found} <= {"kubectl", "git"}
    # One that waits for the end and, for the watches of kubectl, one that does not.
    assert len(found) == len(set(found)) <= 3, found
    assert not re.search(r"\bshell\s*=\s*True", source)


def test_who_catches_everything_logs_it(source: str) -> None:
    handlers = broad_handlers(source)
    assert not [handler.lineno for handler in handlers if not logs(handler)]
    assert len(handlers) <= MAX_BROAD_EXCEPTS


def test_nothing_in_the_module_changes_after_import(source: str) -> None:
    assert not [node.lineno for node in nodes(source) if isinstance(node, ast.Global)]
    targets = [
        target
        for statement in parsed(source).body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in getattr(statement, "targets", None) or [statement.target]
    ]
    assigned = {name for target in targets for name in bound_by(target)}
    # Constants, types, and the logger.
    assert {name for name in assigned if not re.match(r"[A-Z_]", name)} <= {"log"}


def test_exemptions_are_few(source: str) -> None:
    assert len(exemptions(source)) <= MAX_EXEMPTIONS


IMPORT = """
import logging, signal, threading
before = signal.getsignal(signal.SIGTERM)
import gitops_hook
assert threading.active_count() == 1
assert signal.getsignal(signal.SIGTERM) is before
assert not logging.getLogger().handlers
"""


def test_importing_it_does_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT],
        cwd=ROOT,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# === All files ===


def tracked(*patterns: str) -> list[Path]:
    """The files in the repository's index that are still there."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def offences(pattern: str, paths: Iterable[Path]) -> list[str]:
    """The lines of text files in which a pattern occurs."""
    found = []
    for path in paths:
        text = path.read_text("utf-8", errors="replace")
        lines = text.splitlines() if re.search(pattern, text) else ()
        for number, line in enumerate(lines, 1):
            if match := re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    return found


# The brackets keep this file from offending itself.
UNFINISHED = r"\b([T]ODO|[F]IXME)\b"
PACKAGE_HOSTS = r"\b(pypi[.]org|pythonhosted[.]org|npmjs[.]org|deb[.]debian[.]org)\b"
MACHINE_PATHS = r"(?<![\w.-])/([w]ork|[r]oot|[h]ome/\w+|[U]sers)/\w|\.\./[s]hared\b"
DATES = r"\b20\d\d-\d\d-\d\d\b(?!T)"


def test_nothing_is_left_to_do() -> None:
    assert not offences(UNFINISHED, tracked())


def test_no_file_names_the_host_of_a_package_registry() -> None:
    assert not offences(PACKAGE_HOSTS, tracked())


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not offences(MACHINE_PATHS, tracked())


def test_no_date_grows_old_in_text() -> None:
    assert not offences(DATES, tracked(":!tests"))


def test_every_exemption_names_its_rule_and_its_reason() -> None:
    found = {path.name: unexplained(path.read_text("utf-8")) for path in tracked("*.py")}
    assert not {name: lines for name, lines in found.items() if lines}


def test_every_test_runs() -> None:
    found = {path.name: ways_out(path.read_text("utf-8")) for path in tracked("tests/*.py")}
    assert not {name: lines for name, lines in found.items() if lines}


def test_no_test_replaces_a_name_of_the_program() -> None:
    found = {path.name: patches_of_ours(path.read_text("utf-8")) for path in tracked("tests/*.py")}
    assert not {name: lines for name, lines in found.items() if lines}


# === The rules can be broken ===

SAMPLE = '''
"""A program."""
import subprocess
# === Errors ===
class Wrong(Exception):
    pass
def early(later: int) -> int:
    return later
# === Kubectl (the only door) ===
def run(argv: list[str]) -> None:
    subprocess.run(argv, check=True)
'''


def test_sections_are_read_from_banners() -> None:
    assert sections(SAMPLE) == [("errors", 4), ("kubectl", 9)]


@pytest.mark.parametrize(
    ("late", "offends"),
    [
        ("def later() -> None: ...", False),  # an argument of that name hides it
        ("class Wrong2(Wrong): ...", False),
    ],
)
def test_a_local_name_is_not_a_use(late: str, offends: bool) -> None:
    assert bool(used_before_its_section(SAMPLE + late)) is offends


@pytest.mark.parametrize(
    "early",
    [
        "def first() -> None:\n    later()",
        "def first(x: later) -> None: ...",
        "FIRST = [later for x in ()]",
        "class First:\n    def go(self) -> None:\n        return (lambda y: later(y))(1)",
    ],
    ids=["body", "annotation", "comprehension", "lambda"],
)
def test_a_use_of_what_comes_below_is_found(early: str) -> None:
    text = f"# === Errors ===\n{early}\n# === Kubectl ===\ndef later() -> None: ...\n"
    assert len(used_before_its_section(text)) == 1


def test_doors_are_found_with_their_section() -> None:
    more = "# === Git ===\nimport os\nos.system('ls')\nsubprocess.Popen([])\n"
    assert doors(SAMPLE + more) == [
        ("subprocess.run", "kubectl"),
        ("os.system", "git"),
        ("subprocess.Popen", "git"),
    ]


@pytest.mark.parametrize(
    ("clause", "broad"),
    [
        ("", True),
        (" Exception as e", True),
        (" (OSError, BaseException)", True),
        (" OSError", False),
    ],
)
def test_broad_excepts_are_told_from_narrow_ones(clause: str, broad: bool) -> None:
    text = f"try:\n    pass\nexcept{clause}:\n    log.exception('x')\n"
    assert bool(broad_handlers(text)) is broad
    assert all(logs(handler) for handler in broad_handlers(text))
    assert not any(logs(handler) for handler in broad_handlers(text.replace("log.", "lag.")))


@pytest.mark.parametrize(
    ("comment", "fine"),
    [
        ("noqa", False),
        ("noqa: S603", False),
        ("noqa: S603 - argv is a list", True),
        ("noqa: S603, S607 - argv is a list", True),
    ],
)
def test_an_exemption_needs_a_reason(comment: str, fine: bool) -> None:
    assert bool(unexplained(f"x = 1  # {comment}\n")) is not fine


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("@pytest.mark.skipif(True)\ndef test(): ...", True),
        ("pytest.xfail('x')", True),
        ("from pytest import importorskip", True),
        ("self.skipTest('x')", True),
        ("@pytest.mark.parametrize('a', [1])\ndef test(a): ...", False),
        ("skip = scanner.skip()", False),
    ],
)
def test_a_way_out_of_a_test_is_found(text: str, found: bool) -> None:
    assert bool(ways_out(text)) is found


@pytest.mark.parametrize(
    ("call", "ours"),
    [
        ("monkeypatch.setattr(gitops_hook, 'run', None)", True),
        ("monkeypatch.setattr(gitops_hook.subprocess, 'run', None)", True),
        ("mock.patch('gitops_hook.run')", True),
        ("patch.object(gitops_hook.Spool, 'add')", True),
        ("monkeypatch.setattr(time, 'sleep', None)", False),
        ("monkeypatch.setenv('GITOPS_HOOK_CONFIG', 'x')", False),
    ],
)
def test_a_replaced_name_of_ours_is_found(call: str, ours: bool) -> None:
    assert bool(patches_of_ours(call)) is ours


def test_lengths_and_arguments_are_counted_as_written() -> None:
    (function,) = functions(
        "class A:\n    def f(self, a, /, b, *, c):\n        x = 1\n        return x\n"
    )
    assert (length(function), argument_count(function)) == (3, 3)


def test_the_lines_of_a_class_are_counted_with_its_docstring() -> None:
    text = '@decorated\nclass A:\n    """Words."""\n\n    class B:\n        x = 1\n'
    assert class_lengths(text) == {"A": 5, "B": 2}


@pytest.mark.parametrize(
    ("text", "vague"),
    [
        ("found = 1", True),
        ("def f(given): ...", True),
        ("def f(*, known=1): ...", True),
        ("f = lambda told: told", True),
        ("x = [got for got in y]", True),
        ("for made, x in y: ...", True),
        ("if res := f(): ...", True),
        ("with f() as found: ...", True),
        ("entry = found", False),
        ("entry.found = f(made=1)", False),
        ("def found(): ...", False),
        ("unknown = result = 1", False),
    ],
)
def test_a_name_that_tells_nothing_is_seen(text: str, vague: bool) -> None:
    assert bool(vague_names(text)) is vague


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("a, b = 1, 2", True),
        ("self.a, self.b = a, b", True),
        ("(a, [b, c]) = (f(x), g(y))", True),
        ("if x:\n    c = a, b = 1, 2", True),
        ("host, port = address()", False),
        ("first, *others = 1, 2, 3", False),
        ("pair = 1, 2", False),
        ("a, b = b, a", False),
        ("for a, b in ((1, 2), (3, 4)): ...", False),
    ],
)
def test_a_packed_assignment_is_seen(text: str, packed: bool) -> None:
    assert bool(packed_assignments(text)) is packed


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (UNFINISHED, "# TO~DO: later"),
        (PACKAGE_HOSTS, "https://files.pythonhosted~.org/x"),
        (MACHINE_PATHS, "see /wo~rk/main"),
        (MACHINE_PATHS, "../sha~red/design.md"),
        (MACHINE_PATHS, "'/ho~me/alice/x'"),
        (DATES, "since 2020~-01-01"),
    ],
)
def test_an_offence_in_a_text_is_found(pattern: str, text: str) -> None:
    assert re.search(pattern, text.replace("~", ""))
    assert not re.search(pattern, text)
