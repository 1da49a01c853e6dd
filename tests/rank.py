"""One of two processes that stay, and run one script of a test after the other; see ``pair`` in conftest.py.

    python rank.py < lines of {"argv": [script, arguments..], "output": FILE, "port": "1234"}

A line with the exit code answers each. A script is run as ``__main__`` in a module of its own.
"""

import contextlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def run(argv):
    """Exit code of a script."""
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave():
    """No group of processes is left for the next script."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def written_to(path):
    """Whatever this process writes, libraries included, goes to a file."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept):
                os.dup2(old, number)
                os.close(old)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    before = dict(os.environ)
    for line in sys.stdin:
        job = json.loads(line)
        os.environ.clear()
        os.environ.update({**before, "MASTER_PORT": job["port"]})
        with written_to(job["output"]):
            code = run(job["argv"])
            leave()
        print(code, file=answers, flush=True)
