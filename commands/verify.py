"""``verify PATH``: check every byte of a checkpoint, or of all checkpoints of a run, against its manifest."""

from __future__ import annotations

from pathlib import Path

from fulgurite.commands.errors import BAD_INPUT, DONE, ConfigError
from fulgurite.commands.plain import PlainParser


def run(command: str, argv: list[str]) -> int:
    """Print a line per checkpoint and per problem; 2 if anything is damaged or missing."""
    parser = PlainParser(prog="fulgurite verify", description="Check every digest of checkpoints.")
    parser.add_argument("path", type=Path, nargs="+", help="checkpoint, artefact or run folder")
    options = parser.parse_args(argv)
    from fulgurite.checkpoints import verify

    reports = [verify(folder) for path in options.path for folder in folders_at(path)]
    for report in reports:
        print(f"{report.path}: {'good' if report.ok else 'DAMAGED'}, {len(report.checked)} files checked")
        for problem in report.problems:
            print(f"  {problem}")
        for name in report.extra:
            print(f"  {name}: not part of the checkpoint, never read")
    return DONE if all(report.ok for report in reports) else BAD_INPUT


def folders_at(path: Path) -> list[Path]:
    """The checkpoint at ``path``, or all of the run there. Raises ``ConfigError``."""
    from fulgurite.checkpoints import MANIFEST_NAME
    from fulgurite.checkpoints.atomic import is_leftover, resolve
    from fulgurite.checkpoints.runs import ADAPTERS, ARTEFACTS, CHECKPOINTS

    if not path.exists() and not resolve(path).exists():
        raise ConfigError(f"{path}: no such file or folder")
    if not (path / CHECKPOINTS).is_dir():
        return [path]
    found = [
        folder
        for kind in (CHECKPOINTS, ADAPTERS, ARTEFACTS)
        for folder in sorted((path / kind).glob("*/"))
        if (folder / MANIFEST_NAME).is_file() and not is_leftover(folder)
    ]
    if not found:
        raise ConfigError(f"{path}: a run without a finished checkpoint")
    return found
