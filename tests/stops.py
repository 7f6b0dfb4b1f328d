"""Code that ends a command at a chosen moment, for the tests that patch it into a real process."""

KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def on_call(function, n, action):
    """Code that runs `action` before the n-th call of `function`; `real`, `args` are there for it."""
    return f"""
real, calls = {function}, []
def patched(*args, **kwargs):
    calls.append(args)
    if len(calls) == {n}:
        {action}
    return real(*args, **kwargs)
{function} = patched
"""
