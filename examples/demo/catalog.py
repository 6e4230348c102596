"""What the demo draws: objects by Unicode code point, background colors, captions."""

from __future__ import annotations

OBJECTS = {
    "strawberry": "1f353",
    "banana": "1f34c",
    "pizza": "1f355",
    "hamburger": "1f354",
    "apple": "1f34e",
    "lion": "1f981",
    "tiger": "1f42f",
    "penguin": "1f427",
    "butterfly": "1f98b",
    "ladybird": "1f41e",
    "crab": "1f980",
    "cactus": "1f335",
    "sunflower": "1f33b",
    "guitar": "1f3b8",
    "bus": "1f68c",
    "frog": "1f438",
    "cat": "1f431",
    "dog": "1f436",
    "pig": "1f437",
    "cow": "1f42e",
    "monkey": "1f435",
    "rabbit": "1f430",
    "bear": "1f43b",
    "koala": "1f428",
    "mouse": "1f42d",
    "chick": "1f425",
    "owl": "1f989",
    "octopus": "1f419",
    "fish": "1f420",
    "whale": "1f433",
    "turtle": "1f422",
    "snail": "1f40c",
    "bee": "1f41d",
    "watermelon": "1f349",
    "grapes": "1f347",
    "pineapple": "1f34d",
    "carrot": "1f955",
    "mushroom": "1f344",
    "donut": "1f369",
    "cake": "1f382",
    "balloon": "1f388",
    "rocket": "1f680",
    "car": "1f697",
    "house": "1f3e0",
    "rose": "1f339",
    "robot": "1f916",
    "snowman": "26c4",
    "crown": "1f451",
}
"""What the base model is trained to draw. The first sixteen are the ones that are judged."""

JUDGED = list(OBJECTS)[:16]

HELD_OUT = {"panda": "1f43c", "fox": "1f98a", "volcano": "1f30b", "unicorn": "1f984"}
"""What neither the VAE nor the base model has ever seen. The demo teaches the panda."""

COLORS = {
    "white": (255, 255, 255),
    "red": (221, 51, 47),
    "orange": (247, 138, 31),
    "yellow": (252, 216, 61),
    "green": (58, 166, 82),
    "blue": (58, 130, 236),
    "purple": (150, 80, 206),
    "black": (24, 24, 27),
}

PANDA_COLORS = ["white", "red", "orange", "green", "blue", "black"]
"""Backgrounds of the panda's training pictures. Yellow and purple are left for the test."""


def untrained_color(name: str) -> str:
    """The background on which the base model has never seen this object."""
    return list(COLORS)[(5 * list(OBJECTS).index(name) + 3) % len(COLORS)]


def trained_colors(name: str) -> list[str]:
    """The backgrounds on which the base model has seen this object."""
    return [color for color in COLORS if color != untrained_color(name)]


def caption(name: str, color: str) -> str:
    """The prompt of an object on a background."""
    return f"{article(name)} {name} on {article(color)} {color} background"


def article(word: str) -> str:
    """`a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"
