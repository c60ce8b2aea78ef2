"""How the runs were set up: configuration, command, machine."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from ssl_distill.report.markup import run_heading, run_label, setting, table
from ssl_distill.report.names import DASH
from ssl_distill.report.recipe import differences_between, differences_from_recipe
from ssl_distill.report.runs import Run


def configuration(runs: Sequence[Run]) -> str:
    """What differs from the recipe, what differs between the runs, and the whole."""
    parts = [run_heading(runs, i) + _from_recipe(run) for i, run in enumerate(runs)]
    if len(runs) > 1:
        parts.append(f"<h3>Between the runs</h3>{_between(runs)}")
    for run in runs:
        whole = escape(yaml.safe_dump(run.config, sort_keys=False))
        name = f" of {escape(run.name)}" if len(runs) > 1 else ""
        parts.append(f"<details><summary>The whole configuration{name}</summary><pre>{whole}</pre></details>")
    return "".join(parts)


def _from_recipe(run: Run) -> str:
    differences = differences_from_recipe(run)
    if differences is None:
        return '<p class="note">The recipe of this run was not recorded.</p>'
    files = ", ".join(f"<code>{escape(config['path'])}</code>" for config in run.starts[0]["configs"])
    if not differences:
        return f'<p class="note">As in {files}.</p>'
    rows = [
        f"<tr><th><code>{escape(each.key)}</code></th><td>"
        f"{'<i>default</i>' if each.recipe is None else setting(each.recipe)}</td><td>{setting(each.run)}</td></tr>"
        for each in differences
    ]
    head = "<tr><th>argument</th><th>recipe</th><th>this run</th></tr>"
    return f'<p class="note">Different from {files}:</p>{table(head, rows)}'


def _between(runs: Sequence[Run]) -> str:
    rows = [
        f"<tr><th><code>{escape(key)}</code></th>{''.join(f'<td>{setting(value)}</td>' for value in values)}</tr>"
        for key, values in differences_between(runs).items()
    ]
    heads = "".join(f"<th>{run_label(run, i)}</th>" for i, run in enumerate(runs))
    return table(f"<tr><th>argument</th>{heads}</tr>", rows) if rows else '<p class="note">None.</p>'


def environment(runs: Sequence[Run]) -> str:
    """The commands of every run, and a table of machines and versions."""
    parts = []
    for i, run in enumerate(runs):
        again = [f"ssl-distill fit -c {shlex.quote(str(run.folder / 'config.yaml'))}"]
        commands = [start["command"] for start in run.starts] or again
        parts += [run_heading(runs, i), *map(_command, commands)]
    recorded = [(i, run) for i, run in enumerate(runs) if run.starts]
    if recorded:
        facts = [dict(_facts(run.starts[-1])) for _, run in recorded]
        rows = [
            f"<tr><th>{escape(name)}</th>"
            + "".join(f'<td class="text">{escape(str(of_run.get(name, DASH)))}</td>' for of_run in facts)
            + "</tr>"
            for name in dict.fromkeys(name for of_run in facts for name in of_run)
        ]
        heads = "".join(f"<th>{run_label(run, i)}</th>" for i, run in recorded)
        parts.append(table(f"<tr><th></th>{heads}</tr>" * (len(runs) > 1), rows))
    return "".join(parts)


def _command(command: str) -> str:
    """A command for a shell, an option a line."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    text = " ".join(f"\\\n  {word}" if word.startswith("-") else word for word in words)
    return f'<div class="command"><button type="button">copy</button><pre>{escape(text)}</pre></div>'


def _facts(start: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    commit = start["commit"] or ""
    yield "ssl-distill", start["version"] + (f", commit {commit.rstrip('+')}" if commit else "")
    if commit.endswith("+"):
        yield "sources", "changed since that commit"
    yield "machine", f"{start['processor']}; {start['platform']}"
    yield "accelerators", ", ".join(start["accelerators"]) or "none"
    yield "processes", start["processes"]
    yield "threads", start["threads"]
    yield "Python", start["python"]
    yield "packages", ", ".join(f"{name} {version}" for name, version in start["packages"].items())
