"""common.py: errors of one line, flags made of a dataclass, output that fails, files replaced as a whole, locks."""

import argparse
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import train
from common import Parser, UserError, add_flags, command, find_device, lock, replace_file, say

ROOT = Path(__file__).resolve().parent.parent


def python(code, **environment):
    """A process of its own: its status, its stdout and its stderr."""
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True)
    return end.returncode, end.stdout.decode(), end.stderr.decode()


def command_that_raises(error):
    return f"""
from common import *
import sys
sys.argv = ["some/where/try.py"]
@command
def main(argv):
    raise {error}
main()
"""


def test_a_user_error_is_one_line_and_status_2():
    code = command_that_raises('UserError("no file\\n  of that name")')
    assert python(code) == (2, "", "try.py: no file of that name\n")


def test_an_old_python_is_one_line():
    code = "import sys; sys.version_info, sys.version = (3, 10, 9), '3.10.9 (main)'; import train"
    assert python(code) == (1, "", "Python 3.10.9 is too old: 3.11 or newer is needed\n")


def test_of_the_processes_that_a_launcher_started_on_a_machine_one_prints():
    code = command_that_raises('UserError("wrong")')
    assert python(code, RANK="5", LOCAL_RANK="1") == (2, "", "")
    assert python(code, RANK="4", LOCAL_RANK="0") == (2, "", "try.py: wrong\n")
    assert python(code, LOCAL_RANK="1") == (2, "", "try.py: wrong\n")  # no launcher: it left a variable behind


def test_every_other_error_keeps_its_traceback():
    status, _, stderr = python(command_that_raises('ValueError("a bug")'))
    assert status == 1 and stderr.startswith("Traceback") and stderr.endswith("ValueError: a bug\n")


def test_a_command_takes_its_arguments_or_those_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["try.py", "a", "b"])
    main = command(lambda argv: argv)
    assert main() == ["a", "b"] and main([]) == []


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


def parse(*argv):
    parser = Parser("A test.\n\nMore.")
    add_flags(parser, Options)
    return vars(parser.parse_args(argv))


def test_fields_are_flags_and_those_not_given_are_left_out():
    assert parse() == {}
    assert parse("--size=4", "--share", "0.5", "--name=", "--fast") == dict(size=4, share=0.5, name="", fast=True)
    assert parse("--fast=False") == dict(fast=False)


@pytest.mark.parametrize(
    "flag", ["--size=1.5", "--share=much", "--fast=maybe", "--siz=1", "--other=1", "--name", "word"]
)
def test_a_wrong_flag_is_named(flag):
    with pytest.raises(UserError, match=rf"{flag.split('=')[0]}.*--help lists the flags"):
        parse(flag)


def test_help_gives_every_flag_its_group_meaning_type_and_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{group}:" in text for group in ("model", "position", "training", "logging", "machine"))
    for f in dataclasses.fields(train.TrainConfig):
        assert re.search(rf"--{f.name} [^-]\S.*?\({f.type.__name__}, default {f.default!r}\)", text), f.name
    with pytest.raises(SystemExit):
        parse("--help")
    assert "how large, 100 % at most (int, default 3)" in " ".join(capsys.readouterr().out.split())


@dataclasses.dataclass
class Silent(Options):
    said: int = 1  # says what it does
    unsaid: int = 2


def test_a_field_without_a_comment_is_a_bug_that_names_it():
    with pytest.raises(TypeError, match="^unsaid of Silent: a comment"):
        add_flags(Parser("A test."), Silent)


def test_limits_and_choices_name_the_flag():
    options = argparse.Namespace(size=2, share=float("nan"), name="x")
    common.at_least(options, 2, "size")
    common.one_of(options, name=("x", "y"))
    for least, name in ((3, "size"), (0, "share")):
        with pytest.raises(UserError, match=f"--{name} .* must be at least {least}"):
            common.at_least(options, least, name)
    with pytest.raises(UserError, match="--name 'x' is unknown: use one of y, z"):
        common.one_of(options, name=("y", "z"))


# ----------------------------------------------------------------------------------------------------------------------
# Output, files, locks, devices


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("output", ["a closed pipe", "a full disk"])
def test_what_cannot_be_printed_ends_nothing(output):
    reader, closed = os.pipe()
    os.close(reader)
    out = closed if output == "a closed pipe" else os.open("/dev/full", os.O_WRONLY)
    code = "from common import say; import sys\nfor i in range(3): say('x' * 5000)\nsay('still here', sys.stderr)"
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, stderr=subprocess.PIPE)
    os.close(out)
    assert (end.returncode, end.stderr) == (0, b"still here\n")


def test_a_character_that_the_terminal_lacks_is_replaced():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("caf\xe9", file)
    assert file.buffer.getvalue() == b"caf?\n"


@pytest.mark.parametrize("moment", ["write", "os.fsync", "os.replace", "nothing"])
def test_a_file_is_the_old_one_or_the_new_one_wherever_it_is_killed(tmp_path, moment):
    (tmp_path / "file.txt").write_bytes(b"old")
    code = f"""
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

if "{moment}".startswith("os."):
    setattr(os, "{moment}"[3:], kill)
replace_file(Path({str(tmp_path)!r}, "file.txt"), write)
"""
    assert python(code)[0] == (0 if moment == "nothing" else -signal.SIGKILL)
    assert (tmp_path / "file.txt").read_bytes() == (b"new" if moment == "nothing" else b"old")
    replace_file(tmp_path / "file.txt", lambda file: file.write(b"newer"))  # what a killed one left is in nobody's way
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
    code = (
        "import sys; from common import lock; from pathlib import Path; held = lock(Path(sys.argv[1])); print('held', "
    )
    code += "flush=True); input()"
    command = [sys.executable, "-c", code, tmp_path / "file"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process is working in {tmp_path}"):
            lock(tmp_path / "file")
        process.kill()
        process.wait()
    with lock(tmp_path / "file") as file:
        file.write(b"mine")
    with lock(tmp_path / "file") as file:  # what the file holds stays
        file.write(b", again")
    assert (tmp_path / "file").read_bytes() == b"mine, again"


def test_find_device_gives_what_was_asked_for():
    device, dtype, autocast = find_device("cpu", "bfloat16")
    assert (device, dtype) == (torch.device("cpu"), "bfloat16")
    x = torch.ones(2, 2)
    with autocast():
        assert (x @ x).dtype == torch.bfloat16
    assert find_device("cpu", "auto")[1] in ("bfloat16", "float32")
    with find_device("cpu", "float32")[2]():
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    "asked, words", [(("abacus",), "--device 'abacus' does not"), (("cpu", "int4"), "--dtype 'int4'")]
)
def test_find_device_refuses_what_does_not_work(asked, words):
    with pytest.raises(UserError, match=words):
        find_device(*asked)
