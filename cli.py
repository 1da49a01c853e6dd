"""The command line: ``python cli.py COMMAND ...`` and the console script ``fulgurite COMMAND ...`` are the
same.

Nothing heavy is imported before a command is chosen, so ``--help`` and ``--version`` answer at once.

Exit codes: 0 done; 2 bad config or bad input (one message on stderr; ``exit_code_of`` in ``commands/errors.py`` says
what counts); 3 loss, gradients or weights that are NaN or infinite (one message); 130, 138 or 143 ended by SIGINT
(Ctrl-C), SIGUSR1 or SIGTERM, a ``fit`` that trains with a checkpoint written; 1 any other error, with its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

# One line per command: the module whose ``run(command, argv) -> int`` does it, and the line shown in the
# help.
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("fulgurite.commands.train", "train a module; everything it leaves lies in one run folder"),
    "validate": ("fulgurite.commands.train", "evaluate a checkpoint on the validation questions"),
    "test": ("fulgurite.commands.train", "evaluate a checkpoint on the test questions"),
    "predict": ("fulgurite.commands.train", "answer questions and write predictions.jsonl"),
    "index": ("fulgurite.commands.index", "embed the videos of a folder, so that they can be searched"),
    "search": ("fulgurite.commands.search", "find videos of an index by what they show"),
    "features": ("fulgurite.commands.features", "extract frame features once and store them"),
    "data": ("fulgurite.commands.data", "make the default videos and questions"),
    "statistics": ("fulgurite.commands.statistics", "measure what RegMean and Fisher weigh a model by"),
    "merge": ("fulgurite.commands.merge", "make one model of several that lie in files"),
    "prune": ("fulgurite.commands.prune", "set weights of a model to zero, without training"),
    "quantize": ("fulgurite.commands.quantize", "put weights of a model on grids of a few bits"),
    "export": ("fulgurite.commands.export", "write a run or artefact as a model of another library"),
    "verify": ("fulgurite.commands.verify", "check every digest of runs, checkpoints, stores, indexes"),
    "inspect": ("fulgurite.commands.inspection", "print what runs and checkpoints hold, and where they came from"),
}

EXIT_CODES = """\
exit codes:
  0    done
  1    another error, with its traceback
  2    bad config or bad input, one message on stderr: an option or a file is wrong, a constructor refuses its
       arguments, or fulgurite itself refuses a setting (ValueError, LookupError) when it turns out to be wrong
  3    loss, gradients or weights that are NaN or infinite, one message
  130  ended by Ctrl-C (SIGINT)
  138  ended by SIGUSR1
  143  ended by SIGTERM
       a fit that trains has written checkpoints/last before; after a second Ctrl-C it has not"""


def help_text() -> str:
    """The text of ``--help``, generated from ``COMMANDS``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fulgurite COMMAND [options]      (the same as: python cli.py COMMAND [options])",
            "",
            "Adapt, merge, compress and unlearn vision-language models with Lightning.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this; `fulgurite COMMAND --help` shows the options of a command",
            "  --version   show the version",
            "",
            EXIT_CODES,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see the module's docstring).

    ``argv`` is what follows the program's name; ``sys.argv[1:]`` by default. Errors that are neither bad
    config nor bad input are raised, so that they show their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(help_text())
        return 0
    if command == "--version":
        from fulgurite import __version__

        print(f"fulgurite {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=3, cutoff=0.4) or list(COMMANDS)
        print(f"fulgurite: no command {command[:80]!r}; did you mean {', '.join(near)}?", file=sys.stderr)
        return 2
    from fulgurite.commands.errors import exit_code_of

    run = importlib.import_module(COMMANDS[command][0]).run
    return exit_code_of(run, command, argv[1:])


if __name__ == "__main__":
    # Run as a script, the folder of this file comes first on the path, and its sub-folders (`samples`,
    # `metrics`) would be importable a second time under names without the package's prefix.
    sys.path.pop(0)
    from fulgurite.cli import main as package_main

    sys.exit(package_main())
