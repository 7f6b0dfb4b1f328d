"""What the commands share: flags and the one-line error, printing, the atomic file write, the lock, the device."""

import argparse
import functools
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import fields
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed")
try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


def local_rank() -> int:
    """The number of this process on its machine. A launcher started it if RANK is set; else it is alone."""
    return int(os.environ.get("LOCAL_RANK", 0)) if "RANK" in os.environ else 0


class UserError(Exception):
    """Something that the user can fix: a flag, a file, a folder, a network. The message says what to do.

    Every other exception is a bug, in this repository or in a change to it, and keeps its traceback.
    """


def command(main):
    """Decorates the main(argv) of a command: a UserError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            if local_rank() == 0:  # of several processes on a machine, one prints
                say(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", sys.stderr)
            raise SystemExit(2) from None

    return run


class Parser(argparse.ArgumentParser):
    """argparse with a module's first line as description, a dataclass's fields as flags, and UserErrors as errors."""

    def __init__(self, docstring: str, dataclass=None, **options):
        super().__init__(description=docstring.splitlines()[0], allow_abbrev=False, **options)
        if dataclass:
            add_flags(self, dataclass)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def add_flags(parser: Parser, cls) -> None:
    """Makes every field of a dataclass a flag, --name=value. The comment beside the field is the flag's help.

    A comment line in the class begins a group. Flags that are not given are left out of the parsed arguments.
    """
    group, left = parser, {f.name: f for f in fields(cls)}
    for line in "".join(inspect.getsource(some) for some in cls.__mro__[:-1]).splitlines():
        if heading := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(heading[1])
        if (match := re.fullmatch(r"    (\w+): .*?\s*# *(.*)", line)) and match[1] in left:
            f = left.pop(match[1])
            (kind,) = {f.type, *typing.get_args(f.type)} & {bool, int, float, str}  # `float | None` is a float
            options = dict(type=boolean, nargs="?", const=True) if kind is bool else dict(type=kind)
            text = f"{match[2]} ({kind.__name__}, default {f.default!r})".replace("%", "%%")
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="VALUE", help=text, **options)
    if left:
        raise TypeError(
            f"{', '.join(left)} of {cls.__name__}: a comment on the line of the field must say what the flag does"
        )


def at_least(options, least: float, names: str) -> None:
    """Raises UserError unless each option in `names`, separated by spaces, is finite and at least `least`."""
    for name in names.split():
        if not least <= getattr(options, name) < math.inf:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least} and finite")


def one_of(options, **choices) -> None:
    """Raises UserError unless each of the named options is among its choices."""
    for name, known in choices.items():
        if getattr(options, name) not in known:
            raise UserError(f"--{name} {getattr(options, name)!r} is unknown: use one of {', '.join(known)}")


def say(text: str, file=None) -> None:
    """Print. An output error never ends the program: a closed pipe, a full disk, a character the terminal lacks."""
    file = file or sys.stdout
    try:
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:
            print(text.encode(file.encoding, "replace").decode(file.encoding), file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what is still in the buffer goes there too


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
    """Open the file `path` and lock it until it is closed or this process ends, even by SIGKILL. Returns the file.

    Raises UserError if another process holds the lock. Where the system has no locks, the file is only opened.
    """
    file = open(path, "ab")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process is working in {path.parent}: wait for it, or name another folder") from None
    except OSError:  # some network file systems
        pass
    return file


def find_device(device: str = "auto", dtype: str = "auto"):
    """The device, the name of the dtype, and a function that returns the autocast context for it. Raises UserError.

    auto: cuda, else mps, else cpu; bfloat16 where the hardware computes in it, else float32 (always on mps).
    """
    import torch

    if dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"--dtype {dtype!r} is unknown: use auto, bfloat16 or float32")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":  # a launcher numbers the processes of a machine, and each takes one GPU
        device = f"cuda:{local_rank()}"
    try:
        found = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown, not compiled into this torch, or not there
        raise UserError(f"--device {device!r} does not work ({str(error).splitlines()[0][:100]}): use auto") from error
    if found.type == "cuda":
        torch.cuda.set_device(found)
        has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        flags = torch.cpu.get_capabilities() if found.type == "cpu" else {}
        has_bfloat16 = flags.get("avx512_bf16") or flags.get("amx_bf16")
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return found, dtype, functools.partial(torch.autocast, found.type, torch.bfloat16, enabled=dtype == "bfloat16")
