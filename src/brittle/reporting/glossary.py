"""The terms of a report, each explained in a sentence or two."""

from __future__ import annotations

from collections.abc import Iterable

from brittle.results import Audit
from brittle.results.methods import Argument, UniversalKind

GLOSSARY = {
    "Clean accuracy": "Share of the samples that the model classifies correctly without attack.",
    "Robust accuracy": (
        "Share of the samples that stay correct under every attack that was run. An upper estimate of the true"
        " value: an attack may miss an adversarial example, but each one counted was checked again."
    ),
    "Budget eps": "Largest size of the perturbation in the stated norm, in input units.",
    "95 % interval": "Wilson's interval for the underlying probability, samples taken as independent draws.",
    "Fooling rate": "Share of the samples right without attack whose predicted class changes under attack.",
    "Median margin": (
        "Median, over the samples that are right without attack, of how far the logit of the right class exceeds the"
        " largest other one. An estimate."
    ),
    "Margin over sensitivity": (
        "The margin over how fast it shrinks when the input moves, both at the sample; the median over the samples that"
        " are right without attack. To first order the distance to the nearest wrong answer, in input units: an"
        " estimate and no bound."
    ),
    "Masked gradients": (
        "Gradients that are zero, random or misleading, so that attacks which follow them fail although adversarial"
        " examples are near: the network looks more robust than it is."
    ),
    "Certified accuracy": (
        "Share of the samples that are right without attack and whose certified radius exceeds the budget. A lower"
        " bound of the true robust accuracy, whatever the attack."
    ),
    "Certified radius": (
        "Distance, in input units, within which no perturbation can change the prediction: the margin over the"
        " certified bound on how fast the margin can move."
    ),
    "Layer": "Qualified name of the module in the model.",
    "No.": "Position of the layer in the order in which the model lists its modules.",
    "Type": "Type of the module, with what makes its matrix special.",
    "Shape": "Rows are output neurons or filters; columns are the inputs that each of them weighs.",
    "Parameters": "Weight entries stored.",
    "Heads": "Attention heads that the rows belong to, as many to each.",
    "k-term error": (
        "What is lost, as a share of the ℓ₁ norm, when only the largest 5, 10, 25 or 50 % are kept: of the rows' ℓ₁"
        " norms (row), of the singular values (spectral) or of the heads' Frobenius norms (heads). 0: perfectly"
        " compressible; 1 − fraction: all are equal."
    ),
    "Spread": "1 − (k-th largest / largest) among the entries kept. 0: all kept are equal; 1: some kept are zero.",
    "Rank": "Singular values above 10⁻¹⁰ of the largest.",
    "Stable rank": "‖W‖F² / ‖W‖₂²: between 1 and the rank, small when few directions dominate.",
    "Effective rank": "Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).",
    "‖W‖∗ / ‖W‖₂": "Sum of the singular values over the largest: between 1 and the rank.",
    "(‖W‖∗ / ‖W‖F)²": "Squared ratio of the nuclear and the Frobenius norm: between 1 and the rank.",
    "Effective sparsity": "(Σ|Wᵢⱼ| / ‖W‖F)²: between 1 and the number of non-zero entries.",
    "Frobenius norm ‖W‖F": "Root of the sum of squared entries; the scale of the matrix.",
    "Matrix norm": (
        "‖W‖∞ is the largest row ℓ₁ norm and ‖W‖₂ the largest singular value, both exact. For a convolution they are"
        " norms of the filter matrix, not of the operator on images."
    ),
    "Concentration": (
        "How many times the matrix norm exceeds that of a flat matrix of the same shape and Frobenius norm: equal"
        " singular values for ℓ₂ (at least 1), entries of equal magnitude for ℓ∞ (below 1 where rows are sparse and"
        " equally large)."
    ),
    "Operator norm": (
        "Largest factor by which the layer can magnify an input in the stated norm, for convolutions on images of the"
        " size seen. Certified from below (lower) and above (upper); where the two coincide, it is exact."
    ),
    "Structure factor": (
        "The part of the bounds of Theorem 3.1 that depends on compressibility alone and not on the scale:"
        " lower ≤ exact ≤ sharp ≤ linear ≤ paper. The paper's form is ∞ when an entry kept is zero."
    ),
    "Theorem 3.1": "Structure factor × scale: certified bounds on the matrix norm, beside its exact value.",
    "Sensitivity (Lipschitz constant)": (
        "Largest change of the logits per change of the input, in the stated norm. The true value lies between the"
        " largest found and the least certified bound."
    ),
    **{argument.value: argument.explanation for argument in Argument},
    "Random perturbation": (
        "Random signs (ℓ∞) or a random direction (ℓ₂) of the budget's size, carried through the layers like the attack."
    ),
    "Relative change of the output": "Median of ‖z_adv − z‖₂ / ‖z‖₂ at the layer's output.",
    "Growth": (
        "A layer's gain on the attack over its gain on the way from a sample to one of another class: robustness is"
        " margin over sensitivity, and both pass through the layer. Owed to concentration is what of it a random matrix"
        " of the same shape and scale could not do. Estimates on these samples."
    ),
    "Share it decides by": (
        "Cosine, in magnitude, between the gradient of the margin of two classes at a sample of one and the way to the"
        " nearest sample of the other: how much of that way the decision looks at. Exact at the sample, and to first"
        " order beyond. Of a linear classifier it is the share of the best possible radius that it keeps; of other"
        " networks it bounds no radius."
    ),
    "Minimum-distance radius": (
        "Half the distance to the nearest sample of another class among those given: up to there the rule that answers"
        " with the class of the nearest sample keeps its answer. Exact; with more samples it gets smaller."
    ),
    "Attacked radius": (
        "Length, in ℓ₂, of the shortest perturbation found that the network itself answers otherwise: an upper bound of"
        " the distance up to which it keeps its answer."
    ),
    "Nearer output": (
        "The share by which a rule would decide that takes the nearer of the two samples in a layer's output: the"
        " cosine between the way and the gradient of the distance of the two outputs. 100 % at the input."
    ),
    "Not lost": (
        "Share of the length of the way in the row space of the Jacobian of a layer's output; in its strong"
        " directions, those that hold 99 % of the squared singular values. The former is at least the share that the"
        " network decides by, and falls from layer to layer."
    ),
    "Universal perturbation": (
        "One perturbation for all inputs."
        + "".join(f" {kind.capitalize()}: {kind.explanation}" for kind in UniversalKind)
        + " All are judged on the other half, beside random ones of equal size. A larger share of changed predictions"
        " may exist: each is an estimate from below of the worst."
    ),
}
"""Every term that a report may use, by name."""


def glossary_of(audit: Audit, column_terms: Iterable[str]) -> dict[str, str]:
    """The terms that the report of an audit uses, in their order of appearance.

    Args:
        audit: What is reported.
        column_terms: The terms of the layer table's columns.
    """
    tried = {name for norm in audit.norms for name, _ in norm.lipschitz.arguments}
    attack = ["Clean accuracy", "Robust accuracy", "Budget eps", "95 % interval", "Fooling rate", "Masked gradients"]
    groups = [
        (attack, any(norm.evaluation for norm in audit.norms)),
        (["Median margin"], any(norm.evaluation and norm.evaluation.median_margin for norm in audit.norms)),
        (["Margin over sensitivity"], any(norm.lipschitz.reach is not None for norm in audit.norms)),
        (["Certified accuracy", "Certified radius"], any(norm.certified for norm in audit.norms)),
        (column_terms, bool(audit.layers)),
        (["Sensitivity (Lipschitz constant)"], bool(audit.norms)),
        ([argument for argument in Argument if argument in tried], True),
        (["Random perturbation", "Relative change of the output"], any(norm.responses for norm in audit.norms)),
        (["Growth"], any(norm.class_responses for norm in audit.norms)),
        (["Share it decides by", "Minimum-distance radius", "Attacked radius"], audit.features is not None),
        (["Nearer output", "Not lost"], bool(audit.features and audit.features.layers)),
        (["Universal perturbation"], any(norm.universal for norm in audit.norms)),
    ]
    return {term: GLOSSARY[term] for terms, used in groups if used for term in terms}
