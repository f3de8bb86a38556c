"""Names of the arguments that bound a network's Lipschitz constant, and of those that bound the norm of one layer's
operator, with what each one is in a sentence.

What makes a bound and what looks one up both import the name from here; pages take the explanation from here.
"""

PRODUCT = "product of norms"
MULTIPLIERS = "multipliers"
CONV_PAIRS = "pairs of convolutions"
CHAIN = "chain"
PATH = "path"
CROSS_NORM = "cross norm"
PAPER_FORM = "paper form"
SHARP_FORM = "sharp form"
DISJOINT_PAIRS = "exact norms, disjoint pairs"
ALL_PAIRS = "exact norms, all pairs"
ENDS = "ends"
EXPONENTS = "exponents"
SEGMENTS = "segments"
WEIGHTED_SEGMENTS = "weighted segments"

METHODS = {
    PRODUCT: "The layers' operator norms, multiplied along the network. It ignores how layers fit together.",
    MULTIPLIERS: (
        "Gram matrices passed through the network from one end to the other, with weights that use that an"
        " activation's slopes lie in an interval."
    ),
    CONV_PAIRS: (
        "The product of norms, with every strided convolution bounded together with the convolution before it, through"
        " the activation between them."
    ),
    CHAIN: "Largest entry of |W_L| ⋯ |W₁| 1: the magnitudes of the weights, multiplied from layer to layer.",
    PATH: "Norm of (|W_L ⋯ W₁| + |W_L| ⋯ |W₁|) / 2: halfway between the chain and the network made linear.",
    CROSS_NORM: "The least bound in the other norm, times the root of the number of inputs (ℓ∞) or of logits (ℓ₂).",
    PAPER_FORM: "Theorem 3.2 with every layer's norm bounded by Theorem 3.1 in the paper's form.",
    SHARP_FORM: "Theorem 3.2 with every layer's norm bounded by Theorem 3.1 in the sharp form.",
    DISJOINT_PAIRS: (
        "Theorem 3.2 with exact norms (ℓ∞): their product, times the alignments of the best pairs of neighbouring"
        " layers that share none."
    ),
    ALL_PAIRS: (
        "Theorem 3.2 with exact norms (ℓ₂): their product, times the alignments of all pairs of neighbouring layers."
    ),
    ENDS: "The same with the whole spectra of the first and the last layer put into their one alignment.",
    EXPONENTS: "The same with every layer's spectrum shared out best between its two neighbours.",
    SEGMENTS: "The network cut into contiguous segments in the best way, and the bounds of the segments multiplied.",
    WEIGHTED_SEGMENTS: "The segments bound, with every coordinate's movement followed by itself.",
}
"""Explanation by name, the plainest argument first."""

EXACT = "exact"
FILTER_MATRIX = "filter matrix"
SCHUR = "schur"
TORUS = "torus"
POLYPHASE = "polyphase"
COARSE_GRID = "coarse grid"
INTERIOR_FILTER = "interior filter"
ABSOLUTE_KERNEL = "absolute kernel"
STRIDE_CLASSES = "stride classes"
NOT_BOUNDED = "not bounded"

OPERATOR_METHODS = {
    EXACT: "The norm itself: of a dense matrix, of a kernel of one tap (ℓ₂), or with zero padding (ℓ₁, ℓ∞).",
    FILTER_MATRIX: "Largest singular value of the filter matrix, times the root of the most patches on one pixel.",
    SCHUR: "Root of the product of the ℓ₁ and the ℓ∞ operator norm.",
    TORUS: "Largest singular value of the symbol over the frequencies of a circle in which the image fits.",
    POLYPHASE: "The same for a stride above 1, with the input split into its residue classes.",
    COARSE_GRID: "Largest singular value of the symbol on a coarse grid, raised to hold at all frequencies.",
    INTERIOR_FILTER: "Largest ℓ₁ norm of a filter: the ℓ∞ norm where some output position sees no padding.",
    ABSOLUTE_KERNEL: "Largest entry of the convolution (ℓ∞) or transposed convolution (ℓ₁) of |K| with ones.",
    STRIDE_CLASSES: "Largest ℓ₁ norm of a channel's taps that may meet at one pixel: an ℓ₁ bound for every size.",
    NOT_BOUNDED: "No bound is known for every size of the input.",
}
"""Explanation by name of what bounds the operator norm of a layer."""
