"""Mistakes at the command line: told at once, by the flag's name, with the documented exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .tools import infopt, text, tiny

INFOPT = Path(sys.executable).parent / "infopt"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("mistakes") / "model")


def changed(model: Path, folder: Path, **values: object) -> Path:
    """A copy of the model with other values in its config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


CONTRADICTIONS = {
    "gate that is none": ("--method rtn --max-kl nan", "--max-kl nan"),
    "gate below zero": ("--method rtn --max-kl -1", "--max-kl -1"),
    "gate above one": ("--method rtn --min-top1 2", "--min-top1 2"),
    "gate without comparison": ("--method rtn --no-verify --max-kl 1", "--no-verify"),
    "no windows to compare": ("--method rtn --verify-samples 0", "--verify-samples"),
    "bits that nothing reads": ("--method kv-cache --bits 4", "--bits with kv-cache"),
    "scheme that nothing reads": ("--method kv-cache --scheme W8A8", "--scheme with kv-cache"),
    "bits beside a budget": ("--method gptq --target-bits 4 --bits 4", "--bits with a budget"),
    "scheme beside a budget": ("--method gptq --target-bits 4 --scheme W8A8", "--scheme with a budget"),
    "budget without end": ("--method gptq --target-bits inf", "target.bits"),
    "seed too large": ("--method awq --seed 99999999999999999999", "seed"),
    "split of the built-in text": ("--method awq --split train", "--split train"),
    "column of the built-in text": ("--method awq --column text", "--column text"),
    "scheme that is none": ("--method rtn --scheme W5A16", "W4A16"),
}


@pytest.mark.parametrize("name", list(CONTRADICTIONS))
def test_flags_that_make_no_sense(model, tmp_path, name):
    flags, said = CONTRADICTIONS[name]
    done = infopt("quantize", model, *flags.split(), "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert said in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rotate --merge mean", "--merge without --kv-heads"),
        ("--rotate --heal-steps 4", "--heal-steps without --kv-heads or --window"),
        ("--rotate --no-heal", "--no-heal without --kv-heads or --window"),
        ("--window 8 --group position", "--group without --kv-heads"),
        ("--kv-heads 1 --sinks 2", "--sinks without --window"),
        ("--kv-heads 1 --heal-lr 0.01", "--heal-lr without --heal-steps"),
        ("--rotate --seed 99999999999999999999", "--seed"),
        ("--rotate --min-top1 -0.5", "--min-top1 -0.5"),
    ],
)
def test_rewriting_flags_without_effect(model, tmp_path, flags, said):
    done = infopt("rewrite", model, *flags.split(), "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_a_text_file_has_no_columns(model, tmp_path):
    flags = ("--method", "awq", "--dataset", text(tmp_path), "--column", "text")
    done = infopt("quantize", model, *flags, "-o", tmp_path / "out")
    assert done.code == 2
    assert "--column text" in done.err


def test_a_format_that_not_all_candidates_fit_is_refused_before_they_are_measured(model, tmp_path):
    flags = ("--method", "gptq", "--target-bits", "4", "--group-size", "32", "--num-samples", "2", "--seqlen", "16")
    done = infopt("quantize", model, *flags, "--format", "awq", "-o", tmp_path / "out")
    assert done.code == 4, done.err
    assert "with 3 bits" in done.err
    assert "sensitivity" not in done.err


WRONG = {
    "hidden_act": None,
    "layer_types": ["full_attention"] * 7,
    "rms_norm_eps": "x",
    "eos_token_id": "x",
    "head_dim": 31,
    "max_position_embeddings": 0,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
    "dtype": "foo",
}


@pytest.mark.parametrize("key", list(WRONG))
def test_a_wrong_value_in_config_json_is_no_matter_of_the_tokenizer(model, tmp_path, key):
    wrong = changed(model, tmp_path / "wrong", **{key: WRONG[key]})
    for command in (
        ("quantize", wrong, "--method", "awq", "--group-size", "32", "-o", tmp_path / "out"),
        ("calibrate", wrong, "-o", tmp_path / "out"),
        ("generate", wrong, "--prompt", "a"),
    ):
        done = infopt(*command)
        assert done.code == 3, done.err
        assert "config.json" in done.err
        assert "tokenizer" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path, family):
    bare = tiny(family, tmp_path / "model")
    for path in bare.glob("*token*"):
        path.unlink()
    calibrated = infopt("quantize", bare, "--method", "awq", "--group-size", "32", "-o", tmp_path / "out")
    written = infopt("generate", bare, "--prompt", "a")
    for done in (calibrated, written):
        assert done.code == 3, done.err
        assert "no tokenizer" in done.err


@pytest.mark.parametrize(("family", "positions"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_calibration_windows_are_no_longer_than_the_model_can_read(tmp_path, family, positions):
    short = tiny(family, tmp_path / "model", **{positions: 32})
    flags = ("--method", "awq", "--group-size", "32", "--num-samples", "2", "--verify-samples", "1")
    done = infopt("quantize", short, *flags, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "2 packed windows of 32" in done.err


def test_a_missed_gate_names_the_folder_that_is_there(model, tmp_path):
    out = tmp_path / "out"
    flags = ("--method", "rtn", "--bits", "2", "--group-size", "32", "--verify-samples", "1", "--max-kl", "1e-9")
    done = infopt("quantize", model, *flags, "-o", out)
    assert done.code == 7
    assert f"error: {out} is intact" in done.err


def test_the_work_of_another_run_is_not_dropped_in_silence(model, tmp_path):
    out = tmp_path / "out"
    flags = ("--method", "awq", "--group-size", "32", "--num-samples", "2", "--seqlen", "16", "--verify-samples", "1")
    work = tmp_path / "out.infopt-work" / "parts"
    work.mkdir(parents=True)
    work.parent.chmod(0o700)
    (work / "start.json").write_text('{"fingerprint": "another", "hidden": null}')
    (work / "block-00000.json").write_text("{}")
    done = infopt("quantize", model, *flags, "-o", out)
    assert done.code == 0, done.err
    assert "1 finished blocks of an earlier run" in done.err


def test_a_picture_needs_a_name_before_anything_is_timed(model, tmp_path):
    done = infopt("bench", model, "--plot", tmp_path)
    assert done.code == 2
    assert "It is a folder" in done.err
    assert not list(tmp_path.iterdir())


# The process itself


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([INFOPT, *map(str, arguments)], stderr=subprocess.PIPE, text=True, check=False, **options)


def test_a_full_disk_behind_stdout_is_told():
    with open("/dev/full", "w") as full:
        done = run("recipe", "list", stdout=full)
    assert done.returncode == 5
    assert done.stderr.startswith("error: stdout cannot be written")
    assert "Traceback" not in done.stderr


def test_a_reader_that_went_away_ends_it_in_silence():
    with subprocess.Popen([INFOPT, "recipe", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == b""


def test_an_interrupt_says_how_to_go_on(model, tmp_path):
    flags = ("--method", "awq", "--group-size", "32", "--num-samples", "1000", "--seqlen", "256")
    # A job in a script's background is started with interrupts ignored, and the tests may run in one.
    code = "import signal, infopt.cli.main as m; signal.signal(signal.SIGINT, signal.default_int_handler); m.main()"
    command = [sys.executable, "-c", code, "quantize", model, *flags, "-o", tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "layers to quantize" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.endswith("interrupted: run the same command again to go on\n")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
