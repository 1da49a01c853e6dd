"""``data``: make data sets: videos with questions or captions, pictures with captions or with facts to delete."""

from __future__ import annotations

from pathlib import Path

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.plain import PlainParser

SETS = {
    "worlds": "clips of simulated worlds and their questions",
    "captions": "clips of simulated worlds and their captions",
    "emoji": "drawings of OpenMoji and their names",
    "facts": "facts about drawings of OpenMoji, to be learned and to be deleted",
}


def run(command: str, argv: list[str]) -> int:
    """Run ``data NAME --out DIR``."""
    parser = PlainParser(prog="fulgurite data", description="Make the default data.")
    sets = parser.add_subparsers(dest="name", required=True)
    for name, what in SETS.items():
        one = sets.add_parser(name, help=f"{what}; needs fulgurite[worlds]")
        one.add_argument("--out", type=Path, required=True, help="folder to fill; equal names are replaced")
        one.add_argument("--seed", type=int, default=0, help="another seed makes others (default: 0)")
        if name in ("worlds", "captions"):
            one.add_argument("--domains", nargs="+", metavar="NAME", help="only these worlds")
    options = parser.parse_args(argv)
    from fulgurite.datamodules.worlds.captions import generate_captioned
    from fulgurite.datamodules.worlds.emoji_facts import generate_facts
    from fulgurite.datamodules.worlds.emoji_names import generate_named
    from fulgurite.datamodules.worlds.generate import generate

    makers = {"worlds": generate, "captions": generate_captioned, "emoji": generate_named, "facts": generate_facts}
    chosen = {} if getattr(options, "domains", None) is None else {"domains": options.domains}
    try:
        makers[options.name](options.out, seed=options.seed, **chosen)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{options.name}: {error}") from error
    print(f"{options.name}: written to {options.out}")
    return DONE
