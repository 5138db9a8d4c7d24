"""Tokenizers and chat templates of strangers (group 5 of the faults): a tokenizer, or one of our errors, soon, and no harm."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infopt.calibration.data import DataSpec, load_tokenizer, load_windows
from infopt.chat import fill
from infopt.errors import BadInput, InfoptError

from .folders import json_values
from .tools import infopt, text, tiny

USER = [{"role": "user", "content": "hi"}]
quickly = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("tokenizers") / "model")


# Templates


class Template:
    """A tokenizer as far as `fill` asks it: transformers' own sandbox around one template."""

    def __init__(self, source: str) -> None:
        self.source = source

    def apply_chat_template(self, messages: list, add_generation_prompt: bool, tokenize: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        told = {"add_generation_prompt": add_generation_prompt}
        return render_jinja_template([messages], chat_template=self.source, **told)[0][0]


def test_a_sound_template_writes_the_conversation() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert fill("x", Template(source), USER) == "<user>hi"
    assert fill("x", Template(source), USER, answer=True) == "<user>hi>"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 10**10 }}",
        "{% for i in range(99999) %}{{ 'x' * 10**5 }}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ messages.clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{% for %}",
        "{{ '\\ud800' }}",
        "{{ ''.join(cycler('a').next() for _ in range(3)) }}",
    ],
)
def test_an_attack_in_a_template_ends_soon_and_reaches_nothing(source: str) -> None:
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(BadInput, match=r"the chat template of \./m cannot be used\n."):
        fill("./m", Template(source), USER, seconds=1)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB


def test_the_commands_survive_an_attack(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    done = infopt("generate", folder, "--prompt", "x", "--chat")
    assert done.code == 3 and "chat template" in done.err and not done.out
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": USER}))
    done = infopt("quantize", folder, "--method", "gptq", "--dataset", data, "-o", tmp_path / "out")
    assert done.code == 3 and "chat template" in done.err and not (tmp_path / "out").exists()


# Tokenizers


@pytest.mark.parametrize("left", [(), ("tokenizer.model",), ("tokenizer_config.json",)])
def test_no_tokenizer_or_half_of_one(home: Path, tmp_path: Path, left: tuple[str, ...]) -> None:
    """Nothing; SentencePiece's file alone, and that a damaged one; a config without a vocabulary."""
    folder = shutil.copytree(home, tmp_path / "m")
    for path in folder.glob("tokenizer*"):
        if path.name not in left:
            path.unlink()
    if "tokenizer.model" in left:
        (folder / "tokenizer.model").write_bytes(b"\x0a\x10" + bytes(100))
    for command in (("eval", folder), ("quantize", folder, "--method", "gptq", "-o", tmp_path / "out")):
        done = infopt(*command, "--dataset", text(tmp_path))
        assert done.code == 3 and "tokenizer" in done.err, done.err
    assert (
        infopt("quantize", folder, "--method", "rtn", "--group-size", 32, "--no-verify", "-o", tmp_path / "o").code == 0
    )


def test_a_vocabulary_larger_than_the_embedding(home: Path, tmp_path: Path) -> None:
    """Harmless unless a text has such a token."""
    folder = shutil.copytree(home, tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["q"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(data))
    letters = tmp_path / "a.txt"
    letters.write_text("abc " * 300)
    assert infopt("eval", folder, "--dataset", letters, "--seqlen", 16).code == 0
    letters.write_text("q" * 300)
    done = infopt("eval", folder, "--dataset", letters, "--seqlen", 16)
    assert done.code == 3 and "5000" in done.err and "128 rows" in done.err
    done = infopt("generate", folder, "--prompt", "q")
    assert done.code == 3 and "5000" in done.err, done.err


def test_a_letter_without_a_token_and_no_token_for_such_letters(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home, tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["unk_token"] = "none of these"
    (folder / "tokenizer.json").write_text(json.dumps(data))
    letters = tmp_path / "a.txt"
    letters.write_text("é" * 300)
    for done in (infopt("eval", folder, "--dataset", letters), infopt("generate", folder, "--prompt", "é")):
        assert done.code == 3 and "cannot be tokenised" in done.err, done.err


def test_no_special_tokens_at_all(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home, tmp_path / "m")
    settings_of = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in settings_of.items() if not key.endswith("_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    for name in (folder / "config.json", folder / "generation_config.json"):
        if name.exists():
            data = json.loads(name.read_text())
            name.write_text(json.dumps({k: v for k, v in data.items() if not k.endswith("_token_id")}))
    assert config and infopt("eval", folder, "--dataset", text(tmp_path), "--seqlen", 16).code == 0
    assert infopt("generate", folder, "--prompt", "abc", "--max-new-tokens", 3).code == 0


@quickly
@given(data=st.data())
def test_mutated_tokenizer_files_are_read_or_refused(home: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Another value somewhere in tokenizer.json or tokenizer_config.json: tokens come out, or one of our errors."""
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(home, folder)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = json.loads((home / name).read_text())
    at = content
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if not (isinstance(at[key], dict) and at[key] and data.draw(st.booleans())):
            break
        at = at[key]
    at[key] = data.draw(json_values)
    try:
        written = json.dumps(content)
        (folder / name).write_text(written)
    except UnicodeEncodeError:
        return
    sample = tmp_path / "a.txt"
    sample.write_text("the quick brown fox " * 20)
    began = time.process_time()
    try:
        load_windows(DataSpec(str(sample), 2, 8), load_tokenizer(folder), part="calibration", vocab_size=128)
    except InfoptError as error:
        assert error.exit_code in (3, 4), repr(error)
    assert time.process_time() - began < 10
    shutil.copyfile(home / name, folder / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "m"]
