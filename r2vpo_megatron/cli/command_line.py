"""What the commands that take a recipe share: `RECIPE [--section.field value ...]`."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.cli.errors import TRACEBACK_FLAG
from r2vpo_megatron.cli.overrides import apply_overrides, print_help
from r2vpo_megatron.cli.recipe import load_recipe
from r2vpo_megatron.config import RunConfig

USAGE = f"RECIPE_FILE.py:function [--section.field value ...] [{TRACEBACK_FLAG}]"


@dataclass(frozen=True)
class CommandLine:
    """A recipe by name, and the valid configuration that it and the overrides make."""

    recipe: str
    config: RunConfig


def parse_command_line(program: str, purpose: str, arguments: list[str]) -> CommandLine:
    """Read the recipe, apply the overrides and validate the whole.

    Args:
        program: How the command is called, for the help.
        purpose: What it does, for the help.
        arguments: The command line after the program.

    Raises:
        ValueError: the recipe, an override or the resulting configuration is not valid.
        SystemExit: with 0, after help was asked for and printed.
    """
    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    has_recipe = bool(arguments) and not arguments[0].startswith("-")
    if wants_help:
        config = load_recipe(arguments[0]) if has_recipe else RunConfig()
        defaults = (
            f"defaults are those of {arguments[0]}" if has_recipe else "a recipe changes them"
        )
        print_help(
            config,
            f"{program} RECIPE_FILE.py:function",
            f"{purpose} Any field of the recipe's RunConfig can be overridden ({defaults}). "
            f"{TRACEBACK_FLAG} shows where an error was raised.",
        )
        raise SystemExit(0)
    if not has_recipe:
        raise ValueError(
            f"no recipe given. Usage: {program} {USAGE}\n"
            f"for example: {program} recipes/tiny_cpu.py:r2vpo_off_policy (--help lists all fields)"
        )
    config = apply_overrides(load_recipe(arguments[0]), arguments[1:])
    config.validate()
    return CommandLine(recipe=arguments[0], config=config)
