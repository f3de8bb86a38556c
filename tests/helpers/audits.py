"""Synthetic audits: everything there is in one of them, no data in another, and a single hostile layer; and audits
with parts exchanged or left out.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np

from brittle.results import (
    FRACTIONS,
    Audit,
    CertifiedCurve,
    Evaluation,
    FeatureCompression,
    FeatureLayer,
    FeaturePair,
    FragileSample,
    LayerBound,
    LayerResponse,
    LayerResult,
    LipschitzResult,
    NormBounds,
    NormResult,
    NotMeasured,
    Rate,
    SampleResult,
    SecurityCurve,
    Signature,
    UniversalResult,
    Verdict,
)

INF = math.inf
HOSTILE = "</script><img onerror=alert(1) src=x>"
TWO = {
    "product of norms": 5400.0, "multipliers": 1843.2, "path": 4100.0, "cross norm": 9000.0, "paper form": INF,
    "sharp form": 7000.0, "exact norms, all pairs": 2500.0, "ends": 2400.0, "exponents": 2300.0,
    "pairs of convolutions": 2600.0,
}  # fmt: skip
SUP = {
    "product of norms": 3.21e17, "chain": 3.21e17, "segments": 8e17, "weighted segments": 7e17,
    "exact norms, disjoint pairs": 8e17,
}  # fmt: skip
RANDOM = tuple(Rate(hits, 456) for hits in (9, 4, 1, 17, 9))
CERTIFIED = CertifiedCurve(
    2.0,
    (0.0, 0.0123, 0.08, 0.125, 0.25, 0.4, 0.5, 0.6, 1.0),
    tuple(Rate(hits, 1000) for hits in (912, 911, 700, 600, 456, 200, 121, 0, 0)),
    0.2468,
)


def layer(
    name, m=32, n=48, *, kind="Linear", decay=0.05, exact=True, zero=False, infinite=False, seed=0
) -> LayerResult:
    """A layer's result, computed from a random matrix with a decaying spectrum; bounds are merely ordered."""
    rng = np.random.default_rng(seed)
    p = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, p)))[0] for size in (m, n))
    matrix = 0.0 * np.outer(np.ones(m), np.ones(n)) if zero else u * np.exp(-decay * np.arange(p)) @ v.T
    rows, sigma = np.sort(np.abs(matrix).sum(1))[::-1], np.linalg.svd(matrix)[1] if not zero else np.zeros(p)
    frobenius, nuclear = float(np.linalg.norm(matrix)), float(sigma.sum())
    largest = float(sigma[0]) or 1.0

    def errors(vector):
        kept = [max(1, round(f * len(vector))) for f in FRACTIONS]
        return tuple(float(vector[k:].sum() / (vector.sum() or 1)) for k in kept)

    def spreads(vector):
        return tuple(float(1 - vector[max(1, round(f * len(vector))) - 1] / (vector[0] or 1)) for f in FRACTIONS)

    def bounds(p, vector):
        factor = float(vector[0]) / (frobenius or 1.0)
        for place in range(len(FRACTIONS)):
            side = (0.6 * factor, 1.3 * factor, 1.7 * factor, INF if infinite else 4 * factor)
            error, spread = errors(vector)[place], spreads(vector)[place]
            yield LayerBound(p, 3, error, spread, None, None, frobenius, float(vector[0]), *side)

    norms = [NormBounds(p, float(v[0]), float(v[0]) * (1 if exact else 1.8), "exact" if exact else "torus")
             for p, v in ((2.0, sigma), (INF, rows))]  # fmt: skip
    return LayerResult(
        name=name, kind=kind, shape=(m, n), parameters=m * n, row_error=errors(rows), spectral_error=errors(sigma),
        row_spread=spreads(rows), spectral_spread=spreads(sigma), row_norms=tuple(map(float, rows[:128])),
        singular_values=tuple(map(float, sigma[:128])), spectrum=p, rank=0 if zero else p,
        stable_rank=(frobenius / largest) ** 2, nuclear_spectral_ratio=nuclear / largest,
        nuclear_frobenius_ratio=(nuclear / (frobenius or 1.0)) ** 2, effective_rank=0.8 * p,
        effective_sparsity=0.6 * m * n, frobenius=frobenius, filter_norm_inf=float(rows[0]),
        filter_norm_2=float(sigma[0]), operator_norms=tuple(norms),
        bounds=(*bounds(2.0, sigma), *bounds(INF, rows)), input_size=None if kind == "Linear" else (32, 32),
        degenerate=zero,
    )  # fmt: skip


def features() -> FeatureCompression:
    """Forty pairs, of which every fifth was followed through the layers; Jacobians of the last two of these."""
    pairs = tuple(
        FeaturePair(
            25 * i, 7 * i, 4 if i % 2 else 9, 9 if i % 2 else 4, 6.0 + 0.1 * i, 0.05 + 0.002 * i, not i % 5,
            0.3 + 0.02 * i if not i % 5 else None,
        )
        for i in range(40)
    )  # fmt: skip
    layers = (
        FeatureLayer("conv1", 4096, 0.81),
        FeatureLayer("features.fc", 64, 0.32, 0.74, 0.55, 64, 21),
        FeatureLayer("head", 10, 0.15, 0.33, 0.30, 10, 7),
    )
    return FeatureCompression(3072, 1000, pairs, layers, jacobians=8, interpolant=0.041)


@functools.cache
def full() -> Audit:
    """Three layers, attacked in two norms and certified in one."""
    layers = (
        layer("conv1", 16, 27, kind="Conv2d", exact=False, decay=0.08),
        layer("features.fc", 64, 96, decay=0.03, seed=1),
        layer("head", 10, 64, decay=0.12, seed=2),
    )
    settings = {"steps": 20, "step_size": 0.25, "targeted": True, "note": None, "sizes": (1.0, 2.0)}
    names = ("apgd-ce", "apgd-dlr", "square")
    linf = Evaluation(names, INF, 8 / 255, (0.0, 1.0), 2, 0, settings, 1000, 912, 417, 3, 8 / 255, median_margin=4.2)
    two = Evaluation(names[:2], 2.0, 0.5, (0.0, 1.0), 1, 0, settings, 1000, 912, 583, 0, 0.4999999, median_margin=4.2)
    fragile = tuple(FragileSample(i, 0, 7, 0.1 * i, 0.002 * i) for i in range(1, 4))
    eps = tuple(k / 255 for k in (1, 2, 4, 6, 8, 12, 16))
    robust = [
        tuple(Rate(hits, 1000) for hits in row) for row in ((868, 811, 690, 551, 417, 210, 74), (842, 760, 583, 240))
    ]
    responses = {
        p: tuple(
            LayerResponse(name, p, (1, 5), (0.05 * place, 0.2 * place), (1 / 48, 5 / 48), 0.1 * place * p0, 3.0, 495, 2)
            for place, name in enumerate(("conv1", "features.fc", "head"), 1)
        )
        for p, p0 in ((2.0, 1.0), (INF, 1.4))
    }
    measured = tuple(replace(r, step=2.5, step_error=0.01, energy_error=(0.01, 0.01)) for r in responses[INF])
    aimless = tuple(replace(r, energy=r.isotropic, step=0.7) for r in measured)
    between = tuple(replace(r, step=1.0) for r in measured)
    free = f"+ sign of row 3 of “{HOSTILE}”"
    return Audit(
        model="small CNN",
        verdict=Verdict(
            "weakened",
            "Half of the accuracy survives: 91.2 % without attack, 41.7 % under ℓ∞ attacks of size 8/255.",
            (
                "The layer features.fc has 3.1 times the spectral norm of a flat matrix of its size.",
                "The attack puts 60 % of its energy into the top 5 directions of the head, where chance would put 8 %.",
                "One perturbation for all inputs changes 31 % of the predictions.",
            ),
        ),
        norms=(
            NormResult(
                INF, 8 / 255,
                LipschitzResult(
                    INF, None, "", "norm (LayerNorm): not Lipschitz on all inputs", 96.2, 40.3, 200, 90.0, (), 0.04, 9.5
                ),
                linf, SecurityCurve(INF, eps, robust[0]), None, measured,
                (
                    UniversalResult(
                        INF, 8 / 255, "fitted", "projected ascent", 500, Rate(140, 456), RANDOM, Rate(330, 500)
                    ),
                    UniversalResult(INF, 8 / 255, "data-free", free, 500, Rate(56, 456), RANDOM, Rate(401, 500)),
                ),
                random_responses=aimless, class_responses=between, most_fragile=fragile,
            ),
            NormResult(
                2.0, 0.5, LipschitzResult(2.0, 1843.2, "multipliers", None, 12.4, 4.1, 200, 11.3, tuple(TWO.items())),
                two, SecurityCurve(2.0, (0.125, 0.25, 0.5, 1.0), robust[1]), CERTIFIED, responses[2.0],
                (UniversalResult(2.0, 0.5, "fitted", "projected ascent", 500, Rate(41, 456), RANDOM, Rate(418, 500)),),
            ),
        ),
        layers=layers,
        not_measured=(
            NotMeasured("bn1", "no matrix"),
            NotMeasured("bn2", "no matrix"),
            NotMeasured("certified ℓ∞ sensitivity", "norm (LayerNorm) has no global bound"),
        ),
        signature=Signature(
            {"brittle": "0.1.0", "torch": "2.6.0"}, "cpu", 0,
            {"eps_inf": (2 / 255, 8 / 255), "limit": 1000, "attack": "apgd"}, "ab" * 32, "cd" * 32,
        ),
        parameters=8_576,
        seconds=192.4,
        features=features(),
    )  # fmt: skip


@functools.cache
def data_free() -> Audit:
    """Sixty layers without data: depthwise ones, one of zeros, operator norms between bounds, nothing certified."""
    layers = tuple(
        layer(
            f"blocks.{i}.{'depthwise' if i % 3 == 1 else 'project' if i % 3 else 'expand'}.conv",
            *((24, 9) if i % 3 == 1 else (16 + i, 40)),
            kind="Conv2d (24 groups)" if i % 3 == 1 else "Conv2d",
            decay=0.02 + 0.15 * (i % 7) / 7,
            exact=i % 4 == 0,
            zero=i == 7,
            infinite=i % 3 == 1,
            seed=i,
        )
        for i in range(60)
    )
    return Audit(
        model="mobile network",
        verdict=Verdict("not attacked", "No data were given, so the weights alone were measured.", ()),
        norms=(NormResult(2.0, None, LipschitzResult(2.0, None, "", "act (SiLU): no sound rule", None, None, 0)),),
        layers=layers,
        not_measured=tuple(NotMeasured(f"blocks.{i}.bn", "no matrix") for i in range(60)),
        signature=Signature({"brittle": "0.1.0"}, "cpu", 0, {}, "ef" * 32, None),
        parameters=3_504_872,
    )  # fmt: skip


@functools.cache
def attentive() -> Audit:
    """One layer whose rows belong to two attention heads."""
    heads = replace(layer("attn.q_proj", 8, 8), head_norms=(4.0, 1.0), head_error=(0.2,) * 4)
    return replace(data_free(), layers=(heads,))


@functools.cache
def one_layer() -> Audit:
    """One layer with one output and a hostile name; a certified bound that is astronomically large."""
    return replace(
        data_free(),
        model=HOSTILE,
        layers=(layer(HOSTILE, 1, 20),),
        norms=(
            norm_result(
                INF,
                lipschitz=LipschitzResult(
                    INF, 3.21e17, "product of norms", None, None, None, 0, None, tuple(SUP.items())
                ),
            ),
        ),
        not_measured=(NotMeasured(HOSTILE, "because of $x$ & <b>"),),
    )


NO_PARTS: dict[str, Any] = {
    "evaluation": None,
    "curve": None,
    "certified": None,
    "responses": (),
    "random_responses": (),
    "class_responses": (),
    "universal": (),
    "flags": (),
}
"""What a norm's result has without data."""


def no_sensitivity(p: float) -> LipschitzResult:
    """Neither side of the Lipschitz constant."""
    return LipschitzResult(p, None, "", None, None, None, 0)


def norm_result(p: float = INF, **parts: Any) -> NormResult:
    """A norm with the given parts alone; the budget is the evaluation's."""
    evaluation = parts.get("evaluation")
    given = {"eps": evaluation.eps if evaluation else None, "lipschitz": no_sensitivity(p)} | parts
    return NormResult(p, **given)


def with_parts(audit: Audit, p: float | None = None, **parts: Any) -> Audit:
    """The audit with these parts in the norm ``p``, or in every norm."""
    norms = [replace(norm, **parts) if p in (None, norm.p) else norm for norm in audit.norms]
    return replace(audit, norms=tuple(norms))


def without(audit: Audit, *names: str) -> Audit:
    """The audit without some parts of its norms' results; ``lipschitz`` leaves neither side of it."""
    audit = with_parts(audit, **{name: NO_PARTS[name] for name in names if name != "lipschitz"})
    for norm in audit.norms if "lipschitz" in names else ():
        audit = with_parts(audit, norm.p, lipschitz=no_sensitivity(norm.p))
    return audit


VERDICTS = 60
"""Samples of :func:`with_verdicts`."""


def with_verdicts(seed: int) -> Audit:
    """The full audit with random verdicts on a few samples, the same clean and attacked in any norm but its own."""
    audit = full()
    for norm in audit.norms:
        rng = np.random.default_rng((seed, int(norm.p == 2)))
        clean = np.random.default_rng(seed).random(VERDICTS) < 0.8
        held, radii = clean & (rng.random(VERDICTS) < 0.6), rng.random(VERDICTS) * norm.eps * 2
        samples = tuple(
            SampleResult(i, 1, int(clean[i]), 1, 1.0, 1.0, 0.0, None if held[i] else "pgd" if clean[i] else None,
                         None, float(radii[i]) if held[i] else 0.0, bool(held[i] and radii[i] > norm.eps), i % 2 == 0)
            for i in range(VERDICTS)
        )  # fmt: skip
        counts = {"clean_correct": int(clean.sum()), "robust_correct": int(held.sum())}
        proven = sum(sample.proven for sample in samples)
        changed = replace(norm.evaluation, n=VERDICTS, samples=samples, proven=proven, **counts)
        certified = replace(full().norm(2.0).certified, p=norm.p)
        audit = with_parts(audit, norm.p, evaluation=changed, certified=certified)
    return audit
