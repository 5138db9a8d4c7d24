"""Statistics that are made once: the very codes of a run that makes them itself, and refusals of what they cannot give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infopt.calibration.data import DataSpec, load_tokenizer, load_windows
from infopt.calibration.recorded import About, model_digest
from infopt.calibration.stats import EVERYTHING, InputStats
from infopt.checkpoint import CheckpointReader
from infopt.output import OutputFolder, write_manifest
from infopt.recipe import CalibrationData
from infopt.recipes.calibrate import Calibration

from .tools import Result, infopt, text, tiny

DATA = ("--num-samples", 8, "--seqlen", 32)
SMALL = ("--group-size", 32, "--no-verify")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama") / "m", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def stats(model: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "s"
    done = calibrate(model, out, words)
    assert done.code == 0, done.err
    return out


def calibrate(model: Path, out: Path, words: Path, *flags: object) -> Result:
    return infopt("calibrate", model, "-o", out, "--dataset", words, *DATA, *flags)


def reuse(model: Path, stats: Path, out: Path, *flags: object) -> Result:
    return infopt("quantize", model, "-o", out, "--calibration", stats, *SMALL, *flags)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "awq"),
        ("--method", "gptq"),
        pytest.param(("--method", "awq+gptq", "--asym"), marks=pytest.mark.slow),
        ("--method", "smoothquant", "--scheme", "W8A8_STATIC", "--group-size", "channel"),
        ("--method", "kv-cache", "--kv-cache", "int4"),
    ],
    ids=lambda flags: flags[1],
)
def test_the_codes_are_those_of_a_run_on_the_data(model: Path, words: Path, stats: Path, tmp_path: Path, flags) -> None:
    fresh = infopt("quantize", model, "-o", tmp_path / "fresh", "--dataset", words, *DATA, *SMALL, *flags,
                   "--sequential", "none")  # fmt: skip
    assert fresh.code == 0, fresh.err
    again = reuse(model, stats, tmp_path / "again", *flags)
    assert again.code == 0, again.err
    assert weights(tmp_path / "fresh") == weights(tmp_path / "again")
    report = json.loads((tmp_path / "again" / "infopt.json").read_text())
    about = json.loads((stats / "calibration.json").read_text())
    assert report["calibration"]["statistics"] == about["fingerprint"]
    assert report["calibration"]["sha256"] == about["data"]["sha256"]
    assert "sequential: none" in (tmp_path / "again" / "recipe.yaml").read_text()


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_experts(family: str, words: Path, tmp_path: Path) -> None:
    model = tiny(family, tmp_path / "m")
    done = calibrate(model, tmp_path / "s", words, "--min-expert-tokens", 100)
    assert done.code == 0 and "calibration tokens an expert" in done.err, done.err
    counted = json.loads((tmp_path / "s" / "infopt.json").read_text())["experts"]
    assert sum(facts["tokens"] for facts in counted.values()) == 2 * 2 * 2 * 256  # blocks, spaces, experts of a token
    flags = ("--method", "gptq", "--min-expert-tokens", 100)
    again = reuse(model, tmp_path / "s", tmp_path / "again", *flags)
    assert again.code == 0 and "calibrated on the whole batch" in again.err, again.err
    fresh = infopt("quantize", model, "-o", tmp_path / "fresh", "--dataset", words, *DATA, *SMALL, *flags,
                   "--sequential", "none")  # fmt: skip
    assert fresh.code == 0 and weights(tmp_path / "fresh") == weights(tmp_path / "again")
    other = reuse(model, tmp_path / "s", tmp_path / "x", "--method", "gptq")
    assert other.code == 2 and "--min-expert-tokens 100" in other.err


def test_statistics_count_every_token_once(model: Path, stats: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: [gptq: {}]\nsequential: none\nweights: {group_size: 32}\nfirst_token: 8\n")
    other = infopt("quantize", model, "--calibration", stats, "--recipe", recipe, "-o", tmp_path / "x")
    assert other.code == 2 and "first_token: 1" in other.err and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_rotated_model_has_statistics_of_its_own(model: Path, words: Path, stats: Path, tmp_path: Path) -> None:
    assert calibrate(model, tmp_path / "s", words, "--rotate", "--seed", 5).code == 0
    flags = ("--method", "gptq", "--rotate")
    again = reuse(model, tmp_path / "s", tmp_path / "again", *flags)
    assert again.code == 0, again.err
    fresh = infopt("quantize", model, "-o", tmp_path / "fresh", "--dataset", words, *DATA, *SMALL, *flags,
                   "--seed", 5, "--sequential", "none")  # fmt: skip
    assert fresh.code == 0 and weights(tmp_path / "fresh") == weights(tmp_path / "again")
    for folder, extra in ((stats, ("--rotate",)), (tmp_path / "s", ())):
        other = reuse(model, folder, tmp_path / "x", "--method", "gptq", *extra)
        assert other.code == 2 and "rotat" in other.err


def test_padded_rows(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "abc " * n}) for n in (1, 5, 20, 3)))
    done = calibrate(model, tmp_path / "s", rows, "--pad")
    assert done.code == 0 and "4 padded windows (8 were asked for) of 32, 1 rows cut" in done.err, done.err
    flags = ("--method", "awq", "--dataset", rows, *DATA, "--pad")
    again = reuse(model, tmp_path / "s", tmp_path / "again", *flags)
    assert again.code == 0, again.err
    fresh = infopt("quantize", model, "-o", tmp_path / "fresh", *SMALL, *flags, "--sequential", "none")
    assert fresh.code == 0 and weights(tmp_path / "fresh") == weights(tmp_path / "again")
    report = json.loads((tmp_path / "fresh" / "infopt.json").read_text())["calibration"]
    assert report["rows_read"] == report["rows_used"] == report["windows"] == 4
    assert report["padding"] and report["tokens_used"] == 4 + 20 + 32 + 12 and report["tokens"] == 4 * 29


@pytest.mark.parametrize(
    ("flags", "words_of"),
    [
        (("--method", "best-4bit"), "sequential: none"),
        (("--method", "gptq", "--sequential", "space"), "sequential: space"),
        (("--method", "awq", "--target-bits", "4.5"), "decide the bits"),
        (("--method", "awq", "--kv-cache", "fp8"), "change the values"),
        (("--method", "awq", "--num-samples", 9), "--num-samples 9"),
        (("--method", "awq", "--dataset", "builtin"), "--dataset builtin"),
    ],
)
def test_what_statistics_cannot_give(model: Path, stats: Path, tmp_path: Path, flags: tuple, words_of: str) -> None:
    refused = reuse(model, stats, tmp_path / "o", *flags)
    assert refused.code == 2 and words_of in refused.err and "--calibration" in refused.err, refused.err
    assert not list(tmp_path.iterdir())


def test_only_what_a_method_reads(model: Path, words: Path, stats: Path, tmp_path: Path) -> None:
    assert calibrate(model, tmp_path / "s", words, "--method", "smoothquant").code == 0
    small, whole = (sum(path.stat().st_size for path in folder.glob("block*")) for folder in (tmp_path / "s", stats))
    assert small < whole / 2
    refused = reuse(model, tmp_path / "s", tmp_path / "o", "--method", "gptq")
    assert refused.code == 2 and "lack gram" in refused.err
    assert calibrate(model, tmp_path / "t", words, "--method", "rtn").code == 2


def test_statistics_of_another_model(model: Path, stats: Path, tmp_path: Path) -> None:
    """The same shapes; one bit of one weight is another. The same bytes in other files are the same model."""
    other = shutil.copytree(model, tmp_path / "m")
    tensors = load_file(other / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({key: tensors.pop(key)}, other / "b.safetensors", {"format": "pt"})
    save_file(tensors, other / "a.safetensors", {"format": "pt"})
    index = {name: "b.safetensors" if name == key else "a.safetensors" for name in (*tensors, key)}
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (other / "model.safetensors").unlink()
    assert reuse(other, stats, tmp_path / "same", "--method", "gptq").code == 0
    tensors["model.norm.weight"].view(torch.int16)[0] ^= 1
    save_file(tensors, other / "a.safetensors", {"format": "pt"})
    refused = reuse(other, stats, tmp_path / "o", "--method", "gptq")
    assert refused.code == 3 and "does not belong to" in refused.err and not (tmp_path / "o").exists()


def test_damaged_statistics(model: Path, stats: Path, tmp_path: Path) -> None:
    def damaged(change) -> Result:
        folder = shutil.copytree(stats, tmp_path / "s", dirs_exist_ok=True)
        change(folder)
        return reuse(model, folder, tmp_path / "o", "--method", "gptq")

    def rewritten(change):
        """With a manifest that fits: what remains to be found is in the tensors themselves."""

        def act(folder: Path) -> None:
            tensors = load_file(folder / "block-00000.safetensors")
            change(tensors, next(name for name in tensors if name.endswith("/gram")))
            save_file(tensors, folder / "block-00000.safetensors")
            write_manifest(folder)

        return act

    about = stats / "calibration.json"
    cut = damaged(lambda folder: (folder / "block-00001.safetensors").write_bytes(b"12"))
    assert cut.code == 6 and "was changed" in cut.err
    for change in (
        lambda folder: (folder / "calibration.json").unlink(),
        lambda folder: (folder / "calibration.json").write_text("[]"),
        lambda folder: (folder / "calibration.json").write_text('{"format": "infopt-calibration-1"}'),
        lambda folder: (folder / "calibration.json").write_text(
            about.read_text().replace('"rotate": false', '"rotate": 0')
        ),
        rewritten(lambda tensors, gram: tensors.pop(gram)),
        rewritten(lambda tensors, gram: tensors.update({gram: tensors[gram][:-1].clone()})),
        rewritten(lambda tensors, gram: tensors[gram].fill_(float("nan"))),
        rewritten(lambda tensors, gram: tensors.update({gram: tensors[gram].double()})),
    ):
        refused = damaged(change)
        assert refused.code == 3 and "infopt calibrate" in refused.err, refused.err
        assert not (tmp_path / "o").exists()
    assert reuse(model, tmp_path / "absent", tmp_path / "o", "--method", "gptq").code == 3


def test_the_same_bytes_again_and_after_a_stop(model: Path, words: Path, stats: Path, tmp_path: Path) -> None:
    """A run that was interrupted after its first block goes on, and its folder is that of an undisturbed one."""
    reader, data = CheckpointReader(model), CalibrationData(dataset=str(words), num_samples=8, seqlen=32)
    windows_NT, read = load_windows(DataSpec(**data.model_dump()), load_tokenizer(model), part="calibration")
    about = About(model_digest(reader), False, 16, tuple(sorted(EVERYTHING)), True, data, read)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "s", source=model) as out:
        Calibration(reader, about, out, windows_NT)(True, stop)
    assert not (tmp_path / "s").exists()
    resumed = calibrate(model, tmp_path / "s", words)
    assert resumed.code == 0 and "block 1/2  done by an earlier run" in resumed.err
    assert sorted(path.name for path in stats.iterdir()) == sorted(path.name for path in (tmp_path / "s").iterdir())
    for path in stats.iterdir():
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes(), path.name
    assert calibrate(model, tmp_path / "s", words).code == 2  # it is there


def test_storing_is_the_identity() -> None:
    """Wider than a panel of the Gram matrix."""
    counted = InputStats(600)
    for seed in range(3):
        counted.add(torch.randn(50, 600, generator=torch.Generator().manual_seed(seed)))
    counted.routed = 7
    parts = counted.to_tensors()
    again = InputStats.from_tensors(600, EVERYTHING, parts)
    assert (again.tokens, again.routed) == (150, 7)
    for name in ("gram", "mean_abs", "max_abs", "sample"):
        assert torch.equal(getattr(again, name), getattr(counted, name))
    assert parts["gram"].numel() < 0.75 * 600 * 600
    alone = InputStats.from_tensors(600, frozenset({"max"}), {name: parts[name] for name in ("counts", "max")})
    assert torch.equal(alone.max_abs, counted.max_abs)
    with pytest.raises(ValueError, match="no gram"):
        InputStats.from_tensors(600, EVERYTHING, {"counts": parts["counts"]})
