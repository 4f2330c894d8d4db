"""A process that has imported torch and our packages, and forks a child for each `vjepa` command of a page.

A command then starts at once instead of importing torch for seconds. It is still a process of its own, with its own
working directory, environment, output and exit code. `python command_server.py SOCKET` is the server.
"""

import atexit
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from vjepa_data.child_process import die_with_parent

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 1))
"""


def client_folder() -> Path:
    """Return a folder with a program `vjepa` that sends its words to the server."""
    folder, _ = _start_server()
    return folder


@functools.cache
def _start_server() -> tuple[Path, subprocess.Popen[bytes]]:
    folder = Path(tempfile.mkdtemp(prefix="vjepa-commands-"))
    address = str(folder / "socket")
    program = folder / "vjepa"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    command = [sys.executable, __file__, address, str(os.getpid())]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return folder, server


def serve(address: str) -> None:
    """Fork a child for each connection, as long as the parent of this process lives."""
    import vjepa.engine.trainer
    import vjepa.estimate.estimate
    import vjepa.export.export
    import vjepa.report.build  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                run_command(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def run_command(connection: socket.socket) -> None:
    """Run a command as the program `vjepa` would, exit, and send the exit code last of all."""
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    request, code = json.loads(data), 1
    atexit.register(lambda: connection.send(str(code).encode()))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # New objects, because the old ones remember whether the server's own files could seek.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["vjepa", *request["words"]]
    from vjepa.__main__ import main

    code = main()
    sys.exit(code)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    serve(sys.argv[1])
