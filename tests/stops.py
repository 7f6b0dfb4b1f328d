"""What may happen to a run of train.py, as patches for runs.run()."""

import itertools
import os
import pkgutil
import resource
import signal
from functools import partial


def before(function, when, action):
    """A patch. Before a call of `function`, send a signal, raise an error, call a function or return a value instead.

    when: 0 is each call, n is the n-th one, and a function of the arguments says which.
    """
    return partial(patch_call, function, when, action)


def patch_call(function, when, action):
    owner, name = function.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    real = getattr(owner, name)

    def patched(*args, **kwargs):
        if when(*args, **kwargs) if callable(when) else when in (0, next(calls)):
            if isinstance(action, signal.Signals):
                os.kill(os.getpid(), action)
            elif isinstance(action, Exception):
                raise action
            elif callable(action):
                action(*args)
            else:
                return action
        return real(*args, **kwargs)

    setattr(owner, name, patched)


def is_step(number, done, cfg):
    return done == number - 1


def is_line(number, log, **values):
    return values.get("step") == number


def at_step(number, action):
    """A patch: the action before this step of the run."""
    return before("train.learning_rate", partial(is_step, number), action)


def at_line(number, action):
    """A patch: the action before the lines of this step are written to the log."""
    return before("train.Log.write", partial(is_line, number), action)


def half_then_kill(*args):
    file = getattr(args[-1], "file", args[-1])  # the log's, or the one that torch.save writes to
    file.write(b'{"step": 13, "lo')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def leave_room(size, log):
    """From now on, a file takes no more than the log has and `size` bytes. stdout is a file too: away with it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit = os.fstat(log.file.fileno()).st_size + size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def close_pipe(*args):
    """From now on, stdout is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def fill_disk(*args):
    """From now on, stdout is on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
