"""What a module computes, as one hash: a captured graph may stand for it only where nothing has changed.

Hashed are, for every module of the tree: the bytes, types and shapes of parameters and buffers, every
attribute, and the code of its class and of the class's bases as Python runs it (bytecode, constants,
defaults, closures), together with whatever functions, classes and values that code names. Of packages that
code comes from, all source files are hashed besides; of torch and the libraries beneath it, the versions.
What cannot be rendered in the same way in every process (an open file, a compiled TorchScript module, a
hook) has no hash, and such a module is captured every time.
"""

from __future__ import annotations

import collections
import dis
import enum
import fractions
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NOT_COMPUTING = frozenset(name for name in _HOOKS if "state_dict" in name)
_GLOBAL_HOOKS = tuple(
    name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks")
)
# Their versions stand for their sources; this package's own are hashed in any case.
_PLATFORM = frozenset(
    {
        *sys.stdlib_module_names,
        __name__.partition(".")[0],
        "torch",
        "numpy",
        "scipy",
        "sympy",
        "ase",
        "e3nn",
        "opt_einsum",
        "typing_extensions",
    }
)
_VERSIONED = ("torch", "numpy", "scipy", "e3nn", "opt_einsum_fx", "opt_einsum", "ase")
_ATOMS = (
    type(None),
    bool,
    int,
    str,
    bytes,
    complex,
    torch.dtype,
    torch.device,
    torch.layout,
    slice,
    fractions.Fraction,
)
_FIELD = type(collections.namedtuple("_Field", "x").x)  # type: ignore[attr-defined]
_CACHED = type(functools.lru_cache(lambda: None))
_SLOT = (_FIELD, types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.ClassMethodDescriptorType)
_LIBRARIES = (".so", ".pyd", ".dylib")
_LARGEST_PACKAGE = 5_000  # source files


class _UnstableError(Exception):
    """Something that the next process might render differently."""


def fingerprint(module: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """The hash of what ``module`` computes and of the inputs that it is traced with, or None if it has none.

    Two modules of equal hash give the same graph. A hash says nothing about numbers that the graph gives:
    these are still to be compared with the original's.

    Args:
        module: an energy model.
        inputs: by name, in the order that the module takes them.
    """
    try:
        renderer = _Renderer()
        renderer.add("module")
        renderer.module(module)
        for name, value in inputs.items():
            renderer.add("input", name)
            renderer.tensor(value)
        renderer.add("surroundings", *surroundings())
        for package in sorted(renderer.packages):
            renderer.add("package", package, *_sources(package))
        return renderer.digest()
    except (_UnstableError, RecursionError):
        return None


def combined(*parts: str | bytes) -> str:
    """One hash of several texts or bytes; where one ends and the next begins counts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def tensor_bytes(value: Tensor) -> bytes:
    """A tensor's elements in memory order of its indices, with type and shape before them."""
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} ".encode() + data


@functools.lru_cache(maxsize=1)
def _fixed_surroundings() -> tuple[str, ...]:
    versions = (f"{name} {_version(name)}" for name in _VERSIONED)
    own = (*_sources(__name__.partition(".")[0]),)
    return (
        sys.version,
        platform.machine(),
        torch.__version__,
        str(torch.version.git_version),
        *versions,
        *own,
    )


def surroundings() -> tuple[str, ...]:
    """What else a graph depends on: versions, this package's own sources, torch's default type."""
    return (*_fixed_surroundings(), str(torch.get_default_dtype()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.lru_cache(maxsize=256)
def _sources(package: str) -> tuple[str, ...]:
    """Hashes of a package's source files, or of a lone module's; none where there is no file (a notebook).

    Of compiled libraries, size and time.
    """
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    found = [p for folder in folders for p in folder.rglob("*")] if folders else [Path(file)] if file else []
    sources = sorted(p for p in found if p.suffix == ".py")
    libraries = sorted(p for p in found if p.suffix in _LIBRARIES)
    if len(sources) > _LARGEST_PACKAGE:
        raise _UnstableError(f"{package} has {len(sources)} files")
    try:
        hashes = [f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in sources]
        stats = [(p.name, p.stat()) for p in libraries]
    except OSError as error:
        raise _UnstableError(f"{package}: {error}") from error
    return (*hashes, *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats))


class _Renderer:
    """Feeds a hash; objects that have been met are named by the order of their meeting."""

    def __init__(self) -> None:
        self.packages: set[str] = set()
        self._hash = hashlib.sha256()
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no other object takes the address of one that was met

    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, *parts: object) -> None:
        """Parts with their lengths: no two sequences of parts give the same bytes."""
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)

    def _is_new(self, value: object) -> bool:
        """Whether an object is met for the first time; if not, its number stands for it."""
        number = self._met.get(id(value))
        if number is not None:
            self.add("met", number)
            return False
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return True

    # --- modules ------------------------------------------------------------------------------------

    def module(self, module: nn.Module) -> None:
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            raise _UnstableError("hooks on all modules")
        if not self._is_new(module):
            return
        if isinstance(module, torch.jit.ScriptModule):
            raise _UnstableError("a TorchScript module's code is not Python's")
        own = vars(module)
        hooked = [name for name in _HOOKS if name not in _NOT_COMPUTING and own.get(name)]
        if hooked:
            raise _UnstableError(f"{type(module).__qualname__} has {', '.join(hooked)}")
        self.add("module", module.training)
        self.type(type(module))
        for kind in ("_parameters", "_buffers", "_modules"):
            self.add(kind, len(own[kind]))
            for name, value in own[kind].items():
                self.add(name)
                self.value(value)
        for name in sorted(set(own) - _OF_EVERY_MODULE):
            self._attribute(module, name, own[name])

    def _attribute(self, module: nn.Module, name: str, value: object) -> None:
        overridden = getattr(type(module), name, None)
        if (
            callable(overridden)
            and not isinstance(overridden, type)
            and not _is_own_method(module, name, value)
        ):
            raise _UnstableError(f"{type(module).__qualname__}.{name} is replaced on the instance")
        self.add("attribute", name)
        self.value(value)

    def tensor(self, value: Tensor) -> None:
        if (
            type(value) not in (Tensor, nn.Parameter)
            or value.layout is not torch.strided
            or value.is_quantized
        ):
            raise _UnstableError(f"a tensor of type {type(value).__name__}")
        self.add(type(value).__name__, value.dtype, tuple(value.shape), value.stride(), value.device)
        self.add(value.requires_grad, value.is_conj(), value.is_neg())
        self._hash.update(tensor_bytes(value.resolve_conj().resolve_neg()))

    # --- values -------------------------------------------------------------------------------------

    def value(self, value: object) -> None:
        """Anything that an attribute, a default, a closure or a global holds.

        Raises:
            _UnstableError: for what is not known to be the same in every process.
        """
        kind = type(value)
        if kind in _ATOMS or isinstance(value, torch.memory_format):
            self.add(kind.__name__, repr(value))
        elif kind is float:
            self.add("float", value.hex())  # type: ignore[attr-defined]
        elif isinstance(value, enum.Enum):
            self.type(kind)
            self.add("enum", value.name)
        elif isinstance(value, nn.Module):
            self.module(value)
        elif isinstance(value, type):
            self.type(value)
        elif isinstance(value, types.ModuleType):
            self.add("package", value.__name__)
            self._belongs(value.__name__)
        elif isinstance(value, tuple) or self._is_new(value):  # which tuples are one object means nothing
            self._object(value)

    def _object(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, Tensor):
            self.tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            if value.dtype.hasobject:
                raise _UnstableError("an array of objects")
            self.add("array", value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
        elif isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, types.MethodType):
            self.add("method")
            self.value(value.__self__)
            self.value(value.__func__)
        elif isinstance(value, functools.partial):
            self.add("partial")
            for part in (value.func, value.args, value.keywords):
                self.value(part)
        elif isinstance(value, torch.jit.ScriptFunction):
            text = str(value.inlined_graph)
            if "<Tensor>" in text or "prim::CallFunction" in text:
                raise _UnstableError(
                    "a TorchScript function with constants or calls that its text does not show"
                )
            self.add("script", value.name, value.code, text)
        elif isinstance(value, _CACHED):
            self.add("cached")
            self.value(value.__wrapped__)
        elif isinstance(value, _SLOT):  # a field of the class that it is met in
            self.add("field", type(value).__name__)
        elif isinstance(value, _BUILTIN):
            self.add("builtin", getattr(value, "__module__", ""), value.__qualname__)
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, type | types.ModuleType):
                raise _UnstableError(f"the built-in method {value.__qualname__} of an object")
        elif isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            self.add("operator", str(value))
        elif isinstance(value, property | staticmethod | classmethod | functools.cached_property):
            self._descriptor(value)
        elif isinstance(value, tuple | list | dict | set | frozenset):
            self._container(value)
        elif kind.__module__ in ("typing", "types") or isinstance(value, re.Pattern):
            self.add(kind.__qualname__, _without_addresses(repr(value)))
        elif kind.__module__.partition(".")[0] == "logging":
            self.add("logger")
        else:
            self._plain_object(value)

    def _container(self, value: Any) -> None:
        base = next(b for b in (tuple, list, dict, set, frozenset) if isinstance(value, b))
        items = list(base.__iter__(value))  # a subclass may say something else of its length
        self.add("container", len(items))
        self.type(type(value))
        if base is dict:
            for key in items:  # in their order, which a loop over them would see
                self.value(key)
                self.value(dict.__getitem__(value, key))
        elif base in (set, frozenset):
            if not all(type(item) in (bool, int, str, bytes) for item in items):
                raise _UnstableError("a set of objects has no order")
            self.add(*sorted(f"{type(item).__name__} {item!r}" for item in items))
        else:
            for item in items:
                self.value(item)
        self._state(value)

    def _descriptor(self, value: Any) -> None:
        self.add(type(value).__name__)
        names = ("fget", "fset", "fdel") if isinstance(value, property) else ("func",)
        names = ("__func__",) if isinstance(value, staticmethod | classmethod) else names
        for name in names:
            self.value(getattr(value, name))

    def _plain_object(self, value: Any) -> None:
        """An instance of a class written in Python, all of whose state is in its attributes."""
        kind = type(value)
        plain = object in kind.__mro__ and all(
            c is object or (c.__flags__ & (1 << 9) and "__slots__" not in vars(c)) for c in kind.__mro__
        )  # bit 9: made by a class statement
        if not plain:
            raise _UnstableError(f"a {kind.__module__}.{kind.__qualname__}")
        if kind.__basicsize__ > object.__basicsize__ + 2 * 8:  # more than __dict__ and __weakref__
            raise _UnstableError(f"a {kind.__qualname__} with state of its own")
        self.add("object")
        self.type(kind)
        self._state(value)

    def _state(self, value: Any) -> None:
        for name, item in sorted(getattr(value, "__dict__", {}).items()):
            self.add("attribute", name)
            self.value(item)

    # --- code ---------------------------------------------------------------------------------------

    def _is_platform(self, module: str | None) -> bool:
        return (module or "builtins").partition(".")[0] in _PLATFORM

    def _belongs(self, module: str | None) -> None:
        """Note whose sources are to be hashed."""
        if not self._is_platform(module):
            self.packages.add(str(module).partition(".")[0])

    def type(self, kind: type) -> None:
        """A class: its own code and that of its bases."""
        self.add("class", kind.__module__, kind.__qualname__)
        if kind.__module__ == "builtins" or kind is nn.Module or not self._is_new(kind):
            return
        self._belongs(kind.__module__)
        for base in kind.__mro__[1:]:
            self.type(base)
        # Classes of torch and beneath count too, where they are bases: somebody may have changed one.
        for name, value in sorted(vars(kind).items()):
            if name in _OF_EVERY_CLASS or name.startswith("_abc_"):
                continue
            self.add("member", name)
            if self._is_platform(kind.__module__):
                self._platform_member(value)
            else:
                self.value(value)

    def _platform_member(self, value: Any) -> None:
        function = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
        if isinstance(function, types.FunctionType):
            self.add(function.__module__, function.__qualname__)
            self._code(function.__code__)

    def function(self, function: types.FunctionType) -> None:
        """A function's code, defaults, closure, and the globals of its package that it names."""
        self.add("function", function.__module__, function.__qualname__)
        code = function.__code__
        self._code(code)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self.add("free", name)
            try:
                content = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self.value(content)
        module = str(function.__globals__.get("__name__"))  # of a decorator's wrapper, the decorator's
        if self._is_platform(module):
            return
        self._belongs(module)
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.value(wrapped)
        for name in sorted(_names(code)):
            if name in function.__globals__:
                self.add("global", name)
                self._global(function.__globals__[name])

    def _global(self, value: Any) -> None:
        """Functions and classes of the platform by name, all else as it is."""
        if isinstance(value, types.FunctionType | type) and self._is_platform(value.__module__):
            self.add(value.__module__, value.__qualname__)
            return
        self.value(value)

    def _code(self, code: types.CodeType) -> None:
        self.add(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self.add(code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        self.add(getattr(code, "co_exceptiontable", b""))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.add("code")
                self._code(constant)
            elif isinstance(constant, frozenset):
                self.add("constants", *sorted(map(repr, constant)))
            else:
                self.add(type(constant).__name__, repr(constant))


_OF_EVERY_CLASS = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__qualname__", "__parameters__"}
    | {
        "__firstlineno__",
        "__static_attributes__",
        "__orig_bases__",
        "__dataclass_fields__",
        "__dataclass_params__",
    }
    | {
        "__match_args__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__hash__",
        "__slotnames__",
    }
    | {"_ignored_property_names", "dump_patches"}
)


def _is_own_method(module: nn.Module, name: str, value: object) -> bool:
    """Whether an instance's method is one of its owner's class, perhaps without its decorator.

    Recipes bind such methods; a user's replacement is a function that no class knows.
    """
    if not isinstance(value, types.MethodType) or not isinstance(value.__self__, nn.Module):
        return False
    known = getattr(type(value.__self__), name, None)
    unwrapped: Callable[..., Any] | None = inspect.unwrap(known) if known is not None else None
    return value.__func__ is known or value.__func__ is unwrapped


def _names(code: types.CodeType) -> Iterable[str]:
    """The globals that code, or code inside it, names."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= set(_names(constant))
    return found


def _without_addresses(text: str) -> str:
    if " at 0x" in text:
        raise _UnstableError(text)
    return text


_fixed_surroundings()  # now: files that are edited while a process runs are not what it has imported
