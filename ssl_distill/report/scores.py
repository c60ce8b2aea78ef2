"""Scores of the runs, with their baselines and protocols."""

from collections.abc import Sequence
from html import escape

from ssl_distill.evaluate.report import protocol_lines
from ssl_distill.report.markup import run_label, table
from ssl_distill.report.names import is_percent, is_quality, name_of, number
from ssl_distill.report.runs import Run


def evaluation(runs: Sequence[Run]) -> str:
    """Scores with labels, scores without, and how both were made."""
    if not any(run.scores() for run in runs):
        return ""
    tables = []
    for wanted, title in ((False, ""), (True, "<h3>Quality without labels</h3>")):
        if table := _scoretable(runs, wanted):
            tables.append(title + table)
    protocols: dict[str, list[str]] = {}
    for run in runs:
        if run.protocol:
            protocols.setdefault("\n".join(protocol_lines(run.protocol)), []).append(run.name)
    notes = []
    for text, names in protocols.items():
        whose = "" if len(protocols) == 1 else f"<b>{escape(', '.join(names))}</b><br>"
        notes.append(f'<p class="note">{whose}{escape(text).replace(chr(10), "<br>")}</p>')
    protocol = f"<details open><summary>How the numbers were made</summary>{''.join(notes)}</details>" if notes else ""
    return "".join(tables) + protocol


def _scoretable(runs: Sequence[Run], of_quality: bool) -> str:
    """Scores now, before training, and the change: a column per encoder of one run, or else per run."""
    scores = [run.scores() for run in runs]
    encoders = list(dict.fromkeys(encoder for of_run in scores for encoder in of_run))
    if len(runs) == 1:
        heads = [escape(encoder) for encoder in encoders]
        groups = {"": list(scores[0].values())}
    else:
        heads = [run_label(run, i) for i, run in enumerate(runs)]
        groups = {encoder: [of_run.get(encoder, {}) for of_run in scores] for encoder in encoders}
    rows = []
    for encoder, per_column in groups.items():
        names = dict.fromkeys(name for each in per_column for name in each if is_quality(name) == of_quality)
        if names and encoder:
            rows.append(f'<tr class="group"><th colspan="{1 + 3 * len(heads)}">{escape(encoder)}</th></tr>')
        for name in names:
            label, hint = name_of(name)
            cells = "".join(_score_cells(name, each.get(name)) for each in per_column)
            rows.append(f"<tr><th>{escape(label)}{f'<small>{hint}</small>' * bool(hint)}</th>{cells}</tr>")
    if not rows:
        return ""
    top = "".join(f'<th class="run n" colspan="3">{head}</th>' for head in heads)
    kinds = '<th class="run n">now</th><th class="n">before</th><th class="n">change</th>' * len(heads)
    return table(f'<tr class="top"><th></th>{top}</tr><tr><th></th>{kinds}</tr>', rows)


def _score_cells(name: str, values: tuple[float | None, float] | None) -> str:
    before, now = values or (None, None)
    change = None if before is None or now is None else now - before
    text = number(name, change, "+")
    # Only accuracies have a side that is better for certain.
    judged = change is not None and is_percent(name) and not name.endswith("std") and text.strip("+0.\N{MINUS SIGN}")
    kind = ("up" if change > 0 else "down") if judged and change else ""
    return (
        f'<td class="n first now">{number(name, now)}</td><td class="n">{number(name, before)}</td>'
        f'<td class="n {kind}">{text}</td>'
    )
