"""Several processes: the same result as one, up to the order in which sums are made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infopt.errors import VerificationFailed
from infopt.exporters.folder import open_model
from infopt.runtime.model import RuntimeModel
from infopt.runtime.quality import Comparison, compare
from infopt.team import Team

from .test_parallel import Meeting
from .tools import infopt, text, tiny

WINDOWS = ("--num-samples", "9", "--seqlen", "32")


def together(*args: str, processes: int = 2) -> list[str]:
    scripts = Path(sys.executable).parent
    return [
        *(sys.executable, "-m", "torch.distributed.run"),  # torchrun by its other name, which needs no path
        "--nproc-per-node",
        str(processes),
        "--no-python",
        str(scripts / "infopt"),
        *args,
    ]


def run_together(*args: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = together(*args, processes=processes)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = open_model(folder)
    return {name: reader.qtensor(name).dequantize() for name in reader.quantized}


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ("--method", "gptq", "--group-size", "32")),
        pytest.param("llama", ("--method", "smoothquant", "--kv-cache", "int8"), marks=pytest.mark.slow),
        pytest.param(
            "mixtral", ("--method", "gptq", "--group-size", "32", "--min-expert-tokens", "4"), marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_make_what_one_makes(family: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny(family, tmp_path / "m")
    flags = (*flags, *WINDOWS, "--dataset", str(text(tmp_path)))
    done = run_together("quantize", str(model), "-o", str(tmp_path / "two"), *flags, "--verify-samples", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote ") == 1, "one process speaks"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["m", "two"], "the helper's is gone"
    assert infopt("quantize", model, "-o", tmp_path / "one", *flags, "--no-verify").code == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    same = torch.cat([(one[name] == two[name]).flatten() for name in one]).float().mean().item()
    assert same > 0.995, f"only {same:.2%} of the weights are the same"
    shared = quality(tmp_path / "two")
    alone = infopt("verify", tmp_path / "two", "--reference", model, "--num-samples", 2, "--seqlen", 32)
    assert alone.code == 0, alone.err
    assert shared == pytest.approx(quality(tmp_path / "two"), rel=1e-5)


def quality(folder: Path) -> dict[str, float]:
    return json.loads((folder / "verification.json").read_text())["quality"]


@dataclass(frozen=True)
class OfThreads(Team):
    meeting: Meeting | None = None

    def _reduce(self, x: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "SUM"
        self.meeting.reduce(self.rank)(x)
        return x


def test_two_processes_compare_what_one_compares(tmp_path: Path) -> None:
    """The answer is the same for both; what only one of them meets ends both."""
    original = tiny("llama", tmp_path / "m", tie_word_embeddings=False)
    out = tmp_path / "q"
    assert infopt("quantize", original, "-o", out, "--method", "rtn", "--group-size", 32, "--no-verify").code == 0
    windows_NT = torch.randint(3, 90, (5, 32))
    alone = compare(RuntimeModel(original), RuntimeModel(out), windows_NT)
    both = [found.result() for found in compared_together(original, out, windows_NT)]
    assert both[0] == both[1]
    assert both[0].to_json() == pytest.approx(alone.to_json(), rel=1e-5)
    few = [found.result() for found in compared_together(original, out, windows_NT[:1])]
    assert few[0] == few[1] == compare(RuntimeModel(original), RuntimeModel(out), windows_NT[:1])
    tensors = load_file(original / "model.safetensors")
    tensors["model.embed_tokens.weight"][95] = torch.inf
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    windows_NT[4, 7] = 95
    for found in compared_together(original, out, windows_NT):
        with pytest.raises(VerificationFailed, match="not finite"):
            found.result()


def compared_together(original: Path, out: Path, windows_NT: torch.Tensor) -> list:
    meeting = Meeting(2)
    pairs = [(RuntimeModel(original), RuntimeModel(out)) for _ in range(2)]  # on meta, which threads must not share

    def work(rank: int) -> Comparison:
        return compare(*pairs[rank], windows_NT, team=OfThreads(rank, 2, meeting))

    with ThreadPoolExecutor(2) as threads:
        return [threads.submit(work, rank) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path / "m")
    flags = (*WINDOWS, "--dataset", str(text(tmp_path)))
    done = run_together("calibrate", str(model), "-o", str(tmp_path / "two"), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("calibration data: ") == done.stderr.count("wrote ") == 1, "one process speaks"
    assert infopt("calibrate", model, "-o", tmp_path / "one", *flags).code == 0
    for i in range(2):
        one, two = (load_file(tmp_path / name / f"block-0000{i}.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            if not name.endswith(("/sample", "cache/k", "cache/v")):  # some of the tokens, and not the same ones
                torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_more_processes_than_windows_is_a_clear_error(tmp_path: Path) -> None:
    flags = (
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--num-samples",
        "1",
        "--seqlen",
        "32",
        "--dataset",
        str(text(tmp_path)),
    )
    done = run_together("quantize", str(tiny("llama", tmp_path / "m")), "-o", str(tmp_path / "out"), *flags)
    assert done.returncode != 0
    assert "1 calibration windows for 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_team_goes_on_or_begins_again(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m", num_hidden_layers=40)
    flags = ("--method", "gptq", "--group-size", "32", *WINDOWS, "--no-verify", "--dataset", str(text(tmp_path)))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = together("quantize", str(model), "-o", str(tmp_path / "out"), *flags)
    work = tmp_path / "out.infopt-work"
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True) as team:
        deadline = time.monotonic() + 120
        while not (work / "parts" / "block-00001.json").exists():
            assert time.monotonic() < deadline
            assert team.poll() is None
            time.sleep(0.01)
        os.killpg(team.pid, signal.SIGKILL)
        for line in subprocess.run(
            ["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True
        ).stdout.split("\n"):
            if str(tmp_path / "out") in line:  # torchrun starts its processes in sessions of their own
                os.kill(int(line.split()[0]), signal.SIGKILL)
    time.sleep(0.5)
    done = run_together("quantize", str(model), "-o", str(tmp_path / "out"), *flags)
    assert done.returncode == 0, done.stderr
    done = run_together("quantize", str(model), "-o", str(tmp_path / "again"), *flags)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
