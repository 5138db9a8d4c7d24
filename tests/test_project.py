"""The project's own laws: who imports whom, what is imported when, what the documents promise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("infopt", "calibration", "quantizers", "rewriters", "exporters", "kernels", "runtime", "recipes", "cli")
MAX_LINES = 420

#: folder -> what of ours it may import besides itself (docs/architecture.md tells why)
ALLOWED = {
    "infopt": set(),
    "kernels": {"infopt"},
    "exporters": {"infopt"},
    "calibration": {"infopt"},
    "quantizers": {"infopt", "calibration.stats"},
    "rewriters": {"infopt", "calibration.stats"},
    "runtime": {"infopt", "kernels", "exporters"},
    "recipes": {"infopt", "calibration", "quantizers", "rewriters", "exporters", "kernels", "runtime"},
    "cli": set(PACKAGES),
}


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def imports_of_ours(tree: ast.AST) -> set[str]:
    """Dotted names behind `infopt.`, as "calibration.stats"; "infopt" for modules of the spine."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "infopt"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            if node.module == "infopt":
                found |= {f"infopt.{alias.name}" for alias in node.names}
            elif node.module and node.module.startswith("infopt."):
                found.add(node.module)
    names = {name.removeprefix("infopt.") for name in found if name != "infopt"}
    return {name if name.split(".")[0] in PACKAGES else "infopt" for name in names}


def in_fresh_python(code: str, **environment: str) -> str:
    """Run in a new interpreter at the repository's root with the root on sys.path, as `python -m` has it."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("folder", PACKAGES)
def test_folders_import_only_what_they_may(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports_of_ours(ast.parse(path.read_text())):
            top = name.split(".")[0]
            allowed = top == folder or top in ALLOWED[folder] or name in ALLOWED[folder]
            assert allowed, f"{path.relative_to(ROOT)} imports infopt.{name}"


def test_the_law_above_would_notice():
    tree = ast.parse("from infopt.quantizers.gptq import gptq\nimport infopt.calibration.data\nfrom infopt import cli")
    assert imports_of_ours(tree) == {"quantizers.gptq", "calibration.data", "cli"}


def test_every_folder_is_installed_under_its_name():
    code = "import importlib\n" + "\n".join(
        f"print(importlib.import_module('infopt{'' if name == 'infopt' else '.' + name}').__file__)"
        for name in PACKAGES
    )
    assert len(set(in_fresh_python(code).splitlines())) == len(PACKAGES)


def test_our_kernels_folder_does_not_shadow_the_hugging_face_package():
    """transformers imports a package `kernels` where it is installed; our folder of that name is not it."""
    out = in_fresh_python(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "m = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,\n"
        "                                 num_attention_heads=2, num_key_value_heads=2))\n"
        "import importlib.metadata as metadata\n"
        "installed = any(d.name == 'kernels' for d in metadata.distributions())\n"
        "print(is_kernels_available() == installed, type(m).__name__)"
    )
    assert out == "True LlamaForCausalLM"


def test_kernels_from_the_root_is_never_half_of_another_package():
    """Whoever imports `kernels` at the root gets the installed package or an ImportError-free, empty folder of ours."""
    out = in_fresh_python("import infopt.kernels\nimport kernels\nprint(infopt.kernels.__name__, kernels.__file__)")
    name, file = out.split()
    assert name == "infopt.kernels"
    assert Path(file) == ROOT / "kernels" / "__init__.py" or "site-packages" in file


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom infopt.cli.main import main\nsys.argv = ['infopt', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'pydantic', 'gguf'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    assert in_fresh_python(code).splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    "command",
    [
        "quantize",
        "calibrate",
        "verify",
        "eval",
        "generate",
        "bench",
        "inspect",
        "convert",
        "recipe",
        "doctor",
        "shard",
        "assemble",
        "lint",
        "rewrite",
    ],
)
def test_every_command_has_help_with_an_example_and_without_torch(command):
    code = (
        f"import sys\nfrom infopt.cli.main import main\nsys.argv = ['infopt', {command!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print('torch' in sys.modules)"
    )
    out = in_fresh_python(code)
    assert f"Example: infopt {command}" in out
    assert out.splitlines()[-1] == "False"


def test_documented_commands_and_flags_exist():
    from infopt.cli.main import COMMANDS

    checked = 0
    for document in (ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        text = document.read_text().replace("\\\n", " ")
        examples = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
        for command, rest in re.findall(r"^infopt ([a-z]+)(.*)$", examples, re.MULTILINE):
            assert command in COMMANDS, f"{document.name}: infopt {command}"
            text_of_help = help_of(command)
            for flag in re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", rest.split(" #")[0]):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text_of_help), (
                    f"{document.name}: infopt {command} {flag}"
                )
                checked += 1
        for target in re.findall(r"\bmake ([a-z][a-z-]+)\b", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                f"{document.name}: make {target}"
            )
    assert checked > 5


def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "infopt.cli.main", command, "--help"],
        capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    return done.stdout


def test_exit_codes_are_documented():
    from infopt import errors

    readme = (ROOT / "README.md").read_text()
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.InfoptError) and error is not errors.InfoptError:
            assert re.search(rf"^\| {error.exit_code} \|", readme, re.MULTILINE), error


def test_files_stay_readable():
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= MAX_LINES, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines"
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"


def test_habits():
    """No broad excepts, no environment variables as switches, no global statements, no bare asserts on input."""
    broken = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Global | ast.Assert):
                broken.append((path.relative_to(ROOT), node.lineno, type(node).__name__))
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                broken.append((path.relative_to(ROOT), node.lineno, "bare except"))
    assert not broken


def test_tests_and_texts_name_no_foreign_place():
    """Nothing in the project depends on the machine that it was written on."""
    words = ("/wo" + "rk/", "/t" + "mp/", "py" + "pi.org", "/ro" + "ot/", "/ho" + "me/")
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json"}
    folders = [*PACKAGES, "tests", "docs", "benchmarks", ".ci"]
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    files += [
        path for path in ROOT.iterdir() if path.is_file() and (path.suffix in suffixes or path.name == "Makefile")
    ]
    for path in files:
        if path.suffix in suffixes or path.name in {"Makefile", "run"}:
            text = path.read_text()
            assert not [word for word in words if word in text], path.relative_to(ROOT)


def test_versions_agree():
    import tomllib

    import infopt

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == infopt.__version__
    assert f"## {infopt.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"torch=={pinned['torch']}" in (ROOT / "Makefile").read_text()
