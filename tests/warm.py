"""Commands in processes of their own that do not wait for torch and the host to be imported.

``[warm.python(), …]`` runs what ``[sys.executable, …]`` does (``-c``, ``-m`` or a script): exit code, output, signals,
environment and folder are those of a process of its own, which is forked from one that has imported the libraries and this
package and done nothing else. A test of what is imported, or of signals to groups of processes, takes ``sys.executable``.
"""

from __future__ import annotations

import array
import atexit
import functools
import json
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("torchvision", "faiss", "scipy.sparse", "relreid_plugin.host", "relreid_plugin.cli.train")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else ()

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
connection.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
connection.sendall(request)
pid = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
for number in {forwarded!r}:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
answer = connection.recv(4, socket.MSG_WAITALL)
if len(answer) < 4:
    os._exit(1)
code = int.from_bytes(answer, "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def python() -> str:
    """The program that is run in place of ``sys.executable``; one warm process per test process stands behind it."""
    if not hasattr(os, "fork") or not hasattr(socket, "SCM_RIGHTS"):
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="warm")
    address = os.path.join(folder.name, "socket")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    program = Path(folder.name) / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=address, forwarded=[*map(int, FORWARDED)]))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def end() -> None:
        process.kill()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return str(program)


def serve(address: str) -> None:
    """Import, then fork once for every connection; ends with the process that started it."""
    for name in IMPORTED:
        __import__(name)
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    listener.settimeout(5)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that mind a command end unnoticed
    print("ready", flush=True)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        if os.fork() == 0:
            listener.close()
            mind(connection)
        connection.close()


def mind(connection: socket.socket) -> None:
    """Run the command of a connection in a child; say its number and its end; a client that is gone takes it along."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    files = array.array("i")
    head, control, *_ = connection.recvmsg(4, socket.CMSG_SPACE(3 * files.itemsize))
    files.frombytes(control[0][2])
    size = int.from_bytes(head, "big")
    arguments, environment, folder = json.loads(connection.recv(size, socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os._exit(execute(arguments, environment, folder))
    for file in files:
        os.close(file)
    connection.sendall(pid.to_bytes(4, "big"))
    watcher = os.fork()
    if watcher == 0:  # nothing more comes from a client: its end is the end of the connection
        connection.recv(1)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.kill(watcher, signal.SIGKILL)
    try:
        connection.sendall(code.to_bytes(4, "big", signed=True))
    except OSError:
        pass
    os._exit(0)


def execute(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """What ``python arguments…`` does, in this process; the exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    place, rest = ("", arguments[2:]) if arguments[0] in ("-c", "-m") else (os.path.dirname(arguments[0]), arguments[1:])
    own = [os.path.dirname(os.path.abspath(__file__)), str(ROOT)]  # of the warm process
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [place, *paths, *(path for path in sys.path if path not in own)]
    sys.argv[:] = [arguments[0], *rest]
    if "OMP_NUM_THREADS" in environment:  # which torch read when it was imported
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    code = 0
    try:
        if arguments[0] == "-c":
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        elif arguments[0] == "-m":
            sys.modules.pop(arguments[1], None)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 120
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
