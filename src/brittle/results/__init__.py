"""What is found, as frozen data that needs no torch: rates, layers, attacks, whole audits."""

from brittle.results.attacks import (
    CertifiedCurve,
    ClassAccuracy,
    Evaluation,
    Flag,
    FragileSample,
    LayerResponse,
    SampleResult,
    SecurityCurve,
    UniversalResult,
    warnings_of,
)
from brittle.results.comparison import ComparedNetwork, Comparison, LayerRow, Paired, mcnemar
from brittle.results.compression import CompressionRecipe, CompressionRequest, GroupCut
from brittle.results.documents import (
    SCHEMA_VERSION,
    AttackResult,
    Audit,
    Normalisation,
    NormResult,
    Signature,
    Verdict,
)
from brittle.results.examples import Examples, Pictures
from brittle.results.features import FeatureCompression, FeatureLayer, FeaturePair
from brittle.results.frontiers import Frontier, FrontierRow
from brittle.results.layers import FRACTIONS, PROFILE_POINTS, LayerBound, LayerResult, LipschitzResult, NormBounds
from brittle.results.methods import Argument, OperatorMethod, UniversalKind
from brittle.results.rate import NotMeasured, Rate, Setting
from brittle.results.reproduction import (
    ClaimResult,
    ClaimVerdict,
    ColumnCheck,
    ExperimentResult,
    Reproduction,
    Statistic,
)
from brittle.results.size import Latency, NetworkSize

__all__ = [
    "FRACTIONS",
    "PROFILE_POINTS",
    "SCHEMA_VERSION",
    "Argument",
    "AttackResult",
    "Audit",
    "CertifiedCurve",
    "ClaimResult",
    "ClaimVerdict",
    "ClassAccuracy",
    "ColumnCheck",
    "ComparedNetwork",
    "Comparison",
    "CompressionRecipe",
    "CompressionRequest",
    "Evaluation",
    "Examples",
    "ExperimentResult",
    "FeatureCompression",
    "FeatureLayer",
    "FeaturePair",
    "Flag",
    "FragileSample",
    "Frontier",
    "FrontierRow",
    "GroupCut",
    "Latency",
    "LayerBound",
    "LayerResponse",
    "LayerResult",
    "LayerRow",
    "LipschitzResult",
    "NetworkSize",
    "NormBounds",
    "NormResult",
    "Normalisation",
    "NotMeasured",
    "OperatorMethod",
    "Paired",
    "Pictures",
    "Rate",
    "Reproduction",
    "SampleResult",
    "SecurityCurve",
    "Setting",
    "Signature",
    "Statistic",
    "UniversalKind",
    "UniversalResult",
    "Verdict",
    "mcnemar",
    "warnings_of",
]
