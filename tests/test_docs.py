"""What the documents say is true: links lead somewhere, and blocks of shell and Python run.

A block that no test can run has a line before it that says why, such as `<!-- needs: a GPU -->`.
"""

import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torchvision.io import write_jpeg

from ssl_distill.cli import main
from ssl_distill.data.fashion_mnist import DEBIAN_FOLDER

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
RUN_BY_CI = ("pip", "pytest", "ruff", "mypy", "mkdocs")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(language):
    """Blocks in a language that need nothing a test has not."""
    for page in PAGES:
        for needs, found, text in re.findall(
            r"(<!-- needs: .+? -->\n)?^```(\w+)\n(.*?)^```", page.read_text(), re.S | re.M
        ):
            if found == language and not needs:
                yield Block(str(page.relative_to(ROOT)), language, text)


def commands():
    """Commands of shell blocks, each with its page; those that CI runs itself are left out."""
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for command in line.partition(" #")[0].split(" && "):
                words = shlex.split(command, comments=True)
                if words and words[0] not in RUN_BY_CI:
                    yield pytest.param(words, id=f"{block.page}: {' '.join(words)}")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working folder with what the documents speak of: pictures in DIR, a finished run in RUN and runs/quickstart."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "DIR").mkdir()
    for number in range(12):
        write_jpeg(torch.randint(256, (3, 40, 48), dtype=torch.uint8), str(folder / f"DIR/{number}.jpg"))
    run = folder / "runs/quickstart"
    few = {"num_images": 64, "batch_size": 8, "bank_size": 32, "query_size": 16}
    options = [word for key, value in few.items() for word in (f"--data.init_args.{key}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "-c", "configs/quickstart.yaml", "--trainer.max_steps", "2", *options]) == 0
    for copy in ("RUN", "runs/a", "runs/b", "runs/c"):
        shutil.copytree(run, folder / copy)
    return folder


@pytest.mark.filterwarnings("ignore")  # of runs that are too short
@pytest.mark.parametrize("command", list(commands()))
def test_shell_blocks_run(command, desk, monkeypatch):
    if any("fashion_mnist" in word for word in command) and not DEBIAN_FOLDER.is_dir():
        pytest.skip(f"{DEBIAN_FOLDER} is missing: apt-get install dataset-fashion-mnist")
    monkeypatch.chdir(desk)
    assert command[0] == "ssl-distill", "a command that no test runs needs a mark, see above"
    fewer = ["--trainer.fast_dev_run", "1", "--data.init_args.batch_size", "4"] if command[1] == "fit" else []
    if command[1] == "validate":
        fewer = ["--trainer.default_root_dir", "validated"]
    if "--trainer.devices" in command:
        fewer += ["--trainer.devices", "1"]
    assert main([*command[1:], *fewer]) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", list(blocks("python")), ids=lambda block: block.page)
def test_python_blocks_run(block, desk, monkeypatch):
    monkeypatch.chdir(desk)
    exec(compile(block.text, block.page, "exec"), {"__name__": "block"})


@pytest.mark.filterwarnings("ignore")
def test_pipelines_from_a_file(desk, monkeypatch):
    """The configuration on the page about augmentation trains."""
    monkeypatch.chdir(desk)
    (text,) = (block.text for block in blocks("yaml") if block.page == "docs/augmentation.md")
    Path("pipelines.yaml").write_text(text)
    options = ["--trainer.fast_dev_run", "1", "--data.init_args.batch_size", "4"]
    assert main(["fit", "-c", "configs/quickstart.yaml", "-c", "pipelines.yaml", *options]) == 0


def test_plain_loop_example():
    example = runpy.run_path(str(ROOT / "docs/examples/plain_loop.py"))
    assert 0.05 < example["main"](num_images=256, num_epochs=1) <= 1


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_configs_named_in_the_readme_exist():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    named = [word for block in blocks for word in shlex.split(block, comments=True) if word.startswith("configs/")]
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_say_how_they_run(config):
    text = config.read_text()
    assert yaml.safe_load(text)
    command = "ssl-distill sweep" if config.parent.name == "sweeps" else "-c"
    assert f"{command} {config.relative_to(ROOT)}" in text
