"""How results were found: names of methods, each with what it is in a sentence.

What applies a method and what looks one up both take its name from here; pages take the explanation from here. The
members are the plain strings that the results and their JSON hold.
"""

from __future__ import annotations

from enum import StrEnum


class _Explained(StrEnum):
    """Members are written as ``NAME = "name in results", "explanation"``."""

    explanation: str

    def __new__(cls, name: str, explanation: str) -> _Explained:
        """The string itself, with its explanation as an attribute."""
        member = str.__new__(cls, name)
        member._value_, member.explanation = name, explanation
        return member

    # A result reads the same whether it was just made or comes back from JSON, with plain strings.
    __repr__ = str.__repr__


class Argument(_Explained):
    """Arguments that bound a network's Lipschitz constant, the plainest first."""

    PRODUCT = (
        "product of norms",
        "The layers' operator norms, multiplied along the network. It ignores how layers fit together.",
    )
    MULTIPLIERS = (
        "multipliers",
        "Gram matrices passed through the network from one end to the other, with weights that use that an"
        " activation's slopes lie in an interval.",
    )
    CONV_PAIRS = (
        "pairs of convolutions",
        "The product of norms, with every strided convolution bounded together with the convolution before it, through"
        " the activation between them.",
    )
    CHAIN = "chain", "Largest entry of |W_L| ⋯ |W₁| 1: the magnitudes of the weights, multiplied from layer to layer."
    PATH = (
        "path",
        "Norm of (|W_L ⋯ W₁| + |W_L| ⋯ |W₁|) / 2: halfway between the chain and the network made linear.",
    )
    CROSS_NORM = (
        "cross norm",
        "The least bound in the other norm, times the root of the number of inputs (ℓ∞) or of logits (ℓ₂).",
    )
    PAPER_FORM = "paper form", "Theorem 3.2 with every layer's norm bounded by Theorem 3.1 in the paper's form."
    SHARP_FORM = "sharp form", "Theorem 3.2 with every layer's norm bounded by Theorem 3.1 in the sharp form."
    DISJOINT_PAIRS = (
        "exact norms, disjoint pairs",
        "Theorem 3.2 with exact norms (ℓ∞): their product, times the alignments of the best pairs of neighbouring"
        " layers that share none.",
    )
    ALL_PAIRS = (
        "exact norms, all pairs",
        "Theorem 3.2 with exact norms (ℓ₂): their product, times the alignments of all pairs of neighbouring layers.",
    )
    ENDS = "ends", "The same with the whole spectra of the first and the last layer put into their one alignment."
    EXPONENTS = "exponents", "The same with every layer's spectrum shared out best between its two neighbours."
    SEGMENTS = (
        "segments",
        "The network cut into contiguous segments in the best way, and the bounds of the segments multiplied.",
    )
    WEIGHTED_SEGMENTS = "weighted segments", "The segments bound, with every coordinate's movement followed by itself."


class OperatorMethod(_Explained):
    """What bounds the operator norm of a layer."""

    EXACT = "exact", "The norm itself: of a dense matrix, of a kernel of one tap (ℓ₂), or with zero padding (ℓ₁, ℓ∞)."
    FILTER_MATRIX = (
        "filter matrix",
        "Largest singular value of the filter matrix, times the root of the most patches on one pixel.",
    )
    SCHUR = "schur", "Root of the product of the ℓ₁ and the ℓ∞ operator norm."
    TORUS = "torus", "Largest singular value of the symbol over the frequencies of a circle in which the image fits."
    POLYPHASE = "polyphase", "The same for a stride above 1, with the input split into its residue classes."
    COARSE_GRID = (
        "coarse grid",
        "Largest singular value of the symbol on a coarse grid, raised to hold at all frequencies.",
    )
    INTERIOR_FILTER = (
        "interior filter",
        "Largest ℓ₁ norm of a filter: the ℓ∞ norm where some output position sees no padding.",
    )
    ABSOLUTE_KERNEL = (
        "absolute kernel",
        "Largest entry of the convolution (ℓ∞) or transposed convolution (ℓ₁) of |K| with ones.",
    )
    STRIDE_CLASSES = (
        "stride classes",
        "Largest ℓ₁ norm of a channel's taps that may meet at one pixel: an ℓ₁ bound for every size.",
    )
    NOT_BOUNDED = "not bounded", "No bound is known for every size of the input."


class UniversalKind(_Explained):
    """How a universal perturbation is found."""

    FITTED = "fitted", "by ascent on one half of the data."
    DATA_FREE = (
        "data-free",
        "the direction that moves the first layer's output most, read from its weights, or an estimate of it where the"
        " layer is not dense; only its sign is chosen on that half.",
    )
