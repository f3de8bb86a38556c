"""How numbers, norms and budgets are written wherever a person reads them."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import Any

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of what is no sign: control and formatting (of the terminal, of directions), breaks of lines."""
_ROUNDING = {"lower": ROUND_FLOOR, "upper": ROUND_CEILING, "nearest": ROUND_HALF_EVEN}


def number(value: float | None, side: str = "nearest") -> str:
    """Three significant digits, or all digits of the integer part when it has up to five.

    A bound is rounded to its own ``side`` (``lower`` down, ``upper`` up), so that the printed number is still one.

    >>> number(0.12345), number(0.12345, "upper"), number(43210.9), number(-1.5e17), number(math.inf), number(None)
    ('0.123', '0.124', '43211', '-1.50 × 10¹⁷', '∞', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if not value:
        return "0"
    digits = 5 if 1e4 <= abs(value) < 1e5 else 4 if 1e3 <= abs(value) < 1e4 else 3
    rounded = Context(prec=digits, rounding=_ROUNDING[side]).create_decimal_from_float(value)
    if 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:.{max(0, digits - 1 - rounded.adjusted())}f}"
    mantissa, _, exponent = f"{rounded:.2e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"


def share(value: float | None) -> str:
    """A share in percent, with a decimal below a tenth.

    >>> share(0.153), share(0.0241), share(None)
    ('15 %', '2.4 %', '–')
    """
    return "–" if value is None else f"{100 * value:.{0 if value >= 0.1 else 1}f} %"


def norm_name(p: float) -> str:
    """The norm as it is written: ``ℓ₁``, ``ℓ₂`` or ``ℓ∞``."""
    return {1: "ℓ₁", 2: "ℓ₂", math.inf: "ℓ∞"}.get(p, f"ℓ{p:g}")


def budget(eps: float) -> str:
    """A perturbation's size, as a fraction of 255 when it is a whole number of those steps and no short decimal.

    >>> budget(8 / 255), budget(0.5), budget(0.6), budget(1.0), budget(1e308)
    ('8/255', '0.5', '0.6', '1', '1e+308')
    """
    steps, short = round(255 * min(eps, 1.0)), f"{eps:.2g}"  # beyond 1 the product may overflow
    if 0 < steps < 255 and abs(255 * eps - steps) < 1e-4 and abs(float(short) - eps) > 1e-6 * eps:
        return f"{steps}/255"
    return f"{eps:.3g}"


def budget_in_units(p: float, eps: float, bounds: tuple[float, float], std: Sequence[float] = ()) -> str:
    """A budget in every unit that people think in: of the inputs, as a pixel's levels, and after the normalisation.

    Args:
        p: Norm of the budget: 2 or inf.
        eps: The budget, in units of the inputs.
        bounds: Smallest and largest value of an input; pixels have 255 steps where they are 0 and 1.
        std: Standard deviations of the normalisation, by channel; none where it is not known.

    >>> budget_in_units(math.inf, 8 / 255, (0, 1), (0.247, 0.2435, 0.2616))
    'ℓ∞ 8/255 = 0.0314 (0.120 to 0.129 after the normalisation)'
    >>> budget_in_units(math.inf, 0.06, (0, 1)), budget_in_units(2, 0.5, (0, 1), (0.5,))
    ('ℓ∞ 0.06 = 15.3/255', 'ℓ₂ 0.5 (1.00 after the normalisation)')
    """
    plain, written = f"{eps:.3g}", budget(eps)
    if written == plain and math.isinf(p) and bounds == (0, 1):
        written, plain = plain, f"{255 * eps:.3g}/255"
    ends = list(dict.fromkeys(number(eps / side) for side in (max(std), min(std)))) if std else []
    inside = f" ({' to '.join(ends)} after the normalisation)" if ends else ""
    return f"{norm_name(p)} {written}{'' if written == plain else f' = {plain}'}{inside}"


def duration(seconds: float) -> str:
    """Seconds as they are read.

    >>> duration(7.26), duration(90), duration(7260)
    ('7.3 s', '1 min 30 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def printable(text: str) -> str:
    r"""A text with everything that would act on a terminal, break the line or turn it around written out.

    Names of files, layers and classes come from others: they could clear the screen, or look like another name.

    >>> printable("a\x1b[2Jb\nc ä é 8/255")
    'a\\x1b[2Jb\\nc ä é 8/255'
    """
    if text.isprintable():
        return text
    return "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign) in UNPRINTABLE else sign for sign in text
    )


def all_printable(value: Any) -> Any:
    """A result with every text in it as :func:`printable` writes it; per-sample results stay as they are."""
    match value:
        case str():
            return printable(value)
        case tuple():
            return tuple(map(all_printable, value))
        case dict():
            return {all_printable(key): all_printable(entry) for key, entry in value.items()}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.metadata.get("json", True)]
            return dataclasses.replace(value, **{name: all_printable(getattr(value, name)) for name in names})
    return value
