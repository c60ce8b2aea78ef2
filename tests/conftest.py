"""Fixtures of the whole suite: golden files, shape checks, one thread."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from jsonargparse import _common
from safetensors import safe_open
from torch import Tensor

# Shapes in signatures are checked while tests run, in the parts that compute.
_CHECKED = (
    "augment", "backbones", "data", "detection", "distributed", "draws", "evaluate", "heads", "lidar", "losses",
    "methods", "optim", "targets",
)  # fmt: skip
install_import_hook([f"ssl_distill.{part}" for part in _CHECKED], "shape_checks.check")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(Path(__file__).parent / "golden"), help="folder of the golden files")
    parser.addoption("--runs", help="folder that keeps the runs of `tests/numbers`: a finished one is not repeated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-k golden` selects all tests of golden files, on another set of which they are run."""
    hidden = [
        item.nodeid for item in items if "golden" in getattr(item, "fixturenames", ()) and "golden" not in item.name
    ]
    if hidden:
        raise pytest.UsageError(f"tests of golden files must have `golden` in their names, got {', '.join(hidden)}.")


@dataclass(frozen=True)
class GoldenCase:
    """One golden file: inputs and expected outputs of an official implementation."""

    tensors: dict[str, Tensor]
    params: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


class Golden:
    """Reads golden cases by name, such as `golden("dino/loss_two_crops")`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> GoldenCase:
        with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return GoldenCase(tensors, json.loads((file.metadata() or {}).get("params", "{}")))

    def cases(self, pattern: str) -> list[str]:
        """Names of all cases that match a glob such as `dino/head_*`; at least one must."""
        method = pattern.split("/")[0]
        found = sorted(f"{method}/{path.stem}" for path in self.folder.glob(f"{pattern}.safetensors"))
        assert found, f"no golden file matches {pattern} in {self.folder}"
        return found


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it: arguments of other types than annotated reach our own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def fit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs the real command, for `tests/numbers`."""
    from fit_runs import Fit  # not before the hook above

    kept = request.config.getoption("--runs")
    return Fit(Path(kept).resolve() if kept else tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(Path(request.config.getoption("--golden")))


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose classes may be imported is asked for once per process by the commands, here once per test."""
    monkeypatch.setattr("jsonargparse._common.parsing_settings", dict(_common.parsing_settings))
