"""Files are written whole or not at all, in an order that survives a power loss, and nothing of others is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from multistage_diffusion import files
from multistage_diffusion.errors import CheckpointError, ConfigError, DataError, NumericsError, UserError, suggest


def test_exit_codes():
    codes = {kind: kind("x").exit_code for kind in (UserError, ConfigError, DataError, NumericsError, CheckpointError)}
    assert list(codes.values()) == [1, 2, 3, 4, 5]
    assert CheckpointError("x", {"a": 1}).document == {"a": 1}


def test_suggestions():
    assert suggest("fashion_mnist", ["digits", "fashion-mnist"]) == '; did you mean "fashion-mnist"?'
    assert suggest("xyz", ["vp", "edm"]) == "; known: edm, vp"


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the disk, in order."""
    seen = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename
    names = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(("sync", os.readlink(names(fd)))), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append(("rename", str(a), str(b))), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (seen.append(("rename", str(a), str(b))), rename(a, b)))
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_on_disk_before_it_has_its_name(calls, tmp_path):
    files.write_atomic(tmp_path / "a.json", b"content")
    temporary = str(tmp_path / f".a.json.{os.getpid()}.tmp")
    assert calls == [("sync", temporary), ("rename", temporary, str(tmp_path / "a.json")), ("sync", str(tmp_path))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_file_of_a_directory_is_on_disk_before_it_has_its_name(calls, tmp_path):
    with files.whole_directory(tmp_path / "step") as folder:
        (folder / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"2")
    (last,) = [index for index, call in enumerate(calls) if call[0] == "rename" and call[2] == str(tmp_path / "step")]
    synced = {call[1] for call in calls[:last] if call[0] == "sync"}
    temporary = calls[last][1]
    assert {f"{temporary}/a", f"{temporary}/b", temporary} <= synced
    assert any(path.startswith(f"{temporary}/.manifest.json") for path in synced)
    assert calls[last + 1] == ("sync", str(tmp_path))


def test_what_is_written_can_be_checked(tmp_path):
    with files.whole_directory(tmp_path / "new" / "step") as folder:
        (folder / "a").write_bytes(b"1")
    step = tmp_path / "new" / "step"
    assert files.check_directory(step) is None
    assert files.check_directory(step, ["a"]) is None
    assert "does not name b" in str(files.check_directory(step, ["b"]))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["step"]
    assert json.loads((step / "manifest.json").read_text())["files"]["a"]["bytes"] == 1


def test_a_failure_leaves_the_old_directory(tmp_path):
    with files.whole_directory(tmp_path / "step") as folder:
        (folder / "a").write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"cannot write .*step \(7 bytes\): no space; free space"):
        with files.whole_directory(tmp_path / "step", size=7) as folder:
            (folder / "a").write_bytes(b"new")
            raise OSError(28, "no space")
    with pytest.raises(KeyboardInterrupt):
        with files.whole_directory(tmp_path / "step") as folder:
            (folder / "a").write_bytes(b"new")
            raise KeyboardInterrupt
    assert (tmp_path / "step" / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_directories_of_others_are_left_alone(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").write_text("mine")
    with pytest.raises(CheckpointError, match="it holds thesis, which would be lost"):
        with files.whole_directory(home):
            raise AssertionError("not reached")
    with files.whole_directory(home, replace=True) as folder:
        (folder / "a").write_bytes(b"1")
    assert sorted(path.name for path in home.iterdir()) == ["a", "manifest.json"]
    (tmp_path / "empty").mkdir()
    with files.whole_directory(tmp_path / "empty") as folder:
        (folder / "a").write_bytes(b"1")
    assert files.check_directory(tmp_path / "empty") is None


def test_leftovers_of_a_kill_go_and_a_displaced_directory_comes_back(tmp_path):
    (tmp_path / ".step-1.77.tmp").mkdir()
    (tmp_path / ".config.json.77.tmp").write_text("{")
    (tmp_path / ".model.77.old").mkdir()
    (tmp_path / ".model.77.old" / "weights").write_text("the only copy")
    (tmp_path / ".other.78.old").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / ".gitignore").write_text("mine")
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "model", "other"]
    assert (tmp_path / "model" / "weights").read_text() == "the only copy"


@pytest.mark.parametrize("way", [".", "", "/", "folder", "file/below", "x" * 300, "nul\0byte"])
def test_ways_that_cannot_be_written(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        files.write_atomic(Path(way), b"content")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None]})
    assert files.read_json(tmp_path / "a.json") == {"b": 1, "a": [0.1, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "a.json")["b"] == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe\xff"])
def test_what_is_not_json_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json: not valid JSON") as caught:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "missing", Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"no such file|name too long"):
            files.read_json(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "large.json").write_text("[" + "1," * 10 + "1]")
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        files.read_json(tmp_path / "large.json")


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    code = """
import os, pathlib, sys
sys.path[:0] = sys.argv[2:]
from multistage_diffusion import files
files.write_atomic(pathlib.Path(sys.argv[1]), b"old")
os.fsync = lambda fd: os.kill(os.getpid(), 9)
files.write_atomic(pathlib.Path(sys.argv[1]), b"new")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")])
    assert done.returncode == -9
    assert (tmp_path / "a").read_bytes() == b"old"
