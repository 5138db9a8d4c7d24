"""Writing: a folder is complete or absent whatever happens, and files are what other tools expect."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import InfoptError, OutOfResources, UsageError, VerificationFailed
from infopt.output import (
    OutputFolder,
    atomic_file,
    check_manifest,
    free_space_check,
    update_manifest,
    write_json,
    write_manifest,
    write_safetensors,
)
from tests.folders import everything

NEW, OLD = "the new result", "the old result"


def publish(out: Path, text: str, overwrite: bool = False) -> None:
    with OutputFolder(out, overwrite=overwrite) as o:
        (o.stage / "sub").mkdir(exist_ok=True)
        (o.stage / "sub" / "file.txt").write_text(text)
        (o.work / "state").write_text("for a resume")
        o.commit()


def published(out: Path) -> str | None:
    """What OUT holds; a folder that exists must be complete."""
    if not out.exists():
        return None
    check_manifest(out)
    return (out / "sub" / "file.txt").read_text()


def in_child(act: Callable[[], None]) -> int:
    """Run `act` in a forked child and return its wait status: a real process death, without a real start."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            act()
            code = 0
        except InfoptError as err:
            code = err.exit_code
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


# --- the output folder


def test_commit_shows_the_whole_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with OutputFolder(out) as o:
        assert not o.resumed
        (o.stage / "a.txt").write_text("a")
        (o.work / "state").write_text("s")
        assert not out.exists()
        o.commit()
        assert everything(out.parent) == ["out"]
    assert everything(out) == ["a.txt", "manifest.json"]
    check_manifest(out)


def test_without_commit_the_work_stays_for_a_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), OutputFolder(out) as o:
        (o.stage / "block-0").write_text("0")
        (o.stage / "block-1.infopt-partial").write_text("half")
        raise KeyError
    assert not out.exists()
    with OutputFolder(out) as o:
        assert o.resumed
        assert everything(o.stage) == ["block-0"]
        o.discard()
    assert everything(tmp_path) == []


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"):
        pass
    assert everything(tmp_path) == []


def test_an_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, OLD)
    with pytest.raises(UsageError, match="--overwrite"), OutputFolder(out):
        pass
    assert published(out) == OLD
    publish(out, NEW, overwrite=True)
    assert published(out) == NEW
    assert everything(tmp_path) == ["out"]


def test_an_empty_folder_is_a_fine_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out", NEW)
    assert published(tmp_path / "out") == NEW


def test_a_folder_that_infopt_did_not_make_is_never_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    (precious / "manifest.json").write_text('{"name": "a web application"}')
    with pytest.raises(UsageError, match="did not make it"), OutputFolder(precious, overwrite=True):
        pass
    assert everything(tmp_path) == ["home"]
    assert everything(precious) == ["manifest.json", "thesis.tex"]


@pytest.mark.parametrize(
    ("out", "source"), [("m", "m"), ("m/out", "m"), ("m", "m/in"), ("link", "m"), ("link/out", "m")]
)
def test_input_and_output_must_be_apart(tmp_path: Path, out: str, source: str) -> None:
    (tmp_path / "m" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to("m")
    with pytest.raises(UsageError, match="input"):
        OutputFolder(tmp_path / out, overwrite=True, source=tmp_path / source)
    OutputFolder(tmp_path / "m2", source=tmp_path / "m")  # a common prefix is no overlap


def test_impossible_places_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cases: list[tuple[Path, type[InfoptError]]] = [
        (tmp_path / "file", UsageError),
        (tmp_path / "file" / "out", UsageError),
        (tmp_path / ("z" * 250), UsageError),  # the name fits, but not that of the work folder
        (Path("/"), UsageError),
        (Path("/dev"), UsageError),
        (Path("/proc/absent/out"), OutOfResources),
    ]
    for out, error in cases:
        with pytest.raises(error), OutputFolder(out):
            pass
    assert everything(tmp_path) == ["file"]


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out) as first:
        (first.stage / "a").write_text("a")
        with pytest.raises(OutOfResources, match=f"Process {os.getpid()} holds"), OutputFolder(out):
            pass
        assert os.waitstatus_to_exitcode(in_child(lambda: publish(out, NEW))) == 5
        first.commit()
    assert everything(out) == ["a", "manifest.json"]


def test_a_killed_run_holds_no_lock(tmp_path: Path) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "out") as o:
            (o.stage / "block-0").write_text("0")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    with OutputFolder(tmp_path / "out") as o:
        assert o.resumed
        assert everything(o.stage) == ["block-0"]


@pytest.mark.parametrize("before", [None, OLD])
def test_a_kill_at_any_step_leaves_the_old_result_or_the_new_one_and_a_next_run_works(
    tmp_path: Path, before: str | None
) -> None:
    """SIGKILL at the first, second, ... change of the disk during `publish`, until it gets through."""
    seen = set()
    for step in range(1, 200):
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        if before:
            publish(out, before)

        def killed(step: int = step, out: Path = out) -> None:
            kill_at(step)
            publish(out, NEW, overwrite=True)

        status = in_child(killed)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        absent_for_now = (out.parent / "out.infopt-work" / "old").exists() and not out.exists()
        seen.add("between" if absent_for_now else published(out))
        assert absent_for_now or published(out) in (before, NEW)
        with OutputFolder(out, overwrite=True):
            assert published(out) in (before, NEW)  # put back, if it was away
        publish(out, "the next result", overwrite=True)
        assert published(out) == "the next result"
        assert everything(out.parent) == ["out"]
    assert step > 12
    assert seen == ({OLD, NEW, "between"} if before else {None, NEW})


def kill_at(step: int) -> None:
    """SIGKILL for this process at its `step`-th change of the disk."""
    left = [step]
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

    def count(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in changes or opened:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_a_kill_while_discarding_never_leaves_half_of_a_state(tmp_path: Path) -> None:
    for step in range(1, 50):
        with OutputFolder(tmp_path / str(step)) as o:
            for place in (o.work / "hidden-states", o.work / "marks", o.stage / "block-0"):
                place.write_text("x")

        def work(step: int = step) -> None:
            with OutputFolder(tmp_path / str(step)) as o:
                kill_at(step)
                o.discard()

        if os.WIFEXITED(in_child(work)):
            break
        with OutputFolder(tmp_path / str(step)) as o:
            found = [place.exists() for place in (o.work / "hidden-states", o.work / "marks", o.stage / "block-0")]
            assert found in ([o.resumed] * 3, [False] * 3)
            assert o.resumed == all(found)
    assert step > 5


def test_a_lock_whose_folder_was_removed_meanwhile_is_not_mistaken_for_ours(tmp_path: Path) -> None:
    def work() -> None:
        first = [True]

        def finish_other(event: str, args: tuple[Any, ...]) -> None:
            if event == "fcntl.flock" and first.pop():
                first.append(False)
                (tmp_path / "out.infopt-work" / "lock").unlink()  # as the other run does when it ends
                (tmp_path / "out.infopt-work").rmdir()

        sys.addaudithook(finish_other)
        publish(tmp_path / "out", NEW)

    assert in_child(work) == 0
    assert published(tmp_path / "out") == NEW


def test_an_interrupted_commit_whose_name_was_taken_since_destroys_nothing(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.infopt-work"
    publish(out, OLD)
    (work / "out").mkdir(parents=True)
    out.rename(work / "old")
    publish(tmp_path / "other", NEW)
    (tmp_path / "other").rename(out)
    with pytest.raises(UsageError, match="former result is in"), OutputFolder(out, overwrite=True):
        pass
    assert (published(out), published(work / "old")) == (NEW, OLD)


def test_what_takes_the_name_during_a_run_is_not_destroyed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="not empty"), OutputFolder(out) as o:
        (o.stage / "result").write_text("kept")
        out.mkdir()
        (out / "foreign").write_text("x")
        o.commit()
    assert everything(out) == ["foreign"]
    assert (o.stage / "result").read_text() == "kept"


def test_if_the_new_folder_cannot_be_renamed_the_old_one_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, OLD)

    def fail() -> None:
        def refuse(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.rename" and str(args[0]).endswith("infopt-work/out"):
                raise OSError(errno.EIO, "Input/output error")

        sys.addaudithook(refuse)
        publish(out, NEW, overwrite=True)

    assert os.waitstatus_to_exitcode(in_child(fail)) == 5
    assert published(out) == OLD
    assert (tmp_path / "out.infopt-work" / "out" / "sub" / "file.txt").read_text() == NEW  # kept for another try


def test_a_work_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "out.infopt-work").symlink_to("victim")
    with pytest.raises(UsageError, match="not yours"), OutputFolder(tmp_path / "out"):
        pass
    assert everything(tmp_path / "victim") == []


def test_a_full_disk_is_a_resource_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # a write past it fails like one to a full disk
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(100_000)})

    assert os.waitstatus_to_exitcode(in_child(work)) == 5
    assert everything(tmp_path) == []


def test_free_space_is_checked_with_numbers(tmp_path: Path) -> None:
    free_space_check(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutOfResources, match=r"needs 1,152,921,504,606,846,976 bytes.* free: .* missing"):
        free_space_check(tmp_path, 2**60)


def test_an_atomic_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(OLD)
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == OLD
    with atomic_file(path) as file:
        file.write(NEW.encode())
    assert path.read_text() == NEW
    assert everything(tmp_path) == ["f"]


# --- the manifest


def sealed(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "sub" / "b.json").write_text("{}")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes(bytes(range(255)) * 100 + bytes(100)),
            "model.safetensors.*sha256",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 5), "model.safetensors.*size"),
        (lambda f: (f / "sub" / "b.json").unlink(), r"sub/b\.json cannot be read"),
        (lambda f: (f / "chat_template.jinja").write_text("x"), r"chat_template\.jinja was added"),
        (lambda f: (f / "more").symlink_to("/"), "more was added"),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[" * 10**5), r"manifest\.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"files": {}}'), "not a manifest"),
        (
            lambda f: write_json(f / "manifest.json", {"format": "infopt-manifest-1", "files": {"a": 1}}),
            "not a manifest",
        ),
        (lambda f: write_json(f / "manifest.json", {"format": "infopt-manifest-1", "files": {"../x": {}}}), r"\.\./x"),
        (lambda f: write_json(f / "manifest.json", {"format": "infopt-manifest-1", "files": {"/x": {}}}), "/x"),
    ],
)
def test_a_changed_folder_fails_its_manifest(tmp_path: Path, harm: Callable[[Path], object], words: str) -> None:
    folder = sealed(tmp_path / "m")
    (tmp_path / "x").write_text("outside")
    check_manifest(folder)
    harm(folder)
    with pytest.raises(VerificationFailed, match=f"(?s){words}") as caught:
        check_manifest(folder)
    assert caught.value.exit_code == 6


def test_what_downloads_and_people_add_does_no_harm(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "m")
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    (folder / "README.md").write_text("x")
    check_manifest(folder)


def test_one_file_can_be_entered_anew_without_blessing_the_others(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "m")
    (folder / "verification.json").write_text("{}")
    update_manifest(folder, "verification.json")
    check_manifest(folder)
    (folder / "sub" / "b.json").write_text("[]")
    update_manifest(folder, "verification.json")
    with pytest.raises(VerificationFailed, match=r"b\.json"):
        check_manifest(folder)
