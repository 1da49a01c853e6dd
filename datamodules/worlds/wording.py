"""English for the captioned worlds: what their pictures are called, and sentences about what happens to them.

Pictures are known by the names of the Unicode Standard, so that a name is also the character (`unicodedata.lookup`).
"""

from __future__ import annotations

from collections.abc import Mapping

GROUPS: dict[str, dict[str, str]] = {
    "emoji_living": {
        "animal": "rat, mouse, ox, cow, tiger, leopard, rabbit, cat, crocodile, whale, snail, snake, horse, goat, "
        "sheep, monkey, rooster, dog, pig, elephant, octopus, ant, honeybee, tropical fish, turtle, bird, penguin, "
        "koala, dolphin, crab, scorpion, eagle, duck, bat, shark, owl, butterfly, deer, gorilla, lizard, squid, "
        "hedgehog, kangaroo, llama, peacock, parrot, lobster, swan, sloth, flamingo",
        "plant": "seedling, evergreen tree, deciduous tree, palm tree, cactus, tulip, cherry blossom, rose, "
        "hibiscus, sunflower, four leaf clover, maple leaf, mushroom, potted plant",
        "person": "boy, girl, man, woman, baby, older man, older woman, construction worker, princess, prince, "
        "mage, fairy, vampire, elf, genie, zombie, guardsman, bearded person",
        "face": "grinning face, winking face, crying face, angry face, sleeping face, dizzy face, robot face, "
        "clown face, thinking face, nauseated face, freezing face, flushed face, yawning face, panda face, "
        "lion face, fox face",
    },
    "emoji_things": {
        "food": "taco, burrito, tomato, aubergine, watermelon, lemon, banana, pineapple, red apple, green apple, "
        "pear, peach, strawberry, hamburger, doughnut, cookie, lollipop, croissant, avocado, cucumber, potato, "
        "carrot, pretzel, sandwich, coconut, cupcake, waffle, bagel, mango",
        "vehicle": "rocket, helicopter, steam locomotive, tram, bus, ambulance, fire engine, police car, taxi, "
        "automobile, delivery truck, tractor, ship, canoe, flying saucer, skateboard, scooter, bicycle, sailboat",
        "building": "hospital, factory, hotel, hut, office building, circus tent, ferris wheel",
        "clothing": "crown, necktie, t-shirt, dress, kimono, handbag, top hat, scarf, coat, high-heeled shoe, "
        "athletic shoe, hiking boot, graduation cap, military helmet",
        "instrument": "saxophone, guitar, trumpet, violin, banjo, accordion, long drum",
        "object": "camera, radio, television, hammer, wrench, axe, screwdriver, ladder, bucket, key, bomb, trophy, "
        "balloon, crystal ball, microscope, telescope, compass, magnet, teddy bear, broom, kite, parachute, "
        "boomerang, coin, mirror, chair, toothbrush",
    },
}
"""Domain, group, and the names in it."""

IRREGULAR = {
    "mouse": "mice",
    "ox": "oxen",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "man": "men",
    "woman": "women",
    "guardsman": "guardsmen",
    "person": "people",
    "leaf": "leaves",
    "elf": "elves",
    "scarf": "scarves",
    "cactus": "cacti",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
}

# Each plot of the worlds in several wordings. {a} and {b} are pictures with an article, {many} are several of one.
WORDINGS: dict[str, tuple[str, ...]] = {
    "moves": (
        "{a} slides from {start} to {end} on a {colour} background",
        "moving {way}, {a} crosses a {colour} background",
        "{a} travels {way} in front of a {colour} wall",
    ),
    "crowd": (
        "{count} {many} on a {colour} background",
        "a group of {count} {many} in front of a {colour} wall",
        "there are {count} {many} and everything behind them is {colour}",
    ),
    "pair": (
        "{a} {beside} {b} on a {colour} background",
        "{b} with {a} {beside} it, in front of a {colour} wall",
        "one can see {a} {beside} {b} and {colour} all around",
    ),
    "follows": (
        "{a}, then {b}, on a {colour} background",
        "first {a} is shown and after it {b}, in front of a {colour} wall",
        "{b} takes the place of {a} on a {colour} background",
    ),
    "blinks": (
        "{a} appears {times} on a {colour} background",
        "{times} {a} shows up and vanishes in front of a {colour} wall",
        "on a {colour} background, {a} flashes up {times}",
    ),
    "larger": (
        "{a} grows larger and larger on a {colour} background",
        "on a {colour} background, {a} gets bigger",
        "{a} comes closer in front of a {colour} wall",
    ),
    "smaller": (
        "{a} shrinks more and more on a {colour} background",
        "on a {colour} background, {a} gets smaller",
        "{a} goes far away in front of a {colour} wall",
    ),
    "spins": (
        "{a} spins around on a {colour} background",
        "{a} turns round and round in front of a {colour} wall",
        "on a {colour} background, {a} rotates",
    ),
    "recolours": (
        "the background of {a} turns from {colour} to {other}",
        "behind {a}, {colour} gives way to {other}",
        "{a} in front of a wall that is {colour} at first and {other} later",
    ),
}
# Start, end and way of a movement, by the direction that it goes in.
MOVEMENTS = {
    "left": ("the right", "the left", "to the left"),
    "right": ("the left", "the right", "to the right"),
    "up": ("the bottom", "the top", "upwards"),
    "down": ("the top", "the bottom", "downwards"),
}
# Where the first of two pictures is, by the side of the frame that it is on.
BESIDE = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def names(domain: str) -> dict[str, tuple[str, ...]]:
    """Names of a domain's pictures by group."""
    return {group: tuple(text.split(", ")) for group, text in GROUPS[domain].items()}


def with_article(name: str) -> str:
    """``a cat``, ``an owl``."""
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def plural(name: str) -> str:
    """``cats``, ``older men``."""
    first, _, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return f"{first} {last}".strip()


def captions(plot: str, facts: Mapping[str, str]) -> tuple[str, ...]:
    """All wordings of what a clip shows; of two pictures, with either first.

    Args:
        plot: a key of `WORDINGS`.
        facts: names ``a`` and ``b`` of pictures, and what else the plot has: ``colour``, ``other``, ``count``,
            ``times``, ``direction``, ``side``.
    """
    if "side" not in facts:
        return _worded(plot, facts)
    swapped = {**facts, "a": facts["b"], "b": facts["a"], "side": OPPOSITE[facts["side"]]}
    return _worded(plot, facts) + _worded(plot, swapped)


def _worded(plot: str, facts: Mapping[str, str]) -> tuple[str, ...]:
    words = {**facts, "many": plural(facts["a"])}
    words |= {key: with_article(facts[key]) for key in ("a", "b") if key in facts}
    if "direction" in facts:
        words["start"], words["end"], words["way"] = MOVEMENTS[facts["direction"]]
    if "side" in facts:
        words["beside"] = BESIDE[facts["side"]]
    return tuple(wording.format(**words) for wording in WORDINGS[plot])
