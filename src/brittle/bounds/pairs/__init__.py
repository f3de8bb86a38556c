r"""Two layers with an activation between them: ``N_p(B, C) = max_D ||B D C||_p``.

Three files ask the same questions: ``two`` (matrices, p = 2), ``inf`` (matrices, p = inf), ``conv`` (p = 2).

============  =========================================================================================================
``upper``     certified upper bounds of N_p by name; the least is the one to use
``lower``     what a pattern attains: a lower bound of N_p, but not of a network, where no input may reach the pattern
``exact``     N_p itself, to a relative 1e-9; None where it is out of reach
============  =========================================================================================================

Their words:

============  =========================================================================================================
``B, C``      matrices after and before the activation, ``(m, h)`` and ``(h, n)``: weights W2, W1 or factors of them
``K2, K1``    the kernels in their place, each with its geometry
unit          one of the h entries between the two
``slopes``    ``(alpha, gamma)``: smallest and largest difference quotient of the activation; ReLU has (0, 1)
pattern, D    a diagonal matrix with entries within the slopes
middle        ``|alpha + gamma| / 2``; with ``radius = (gamma - alpha) / 2``, D is +-middle I + radius T, T in [-1, 1]
alignment     ``N_p / (||B||_p ||C||_p)``, in [0, 1] for slopes in [0, 1]; ``dense`` has it for two weights
============  =========================================================================================================

And the upper bounds' names:

========================  =============================================================================================
product                   ``||B|| ||C||``
half                      ``middle ||B C|| + radius ||B|| ||C||``
scaled half (2)           the same with the units weighted
entry                     of magnitudes: inf: ``max |B| |C| 1``; 2: ``||(|B C| + |B| |C|) / 2||``
half entry (inf)          ``max middle |B C| 1 + radius |B| |C| 1``
spectral (inf)            row by row, the part of T bounded by a spectral norm with units and inputs weighted
multipliers (2)           ``lambda_max(C^T R C)^(1/2)``, R from diagonal multipliers in closed form (``multipliers``)
optimised multipliers     the same after some steps of optimisation
========================  =============================================================================================

Formulas and proofs: theory page, section "Alignment".
"""
