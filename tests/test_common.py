"""common.py: errors of one line, flags made of a dataclass, output that fails, files replaced as a whole, locks."""

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, command

import train
from common import UserError, lock, replace_file

RAISES = """
from common import *
import sys
sys.argv = ["some/where/try.py"]
@command
def main(argv):
    raise {error}
main()
"""


def test_a_user_error_is_one_line_and_every_other_error_keeps_its_traceback():
    code = RAISES.format(error='UserError("no file\\n  of that name")')
    said = command("-c", code, LOCAL_RANK="1")  # a variable that is left over: without RANK, it means nothing
    assert said == (2, "", "try.py: no file of that name\n")
    status, _, stderr = command("-c", RAISES.format(error='ValueError("a bug")'))
    assert status == 1 and stderr.startswith("Traceback") and stderr.endswith("ValueError: a bug\n")


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def test_help_has_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(train.TrainConfig):
        assert re.search(rf"--{f.name} [^-]\S.*?\({f.type.__name__}, default {f.default!r}\)", text), f.name


# ----------------------------------------------------------------------------------------------------------------------
# Output, files, locks, devices


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_printed_ends_nothing():
    code = "from common import say; import sys\nfor i in range(3): say('x' * 5000)\nsay('still here', sys.stderr)"
    with open("/dev/full", "w") as full:
        end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert (end.returncode, end.stderr) == (0, b"still here\n")


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
    status, *_ = command("-c", KILLED.format(moment=moment, path=path))
    assert (status, path.read_bytes()) == ((0, b"new") if moment == "nothing" else (-signal.SIGKILL, b"old"))
    replace_file(path, lambda file: file.write(b"newer"))  # what a killed one left is in nobody's way
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file.txt", b"newer")]


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
    lock(path).close()
