"""Direct solvers: triangular solves, Cholesky, LU and what is made of them.

These have a definite count: any order of the same elimination (unblocked, blocked, recursive) multiplies the same
pairs. Divisions (or products with a reciprocal) and square roots on the way count as 1, as in LAPACK Working Note 41,
appendix C, whose formulas these are. Zeros are not looked for.

Not counted, because the work depends on the algorithm or on the data: QR and Householder products (blocked kernels add
products that plain ones have not), SVD, eigenvalues, least squares, LDL, ``cholesky_inverse``, ``matrix_exp``. Complex
matrices are not counted either, a division not being four real ones.
"""

from typing import Any

from .registry import Arguments, Count, Outputs, counts, numel


def substitution_flops(n: int, unit_diagonal: bool = False) -> int:
    """One right-hand side: n(n-1)/2 multiply-adds, and n divisions unless the diagonal is 1."""
    return n * (n - 1) + (0 if unit_diagonal else n)


def cholesky_flops(n: int) -> int:
    """(n^3 - n)/6 multiply-adds, n(n-1)/2 divisions, n square roots."""
    return (n**3 - n) // 3 + n * (n - 1) // 2 + n


def lu_flops(m: int, n: int) -> int:
    """At each pivot: a division for each row below it, a multiply-add for each element below and to the right."""
    return sum((m - pivot - 1) * (1 + 2 * (n - pivot - 1)) for pivot in range(min(m, n)))


def _batch(matrix: Any) -> int:
    m, n = matrix.shape[-2:]
    return numel(matrix) // (m * n) if m * n else 0


def _is_complex(a: Arguments) -> bool:
    return any(getattr(getattr(value, "dtype", None), "is_complex", False) for value in a.values())


def _solve(result: Any, n: int, per_column: int) -> int:
    """``per_column`` FLOPs for each right-hand side in ``result``, whichever side of it the matrix stands on."""
    return numel(result) // n * per_column if n else 0


@counts("aten::linalg_solve_triangular", "aten::triangular_solve")
def solve_triangular_flops(a: Arguments, outputs: Outputs) -> Count:
    """Substitution."""
    matrix = a["A"] if "A" in a else a["self"]
    n = int(matrix.shape[-1])
    return None if _is_complex(a) else _solve(outputs[0], n, substitution_flops(n, a["unitriangular"]))


@counts("aten::linalg_cholesky_ex", "aten::cholesky")
def cholesky_factor_flops(a: Arguments, outputs: Outputs) -> Count:
    """The factor."""
    return None if _is_complex(a) else _batch(a["self"]) * cholesky_flops(int(a["self"].shape[-1]))


@counts("aten::cholesky_solve", "aten::_cholesky_solve_helper")
def cholesky_solve_flops(a: Arguments, outputs: Outputs) -> Count:
    """Two substitutions."""
    matrix = a["input2"] if "input2" in a else a["A"]
    n = int(matrix.shape[-1])
    return None if _is_complex(a) else _solve(outputs[0], n, 2 * substitution_flops(n))


@counts("aten::linalg_lu_factor_ex", "aten::linalg_lu", "aten::_linalg_det", "aten::_linalg_slogdet")
def lu_factor_flops(a: Arguments, outputs: Outputs) -> Count:
    """The factors; for the determinants also their diagonal's product, a reduction."""
    m, n = (int(size) for size in a["A"].shape[-2:])
    return None if _is_complex(a) else _batch(a["A"]) * lu_flops(m, n)


@counts("aten::linalg_lu_solve")
def lu_solve_flops(a: Arguments, outputs: Outputs) -> Count:
    """A substitution with each factor; L has a unit diagonal."""
    n = int(a["LU"].shape[-1])
    per_column = substitution_flops(n) + substitution_flops(n, unit_diagonal=True)
    return None if _is_complex(a) else _solve(outputs[0], n, per_column)


@counts("aten::_linalg_solve_ex", "aten::linalg_inv_ex")
def solve_flops(a: Arguments, outputs: Outputs) -> Count:
    """LU, then a substitution with each factor; the inverse is the solution for the identity (its zeros count)."""
    n = int(a["A"].shape[-1])
    per_column = substitution_flops(n) + substitution_flops(n, unit_diagonal=True)
    return None if _is_complex(a) else _batch(a["A"]) * lu_flops(n, n) + _solve(outputs[0], n, per_column)
