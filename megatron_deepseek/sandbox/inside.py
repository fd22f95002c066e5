"""The process that a program runs in: it gives up what a program has no use for, and then becomes that program.

    python -I -S inside.py '{"isolated": true, "folder": "/tmp/x", ...}' < program

It is a script that imports nothing of this project, started by sandbox/run.py. In `isolated` mode it moves to new
namespaces (user_namespaces(7)): no network, no other processes, no file that can be written but those of a file system
in memory. In every mode setrlimit(2) bounds memory, processor time, file sizes and processes.

The first process waits for the second one, which is process 1 of its namespace, and that for the program: when it
ends, or the first one is killed, the kernel kills all that the program started. A program is not process 1 itself,
which signals do not end.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NOBODY = 65534
STARTED, ENDED = b"S", b"E"
LIBC = ctypes.CDLL(None, use_errno=True)

# Constants of Linux: linux/sched.h, linux/mount.h, linux/prctl.h.
_NEW_MOUNTS, _NEW_HOST_NAME, _NEW_IPC, _NEW_USERS = 0x20000, 0x4000000, 0x8000000, 0x10000000
_NEW_PROCESSES, _NEW_NETWORK = 0x20000000, 0x40000000
_NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_READ_ONLY, _THIS_FOLDER = 442, 0x8000, 1, -100
_SET_PARENT_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38

# What runs the program: it marks the end only after the last line, so that sys.exit(0) or os._exit(0) is no success.
_RUNNER = """
import os, sys
program, sys.stdin = sys.stdin.read(), open(os.devnull)
exec(compile(program, "program.py", "exec"), {"__name__": "__main__", "__file__": "program.py"})
sys.stdout.flush()
os.write(%d, b"E")
"""


def call(name: str, *arguments) -> None:
    """Call a function of the C library; raise OSError, with the name, where it fails."""
    if getattr(LIBC, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(kind: bytes, target: str, flags: int, data: bytes = b"") -> None:
    call("mount", kind, target.encode(), kind, ctypes.c_ulong(flags), data)


def open_ways(paths: list[str]) -> None:
    """Let nobody reach `paths` in folders that are closed to others, as /root is.

    Such a folder is hidden behind an empty one that holds these paths alone.
    """
    call("unshare", _NEW_MOUNTS)
    mount(b"none", "/", _RECURSIVE | _PRIVATE)
    closed: dict[str, set[str]] = {}
    for path in paths:
        parents = ["/".join(path.split("/")[:depth]) for depth in range(2, path.count("/") + 1)]
        first = next((folder for folder in parents if not os.stat(folder).st_mode & 1), None)
        if first is not None:
            closed.setdefault(first, set()).add(path)
    for folder, inside in closed.items():
        held = {path: os.open(path, os.O_PATH) for path in inside}
        mount(b"tmpfs", folder, _NO_SUID | _NO_DEVICES, b"mode=755,size=1m")
        for path, descriptor in held.items():
            os.makedirs(path, exist_ok=True)
            call("mount", b"/proc/self/fd/%d" % descriptor, path.encode(), None, ctypes.c_ulong(_BIND), None)
            os.close(descriptor)


def enter_namespaces(as_nobody: bool, interpreter: list[str]) -> None:
    """Move to new namespaces; as root first become nobody, whose number of processes the kernel limits."""
    if as_nobody:
        open_ways(interpreter)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self is root's
    user, group = os.getuid(), os.getgid()
    call("unshare", _NEW_USERS | _NEW_MOUNTS | _NEW_NETWORK | _NEW_PROCESSES | _NEW_IPC | _NEW_HOST_NAME)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def close_files(folder: str, folder_bytes: int) -> None:
    """Make every file read-only, and `folder` an empty place in memory; hide sockets and other processes."""
    mount(b"none", "/", _RECURSIVE | _PRIVATE)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY, 0, 0, 0)
    call("syscall", ctypes.c_long(_MOUNT_SETATTR), _THIS_FOLDER, b"/", _AT_RECURSIVE, ctypes.byref(attributes),
         ctypes.c_size_t(ctypes.sizeof(attributes)))
    mount(b"tmpfs", folder, _NO_SUID | _NO_DEVICES, b"mode=777,size=%d" % folder_bytes)
    for hidden in ("/run", "/proc"):
        if os.path.isdir(hidden):
            mount(b"tmpfs", hidden, _NO_SUID | _NO_DEVICES, b"size=4096")


def limit(settings: dict) -> None:
    """Set the limits, from which there is no way back."""
    bounds = {resource.RLIMIT_AS: settings["memory_bytes"], resource.RLIMIT_CPU: settings["processor_seconds"],
              resource.RLIMIT_FSIZE: settings["file_bytes"], resource.RLIMIT_NPROC: settings["processes"],
              resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0}
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def become_program(settings: dict) -> None:
    """Run the program of standard input in place of this one."""
    call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    os.chdir(settings["folder"])
    limit(settings)
    environment = {"PATH": "/usr/bin:/bin", "HOME": settings["folder"], "TMPDIR": settings["folder"], "LANG": "C.UTF-8",
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.write(settings["mark"], STARTED)
    os.execve(settings["python"], [settings["python"], "-I", "-c", _RUNNER % settings["mark"]], environment)


def main() -> int:
    settings = json.loads(sys.argv[1])
    if settings["isolated"]:
        enter_namespaces(settings["as_nobody"], settings["interpreter"])
    first = os.fork()
    if first:
        return status_of(first)
    call("prctl", _SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if settings["isolated"]:
        close_files(settings["folder"], settings["folder_bytes"])
    program = os.fork()
    if not program:
        become_program(settings)
    return status_of(program)


def status_of(child: int) -> int:
    """Wait for a child, and for orphans that become this process's; return the child's status, 128 + N after signal N.
    """
    while True:
        process, status = os.wait()
        if process == child:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


if __name__ == "__main__":
    try:
        code = main()
    except OSError as error:
        print(error, file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)
