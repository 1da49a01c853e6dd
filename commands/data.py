"""``data``: make data sets: ``data worlds`` videos with questions, ``data captions`` videos with captions."""

from __future__ import annotations

from pathlib import Path

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.plain import PlainParser


def run(command: str, argv: list[str]) -> int:
    """Run ``data worlds --out DIR`` or ``data captions --out DIR``."""
    parser = PlainParser(prog="fulgurite data", description="Make the default data.")
    sets = parser.add_subparsers(dest="name", required=True)
    for name, what in {"worlds": "questions", "captions": "captions"}.items():
        one = sets.add_parser(name, help=f"clips of simulated worlds and their {what}; needs fulgurite[worlds]")
        one.add_argument("--out", type=Path, required=True, help="folder to fill; equal names are replaced")
        one.add_argument("--domains", nargs="+", metavar="NAME", help="only these worlds")
        one.add_argument("--seed", type=int, default=0, help="another seed makes other clips (default: 0)")
    options = parser.parse_args(argv)
    from fulgurite.datamodules.worlds.captions import generate_captioned
    from fulgurite.datamodules.worlds.generate import generate

    make = {"worlds": generate, "captions": generate_captioned}[options.name]
    chosen = {} if options.domains is None else {"domains": options.domains}
    try:
        make(options.out, seed=options.seed, **chosen)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{options.name}: {error}") from error
    return DONE
