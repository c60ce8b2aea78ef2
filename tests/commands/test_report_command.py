import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from ssl_distill.callbacks.metrics_file import MetricsFile
from ssl_distill.cli import main
from ssl_distill.commands.environment import read_environment, record_end, record_start
from ssl_distill.report.charts import Curve, chart
from ssl_distill.report.markup import TEMPLATES
from ssl_distill.report.pictures import embedded
from ssl_distill.report.recipe import differences_between, differences_from_recipe
from ssl_distill.report.runs import read_runs

RECIPE = """
trainer: {max_epochs: 28}
model:
  class_path: ssl_distill.methods.dino.DINO
  init_args:
    backbone: convnet_nano
    learning_rate: {start: 3e-3, end: 1.0e-5}
"""
PROTOCOL = {"bank": 100, "queries": 20, "KNN": {"k": [20, 10], "temperature": 0.07}, "Quality": {"max_spectrum": 5}}


def make_run(folder, seed=0, momentum=0.99, recorded=True):
    """A run folder as `fit` leaves it, with the words of no encoder or option that could be taken for HTML."""
    folder.mkdir(parents=True)
    config = yaml.safe_load(RECIPE)
    config["model"]["init_args"] |= {"momentum": {"start": momentum}, "learning_rate": {"start": 0.003, "end": 1e-5}}
    config |= {"seed_everything": seed, "data": {"class_path": "ssl_distill.data.shapes.ShapesData", "init_args": {}}}
    config["trainer"] |= {"max_epochs": 2, "default_root_dir": str(folder), "logger": "<none> & 'all'"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = MetricsFile(folder)
    for step in range(40):
        row = {"train/loss": 7 - step / 10, "train/class": 7 - step / 10, "schedule/momentum": 0.9}
        row |= {"train/images_per_s": 700.0, "train/health/kl": 1.0 / (step + 1)}
        if step % 13 == 0:
            for encoder in ("teacher", "student"):
                row |= {f"val/{encoder}/knn_top1": 0.15 + step / 200, f"val/{encoder}/rankme": 20.0 + step}
            row["val/score"] = 0.15 + step / 200
        metrics.log_metrics(row, step)
    (folder / "evaluation.json").write_text(json.dumps([{"stage": "fit", "protocol": PROTOCOL, "scores": {}}]))
    for name, size in (("views", (300, 800)), ("pca", (700, 600)), ("neighbours", (1100, 800))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
    if recorded:
        (folder.parent / "recipe.yaml").write_text(RECIPE)
        args = ["fit", "-c", str(folder.parent / "recipe.yaml"), "--trainer.max_epochs", "2", "--model.init_args."]
        args[-1] += f"momentum.start={momentum}"
        record_start(folder, args, num_processes=1, resumed=False)
        record_end(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "a"), make_run(root / "b", seed=1, momentum=0.98), make_run(root / "old", recorded=False)]


def test_the_environment_is_recorded(runs):
    (entry,) = read_environment(runs[0])
    assert entry["command"].startswith("ssl-distill fit -c ")
    assert entry["configs"][0]["text"] == RECIPE
    assert entry["ended"] >= entry["started"]
    assert {"torch", "lightning", "timm"} <= entry["packages"].keys()


def test_a_resumed_run_has_two_starts(tmp_path):
    record_start(tmp_path, ["fit"], num_processes=2, resumed=False)
    record_start(tmp_path, ["fit", "--ckpt_path", "last"], num_processes=2, resumed=True)
    record_end(tmp_path)
    assert [entry["ended"] is None for entry in read_environment(tmp_path)] == [True, False]
    record_start(tmp_path, ["fit"], num_processes=2, resumed=False)  # another run in a folder that kept nothing
    assert len(read_environment(tmp_path)) == 1


def test_differences(runs):
    first, second, old = read_runs(runs)
    assert set(differences_from_recipe(first)) == {
        ("trainer.max_epochs", 28, 2),
        ("model.momentum.start", None, 0.99),  # was a default, and was given; 3e-3 is 0.003
    }
    assert differences_from_recipe(old) is None
    assert differences_between([first, second]) == {"model.momentum.start": [0.99, 0.98], "seed_everything": [0, 1]}
    assert first.scores()["student"]["knn_top1"] == (0.15, pytest.approx(0.345))


def test_one_page_holds_everything(runs, capsys):
    assert main(["report", str(runs[0])]) == 0
    output = runs[0] / "report.html"
    assert str(output) in capsys.readouterr().out
    page = output.read_text()
    assert output.stat().st_size < 5e6
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing is fetched
    for text in (
        "DINO on Shapes", "34.5 %", "before training 15.0 %", "+19.5", "RankMe", "KNN: k 20 10, temperature 0.07",
        "validation score", "Nearest neighbours", "model.momentum.start", "recipe.yaml", "torch ",
        "--trainer.max_epochs 2", "&lt;none&gt; &amp;",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("<img ") == 3
    assert page.count('class="chart"') == 7  # the only term is the loss: one panel


def test_several_runs_stand_side_by_side(runs, tmp_path):
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "all.html")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert page.count("<img ") == 9
    assert "DINO, 3 runs" in page
    assert "The recipe of this run was not recorded." in page
    assert "Between the runs" in page
    assert (tmp_path / "all.html").stat().st_size < 5e6  # though nine pictures of noise do not compress


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name / "run", recorded=False) for name in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run"]
    assert read_runs([folders[0], folders[0]])[1].name == "run"


@pytest.mark.parametrize("others", [0, 1])
def test_what_runs_say_is_no_markup(tmp_path, others):
    evil = "<script>alert(1)<"
    run = make_run(tmp_path / f'">{evil}run')
    words = ("convnet_nano", "student", "temperature", "recipe.yaml")
    for name in ("config.yaml", "evaluation.json", "environment.json", "metrics.csv"):
        (run / name).write_text(re.sub("|".join(words), lambda word: evil + word[0], (run / name).read_text()))
    old = [make_run(tmp_path / "old", recorded=False)] * others
    assert main(["report", str(run), *map(str, old), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 1  # the page's own
    for word in ("run", *words):
        assert f"&lt;script&gt;alert(1)&lt;{word}" in page, word
    assert 'alt="Views of &#34;&gt;&lt;script&gt;' in page


def drawn(title, curves):
    return TEMPLATES.get_template("chart.html.j2").render(chart=chart(title, curves))


def test_charts_hold_any_numbers():
    for points in ([(0, 1.0)], [(0, 0.0), (1, 0.0)], [(5, -1e-9), (9, 1e9)], [(i, i % 7) for i in range(9999)]):
        panel = drawn("<title>", [Curve("a & b", 0, 0, points)])
        assert "&lt;title&gt;" in panel
        assert "a &amp; b" in panel
        assert "nan" not in panel
        assert len(panel) < 12_000
    peak = [(i, float(i == 5000)) for i in range(9999)]
    points = re.search(r'points="([^"]+)"', drawn("peak", [Curve("a", 0, 0, peak)]))[1]
    heights = {pair.split(",")[1] for pair in points.split()}
    assert len(heights) == 2  # thinning keeps the peak


def test_large_pictures_are_made_smaller(tmp_path):
    Image.effect_noise((900, 900), 90).convert("RGB").save(tmp_path / "noise.png")
    assert len(embedded(tmp_path / "noise.png", 60_000)) < 81_000


def test_errors(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        assert main(["report", str(tmp_path / name)]) == 2
        assert "is no run folder of `ssl-distill fit`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "doctor"])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom ssl_distill.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'numpy', 'yaml', 'PIL'} & set(sys.modules)\nassert not heavy, heavy"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"usage: ssl-distill {command}" in output


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("error", (event) => { document.title = "error: " + event.message; });
addEventListener("load", () => setTimeout(() => {
  if (document.title.startsWith("error")) return;
  const chart = document.querySelector(".chart svg"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 20, clientY: box.top + 20 }));
  const images = [...document.images].every((image) => image.naturalWidth > 50);
  const wide = document.documentElement.scrollWidth > innerWidth;
  const [entry] = performance.getEntriesByType("navigation");
  document.title = JSON.stringify({ images, wide, ms: entry.loadEventStart, values: values.innerText });
}));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_opens_it(runs, tmp_path, scheme):
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    page.write_text(page.read_text().replace("<body>", f"<body>{PROBE}"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1600"]
    options += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--user-data-dir={tmp_path}/user"]
    environment = {**os.environ, "HOME": str(tmp_path)}

    def browse(*more):
        command = [CHROMIUM, *options, *more, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True).stdout

    seen = json.loads(re.search(r"<title>(.*?)</title>", browse("--dump-dom", "--virtual-time-budget=5000"))[1])
    assert seen["images"]
    assert not seen["wide"]  # nothing sticks out sideways
    assert seen["ms"] < 2000
    assert re.match(r"step \d+\s+a\s+[\d.]+", seen["values"])
    browse(f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as shot:
        ground = shot.convert("L").getpixel((3, 800))
        assert (ground > 230) if scheme == "light" else (ground < 40)
        assert len(shot.convert("RGB").resize((128, 160)).getcolors(128 * 160)) > 50
