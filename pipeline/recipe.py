"""Recipes as text that round-trips: `export-onnx{opset=18},quantize-onnx{mode=dynamic}`.

The text is what `--recipe` takes, what `--dry-run` prints, what the manifest records and what golden tests hold.
Options at their defaults are left out; `checkpoint` alone is the recipe without passes.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import typing
from importlib.metadata import entry_points

from optimize.pipeline.contract import Kind, Pass, Recipe
from optimize.pipeline.errors import RequestError

UNCHANGED = "checkpoint"
LONGEST_NUMBER = 20  # characters of an option
_STEP = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def pass_names() -> tuple[str, ...]:
    """Every pass's name: the files of passes/, and what installed distributions offer as `optimize.passes`."""
    return tuple(sorted(_own_names() | {point.name for point in entry_points(group="optimize.passes")}))


def pass_class(name: str) -> type[Pass]:
    """The pass called `name`. Raises RequestError for a name that no pass has, or that two have."""
    if name not in pass_names():
        raise RequestError(f"unknown pass {name!r}", hint=f"passes: {', '.join(pass_names())} (see `optimize passes`)")
    for point in entry_points(group="optimize.passes", name=name):
        offered = typing.cast(type[Pass], point.load())
        if name in _own_names() or offered.name != name:
            raise RequestError(
                f"the entry point {name} = {point.value} offers a pass called {offered.name!r}",
                hint="an entry point of optimize.passes has its pass's name, and one that no shipped pass has",
            )
        return offered
    module = importlib.import_module(f"optimize.passes.{name.replace('-', '_')}")
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Pass) and c is not Pass]
    (only,) = [c for c in found if c.__module__ == module.__name__]
    return only


def _own_names() -> set[str]:
    package = importlib.import_module("optimize.passes")
    return {module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_"}


def parse(text: str, name: str | None = None) -> Recipe:
    """Read a recipe. Raises RequestError for an unknown pass, a wrong option, or kinds that do not join."""
    if text.strip() == UNCHANGED:
        return Recipe(name or UNCHANGED, ())
    passes = _parse_passes(text)
    kind = Kind.CHECKPOINT
    for step_pass in passes:
        if step_pass.accepts != kind:
            raise RequestError(
                f"recipe {text!r}: {step_pass.name} reads {step_pass.accepts}, but what is there is {kind}"
            )
        kind = step_pass.produces
    return Recipe(name or text.strip(), tuple(passes))


def parse_pass(text: str) -> Pass:
    """Read one pass with its options, whatever kind it accepts. Raises RequestError as `parse` does."""
    passes = _parse_passes(text)
    if len(passes) != 1:
        raise RequestError(f"{text!r} is {len(passes)} passes, not one")
    return passes[0]


def pass_text(step: Pass) -> str:
    """One pass as text: its name and the options that are not at their defaults, in field order."""
    options = ";".join(
        f"{option.name}={option_text(getattr(step, option.name))}"
        for option in dataclasses.fields(step)
        if getattr(step, option.name) != option.default
    )
    return f"{step.name}{{{options}}}" if options else step.name


def recipe_text(recipe: Recipe) -> str:
    """The recipe as text. `parse(recipe_text(r)).passes == r.passes`."""
    return ",".join(pass_text(step) for step in recipe.passes) or UNCHANGED


def _parse_passes(text: str) -> list[Pass]:
    passes: list[Pass] = []
    position = 0
    while position < len(text) or not passes:
        step = _STEP.match(text, position)
        if step is None or (step.end() == len(text) and text.rstrip().endswith(",")):
            raise RequestError(
                f"recipe {text!r} cannot be read at {text[position:][:20]!r}",
                hint="write pass{option=value;option=value},pass,... as in `export-onnx,quantize-onnx{mode=dynamic}`",
            )
        passes.append(_build(pass_class(step[1]), step[2]))
        position = step.end()
    return passes


def _build(cls: type[Pass], options: str | None) -> Pass:
    types = typing.get_type_hints(cls)
    known = {option.name: types[option.name] for option in dataclasses.fields(cls)}
    values = {}
    for part in filter(None, (part.strip() for part in (options or "").split(";"))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in known or name in values:
            reason = "is given twice" if name in values else "is not an option" if equals else "has no value"
            listed = ", ".join(known) or "none"
            raise RequestError(f"{cls.name}: {name!r} {reason}", hint=f"options of {cls.name}: {listed}")
        values[name] = _convert(cls.name, name, value, known[name])
    for option in dataclasses.fields(cls):
        if option.default is dataclasses.MISSING and option.name not in values:
            raise RequestError(f"{cls.name}: the option {option.name} must be given")
    return cls(**values)


def _convert(owner: str, name: str, text: str, kind: typing.Any) -> object:
    if kind in (int, float):
        try:
            if not text.isascii() or len(text) > LONGEST_NUMBER:
                raise ValueError
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise RequestError(f"{owner}: {name}={text[:LONGEST_NUMBER]!r} is not {wanted}") from None
    if kind is str:
        return text
    choices = {option_text(choice): choice for choice in ((True, False) if kind is bool else typing.get_args(kind))}
    if text not in choices:
        raise RequestError(
            f"{owner}: {name}={text!r} is not one of {', '.join(choices)}",
            hint="options of a pass are separated by ;" if "," in text else None,
        )
    return choices[text]


def option_text(value: object) -> str:
    """An option's value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
