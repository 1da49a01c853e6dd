"""The default videos: five small worlds, their questions, and the generator that made them.

``clips/<domain>/{train,val,test}.jsonl`` hold one question a line (``id``, ``video``, ``question``, ``answer``,
``kind``; ``video`` is relative to the domain's folder). `fulgurite.datamodules.worlds.generate` makes them anew.

``captioned_clips/<domain>/`` hold two more, with captions in place of questions (``video``, ``caption``), which
`fulgurite.datamodules.worlds.captions` makes.
"""

from pathlib import Path

__all__ = ["CAPTIONED_DOMAINS", "DOMAINS", "SPLITS", "captioned_folder", "clips_folder"]

# Training order. The two emoji worlds look alike and are to be told apart by a router; with another world
# between and after them, what one of the two overwrites in the other is seen before the stream ends.
DOMAINS = ("doom", "emoji_scenes", "grid", "emoji_stories", "crafter")
CAPTIONED_DOMAINS = ("emoji_living", "emoji_things")
SPLITS = ("train", "val", "test")


def clips_folder() -> Path:
    """Folder with one folder a domain, as shipped with the package."""
    return Path(__file__).parent / "clips"


def captioned_folder() -> Path:
    """The same of the captioned domains."""
    return Path(__file__).parent / "captioned_clips"
