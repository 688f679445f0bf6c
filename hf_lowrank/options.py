"""The one door for options: what a verb can be told are the fields of a frozen dataclass, told once.

    @dataclass(frozen=True, kw_only=True)
    class RecoveryOptions(Options):  # with a docstring that says under `Args` what each field means
        epochs: float = option(3, above=0, at_most=MOST_PASSES)
        losses: Mapping[str, float] | None = option(None, at_least=0)

    settle(RecoveryOptions, {"epoch": 3}, "recover")  # InputError: recover has no option 'epoch'. Closest: 'epochs'.
    settle_parts((Budget, Targets), options, "compress")  # one instance each, of one set of keyword arguments

Type and default are the field's, bounds and choices stand in `option`, the meaning is the docstring's. An instance
checks itself however it is made; what hangs on two fields is checked in a `__post_init__` that calls this one's.

The command line follows from the same fields: `add_flags(parser, RecoveryOptions, ["epochs", "losses"])` adds
`--epochs F` with the first sentence of the meaning and the default as its help, and `given(arguments,
RecoveryOptions)` is what was given. This module, and so every module of options, imports neither torch nor
transformers: `--help` must be fast.
"""

import argparse
import dataclasses
import inspect
import math
import numbers
import re
import reprlib
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_plan import closest_name

LARGEST_SEED = 2**32 - 1  # numpy's
# More could not end.
MOST_PASSES = 10_000
# Choices that help names beside the flag.
_MOST_SHOWN = 10
_BOUNDS = {"at_least": "at least", "above": "above", "at_most": "at most"}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_UNIONS = (Union, types.UnionType)  # written with a name, and with a bar
_METAVARS = {int: "N", float: "F"}
# `name: What it means` in a docstring, to the next of them or an empty line.
_ENTRY = re.compile(r"^ {4}(\w+): (.+?)(?=^ {4}\w+: |^ *$|\Z)", re.MULTILINE | re.DOTALL)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def option(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Collection[str] = (),
    metavar: str | None = None,
    of: Collection[str] = (),
    flags: str | None = None,
) -> Any:
    """A field of a class of options.

    Args:
        at_least: Bound of the number, or of each number of a list or mapping.
        above: Bound that it must not reach.
        at_most: The other bound.
        choices: The words allowed, or the names of a mapping; a table that grows afterwards counts as it is then.
        metavar: What help calls the value.
        of: What it goes with, where it does not go with everything; the class says what these names are of.
        flags: Group of flags it is in, where its verb's command has one for it; see `names_of_flags`.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    said = {**bounds, "choices": choices, "metavar": metavar, "of": of, "flags": flags}
    return dataclasses.field(default=default, metadata=said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a verb can be told; checks the type, the bounds and the choices of every field when it is made.

    Raises:
        InputError: Naming the option, the rule and the value.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))


def settle(cls: type[T], options: Mapping[str, Any], verb: str) -> T:
    """The options of a verb from its keyword arguments.

    Raises:
        InputError: If an option does not exist, naming the closest that does; is missing; or has a wrong value.
    """
    settled: T = settle_parts((cls,), options, verb)[0]
    return settled


def settle_parts(classes: Sequence[type[Any]], options: Mapping[str, Any], verb: str) -> tuple[Any, ...]:
    """One instance of each class; an option that several know, such as a seed, goes to all of them.

    Raises:
        InputError: As `settle`.
    """
    return tuple(cls(**own) for cls, own in zip(classes, split(classes, options, verb), strict=True))


def split(classes: Sequence[type[Any]], options: Mapping[str, Any], verb: str) -> list[dict[str, Any]]:
    """What each class is told, before it is settled.

    Raises:
        InputError: If an option does not exist, or is missing.
    """
    fields = [{field.name: field for field in dataclasses.fields(cls) if field.init} for cls in classes]
    known = sorted({name for names in fields for name in names})
    for name in options:
        if name not in known:
            raise InputError(f"{verb} has no option {name!r}. Closest: {closest_name(name, known)!r}.")
    for cls, own in zip(classes, fields, strict=True):
        for name, field in own.items():
            if name not in options and dataclasses.MISSING is field.default is field.default_factory:
                raise InputError(f"{verb} needs {name}: {_uncapitalized(_sentences(cls)[name][0])}.")
    return [{name: options[name] for name in own if name in options} for own in fields]


def checked(verb: Callable[P, R]) -> Callable[P, R]:
    """A function or constructor that refuses arguments of other types than it says, as a class of options does.

    Models are left to it: much holds one.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].annotation
            if kind is not signature.empty and "PreTrainedModel" not in str(kind) and not _fits(value, kind):
                raise InputError(f"{name} must be {_in_words(kind)}, got {reprlib.repr(value)}.")
        return verb(*args, **kwargs)

    return called


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    said = field.metadata
    choices = said.get("choices", ())
    words = [value] if isinstance(value, str) else value if isinstance(value, Collection) else ()
    for word in (word for word in words if choices and isinstance(word, str) and word not in choices):
        closest = closest_name(word.partition(":")[0], choices)  # of a name with more after a colon
        got = f"got {reprlib.repr(word)}. Closest: {closest!r}."
        raise InputError(f"{field.name} must be one of {', '.join(choices)}, {got}")
    bounds = {name: said[name] for name in _BOUNDS if said.get(name) is not None}
    if _fits(value, field.type) and _are_within(value, **bounds):
        return
    rule = _in_words(field.type) + "".join(
        f"{' and' if place else ''} {_BOUNDS[name]} {bound}" for place, (name, bound) in enumerate(bounds.items())
    )
    raise InputError(f"{field.name} must be {rule}, got {reprlib.repr(value)}.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers are numbers, and a truth value is neither."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        return any(_fits(value, part) for part in parts)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        return isinstance(value, numbers.Integral) or (kind is float and math.isfinite(value))
    if kind is Any:
        return True
    if origin is None:
        return isinstance(value, kind)
    if issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(name, parts[0]) and _fits(number, parts[1]) for name, number in pairs)
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and all(_fits(item, parts[0]) for item in value)


def _are_within(value: Any, at_least: Any = -math.inf, above: Any = -math.inf, at_most: Any = math.inf) -> bool:
    """Whether a number, or each of a list or mapping, is within bounds; what is none has none."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
    found = [item for item in items if isinstance(item, numbers.Real)]
    return all(at_least <= number <= at_most and number > above for number in found)


def _alternatives(kind: Any) -> list[Any]:
    """The types a union is of, without None."""
    parts = get_args(kind) if get_origin(kind) in _UNIONS else [kind]
    return [part for part in parts if part is not types.NoneType]


def _in_words(kind: Any) -> str:
    words = []
    for part in _alternatives(kind):
        origin, parts = get_origin(part), get_args(part)
        if origin is None:
            words.append(_WORDS.get(part) or f"a {part.__name__}")
        elif issubclass(origin, Mapping):
            words.append(f"{_in_words(parts[1])} by name")
        else:
            words.append(f"a list of which each is {_in_words(parts[0])}")
    return " or ".join(words)


def _sentences(cls: type[Any]) -> dict[str, list[str]]:
    """Name of each field and what the docstrings say of it."""
    docs = [inspect.cleandoc(part.__doc__ or "") for part in reversed(cls.__mro__)]
    entries = {name: " ".join(text.replace("`", "").split()) for doc in docs for name, text in _ENTRY.findall(doc)}
    return {name: re.split(r"\.(?:\s+|$)", text) for name, text in entries.items()}


def names_of_flags(cls: type[Any], group: str) -> list[str]:
    """The options of a class that are in that group of flags."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("flags") == group]


def add_flags(parser: Any, cls: type[Any], names: Iterable[str]) -> None:
    """Add a flag for each of these options to a parser or a group of one; none has a default of its own.

    A value is checked as soon as it is read: before any command is imported. A default that is None is told as the
    docstring's sentence `Default: ...` tells it.
    """
    fields, sentences = {field.name: field for field in dataclasses.fields(cls)}, _sentences(cls)
    for name in names:
        default = fields[name].default
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        if any(default is one for one in (dataclasses.MISSING, None, False)):
            shown = next((one[9:] for one in sentences[name] if one.startswith("Default: ")), "")
        few = choices if 0 < len(choices := fields[name].metadata.get("choices") or ()) <= _MOST_SHOWN else ()
        more = [f"one of {', '.join(few)}"] * bool(few) + [f"default: {shown}"] * bool(shown)
        meaning = _uncapitalized(sentences[name][0]) + (f" ({'; '.join(more)})" if more else "")
        form = {"help": meaning.replace("%", "%%"), "required": default is dataclasses.MISSING, **_form(fields[name])}
        parser.add_argument("--" + name.replace("_", "-"), **form)


def _uncapitalized(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def given(arguments: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The options of a class that were given on the command line."""
    found = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in found.items() if value is not None}


def _form(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How a flag is read: what is given to `add_argument`."""
    kinds = _alternatives(field.type)
    if bool in kinds:
        return {"action": "store_true", "default": None}
    form: dict[str, Any] = {"action": _Checked, "field": field}
    many = next((kind for kind in kinds if get_origin(kind) is not None), None)
    kind = get_args(many)[-1] if many is not None else str if str in kinds else kinds[0]
    is_pair = many is not None and issubclass(get_origin(many), Mapping)
    metavar = field.metadata.get("metavar") or ("NAME=F" if is_pair else _METAVARS.get(kind))
    form |= {"type": _pair(kind, metavar) if is_pair else kind, "nargs": None if many is None else "+"}
    return form | {"metavar": metavar}


class _Checked(argparse.Action):
    """Keeps what was read, a list after what was there already, and checks it."""

    def __init__(self, *args: Any, field: dataclasses.Field[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._field = field

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        if self.nargs is not None and isinstance(values[0], tuple):
            pairs = [*(before or {}).items(), *values]
            values = dict(pairs)
            if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
                raise InputError(f"{self.dest} names {twice[0]!r} twice. Give each name one value.")
        elif self.nargs is not None:
            values = [*(before or []), *values]
        _check(self._field, values)
        setattr(namespace, self.dest, values)


def _pair(kind: type[Any], metavar: str | None) -> Any:
    """What reads `logits=1` as `("logits", 1.0)`."""

    def read(text: str) -> tuple[str, Any]:
        name, _, number = text.rpartition("=")
        try:
            return name, kind(number)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {metavar}, such as name=1") from error

    return read
