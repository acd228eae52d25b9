"""Harmonics in a convolution's kernels: contracted with Clebsch-Gordan constants, and their gradient.

Both are an edge's, or a chunk's, own: they lie in small arrays, a column after another, those of a head (of
one part of every block's channels) before the next head's.
"""

from __future__ import annotations

from collections.abc import Sequence

from .conv_terms import PathTerms, Problem, conv_width
from .emit import literal, local, loop, signed_sum, splat, vector


def gathered_harmonics(problem: Problem, size: int) -> list[str]:
    """An edge's harmonics into ``harmonic[column, edge]``."""
    columns = [h * problem.step + c for h in range(problem.heads) for c in problem.columns]
    return [f"harmonic[{k * size} + j] = sh[edge[j], {c}]" for k, c in enumerate(columns)]


def harmonics_memory(problem: Problem, size: int) -> list[str]:
    """The arrays of a chunk's harmonics, and of what they are with the constants."""
    columns, symbols = (max(1, len(part)) * problem.heads for part in (problem.columns, problem.symbols))
    return [local("harmonic", columns * size), local("A", symbols * size)]


def clear_harmonics(problem: Problem, lanes: int, size: int) -> list[str]:
    """Unused lanes of the last chunk are computed too: zeros, not whatever the stack holds."""
    count = max(1, len(problem.columns)) * problem.heads * size // lanes
    clear = vector("harmonic", f"z * {lanes}", lanes)
    return loop(f"z in T.serial({count})", [f"{clear} = {splat(literal(0.0), lanes)}"])


def contract_harmonics(problem: Problem, lanes: int, size: int) -> list[str]:
    """``A[symbol, edge]`` for the chunk, vectorised over its edges."""
    place = {column: k for k, column in enumerate(problem.columns)}
    lines = []
    for k, form in enumerate(problem.symbols):
        terms = []
        for c, value in form:
            at = _of_head(problem, "h", len(place), f"{place[c]}", size)
            terms.append((1, f"{vector('harmonic', f'{at} + v * {lanes}', lanes)} * {literal(value)}"))
        symbol = _of_head(problem, "h", len(problem.symbols), f"{k}", size)
        lines.append(f"{vector('A', f'{symbol} + v * {lanes}', lanes)} = {signed_sum(terms)}")
    return _every_head(problem, loop(f"v in T.serial({size // lanes})", lines))


def symbol_place(problem: Problem, symbol: int, head: str, size: int, edge: str) -> str:
    """Where the contracted harmonics of an edge lie in ``A``."""
    return f"{_of_head(problem, head, len(problem.symbols), str(symbol), size)} + {edge}"


def head_of_tile(problem: Problem, mul: int, lanes: int) -> str:
    """The head that the channels of tile ``t`` of a block belong to."""
    tiles = mul // problem.heads // lanes
    return "t" if tiles == 1 else f"t // {tiles}"


def _of_head(problem: Problem, head: str, count: int, place: str, size: int) -> str:
    """Where ``size`` numbers begin, ``count`` times which every head has."""
    if problem.heads == 1:
        return str(int(place) * size)
    return f"(({head}) * {count} + {place}) * {size}"


def _every_head(problem: Problem, lines: Sequence[str]) -> list[str]:
    return list(lines) if problem.heads == 1 else loop(f"h in T.serial({problem.heads})", lines)


def grad_sh_slot(problem: Problem, column: int, widest: int, head: str = "h") -> str:
    """Where an edge's partial grad_sh lies: one vector per column."""
    place = str(problem.columns.index(column))
    return _of_head(problem, head, len(problem.columns), place, widest)


def grad_sh_memory(problem: Problem, widest: int) -> list[str]:
    """The arrays of an edge's partial grad_sh, and for adding it up."""
    columns = max(1, len(problem.columns)) * problem.heads
    return [local("partial", columns * widest), local("halves", max(2, widest))]


def zero_grad_sh(problem: Problem, widest: int) -> list[str]:
    """No gradient yet."""
    zero = splat(literal(0.0), widest)
    slots = [grad_sh_slot(problem, c, widest) for c in problem.columns]
    return _every_head(problem, [f"{vector('partial', slot, widest)} = {zero}" for slot in slots])


def reduce_grad_sh(problem: Problem, widest: int) -> list[str]:
    """Sum each partial vector over its lanes, by halving: a fixed order, so the same bits always."""
    lines = []
    for column in range(conv_width(problem, "sh") // problem.heads):
        home = f"{column}" if problem.heads == 1 else f"h * {problem.step} + {column}"
        if column not in problem.columns:
            lines.append(f"grad_sh[edge[j], {home}] = {literal(0.0)}")
            continue
        at, source, half = grad_sh_slot(problem, column, widest), "partial", widest // 2
        while half >= 1:
            total = f"{vector(source, at, half)} + {vector(source, f'{at} + {half}', half)}"
            lines.append(f"{vector('halves', str(half), half)} = {total}")
            at, source, half = str(half), "halves", half // 2
        lines.append(f"grad_sh[edge[j], {home}] = {source}[{at}]")
    return _every_head(problem, lines)


def grad_sh_path(terms: PathTerms, k: int, version: dict[int, int]) -> list[str]:
    """Add one path to the partial grad_sh; products with the same constant are summed first."""
    sizes = {abs(t.value) for t in terms.triples}
    single = len(sizes) == 1
    lines = [f"c{k}: T.let = w{k} * {literal(min(sizes))}"] if single else []
    weight = f"c{k}" if single else f"w{k}"
    lines += [f"y{k}_{m}: T.let = {weight} * x{m}" for m in range(terms.path.block_x.components)]
    for column in sorted({t.column for t in terms.triples}):
        for size in sorted({abs(t.value) for t in terms.triples if t.column == column}):
            products = [
                (1 if t.value > 0 else -1, f"y{k}_{t.m1} * g{k}_{t.m3}")
                for t in terms.triples
                if t.column == column and abs(t.value) == size
            ]
            before = f"s{column}_{version[column]}"
            version[column] += 1
            after = f"s{column}_{version[column]}: T.let = "
            if single:
                lines.append(after + signed_sum(products, before))
            else:
                lines.append(f"{after}{before} + ({signed_sum(products)}) * {literal(size)}")
    return lines
