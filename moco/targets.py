"""What users plug in: functions and classes of their own, named ``package.module:name``.

A target is imported only when the user names it, on the command line, in a YAML file or in Python.
A target that stands in a checkpoint is a string until then.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from moco.errors import InputError

GIVEN = "given"
"""The name, in a config, of what a program got as an object of Python."""


def import_target(target: str, key: str) -> Callable[..., Any]:
    """Return the function or class that a target names.

    The current folder is searched, too, also by the ``moco-*`` commands.

    Args:
        target: ``package.module:name``; the name may have dots, such as ``Net.small``.
        key: the setting, for messages.

    Raises:
        InputError: there is no such module or name, importing it fails, or it cannot be called.
    """
    module_name, _, name = target.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        raise InputError(f"{key}={target}: expected package.module:function")
    found: Any = import_module(module_name, f"{key}={target}")
    for part in name.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, public_names(found))
            raise InputError(f"{key}={target}: {module_name} has no '{name}'{hint}")
        found = getattr(found, part)
    if not callable(found):
        kind = type(found).__name__
        raise InputError(f"{key}={target}: expected a function or a class, got {kind}")
    return found


def import_module(name: str, source: str) -> ModuleType:
    """Return a module of the user.

    Raises:
        InputError: there is no such module, or it cannot be imported; begins with `source`.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            reason = f"importing {name} failed: {error}"
        else:
            hint = did_you_mean(error.name, names_beside(error.name))
            reason = f"no module named '{error.name}'{hint}"
        raise InputError(f"{source}: {reason}") from error
    except Exception as error:
        # Whatever the user's module does when it is imported.
        kind = type(error).__name__
        raise InputError(f"{source}: importing {name} failed: {kind}: {error}") from error


def call_target(target: str, options: Mapping[str, Any] | None, key: str) -> Any:
    """Return what a target returns when it is called with the options.

    Args:
        target: see `import_target`.
        options: its keyword arguments.
        key: the group of settings, such as ``backbone``, for messages.

    Raises:
        InputError: see `import_target`; or the target takes no such options, or it fails.
    """
    function = import_target(target, f"{key}.target")
    options = dict(options or {})
    check_options(function, options, key, target)
    try:
        return function(**options)
    except InputError:
        raise
    except Exception as error:
        # Whatever the user's function does.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{key}.target={target}: raised {reason}") from error


def check_named(target: str | None, given: str | None, key: str, *, trust_targets: bool) -> None:
    """Raise InputError if a checkpoint names a function that the user has not named, too.

    Importing a module runs its code, so a file alone must not decide which.

    Args:
        target: the checkpoint's; None if it names none.
        given: the user's.
        key: the setting, such as ``backbone.target``.
        trust_targets: the user allows every function that the checkpoint names.
    """
    if target is not None and given != target and not trust_targets:
        raise InputError(
            f"names the function {key}={target}, which is imported only if you name it, too: add "
            f"{key}={target}, or trust_targets=true if you trust the file"
        )


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], key: str, name: str
) -> None:
    """Raise InputError if a function has no such keyword arguments, or needs others.

    Args:
        function: of the user or of a library.
        options: the keyword arguments.
        key: the group of settings, for messages.
        name: of the function, for messages.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    parameters = signature.parameters.values()
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    named = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    known = [parameter.name for parameter in named]
    for option in options:
        if option not in known and not takes_any:
            hint = did_you_mean(option, known)
            listed = f" (options: {', '.join(known)})" if known else " (it takes none)"
            raise InputError(f"{key}.options.{option}: {name} has no such option{hint}{listed}")
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise InputError(
                f"{key}.options.{parameter.name}: missing; {name} cannot be called without it"
            )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint at the nearest of the names, or nothing."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def public_names(found: Any) -> list[str]:
    """Return the names of a module or class without those that begin with an underscore."""
    return [name for name in dir(found) if not name.startswith("_")]


def names_beside(module_name: str) -> list[str]:
    """Return the full names of the modules in the place where a module is missing."""
    parent, _, _ = module_name.rpartition(".")
    if not parent:
        return [module.name for module in pkgutil.iter_modules()]
    path = getattr(importlib.import_module(parent), "__path__", [])
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(path)]
