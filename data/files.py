"""What the commands share: printing, the one-line error, the atomic file write, the lock."""

import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets in each process


def say(text: str, file=None) -> None:
    """Print. No output ends the program: not a closed pipe, a full disk, or a terminal that lacks a character."""
    file = file or sys.stdout
    try:
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:
            print(text.encode(file.encoding, "replace").decode(file.encoding), file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what is still in the buffer goes there too


def fail(message: str):
    """End the command on bad input: one line on stderr, exit status 2. Only the first process of a machine prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or any(name not in os.environ for name in LAUNCHER):
        say(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", sys.stderr)
    raise SystemExit(2)


def replace_file(path: Path, write) -> None:
    """Replace a file as a whole: write(f) fills a temporary file beside it, which is synced and then renamed."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(path: Path):
    """Open the file `path` and lock it until it is closed or this process ends, by SIGKILL too. Returns the open file.

    A second process that asks for the lock ends with one line. Where the system has no locks, the file is only opened.
    """
    file = open(path, "ab", buffering=0)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        fail(f"another process is working in {path.parent}: run this again when it has ended, or name another folder")
    except OSError:  # some network file systems
        pass
    return file
