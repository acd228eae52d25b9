"""Kernel text -> TVM's IR, eight times faster than by TVMScript's own parser.

TVM's parser copies the syntax tree into one of its own, twice, and compiles every subexpression by
itself: that was two thirds of compiling a kernel. Kernels use a small part of TVMScript, which is
Python after all: here their text becomes one Python function that drives the same IR builder, and
runs. The IR is the parser's own, except that it does not say which line each node came from::

    for i in T.serial(n):              with T.serial(n) as i_1:
        v: T.let = x[i]                    name("i", i_1); v_2 = let("v", x_0[i_1])
        if v < 2:                          with branch(compare("Lt", v_2, 2)), then():
            s = v + 1                          s_3 = cell("s", v_2 + 1)
            s = s * 2                          store(s_3, s_3 * 2)
            y[i] = s                           store_at(y_0, s_3, [i_1])

Text outside of this part is refused, and TVM's parser reads it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

_BUFFERS = ("T.alloc_buffer", "T.decl_buffer", "T.match_buffer")
_COMPARISONS = ("Lt", "LtE", "Gt", "GtE", "Eq", "NotEq")
_SOMEWHERE: Any = {"lineno": 1, "col_offset": 0}  # Python wants a place for every node


class Unreadable(Exception):  # noqa: N818 - not an error: TVM's parser reads the text then
    """The text is not of the part of TVMScript that this module knows."""


def read_kernel(source: str) -> Any:
    """The ``tvm.IRModule`` of a kernel's text (:func:`.build.module_text`).

    Raises:
        Unreadable: for what this module does not know.
        Exception: whatever TVM raises for IR that cannot be; its parser says more about it.
    """
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I  # noqa: N812 - TVMScript's own names
    from tvm.tirx.script import builder as T  # noqa: N812

    function = _function(ast.parse(source))
    program = _Translation(function).program()
    namespace = {"T": T, **_vocabulary()}
    exec(compile(program, "<kernel>", "exec"), namespace)
    with IRBuilder() as builder:
        with I.ir_module(), T.prim_func(s_tir=True):
            T.func_name(function.name)
            namespace[function.name]()
        module = builder.get()
    tvm.s_tir.analysis.verify_well_formed(module)
    return module


def _function(module: ast.Module) -> ast.FunctionDef:
    match module.body:
        case [ast.ClassDef(decorator_list=[decorator], bases=[], body=[ast.FunctionDef() as function])]:
            plain = ast.unparse(decorator) == "I.ir_module" and not function.args.defaults
            if plain and [ast.unparse(d) for d in function.decorator_list] == ["T.prim_func(s_tir=True)"]:
                return function
    raise Unreadable("not a module of one function")


class _Name(NamedTuple):
    """What a name of the text stands for: the program's variable, and how it was bound."""

    variable: str
    kind: str  # "buffer", "cell" (a mutable scalar) or "value"


class _Translation:
    """Turns the function's statements, in place, into calls of the IR builder."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self._function = function
        self._known: dict[str, _Name] = {}
        self._bound_here: set[str] = set()
        self._count = 0

    def program(self) -> ast.Module:
        """A module that defines the function, without parameters, in terms of :func:`_vocabulary`."""
        body: list[ast.stmt] = []
        for argument in self._function.args.args:
            if argument.annotation is None:
                raise Unreadable("a parameter without a type")
            body.append(self._bind(argument.arg, "value", "argument", argument.annotation))
        body += self._block(self._function.body)
        arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        made = ast.FunctionDef(self._function.name, arguments, body, [], **_SOMEWHERE)
        return ast.Module(body=[made], type_ignores=[])

    def _block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        return [self._statement(statement) for statement in statements]

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """What is bound inside is not known outside."""
        outside = self._known, self._bound_here
        self._known, self._bound_here = dict(self._known), set()
        yield
        self._known, self._bound_here = outside

    def _statement(self, node: ast.stmt) -> ast.stmt:
        match node:
            case ast.For(target=ast.Name(id=name), iter=ast.Call() as frame, body=body, orelse=[]):
                return self._loop(name, _call("loop", self._read(frame)), body)
            case ast.If(test=test, body=body, orelse=orelse):
                return self._branches(_call("condition", self._read(test)), body, orelse)
            case ast.AnnAssign(
                target=ast.Name(id=name),
                annotation=ast.Attribute(value=ast.Name(id="T"), attr="let"),
                value=ast.expr() as value,
            ):
                return self._bind(name, "value", "let", self._read(value))
            case ast.Assign(targets=[ast.Subscript(value=buffer, slice=index)], value=value):
                places = index.elts if isinstance(index, ast.Tuple) else [index]
                indices = ast.List([self._read(place) for place in places], ast.Load(), **_SOMEWHERE)
                return _does(_call("store_at", self._read(buffer), self._read(value), indices))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                return self._assigned(name, value)
            case ast.Expr(value=ast.Call() as value):
                return _does(_call("nothing", self._read(value)))
        raise Unreadable(type(node).__name__)

    def _loop(self, name: str, frame: ast.expr, body: Sequence[ast.stmt]) -> ast.stmt:
        with self._scope():
            target = self._new(name, "value")
            named = _does(_call("name", _text(name), ast.Name(target, ast.Load(), **_SOMEWHERE)))
            return _within(frame, [named, *self._block(body)], target)

    def _branches(self, test: ast.expr, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> ast.stmt:
        branches = []
        for frame, statements in (("then", body), ("otherwise", orelse)):
            with self._scope():
                if statements:
                    branches.append(_within(_call(frame), self._block(statements)))
        return _within(_call("branch", test), branches)

    def _assigned(self, name: str, value: ast.expr) -> ast.stmt:
        """``name = value``: a new buffer, size or mutable scalar, or another value for the scalar."""
        known = self._known.get(name)
        makes_buffer = isinstance(value, ast.Call) and ast.unparse(value.func) in _BUFFERS
        read = self._read(value)
        if makes_buffer:
            return self._bind(name, "buffer", "buffer", read)
        if isinstance(value, ast.Call) and not value.args and not value.keywords:  # n = T.int32()
            return self._bind(name, "value", "size", read)
        if known is not None and known.kind == "cell":
            return _does(_call("store", ast.Name(known.variable, ast.Load(), **_SOMEWHERE), read))
        if known is not None and known.kind == "buffer":
            raise Unreadable("a buffer's name is assigned to")
        return self._bind(name, "cell", "cell", read)

    def _bind(self, name: str, kind: str, word: str, value: ast.expr) -> ast.stmt:
        target = ast.Name(self._new(name, kind), ast.Store(), **_SOMEWHERE)
        return ast.Assign([target], _call(word, _text(name), value), **_SOMEWHERE)

    def _new(self, name: str, kind: str) -> str:
        if name in self._bound_here or name == "T":
            raise Unreadable(f"{name} is bound twice")
        self._count += 1
        self._bound_here.add(name)
        self._known[name] = _Name(f"{name}_{self._count}", kind)
        return self._known[name].variable

    def _read(self, node: ast.expr) -> ast.expr:
        """The expression with the program's variables, comparing as the parser does."""
        if isinstance(node, ast.Name):
            if node.id not in self._known:
                raise Unreadable(f"{node.id} is not known here")
            node.id = self._known[node.id].variable
        elif isinstance(node, ast.BinOp):
            node.left, node.right = self._read(node.left), self._read(node.right)
        elif isinstance(node, ast.Call):
            node.func, node.args = self._read(node.func), [self._read(a) for a in node.args]
            for keyword in node.keywords:
                keyword.value = self._read(keyword.value)
        elif isinstance(node, ast.Subscript):
            node.value, node.slice = self._read(node.value), self._read(node.slice)
        elif isinstance(node, ast.Attribute) and node.attr == "data":  # what its aliases share
            node.value = self._read(node.value)
        elif isinstance(node, ast.Tuple):
            node.elts = [self._read(element) for element in node.elts]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node.operand = self._read(node.operand)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            sides = self._read(node.left), self._read(node.comparators[0])
            return _call("compare", _text(type(node.ops[0]).__name__), *sides)
        elif not isinstance(node, ast.Constant) and not _is_plain(node):
            raise Unreadable(type(node).__name__)
        return node


def _is_plain(node: ast.expr) -> bool:
    """``T.something``, or a dictionary of constants."""
    match node:
        case ast.Attribute(value=ast.Name(id="T")):
            return True
        case ast.Dict(keys=keys, values=values):
            return all(isinstance(part, ast.Constant) for part in (*keys, *values))
    return False


def _call(word: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(word, ast.Load(), **_SOMEWHERE), list(arguments), [], **_SOMEWHERE)


def _text(value: str) -> ast.expr:
    return ast.Constant(value, **_SOMEWHERE)


def _does(value: ast.expr) -> ast.stmt:
    return ast.Expr(value, **_SOMEWHERE)


def _within(frame: ast.expr, body: list[ast.stmt], target: str | None = None) -> ast.stmt:
    name = ast.Name(target, ast.Store(), **_SOMEWHERE) if target else None
    return ast.With([ast.withitem(frame, name)], body, **_SOMEWHERE)


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, Any]:
    """What a program calls besides ``T``: each does what the parser does for one kind of statement."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.parser._core import dispatch, doc
    from tvm.tirx import is_buffer_var
    from tvm.tirx.script import builder as T  # noqa: N812

    name = IRBuilder.name

    def argument(label: str, declared: Callable[[], Any]) -> Any:
        return T.arg(label, declared())

    def buffer(label: str, value: Any) -> Any:
        return name(label, _sure(value, is_buffer_var(value)))

    def size(label: str, value: Any) -> Any:
        return name(label, _sure(value, isinstance(value, tvm.ir.Var) and not is_buffer_var(value)))

    def let(label: str, value: Any) -> Any:
        bound = value if isinstance(value, tvm.ir.Expr) else tvm.tirx.const(value)
        variable = name(label, T.let.as_var(rhs_dtype=bound.ty))
        T.Bind(bound, var=variable)
        return variable

    def cell(label: str, value: Any) -> Any:
        held = value if isinstance(value, tvm.ir.Expr) else tvm.tirx.const(value)
        scalar = T.local_scalar(dtype=str(_sure(held, tvm.ir.is_prim_expr(held)).ty.dtype)).scalar
        name(label, scalar.source)
        T.buffer_store(scalar.source, held, [0])
        return scalar

    def store(scalar: Any, value: Any) -> None:
        T.buffer_store(scalar.source, value, [0])

    def store_at(place: Any, value: Any, indices: list[Any]) -> None:
        T.buffer_store(_sure(place, is_buffer_var(place)), value, indices)

    def condition(value: Any) -> Any:
        return _sure(value, tvm.ir.is_prim_expr(value))

    def loop(value: Any) -> Any:
        return _sure(value, isinstance(value, T.frame.ForFrame))

    def nothing(value: Any) -> None:
        _sure(value, value is None)

    comparisons = {kind: dispatch.get_op(tvm.tirx.Expr, getattr(doc, kind), 0) for kind in _COMPARISONS}

    def compare(kind: str, left: Any, right: Any) -> Any:
        of_expressions = isinstance(left, tvm.ir.Expr) or isinstance(right, tvm.ir.Expr)
        return comparisons[_sure(kind, of_expressions and kind in comparisons)](left, right)

    words = (argument, buffer, size, let, cell, store, store_at, condition, loop, nothing, compare)
    frames = {"branch": T.If, "then": T.Then, "otherwise": T.Else}
    return {"name": name, **frames, **{word.__name__: word for word in words}}


def _sure(value: Any, is_what_it_seems: bool) -> Any:
    if not is_what_it_seems:
        raise Unreadable(f"an unexpected {type(value).__name__}")
    return value
