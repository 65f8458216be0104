"""The house: who may import whom, no copies, a light import, commands that exist, nothing private."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_jax.cli import make_parser

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "wan_jax").rglob("*.py"))

# Layer -> what it may import of the package, beside ``errors`` and itself. A layer is a module or a folder of
# wan_jax; the longest name that fits a module is its layer.
MAY_IMPORT = {
    "wan_jax": "",
    "errors": "",
    "home": "",
    "config": "",
    "parallel": "config",
    "nn": "config parallel",
    "models": "config parallel nn",
    "checkpoint": "config parallel nn",
    "ffmpeg": "",
    "media": "config ffmpeg",
    "text": "config",
    "captions": "",
    "weights": "config parallel models checkpoint home nn.layers nn.quant nn.stack",
    "sampling": "config parallel nn.reuse home",  # it is given a velocity function
    "resume": "sampling weights",  # the saved state is a safetensors file
    "request": "config sampling captions",
    "references": "media request",
    "model": "config parallel models checkpoint text weights nn.layers nn.quant nn.stack",
    "conditions": "config parallel nn models media sampling",
    "sound": "config distributed nn models media references conditions sampling",
    "small": "conditions media text",
    "provenance": "wan_jax config ffmpeg media",
    "distributed": "wan_jax parallel",
    "cache": "wan_jax home",
    "batch": "distributed",
    "pipeline": "wan_jax config parallel distributed nn models model media request references conditions sound sampling"
    " resume weights provenance small",
    "work": "config models",
    "plan": "config parallel nn models checkpoint model request sound weights work",
    "aot": "config parallel nn models checkpoint model request conditions sound sampling pipeline plan",
    "train": "config parallel nn models checkpoint text captions media references request sampling weights model"
    " conditions sound pipeline conversion train.puppets",
    "train.puppets": "captions",  # a world of its own
    "evaluate": "config checkpoint model media request references conditions sound pipeline provenance parallel"
    " train.puppets",  # its truth
    "conversion": "config checkpoint models model weights",  # whole models, from layout to layout
    "cli": "wan_jax config parallel distributed cache batch media request references model pipeline plan aot provenance"
    " weights conversion evaluate train",
}
FOREIGN = {"torch", "transformers", "diffusers", "tensorflow", "convert", "configs", "benchmarks", "tests"}

HEAVY = "torch transformers diffusers tensorflow gradio librosa orbax optax imageio PIL".split()
PULLED_BY_FLAX = {"optax"}
IMPORT_SECONDS = 1.5

MIN_LINES = 8
MAX_BYTES = 30 * 2**20
PRIVATE = {
    "path of one machine": r"(?<![\w.:/-])/(work|root|(home|Users|tmp)/\w+)/",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,})",
    "AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "Google key": r"\bAIza[\w-]{35}",
    "API key": r"\bsk-[\w-]{32,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}


def module_name(path: Path) -> str:
    """``wan_jax/models/dit.py`` -> ``models.dit``; the package itself is ``wan_jax``."""
    parts = path.relative_to(ROOT / "wan_jax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "wan_jax"


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too, but not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield from imports(node)


def layer(module: str) -> str:
    fits = (name for name in MAY_IMPORT if f"{module}.".startswith(f"{name}."))
    return max(fits, key=len, default="wan_jax")


def may_import(importer: str, imported: str) -> bool:
    ours, theirs = layer(importer), layer(imported)
    names = {"errors", ours, *MAY_IMPORT[ours].split()}
    parts = (name for name in names if name.startswith(f"{theirs}."))  # a row may allow a part of a layer
    return theirs in names or any(f"{imported}.".startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("models.dit", "nn.layers.Linear", True),
        ("nn.layers", "models.dit.DiT", False),
        ("sampling.sampler", "parallel.compiler_options", True),
        ("sampling.sampler", "nn.layers.Linear", False),
        ("sampling.sampler", "weights.readers.open_checkpoint", False),
        ("weights.engine", "model.load", False),
        ("model", "conversion.check_folder", False),
        ("config", "__version__", False),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert may_import(importer, imported) == allowed


def test_import_directions():
    faults = []
    modules = [module_name(path) for path in SOURCES]
    faults += [f"MAY_IMPORT has a row for {name}: no such module" for name in set(MAY_IMPORT) - set(modules)]
    for path, importer in zip(SOURCES, modules, strict=True):
        if layer(importer) == "wan_jax" != importer:
            faults.append(f"{importer}: a new module; give it a row in MAY_IMPORT")
            continue
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            first, _, rest = name.partition(".")
            if first in FOREIGN or not first:
                faults.append(f"{importer} imports {name}: never inside wan_jax (relative imports neither)")
            elif first == "wan_jax" and not may_import(importer, rest or "wan_jax"):
                allowed = MAY_IMPORT[layer(importer)]
                faults.append(f"{importer} imports {rest}; it may import: errors {allowed}")
    assert not faults, "\n".join(faults)


def normalised(function: ast.FunctionDef) -> str | None:
    """The body without docstring and names of variables; None when shorter than `MIN_LINES`."""
    body = copy.deepcopy(function.body[ast.get_docstring(function) is not None :])
    if not body or body[-1].end_lineno - body[0].lineno + 1 < MIN_LINES:
        return None
    for node in (node for statement in body for node in ast.walk(statement)):
        for name in {"id", "arg", "name"} & set(node._fields):
            setattr(node, name, "")
    return "\n".join(ast.dump(statement) for statement in body)


def repeated(sources: dict[str, str]) -> list[list[str]]:
    places = defaultdict(list)
    for where, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (body := normalised(node)):
                places[body].append(f"{where}:{node.lineno} {node.name}")
    return [found for found in places.values() if len(found) > 1]


def test_no_function_is_repeated():
    assert not repeated({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES})
    body = "".join(f"    x{i} = a.b({i}) + c\n" for i in range(MIN_LINES))
    renamed = '    """Other names."""\n' + body.replace("x", "y").replace("c\n", "z\n")
    assert repeated({"a": f"def f(a, c):\n{body}", "b": f"def g(a, z):\n{renamed}"})  # the test can fail


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def loaded(module: str) -> set[str]:
    """Which of `HEAVY` importing a module loads."""
    modules = json.loads(run_python(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))
    return set(HEAVY) & set(modules)


def test_import_is_fast():
    def seconds() -> float:
        begin = time.perf_counter()
        run_python("import wan_jax")
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(3)) <= IMPORT_SECONDS


def test_import_is_light():
    assert not loaded("wan_jax")
    assert not loaded("wan_jax.cli")
    assert loaded("wan_jax.pipeline") <= PULLED_BY_FLAX


def commands(markdown: str) -> Iterator[str]:
    """What follows ``wan-jax`` in the code blocks of a page, with lines joined at a final backslash."""
    for block in re.findall(r"^```\w*\n(.*?)^```", markdown, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^|[\s$/])wan-jax\s(.*)", line):
                yield match[1]


def complaint(command: str) -> str:
    """What the parser says to a command up to its comment, pipe or ``&&``; nothing when it accepts it."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if word[0] in "|&;<>":
            break
        words.append(word)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            make_parser().parse_args(words)
    except SystemExit as stop:
        if stop.code:
            return f"wan-jax {command}\n  {said.getvalue().strip().splitlines()[-1]}"
    return ""


def test_documented_commands_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [command for page in pages for command in commands(page.read_text(encoding="utf-8"))]
    assert not any(map(complaint, found)), "\n".join(map(complaint, found))


def test_a_wrong_command_is_found():
    line = "$ .venv/bin/wan-jax generate --model m \\\n  --prompt 'a | b' --seeed 3 | tee log  # text\n"
    (command,) = commands(f"wan-jax outside a block\n```bash\n{line}```\n")
    assert "did you mean --seed" in complaint(command)
    assert not complaint(command.replace("--seeed", "--seed")) and complaint("generat --model m")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return [path for name in git.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_nothing_private_is_tracked(tracked):
    faults = []
    for path in tracked:
        text = path.read_bytes().decode("utf-8", "replace")
        for what, pattern in PRIVATE.items():
            if match := re.search(pattern, text):
                faults.append(f"{path.relative_to(ROOT)}: {what}: {match[0][:12]}...")
    assert not faults, "\n".join(faults)


def test_no_large_file_is_tracked(tracked):
    assert not [f"{path}: {path.stat().st_size} bytes" for path in tracked if path.stat().st_size > MAX_BYTES]
