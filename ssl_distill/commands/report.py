"""`ssl-distill report`: one HTML page about one or several runs, to open in a browser or send to others."""

from pathlib import Path

from ssl_distill.commands.arguments import OneLineParser


def report(args: list[str]) -> None:
    """Write the page.

    Raises:
        ValueError: If a folder is no run folder.
    """
    parser = OneLineParser(prog="ssl-distill report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder of `ssl-distill fit`")
    parser.add_argument("--output", type=Path, help="default: report.html in the run folder, of several in this folder")
    options = parser.parse_args(args)

    from ssl_distill.callbacks.atomic import replacing
    from ssl_distill.report.page import render
    from ssl_distill.report.runs import read_runs

    runs = read_runs(options.runs)
    output = options.output or (options.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    with replacing(output) as temporary:  # a run folder from elsewhere may hold a link of that name
        temporary.write_text(render(runs), encoding="utf-8")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, opens in any browser")
