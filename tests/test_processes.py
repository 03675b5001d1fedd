"""Signals end commands alike, with their children, and what was ended goes on to the last digit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, comparable

from relreid_plugin import processes
from relreid_plugin.cli.train import run_command
from relreid_plugin.errors import UserError
from relreid_plugin.processes import Interrupted, raise_pending, run_all

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
PRELUDE = "import os, signal, sys, time\nfrom relreid_plugin.cli.train import run_command\n"


def spawn(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_alive(pid):
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


# --- one command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number,code", ENDINGS)
def test_every_signal_ends_a_command_in_the_same_way(number, code, capsys):
    before, cleaned = signal.getsignal(number), []

    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            cleaned.append(True)

    assert run_command(work, go_on="--resume") == code
    assert capsys.readouterr().err == "interrupted; go on with --resume\n"
    assert cleaned and signal.getsignal(number) == before


def test_what_libraries_make_of_a_signal_is_an_interruption_too(capsys):
    """faiss and torch's loader raise RuntimeErrors of their own, module initialisers ImportErrors."""

    def converted():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException:
            raise UserError("torchreid could not be imported (initialization failed)") from None

    def swallowed():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException:
            pass
        raise_pending()

    for work in (converted, swallowed):
        assert run_command(work) == 143
        assert capsys.readouterr().err == "interrupted; go on with the same command\n"
    assert processes.received() is None


def test_two_signals_at_once_are_one(capsys):
    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    assert run_command(work) == 143
    assert capsys.readouterr().err.count("interrupted") == 1


def test_a_second_signal_later_ends_a_command_that_cannot_end():
    process = spawn(
        "from relreid_plugin import processes\nprocesses._AGAIN = 0.0\n"
        "def work():\n    try:\n        print('on', flush=True)\n        time.sleep(60)\n    finally:\n"
        "        print('off', flush=True)\n        time.sleep(60)\nsys.exit(run_command(work))"
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "off\n"
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130 and "Traceback" not in process.communicate()[1]


def test_nohup_stays_in_force():
    process = spawn(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "sys.exit(run_command(lambda: (print('on', flush=True), os.kill(os.getpid(), signal.SIGHUP), print('still on'))))"
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "on\nstill on\n", "")


def test_a_reader_that_has_gone_is_no_traceback():
    process = spawn("sys.exit(run_command(lambda: [print('x' * 100) for _ in range(10_000)]))")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == ""


def test_forked_processes_leave_the_end_to_their_parent():
    process = spawn(
        "def work():\n    child = os.fork()\n    if child == 0:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.01)\n        os._exit(7)\n    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    child = os.fork()\n    if child == 0:\n        os.kill(os.getpid(), signal.SIGTERM)\n        os._exit(7)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\nsys.exit(run_command(work))"
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split(), err) == (0, ["7", "-15"], "")


# --- grids --------------------------------------------------------------------------------------------------------------

CHILD = PRELUDE + (
    "from pathlib import Path\n"
    "def work():\n    Path(sys.argv[1]).write_text(str(os.getpid()))\n    try:\n        time.sleep(60)\n    finally:\n"
    "        time.sleep(0.1)\n        Path(sys.argv[1] + '.clean').write_text('')\n"
    "sys.exit(run_command(work))\n"
)
GRID = (
    "from relreid_plugin.processes import run_all\n"
    "def work():\n    commands = [[sys.executable, '-c', sys.argv[1], name] for name in sys.argv[2:]]\n"
    "    run_all(commands, jobs=2, environment=dict(os.environ), done=print)\nsys.exit(run_command(work))"
)


@pytest.mark.parametrize("number,code", [*ENDINGS, (signal.SIGKILL, -9)], ids=lambda value: str(int(value)))
def test_a_grid_ends_with_its_children(tmp_path, number, code):
    names = [tmp_path / name for name in "abc"]
    grid = spawn(GRID, CHILD, *names)
    wait_until(lambda: all(name.is_file() and name.read_text() for name in names[:2]))
    pids = [int(name.read_text()) for name in names[:2]]
    grid.send_signal(number)
    out, err = grid.communicate(timeout=60)
    assert grid.returncode == code
    if number != signal.SIGKILL:
        assert err == "interrupted; go on with the same command\n" and not out
        assert not any(is_alive(pid) for pid in pids)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert all(name.with_name(f"{name.name}.clean").is_file() for name in names[:2])
    assert not names[2].exists()


def test_a_grid_whose_child_fails_starts_no_other_and_hands_its_sentence_on(tmp_path):
    seen = []

    def done(number, code, message):
        seen.append((number, code, message))
        if code:
            raise UserError(message.strip())

    commands = [[sys.executable, "-c", f"import sys; sys.exit({text!r} or None)"] for text in ("", "no such key", "third")]
    with pytest.raises(UserError, match="no such key"):
        run_all(commands, jobs=1, environment=dict(os.environ), done=done)
    assert [number for number, _, _ in seen] == [0, 1] and seen[1][1] == 1


def test_variants_with_a_point_in_their_names_have_files_of_their_own(tmp_path, monkeypatch):
    """eta0.1-seed1 and eta0.25-seed1 must not share the file of their configuration."""
    from relreid_plugin.engine import grid as ablation
    from relreid_plugin.rib.tables import eta_variants

    config, wanted = ROOT / "configs" / "rib_dcs_vit_embedded.yml", []

    def look(commands, **options):
        wanted.extend(ablation.load_config(command[-2]) for command in commands)

    monkeypatch.setattr(ablation, "run_all", look)
    parts = ablation.plan(str(config), eta_variants([0.1, 0.25]), [1], folder=tmp_path, overrides=[])
    ablation.train(parts, jobs=2)
    assert [cfg.rib.ibb.eta for cfg in wanted] == [0.1, 0.25] and not list(tmp_path.glob("*.yml"))


# --- trainings ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner,name,call,number",
    [("image", "forward_backward", 5, signal.SIGTERM), ("relation", "forward_backward", 4, signal.SIGINT)]
    + [("os", "replace", call, signal.SIGTERM) for call in (6, 18)],
)
def test_a_run_that_was_ended_goes_on_to_the_last_digit(
    tiny_run, tiny_config, tmp_path, command, monkeypatch, owner, name, call, number
):
    from relreid_plugin.engine import image
    from relreid_plugin.magformer import stage as relation

    place = {"image": image.CompositeEngine, "relation": relation.RelationEngine, "os": os}[owner]
    folder, calls = tmp_path / "run", []
    original = getattr(place, name)

    def wrapped(*args, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, wrapped)
        code, _, err = command("--config-file", tiny_config, "data.save_dir", folder)
    assert (code, err) == (128 + number, "interrupted; go on with --resume\n")
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.lock"))
    code, _, err = command("--config-file", tiny_config, "data.save_dir", folder, "--resume")
    assert code == 0, err
    assert comparable(folder) == comparable(tiny_run)


RENDER = (
    "from relreid_plugin.data.embedded import dataset\n"
    "def work():\n    spec = dataset.EmbeddedPersonsSpec(num_train_ids=100, num_test_ids=100)\n"
    "    dataset.ensure_embedded_persons(sys.argv[1], spec=spec, workers=2, verbose=False)\nsys.exit(run_command(work))"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_rendering_ends_with_its_processes_and_leaves_nothing_that_stays(tmp_path, number):
    from relreid_plugin.data.embedded import dataset

    process = spawn(RENDER, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob(".*/**/*.jpg"))) > 3)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as stream:
        children = [int(pid) for pid in stream.read().split()]
    assert len(children) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -9) and "Traceback" not in err
    wait_until(lambda: not any(is_alive(pid) for pid in children))
    dataset._others(tmp_path / "embedded_persons")
    assert not list(tmp_path.iterdir())


def test_a_second_rendering_waits_for_the_first(tmp_path, capsys):
    from relreid_plugin.data.embedded import dataset

    code = (
        "from pathlib import Path\nfrom relreid_plugin.data.embedded import dataset\n"
        "with dataset._sibling(Path(sys.argv[1]), 'new') as place:\n    print('on', flush=True)\n    sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(tmp_path / "embedded_persons")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "on\n"
    turns = []

    def turn(seconds):
        turns.append(seconds)
        assert len(list(tmp_path.iterdir())) == 2
        if len(turns) == 2:
            process.communicate("\n")

    spec = dataset.EmbeddedPersonsSpec(num_train_ids=1, num_test_ids=1, num_distractors=0, num_junk=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset.time, "sleep", turn)
        folder = dataset.ensure_embedded_persons(tmp_path, spec=spec, workers=1)
    assert len(turns) == 2 and "another process is rendering" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_interruptions_are_keyboard_interrupts():
    assert issubclass(Interrupted, KeyboardInterrupt) and Interrupted(15).signum == 15
