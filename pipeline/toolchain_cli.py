"""`optimize toolchain`: the environments that stand apart, on the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from optimize.pipeline import terminal
from optimize.pipeline.errors import ExitCode, OptimizeError, RequestError, ToolchainError

if TYPE_CHECKING:
    from optimize.pipeline.toolchain_files import Toolchain
    from optimize.pipeline.toolchains import Toolchains

CACHE = click.option("--cache", type=click.Path(path_type=Path), help="As for `optimize MODEL`.")


@click.group("toolchain")
def toolchain_group() -> None:
    """Look after the environments of stacks that cannot live together."""


@toolchain_group.command("list")
@CACHE
def list_toolchains(cache: Path | None) -> int:
    """List the toolchains: what each is for, why it stands apart, and whether it can be used here."""
    from optimize.pipeline.toolchain_files import read_toolchain, toolchain_names

    toolchains = _toolchains(cache)
    table = terminal.table("toolchain", "provides", "state", "why it stands apart")
    for name in toolchain_names():
        try:
            toolchain = read_toolchain(name)
        except RequestError as error:
            table.add_row(name, "", "[red]unreadable", escape(error.message))
            continue
        table.add_row(name, *map(escape, (", ".join(toolchain.provides), _state(toolchains, name), _why(toolchain))))
    terminal.console().print(table)
    return ExitCode.EMITTED


@toolchain_group.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@CACHE
def install(name: str, yes: bool, cache: Path | None) -> int:
    """Make the environment of toolchain NAME, from exact versions with hashes."""
    from optimize.pipeline import installing
    from optimize.pipeline.toolchain_files import read_toolchain

    toolchains, toolchain = _toolchains(cache), read_toolchain(name)
    try:
        found = toolchains.find(name)
    except ToolchainError:
        if toolchain.lock and not yes and not os.environ.get(toolchain.variable):
            if sys.stdin is None or not sys.stdin.isatty():
                raise RequestError(f"toolchain {name}: nobody is there to be asked", hint="give --yes") from None
            if not confirm_install(toolchain):
                terminal.say(f"toolchain {name}: not installed")
                return ExitCode.REFUSED
        found = installing.install(toolchains, name, terminal.say)
    terminal.say(f"toolchain {name}: {found.python}, Python {found.version}, {len(found.packages)} distributions")
    return ExitCode.EMITTED


@toolchain_group.command()
@click.argument("name")
@CACHE
def remove(name: str, cache: Path | None) -> int:
    """Remove the environment of toolchain NAME. What was built with it stays."""
    from optimize.pipeline import installing
    from optimize.pipeline.toolchain_files import read_toolchain

    freed = installing.remove(_toolchains(cache), name)
    terminal.say(
        f"toolchain {name}: removed, {freed / 1e9:.2f} GB freed" if freed else f"toolchain {name}: was not there"
    )
    if os.environ.get(variable := read_toolchain(name).variable):
        terminal.say(f"{variable} names an interpreter, which stays as it is")
    return ExitCode.EMITTED


@toolchain_group.command()
@click.argument("names", nargs=-1)
@CACHE
def doctor(names: tuple[str, ...], cache: Path | None) -> int:
    """Import what each toolchain is for, in its own process: those NAMES, or all that are there."""
    from optimize.pipeline.toolchain_files import toolchain_file, toolchain_names

    for name in names:
        toolchain_file(name)
    toolchains = _toolchains(cache)
    table = terminal.table("toolchain", "state", "what was found")
    well = True
    for name in names or toolchain_names():
        try:
            toolchains.find(name)
        except OptimizeError as error:
            missing = isinstance(error, ToolchainError) and error.absent and not names
            well = well and missing
            table.add_row(name, "not there" if missing else "[red]unusable", escape(str(error)))
            continue
        try:
            toolchains.try_imports(name)
            table.add_row(name, _state(toolchains, name), "it imports what it is for")
        except ToolchainError as error:
            well = False
            table.add_row(name, "[red]broken", escape(str(error)))
    terminal.console().print(table)
    return ExitCode.EMITTED if well else ExitCode.BUG


def confirm_install(toolchain: Toolchain) -> bool:
    """Ask on the terminal."""
    size = f"; it takes about {toolchain.disk / 1e9:.1f} GB" if toolchain.disk else ""
    return click.confirm(f"Install toolchain {toolchain.name} ({', '.join(toolchain.provides)}{size})?", err=True)


def _toolchains(cache: Path | None) -> Toolchains:
    from optimize.pipeline.driver import cache_folder
    from optimize.pipeline.toolchains import Toolchains

    return Toolchains(cache_folder(cache), cache)


def _state(toolchains: Toolchains, name: str) -> str:
    from optimize.pipeline.installing import size_of
    from optimize.pipeline.toolchain_files import read_toolchain

    try:
        found = toolchains.find(name)
    except ToolchainError as error:
        size = read_toolchain(name).disk
        takes = f"; it takes {size / 1e9:.1f} GB" if error.absent and size else ""
        return (error.message.partition(f"toolchain {name}")[2].strip(": ") or error.message) + takes
    if found.named:
        return f"named: {found.python}, Python {found.version}"
    return f"installed: Python {found.version}, {size_of(toolchains, name) / 1e9:.2f} GB"


def _why(toolchain: Toolchain) -> str:
    return f"{toolchain.why}; {toolchain.archived}" if toolchain.archived else toolchain.why
