"""Sentences for the classes of small data sets, and their words as numbers: what a CLIP without a tokenizer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAUGHT = ("a photo of a {}", "a picture of the {}", "an image of one {}", "a small photo of the {}")
"""Sentences that training shows."""
HELD_OUT = ("one picture of a {}", "the image of the {}", "a small picture of one {}")
"""Sentences that it does not show, of the same words."""
PAD, BEGIN = 0, 1
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
KINDS = (
    "sea mammal", "fish", "flower", "food container", "fruit or vegetable", "electrical device", "furniture", "insect",
    "large carnivore", "large building", "large natural scene", "large herbivore", "medium mammal",
    "small invertebrate", "person", "reptile", "small mammal", "tree", "vehicle for people", "large vehicle",
)  # fmt: skip
KIND_OF = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
)  # fmt: skip
"""The kind of every class of CIFAR-100, its superclass."""
PHRASES: Mapping[str, Sequence[str]] = {
    "digits": [f"{name} , {'odd' if place % 2 else 'even'}" for place, name in enumerate(DIGITS)],
    "cifar10": CIFAR10,
    "cifar100": [f"{name} , a {KINDS[kind]}" for name, kind in zip(CIFAR100, KIND_OF, strict=True)],
}
"""What stands for every class in a sentence."""
NEVER_CAPTIONED: Mapping[str, Sequence[int]] = {
    "digits": (7, 8, 9),
    "cifar10": (),
    "cifar100": tuple(KIND_OF.index(kind) for kind in range(len(KINDS))),
}
"""Classes of which no image is shown in training and no sentence names: of CIFAR-100 one of every kind."""


@dataclass(frozen=True)
class Words:
    """Words by number.

    Attributes:
        number: Of every word, from 2.
        length: Numbers of a sentence, with its begin, its end and padding.
    """

    number: Mapping[str, int]
    length: int

    @property
    def end(self) -> int:
        """What stands behind the last word: the largest number."""
        return len(self.number) + 2

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Sentences as ``(n, length)`` numbers."""
        rows = []
        for sentence in sentences:
            row = [BEGIN, *(self.number[word] for word in sentence.split()), self.end]
            rows.append(row + [PAD] * (self.length - len(row)))
        return torch.tensor(rows)


def words_of(data: Sequence[str]) -> Words:
    """The words of all sentences about some data sets, those about classes that are never captioned as well."""
    sentences = [
        template.format(phrase) for name in data for phrase in PHRASES[name] for template in (*TAUGHT, *HELD_OUT)
    ]
    words = sorted({word for sentence in sentences for word in sentence.split()})
    longest = max(len(sentence.split()) for sentence in sentences)
    return Words({word: number for number, word in enumerate(words, 2)}, longest + 2)
