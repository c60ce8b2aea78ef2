"""Errors of the command line in one line that names the key and the nearest right one."""

import difflib
import importlib
import re
from collections.abc import Iterable

import yaml
from jsonargparse import ArgumentParser

from ssl_distill.commands.methods import list_classes
from ssl_distill.commands.trust import refusal

_UNKNOWN_KEY = (
    r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
    r"does not accept option '(?P<key>[^']+)'",
    r"Option '(?P<key>[^']+)' is not accepted",
    r"unrecognized arguments: --(?P<key>[^\s=]+)",
)
_NOT_KNOWN = (r"Importing '(?P<path>[^']+)' is not allowed, denied by",)
_MISSING_CLASS = (
    r"Expected a dot import path string: (?P<path>\S+)",
    r"module '(?P<path>[\w.]+)' has no attribute '(?P<name>\w+)'",
    r"No module named '(?P<path>[\w.]+)'",
)


def one_line(error: BaseException) -> str:
    """What went wrong, without the parser's account of all types that it tried."""
    messages = [" ".join(str(cause).split()) for cause in _causes(error)]
    return next((message for message in messages if "Union subtypes" not in message), messages[-1])


def explain(error: BaseException, known_keys: Iterable[str]) -> str:
    """One line for an error of jsonargparse.

    Args:
        error: What the parser raised. Its causes lead to the place; its text holds what was tried besides.
        known_keys: All dotted keys of the parser.
    """
    causes = _causes(error)
    message = str(causes[-1])
    key, owner = _place(causes)
    address = ".".join(key)
    if found := _search(_NOT_KNOWN, message, str(error)):
        where = f"`{address.removesuffix('.init_args')}`: " if key else ""
        return where + refusal(found["path"])
    if found := re.search(r"arguments are required: (.+)", message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        group = ".".join(part for part in key if part != "init_args")
        options = " ".join(f"--{group}.{name} VALUE" if group else f"--{name} CLASS" for name in names)
        return f"{' and '.join(f'`{name}`' for name in names)} must be given, in a config (-c FILE) or by {options}."
    if found := re.search(r"unrecognized arguments: ([^-]\S*)", message):
        return f"{found[1]!r} belongs to no option; write --key value."
    if found := _search(_UNKNOWN_KEY, message, str(error)):
        unknown = ".".join(part for part in (found.groupdict().get("group"), found["key"]) if part)
        candidates = _arguments_of(owner) if owner else known_keys
        whose = f" of {owner}" if owner else ""
        return f"`{'.'.join([*key, unknown])}` is no argument{whose}{_nearest(unknown, candidates)}"
    if found := _search(_MISSING_CLASS, message, str(error)):
        path = ".".join(found.groupdict().values())
        if owner and owner.startswith(path):  # a module on the way to the class is missing
            path = owner
        return f"`{address.removesuffix('.init_args')}`: there is no class {path}{_nearest_class(path)}"
    if isinstance(causes[-1], yaml.MarkedYAMLError) and (mark := causes[-1].problem_mark):
        return f"a config is no YAML: {causes[-1].problem} in line {mark.line + 1}, column {mark.column + 1}."
    expected, _, value = message.partition(". Got value: ")
    if expected.startswith("Expected a <class"):  # the first of the types that were tried
        union = re.match(r".*Union subtypes\nSubtypes: \[(.+)\]", str(causes[-2])) if len(causes) > 1 else None
        expected = f"must be one of {union[1]}" if union else expected.replace("Expected", "must be")
    return f"{f'`{address}`: ' if key else ''}{_readable(expected)}{f', got {value}' if value else ''}."


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and so on."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def _place(causes: Iterable[BaseException]) -> tuple[list[str], str | None]:
    """Parts of the dotted key where the error is, and the class whose arguments are read there, if it is one's."""
    key: list[str] = []
    owner: str | None = None
    for cause in causes:
        if found := re.match(r'Parser key "([^"]+)"', str(cause)):
            if not key or key[-1] != found[1]:
                key.append(found[1])
        elif found := re.match(r"Problem with given class_path '([^']+)'", str(cause)):
            owner = found[1]
            key.append("init_args")
    return key, owner


def _search(patterns: Iterable[str], *texts: str) -> re.Match[str] | None:
    return next((found for text in texts for pattern in patterns if (found := re.search(pattern, text))), None)


def _arguments_of(class_path: str) -> list[str]:
    """All dotted keys of a class's arguments."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    keys = [action.dest for action in parser._actions]
    return keys + [f"init_args.{key}" for key in keys]


def _nearest(unknown: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(unknown, candidates, n=1)
    return f"; did you mean `{near[0]}`?" if near else "."


def _nearest_class(path: str) -> str:
    """Suggests by the name alone, since whoever mistypes a class seldom has its module right."""
    from lightning.pytorch import callbacks, loggers

    paths = list_classes() + [f"{module.__name__}.{name}" for module in (callbacks, loggers) for name in module.__all__]
    by_name = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = difflib.get_close_matches(path.rpartition(".")[2], by_name, n=1)
    return f"; did you mean {by_name[near[0]]}?" if near else "."


def _readable(types: str) -> str:
    """Python's names of types as a reader of YAML knows them."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", text)
    return " ".join(text.replace("NoneType", "null").split()).rstrip(".")
