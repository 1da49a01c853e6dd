"""``data``: make data sets. So far ``data worlds``, the default videos and questions."""

from __future__ import annotations

from pathlib import Path

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.plain import PlainParser


def run(command: str, argv: list[str]) -> int:
    """Run ``data worlds --out DIR``."""
    parser = PlainParser(prog="fulgurite data", description="Make the default data.")
    sets = parser.add_subparsers(dest="name", required=True)
    worlds = sets.add_parser("worlds", help="clips of simulated worlds; needs fulgurite[worlds]")
    worlds.add_argument("--out", type=Path, required=True, help="folder to fill; equal names are replaced")
    worlds.add_argument("--domains", nargs="+", metavar="NAME", help="only these worlds")
    worlds.add_argument("--seed", type=int, default=0, help="another seed makes other clips (default: 0)")
    options = parser.parse_args(argv)
    from fulgurite.datamodules.worlds.generate import generate

    chosen = {} if options.domains is None else {"domains": options.domains}
    try:
        generate(options.out, seed=options.seed, **chosen)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"worlds: {error}") from error
    return DONE
