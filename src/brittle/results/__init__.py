"""What is found, as frozen data that needs no torch: rates, layers, attacks, whole audits."""

from brittle.results.attacks import (
    DATA_FREE,
    FITTED,
    UNIVERSAL_KINDS,
    CertifiedCurve,
    Evaluation,
    LayerResponse,
    SampleResult,
    SecurityCurve,
    UniversalResult,
)
from brittle.results.documents import SCHEMA_VERSION, AttackResult, Audit, Flag, NormResult, Signature, Verdict
from brittle.results.layers import FRACTIONS, PROFILE_POINTS, LayerBound, LayerResult, LipschitzResult, NormBounds
from brittle.results.rate import NotMeasured, Rate, Setting

__all__ = [
    "DATA_FREE",
    "FITTED",
    "FRACTIONS",
    "PROFILE_POINTS",
    "SCHEMA_VERSION",
    "UNIVERSAL_KINDS",
    "AttackResult",
    "Audit",
    "CertifiedCurve",
    "Evaluation",
    "Flag",
    "LayerBound",
    "LayerResponse",
    "LayerResult",
    "LipschitzResult",
    "NormBounds",
    "NormResult",
    "NotMeasured",
    "Rate",
    "SampleResult",
    "SecurityCurve",
    "Setting",
    "Signature",
    "UniversalResult",
    "Verdict",
]
