"""Files are written whole or named in one sentence; what killed writers left is removed; folders have one writer."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, comparable

from relreid_plugin import files
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.errors import UserError
from relreid_plugin.files import (
    WriteError,
    atomic_file,
    clear_leftovers,
    folder_beside,
    write_error,
    write_json,
    write_text,
    writing,
)
from relreid_plugin.locks import RUN_LOCK, folder_lock

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


def fail_at(monkeypatch, owner, name, call, code=errno.ENOSPC):
    """Let the ``call``-th call of a function raise an error of the system's."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **options):
        calls.append(name)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


def spawn(code, *args, program=sys.executable, **options):
    return subprocess.Popen(
        [program, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- one sentence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code,words",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EIO, "reports an error"),
        (errno.EMFILE, "data.workers"),
        (errno.EFBIG, "larger"),
    ],
)
@pytest.mark.parametrize("place", ["_temporary", "fsync", "replace"])
def test_every_step_of_a_write_becomes_a_sentence(tmp_path, monkeypatch, code, words, place):
    path = tmp_path / "metrics.json"
    write_text(path, "before")
    fail_at(monkeypatch, files if place == "_temporary" else os, place, 1, code)
    with pytest.raises(WriteError, match=words) as caught:
        write_text(path, "after")
    assert f"'{path}' cannot be written" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.read_only == (code in (errno.EROFS, errno.EACCES))
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_no_device_or_pipe_is_replaced(tmp_path):
    """Whoever may would take /dev/null from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(WriteError, match=f"{name}' cannot be written \\(it is a device or pipe"):
            write_text(tmp_path / name, "text")
    assert stat.S_ISFIFO(os.stat(tmp_path / "link").st_mode) and len(list(tmp_path.iterdir())) == 2


def test_unusable_paths_become_sentences(tmp_path):
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "file" / "metrics.json", "where a folder is needed"),
        (tmp_path / ("x" * 300) / "metrics.json", "too long"),
        (tmp_path / ("x" * 250), "too long"),
        (tmp_path / "a\0b" / "metrics.json", "NUL"),
    ):
        with pytest.raises(WriteError, match=words) as caught:
            write_json(path, {})
        assert len(str(caught.value)) < 500


def test_what_has_nothing_to_do_with_files_stays_what_it_is(tmp_path):
    for error in (RuntimeError("CUDA error"), ValueError("too small"), KeyError("x")):
        assert write_error(error) is None
        with pytest.raises(type(error)), atomic_file(tmp_path / "x"):
            raise error
    assert not list(tmp_path.iterdir())


def test_errors_of_the_libraries_that_write(tmp_path):
    zip_writer = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    zip_writer.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in str(write_error(zip_writer, tmp_path / "last.pth.tar"))
    alone = write_error(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), tmp_path / "x")
    assert "cannot be written" in str(alone)
    stream = RuntimeError("basic_ios::clear: iostream error")  # torch's archive where no more fits into a file
    stream.__context__ = OSError(errno.EFBIG, "File too large")
    assert "larger than files may be here" in str(write_error(stream, tmp_path / "x"))
    safe = pytest.importorskip("safetensors").SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(WriteError, match="x' cannot be written .the disk is full.; make room"), writing(tmp_path / "x"):
        raise safe
    assert write_error(type(safe)("Error while deserializing header"), tmp_path / "x") is None
    loader = OSError('Caught OSError in DataLoader worker process 0.\nTraceback\n  File "x"\nOSError: [Errno 5] no disk')
    assert str(write_error(loader)).count("\n") == 0 and "no disk" in str(write_error(loader))


RESOURCE = """
import resource, signal, sys, torch
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from relreid_plugin.engine import checkpoint as ckpt
from relreid_plugin.errors import UserError
folder = Path(sys.argv[1])
ckpt.save(folder / "last.pth.tar", {"kind": "image", "state_dict": {}, "value": 1})
def attempt(name, function):
    try:
        function()
    except UserError as error:
        print("\\n" + name, error)
big = torch.zeros(30_000)
attempt("checkpoint", lambda: ckpt.save(folder / "last.pth.tar", {"kind": "image", "value": big}))
attempt("text", lambda: ckpt.write_text(folder / "text.txt", "x" * 50_000))
from relreid_plugin.features.arrays import write_rows, write_tensor
attempt("tensor", lambda: write_tensor(folder / "a.features", big))
attempt("rows", lambda: write_rows(folder / "a.bin", 0, big))
import faiss
from relreid_plugin.search.index import write_index
index = faiss.IndexHNSWFlat(16, 8)
index.add(torch.rand(2000, 16).numpy())
def put():
    with ckpt.atomic_file(folder / "features-hnsw.faiss") as temporary:
        write_index(index, temporary)
attempt("index", put)
from relreid_plugin.engine.events import EventWriter
def events():
    writer = EventWriter(folder / "tensorboard", purge_step=0)
    for step in range(2000):
        writer.add_scalar("Train/loss", 0.5, step)
    writer.close()
attempt("events", events)
from relreid_plugin.engine.runner import logged
def log():
    with logged(folder / "train.log"):
        for _ in range(300):
            print("x" * 100, file=sys.stdout)
attempt("log", log)
"""


@pytest.mark.slow
@POSIX
def test_a_disk_without_room_is_named_by_every_writer(tmp_path):
    """Files may have 20,000 bytes: real errors of the system's, from torch's, faiss's and TensorBoard's own code too."""
    process = spawn(RESOURCE, tmp_path, program=warm.python())
    out, err = process.communicate(timeout=120)
    lines = [line for line in out.splitlines() if line and not line.startswith("xxx")]
    assert [line.split()[0] for line in lines] == ["checkpoint", "text", "tensor", "rows", "index", "events", "log"], out[
        -900:
    ]
    assert all("cannot be written" in line and str(tmp_path) in line for line in lines)
    assert "Traceback" not in err and "Exception" not in err
    assert ckpt.load(tmp_path / "last.pth.tar", kind="image")["value"] == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_index_written_by_pieces_is_the_one_faiss_writes(tmp_path):
    faiss = pytest.importorskip("faiss")
    from relreid_plugin.search.index import write_index

    index = faiss.IndexHNSWFlat(8, 4)
    index.add(np.random.default_rng(0).random((50, 8), dtype=np.float32))
    write_index(index, tmp_path / "a")
    faiss.write_index(index, str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_standard_output_on_a_full_disk_is_one_sentence():
    code = "import sys\nfrom relreid_plugin.cli.train import run_command\nsys.exit(run_command(lambda: print('x' * {})))"
    for length in (10, 100_000):  # noticed at the end, and while printing
        with open("/dev/full", "w") as full:
            process = subprocess.run(
                [sys.executable, "-c", code.format(length)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert process.returncode == 2 and process.stderr.count("\n") == 1 and "disk is full" in process.stderr


# --- leftovers ----------------------------------------------------------------------------------------------------------

WRITER = """
import os, sys, time
from pathlib import Path
from relreid_plugin.files import atomic_file
with atomic_file(Path(sys.argv[1])) as temporary:
    child = os.fork() if len(sys.argv) > 2 else 0
    if child == 0:  # which has closed by now what it has inherited
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@POSIX
def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    path = tmp_path / "features-hnsw.faiss"
    process = spawn(WRITER, path)
    assert process.stdout.readline()
    (left,) = tmp_path.iterdir()
    clear_leftovers(tmp_path)
    assert left.is_file()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert left.is_file()
    write_text(tmp_path / "features", "another file")
    assert left.is_file()
    write_text(path, "the same file")
    assert not left.exists() and path.read_text() == "the same file"


@POSIX
def test_what_a_killed_export_was_making_goes_with_the_next_one(tmp_path):
    path, other = tmp_path / "model.onnx", tmp_path / ".model.onnx.mine"
    other.mkdir()
    process = spawn(WRITER.replace("atomic_file", "folder_beside"), path)
    assert process.stdout.readline()
    (left,) = set(tmp_path.iterdir()) - {other}
    with folder_beside(path) as place:
        assert left.is_dir() and place.is_dir()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with folder_beside(tmp_path / "model"):
        assert left.is_dir()
    with folder_beside(path):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [other]


@POSIX
def test_a_living_child_of_a_killed_process_holds_neither_files_nor_folders(tmp_path):
    code = "from relreid_plugin.locks import folder_lock\nimport sys\n" + WRITER.replace(
        "with atomic", "with folder_lock(Path(sys.argv[1]).parent), atomic"
    )
    process = spawn(code, tmp_path / "run" / "x", "fork")
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match="another process"), folder_lock(tmp_path / "run"):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with folder_lock(tmp_path / "run"):
            clear_leftovers(tmp_path / "run")
            assert [file.name for file in (tmp_path / "run").iterdir()] == [RUN_LOCK]
        assert not list((tmp_path / "run").iterdir())
    finally:
        os.kill(child, signal.SIGKILL)


# --- one writer per folder ----------------------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path):
    with folder_lock(tmp_path / "run"):
        with pytest.raises(UserError, match="being written by another process"), folder_lock(tmp_path / "run"):
            pass
        with folder_lock(tmp_path / "run" / "ladder"):
            pass
    with folder_lock(tmp_path / "run"):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_second_training_in_a_folder_is_refused(tiny_config, tmp_path, command):
    folder = tmp_path / "run"
    with folder_lock(folder):
        for flags in ([], ["--resume"]):
            code, _, err = command("--config-file", tiny_config, *flags, "data.save_dir", folder)
            assert code == 2 and "another process" in err and err.count("\n") == 1
        assert [path.name for path in folder.iterdir()] == [RUN_LOCK]


def test_a_second_test_of_a_folder_is_refused_and_readers_may_read(tiny_run, tiny_config, command):
    from relreid_plugin.engine.runner import open_run

    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    with folder_lock(tiny_run):
        code, _, err = command("--config-file", tiny_config, "--eval-only", "data.save_dir", tiny_run)
        assert code == 2 and "another process" in err
        open_run(tiny_run)
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before


def test_a_second_grid_in_a_folder_is_refused(tmp_path):
    from relreid_plugin.rib.tables import eta_report

    config = ROOT / "configs" / "rib_dcs_vit_embedded.yml"
    with folder_lock(tmp_path / "eta"), pytest.raises(UserError, match="another process"):
        eta_report(str(config), [0.5], [1], out=tmp_path / "eta")


@POSIX
def test_a_bank_in_a_folder_that_may_not_be_written_to_is_optional(tmp_path, monkeypatch, capsys):
    from relreid_plugin.engine.bank import bank_file, load_or_extract
    from relreid_plugin.features.sets import Features

    features = Features(torch.ones(2, 3), np.arange(2), np.arange(2), ["a", "b"])
    for code, optional, refused in ((errno.EROFS, True, False), (errno.EROFS, False, True), (errno.ENOSPC, True, True)):
        with monkeypatch.context() as patch:
            fail_at(patch, files, "_temporary", 1, code)
            if refused:
                with pytest.raises(WriteError):
                    load_or_extract(tmp_path, "x", "key", lambda: features, optional=optional)
            else:
                assert load_or_extract(tmp_path, "x", "key", lambda: features, optional=optional) is features
                assert "not kept" in capsys.readouterr().out
    long = bank_file(tmp_path, "/".join(["folder" * 5] * 20) + "-query")
    assert len(long.name) < 200 and long != bank_file(tmp_path, "/".join(["folder" * 5] * 20) + "-gallery")
    assert bank_file(tmp_path, "market1501-query").name == "market1501-query.pt"


# --- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("place,call", [("_temporary", 5), ("replace", 14)])
def test_a_run_that_finds_no_room_goes_on_later(tiny_run, tiny_config, tmp_path, command, monkeypatch, place, call):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at(patch, files if place == "_temporary" else os, place, call)
        code, _, err = command("--config-file", tiny_config, "data.save_dir", folder)
    assert code == 2 and "the disk is full" in err and str(folder) in err and err.count("\n") == 1
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.lock"))
    code, _, err = command("--config-file", tiny_config, "data.save_dir", folder, "--resume")
    assert code == 0, err
    assert comparable(folder) == comparable(tiny_run)


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_full_disk_ends_a_run_in_one_sentence(tiny_run, tiny_config, tmp_path, command):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, _, err = command("--config-file", tiny_config, "data.save_dir", disk / "run")
        assert code == 2 and err.count("\n") == 1 and "disk" in err and str(disk) in err, err
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        code, _, err = command("--config-file", tiny_config, "data.save_dir", disk / "run", "--resume")
        assert code == 0, err
        assert comparable(disk / "run") == comparable(tiny_run)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, _, err = command("--config-file", tiny_config, "data.save_dir", disk / "run", "--eval-only")
        assert code == 2 and "read-only" in err and err.count("\n") == 1
        code, out, err = command("--config-file", tiny_config, "data.save_dir", disk / "run", "--resume")
        assert code == 0 and "is finished" in out, err
    finally:
        subprocess.run(["umount", disk], check=False)


def test_metrics_are_written_last(tiny_run, tiny_config, tmp_path, command, monkeypatch):
    """A run whose last files found no room is not finished: going on writes them."""
    from relreid_plugin.engine import curves

    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "plots")

    def full(*args, **options):
        raise WriteError("the disk is full.", errno.ENOSPC)

    with monkeypatch.context() as patch:
        patch.setattr(curves, "write_figure", full)
        assert command("--config-file", tiny_config, "data.save_dir", folder, "--resume")[0] == 2
    assert not (folder / "metrics.json").exists()
    assert command("--config-file", tiny_config, "data.save_dir", folder, "--resume")[0] == 0
    assert comparable(folder) == comparable(tiny_run) and (folder / "plots" / "stage1.png").is_file()


def test_text_that_is_no_path_is_refused(tiny_config, tmp_path, command):
    for value in ("a\0b", "a\udcffb"):
        code, _, err = command("--config-file", tiny_config, "data.save_dir", value)
        assert code == 2 and "'data.save_dir'" in err and err.count("\n") == 1
    code, _, err = command("--config-file", tiny_config, "data.save_dir", tmp_path / ("x" * 300))
    assert code == 2 and "too long" in err and err.count("\n") == 1
