"""`optimize toolchain`: the environments that stand apart, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from optimize.pipeline import terminal
from optimize.pipeline.errors import ExitCode, OptimizeError, ToolchainError

if TYPE_CHECKING:
    from optimize.pipeline.toolchains import Toolchain, Toolchains

CACHE = click.option("--cache", type=click.Path(path_type=Path), help="As for `optimize MODEL`.")


@click.group("toolchain")
def toolchain_group() -> None:
    """Look after the environments of stacks that cannot live together."""


@toolchain_group.command("list")
@CACHE
def list_toolchains(cache: Path | None) -> int:
    """List the toolchains: what each is for, why it stands apart, and whether it can be used here."""
    from optimize.pipeline.toolchains import read_toolchain, toolchain_names

    toolchains = _toolchains(cache)
    table = terminal.table("toolchain", "provides", "state", "why it stands apart")
    for name in toolchain_names():
        toolchain = read_toolchain(name)
        table.add_row(name, ", ".join(toolchain.provides), _state(toolchains, name), _why(toolchain))
    terminal.console().print(table)
    return ExitCode.EMITTED


@toolchain_group.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@CACHE
def install(name: str, yes: bool, cache: Path | None) -> int:
    """Make the environment of toolchain NAME, from exact versions with hashes."""
    from optimize.pipeline import installing
    from optimize.pipeline.toolchains import read_toolchain

    toolchains, toolchain = _toolchains(cache), read_toolchain(name)
    try:
        found = toolchains.find(name)
    except ToolchainError:
        if toolchain.lock and not yes and not confirm_install(toolchain):
            raise click.Abort from None
        found = installing.install(toolchains, name, terminal.say)
    terminal.say(f"toolchain {name}: {found.python}, Python {found.version}, {len(found.packages)} distributions")
    return ExitCode.EMITTED


@toolchain_group.command()
@click.argument("name")
@CACHE
def remove(name: str, cache: Path | None) -> int:
    """Remove the environment of toolchain NAME. What was built with it stays."""
    from optimize.pipeline import installing

    terminal.say(f"toolchain {name}: removed, {installing.remove(_toolchains(cache), name) / 1e9:.2f} GB freed")
    return ExitCode.EMITTED


@toolchain_group.command()
@click.argument("names", nargs=-1)
@CACHE
def doctor(names: tuple[str, ...], cache: Path | None) -> int:
    """Import what each toolchain is for, in its own process: those NAMES, or all that are there."""
    from optimize.pipeline.toolchains import toolchain_names

    toolchains = _toolchains(cache)
    table = terminal.table("toolchain", "state", "what was found")
    well = True
    for name in names or toolchain_names():
        try:
            toolchains.find(name)
        except OptimizeError as error:
            missing = isinstance(error, ToolchainError) and error.absent and not names
            well = well and missing
            table.add_row(name, "not there" if missing else "[red]unusable", str(error))
            continue
        try:
            toolchains.try_imports(name)
            table.add_row(name, _state(toolchains, name), "it imports what it is for")
        except ToolchainError as error:
            well = False
            table.add_row(name, "[red]broken", str(error))
    terminal.console().print(table)
    return ExitCode.EMITTED if well else ExitCode.BUG


def confirm_install(toolchain: Toolchain) -> bool:
    """Ask on the terminal."""
    size = f" about {toolchain.disk / 1e9:.1f} GB" if toolchain.disk else ""
    provided = ", ".join(toolchain.provides)
    return click.confirm(f"Install toolchain {toolchain.name} ({provided}; it takes{size})?", err=True)


def _toolchains(cache: Path | None) -> Toolchains:
    from optimize.pipeline.driver import cache_folder
    from optimize.pipeline.toolchains import Toolchains

    return Toolchains(cache_folder(cache))


def _state(toolchains: Toolchains, name: str) -> str:
    from optimize.pipeline.installing import size_of

    try:
        found = toolchains.find(name)
    except ToolchainError as error:
        return error.message.partition(f"toolchain {name}")[2].strip(": ") or error.message
    if found.named:
        return f"named: {found.python}, Python {found.version}"
    return f"installed: Python {found.version}, {size_of(toolchains, name) / 1e9:.2f} GB"


def _why(toolchain: Toolchain) -> str:
    return f"{toolchain.why}; {toolchain.archived}" if toolchain.archived else toolchain.why
