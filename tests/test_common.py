"""common.py: errors of one line, flags made of a dataclass, output that fails, files replaced as a whole, locks."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT

import train
from common import Parser, UserError, find_device, lock, replace_file


def python(code, **options):
    """A process of its own: its status, its stdout and its stderr."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, **options)
    return end.returncode, end.stdout, end.stderr


RAISES = """
from common import *
import sys
sys.argv = ["some/where/try.py"]
@command
def main(argv):
    raise {error}
main()
"""


@pytest.mark.parametrize(
    "variables, says",
    [
        ({}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, True),
        ({"RANK": "5", "LOCAL_RANK": "1"}, False),  # of the processes that a launcher started on a machine, one prints
        ({"LOCAL_RANK": "1"}, True),  # no launcher: it left a variable behind
    ],
)
def test_a_user_error_is_one_line_and_status_2(variables, says):
    code = RAISES.format(error='UserError("no file\\n  of that name")')
    assert python(code, env=os.environ | variables) == (2, "", "try.py: no file of that name\n" * says)


def test_every_other_error_keeps_its_traceback():
    status, _, stderr = python(RAISES.format(error='ValueError("a bug")'))
    assert status == 1 and stderr.startswith("Traceback") and stderr.endswith("ValueError: a bug\n")


def test_an_old_python_is_one_line():
    code = "import sys; sys.version_info, sys.version = (3, 10, 9), '3.10.9 (main)'; import train"
    assert python(code) == (1, "", "Python 3.10.9 is too old: 3.11 or newer is needed\n")


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@dataclasses.dataclass
class Options:
    # first group
    size: int = 3  # how large, 100 % at most
    share: float | None = None  # which part
    # second group
    name: str = "x"  # what it is called
    fast: bool = False  # whether to hurry


@dataclasses.dataclass
class Silent(Options):
    said: int = 1  # says what it does
    unsaid: int = 2


def parse(*argv, cls=Options):
    return vars(Parser("A test.\n\nMore.", cls).parse_args(argv))


def test_fields_are_flags_and_those_not_given_are_left_out():
    assert parse() == {}
    assert parse("--size=4", "--share", "0.5", "--name=", "--fast") == dict(size=4, share=0.5, name="", fast=True)
    assert parse("--fast=False") == dict(fast=False)
    for flag in ("--size=1.5", "--fast=maybe", "--siz=1", "word"):
        with pytest.raises(UserError, match=rf"{flag.split('=')[0]}.*--help lists the flags"):
            parse(flag)
    with pytest.raises(TypeError, match="^unsaid of Silent: a comment"):  # a bug of ours
        parse(cls=Silent)


def test_help_gives_every_flag_its_group_meaning_type_and_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{group}:" in text for group in ("model", "position", "training", "logging", "machine"))
    for f in dataclasses.fields(train.TrainConfig):
        assert re.search(rf"--{f.name} [^-]\S.*?\({f.type.__name__}, default {f.default!r}\)", text), f.name


# ----------------------------------------------------------------------------------------------------------------------
# Output, files, locks, devices


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("output", ["a closed pipe", "a full disk"])
def test_what_cannot_be_printed_ends_nothing(output):
    reader, closed = os.pipe()
    os.close(reader)
    out = closed if output == "a closed pipe" else os.open("/dev/full", os.O_WRONLY)
    code = "from common import say; import sys\nfor i in range(3): say('x' * 5000)\nsay('still here', sys.stderr)"
    assert python(code, stdout=out) == (0, None, "still here\n")
    os.close(out)


KILLED = """
import os, signal
from pathlib import Path
from common import replace_file

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def write(file):
    file.write(b"n")
    if "{moment}" == "write":
        file.flush()
        kill()
    file.write(b"ew")

if "{moment}" in ("fsync", "replace"):
    os.{moment} = kill
replace_file(Path("{path}"), write)
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace", "nothing"])
def test_a_file_is_the_old_one_or_the_new_one_wherever_it_is_killed(tmp_path, moment):
    path = tmp_path / "file.txt"
    path.write_bytes(b"old")
    status, *_ = python(KILLED.format(moment=moment, path=path))
    assert (status, path.read_bytes()) == ((0, b"new") if moment == "nothing" else (-signal.SIGKILL, b"old"))
    replace_file(path, lambda file: file.write(b"newer"))  # what a killed one left is in nobody's way
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file.txt", b"newer")]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, error):
    def write(file):
        file.write(b"half of it")
        raise error

    (tmp_path / "file.txt").write_bytes(b"old")
    with pytest.raises(error):
        replace_file(tmp_path / "file.txt", write)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file.txt", b"old")]


def test_a_lock_is_held_until_it_is_closed_or_its_process_is_killed(tmp_path):
    path = tmp_path / "file"
    code = f"from common import *\nheld = lock(Path('{path}'))\nprint('held', flush=True)\ninput()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process is working in {tmp_path}"):
            lock(path)
        process.kill()
        process.wait()
    for text in (b"mine", b", again"):  # what the file holds stays
        with lock(path) as file:
            file.write(text)
    assert path.read_bytes() == b"mine, again"


def test_find_device_gives_what_was_asked_for():
    x = torch.ones(2, 2)
    for dtype in ("bfloat16", "float32"):
        device, name, autocast = find_device("cpu", dtype)
        with autocast():
            assert (device, name, (x @ x).dtype) == (torch.device("cpu"), dtype, getattr(torch, dtype))
    assert find_device("cpu", "auto")[1] in ("bfloat16", "float32")
