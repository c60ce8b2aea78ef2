"""Seeded mutants of losses, centering, EMA, schedules and clipping, and which of them the tests let live.

Run: python tools/mutate.py [--count 200] [--seed 0] [--only losses/koleo.py ...] [--numbers 3 17 ...] [--list]
Protocol: mutants are drawn without replacement from all that the kinds below give; each is written into a copy of
package and tests in a temporary folder, where the tests of `TESTS` run with `-x`. The checkout is never touched. A
mutant lives if all of them pass; one that takes longer than `--limit` seconds is dead too. PyTorch is imported once:
each mutant runs in a fork. First the tests run without a mutant, and have to pass.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
JOBS = 2
IMPORTED_ONCE = ("torch", "lightning.pytorch", "torchvision", "timm", "kornia", "torchmetrics", "scipy.special",
                 "safetensors.torch", "hypothesis", "jaxtyping", "beartype", "matplotlib.pyplot")  # fmt: skip

# What is mutated: its own tests, and the methods that use it, whose golden and contract tests run after those.
TESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "losses/consolidated.py": (("targets/test_consolidated.py",), ("udi",)),
    "losses/cross_view.py": (("losses/test_cross_view.py", "targets/test_targets.py"), ("dino",)),
    "losses/entropy.py": (("losses/test_entropy.py",), ("random_teacher",)),
    "losses/koleo.py": (("losses/test_koleo.py",), ("random_teacher",)),
    "losses/masked_feature.py": (("losses/test_masked_feature.py",), ("dbot",)),
    "losses/masked_token.py": (("losses/test_masked_token.py",), ("ibot",)),
    "losses/matched.py": (("losses/test_matched.py",), ("mokd", "random_teacher")),
    "losses/object_view.py": (("losses/test_object_view.py",), ("odis",)),
    "losses/pixel_contrast.py": (("losses/test_pixel_contrast.py",), ("pcd",)),
    "losses/pixel_pairs.py": (("losses/test_pixel_contrast.py",), ("pcd",)),
    "losses/point_distance.py": (("losses/test_point_distance.py",), ("scalr",)),
    "losses/row_entropy.py": (("losses/test_cross_view.py", "losses/test_masked_token.py"), ("ibot",)),
    "losses/von_mises_fisher.py": (("losses/test_von_mises_fisher.py", "losses/test_entropy.py"), ()),
    "targets/center.py": (("targets/test_targets.py", "targets/test_consolidated.py"), ("dino",)),
    "targets/consolidated.py": (("targets/test_consolidated.py",), ("udi",)),
    "targets/health.py": (("targets/test_targets.py",), ("random_teacher",)),
    "targets/queue.py": (("targets/test_queue.py",), ("pcd",)),
    "targets/sinkhorn.py": (("losses/test_cross_view.py", "targets/test_targets.py"), ()),
    "callbacks/ema_teacher.py": ((), ("dino", "random_teacher", "mokd")),
    "optim/schedules.py": (("optim/test_schedules.py", "optim/test_restarts.py"), ("dino", "dbot")),
    "optim/parameters.py": (("optim/test_parameters.py",), ("dino", "udi")),
}

SWAPPED_SIGNS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add}
SWAPPED_COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SWAPPED_REDUCTIONS = {"mean": "sum", "sum": "mean"}
TAKE_AXES = {
    "sum", "mean", "softmax", "log_softmax", "logsumexp", "norm", "vector_norm", "amax", "argmax", "std", "cat",
    "stack", "flatten", "unbind", "flip", "normalize", "cosine_similarity", "var_mean",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        file: Of the package.
        line: Where the change is.
        kind: What was done.
        change: The statement's expression before and after.
        source: The changed file's text.
    """

    file: str
    line: int
    kind: str
    change: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.change}"


@dataclass(frozen=True)
class Job:
    """Tests to run with a file of the package as it says."""

    arguments: list[str]
    file: str
    source: str


@dataclass(frozen=True)
class Place:
    """A node of a syntax tree, and where it hangs."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST

    def put(self, node: ast.AST) -> None:
        """Hang another node there."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def places(node: ast.AST) -> Iterator[Place]:
    """All that is computed below a node: no annotations, imports, messages and docstrings."""
    if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom)) or ast.unparse(node).startswith("warnings.warn("):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                yield Place(node, field, index if isinstance(value, list) else None, child)
                yield from places(child)


def edits(place: Place) -> Iterator[tuple[str, ast.AST]]:
    """Kinds of changes of a node, and what stands in its place then."""
    node, parent = place.node, place.parent
    if isinstance(node, ast.operator) and type(node) in SWAPPED_SIGNS:
        yield "sign", SWAPPED_SIGNS[type(node)]()
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not is_axis(place):
        yield "sign", node.operand
    if isinstance(node, ast.cmpop) and type(node) in SWAPPED_COMPARISONS:
        yield "comparison", SWAPPED_COMPARISONS[type(node)]()
    if isinstance(node, ast.Constant) and not isinstance(parent, ast.Expr):
        yield from edits_of_constant(node, is_axis(place) or isinstance(parent, ast.UnaryOp))
    if is_axis(place):
        axis = ast.literal_eval(ast.unparse(node))
        yield "axis", ast.Constant({0: 1, 1: 0, -1: 0}.get(axis, axis - 1 if axis > 0 else axis + 1))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "detach":
            yield "detach", node.func.value
        if node.func.attr in SWAPPED_REDUCTIONS:
            other = ast.Attribute(node.func.value, SWAPPED_REDUCTIONS[node.func.attr], ast.Load())
            yield "mean/sum", ast.Call(other, node.args, node.keywords)
    if isinstance(node, ast.With) and ast.unparse(node.items[0]) == "torch.no_grad()":
        yield "no_grad", ast.If(ast.Constant(True), node.body, [])
    in_sum_or_call = isinstance(parent, (ast.Call, ast.BinOp, ast.keyword)) and place.field != "func"
    if isinstance(node, ast.expr) and is_momentum(node) and in_sum_or_call and not is_complement(parent):
        yield "momentum", ast.BinOp(ast.Constant(1), ast.Sub(), node)
    if is_complement(node):
        yield "momentum", node.right  # type: ignore[attr-defined]


def edits_of_constant(node: ast.Constant, only_if_float: bool) -> Iterator[tuple[str, ast.AST]]:
    """Other numbers; a whole one is one off."""
    if isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node.value, float):
        yield "constant", ast.Constant(2 * node.value or 1.0)
    elif isinstance(node.value, int) and not only_if_float:
        yield "off by one", ast.Constant(node.value + 1)
        yield "off by one", ast.UnaryOp(ast.USub(), ast.Constant(1)) if not node.value else ast.Constant(node.value - 1)


def is_axis(place: Place) -> bool:
    """Whether a node is a whole number that says over which dimension."""
    call, node = place.parent, place.node
    if isinstance(call, ast.keyword) and call.arg == "dim":
        return isinstance(node, (ast.Constant, ast.UnaryOp))
    number = node.operand if isinstance(node, ast.UnaryOp) else node
    return (
        isinstance(call, ast.Call)
        and place.field == "args"
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in TAKE_AXES
        and isinstance(number, ast.Constant)
        and type(number.value) is int
    )


def is_momentum(node: ast.AST) -> bool:
    """Whether it is a momentum by its name."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.endswith("momentum") and isinstance(getattr(node, "ctx", None), ast.Load)


def is_complement(node: ast.AST) -> bool:
    """Whether it is 1 - momentum."""
    return isinstance(node, ast.BinOp) and ast.unparse(node.left) == "1" and is_momentum(node.right)


def swappable(function: ast.AST, first: ast.AST, second: ast.AST) -> bool:
    """Whether the order of two statements may matter, and the second does not need a name that the first makes."""
    if not all(isinstance(each, (ast.Assign, ast.AugAssign, ast.Expr)) for each in (first, second)):
        return False
    if any(isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) for each in (first, second)):
        return False
    known = {each.arg for each in ast.walk(function) if isinstance(each, ast.arg)} | {
        each.id
        for each in ast.walk(function)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store) and each.lineno < first.lineno  # type: ignore[attr-defined]
    }
    made = {each.id for each in ast.walk(first) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    read = {each.id for each in ast.walk(second) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
    if (made - known) & read:
        return False
    return bool(written(first) & touched(second) or written(second) & touched(first))


def touched(statement: ast.AST) -> set[str]:
    """Names and attributes in a statement."""
    return {ast.unparse(each) for each in ast.walk(statement) if isinstance(each, (ast.Name, ast.Attribute))}


def written(statement: ast.AST) -> set[str]:
    """Names and attributes that it sets or changes in place."""
    stored = {each for each in ast.walk(statement) if isinstance(getattr(each, "ctx", None), ast.Store)}
    # A subscript's owner is what changes: `self.keys[place] = ...` writes `self.keys`.
    owners = {each.value for each in stored if isinstance(each, ast.Subscript)}
    changed = {
        call.func.value
        for call in ast.walk(statement)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if call.func.attr.endswith("_") or (isinstance(statement, ast.Expr) and call is statement.value)
    }
    return {ast.unparse(each) for each in stored | owners | changed} - {"self", "torch"}


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of one file, in the order of its text."""
    tree = ast.parse(source)
    for place in list(places(tree)):
        line = getattr(place.node, "lineno", getattr(place.parent, "lineno", 0))
        shown: ast.AST = place.parent if isinstance(place.node, (ast.operator, ast.cmpop)) else place.node
        shown = place.parent if isinstance(shown, (ast.Constant, ast.UnaryOp)) else shown
        for kind, node in list(edits(place)):
            before = short(shown)
            place.put(node)
            after = short(node if shown is place.node else shown)
            yield Mutant(file, line, kind, f"{before} -> {after}", ast.unparse(tree))
            place.put(place.node)
    for function in [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]:
        for index, decorator in enumerate(function.decorator_list):
            if ast.unparse(decorator) == "torch.no_grad()":
                del function.decorator_list[index]
                yield Mutant(file, function.lineno, "no_grad", f"not on {function.name}", ast.unparse(tree))
                function.decorator_list.insert(index, decorator)
        bodies: list[Any] = [getattr(each, "body", None) for each in ast.walk(function)]
        for body in (each for each in bodies if isinstance(each, list)):
            for index in range(len(body) - 1):
                first, second = body[index : index + 2]
                if swappable(function, first, second):
                    body[index : index + 2] = second, first
                    change = f"{short(first)}; {short(second)} swapped"
                    yield Mutant(file, first.lineno, "order", change, ast.unparse(tree))
                    body[index : index + 2] = first, second


def short(node: ast.AST) -> str:
    """A node in one line."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:67]}..."


def copied(checkout: Path, folder: Path) -> Path:
    """Package and tests, without compiled files: they are told from new ones by size and second only."""
    for name in ("ssl_distill", "tests", "configs"):
        shutil.copytree(checkout / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    shutil.copy(checkout / "pyproject.toml", folder)
    return folder


def start(folder: Path, arguments: list[str]) -> int:
    """Run tests in a fork; its process id.

    It exits with pytest's status. What it prints goes to `log` in the folder.
    """
    process = os.fork()
    if process:
        return process
    os.setsid()  # to end it with all that it starts
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    status = 99
    try:
        status = int(pytest.main(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def arguments(files: set[str]) -> list[str]:
    """What pytest is called with to test these files: their own tests first, which are the fastest."""
    own = {path for file in files for path in TESTS[file][0]}
    methods = {method for file in files for method in TESTS[file][1]}
    paths = [*sorted(own), *(f"methods/test_{method}.py" for method in sorted(methods))]
    contract = f"({' or '.join(methods)}) and not resume and not bf16" if methods else "nothing"
    chosen = ["-k", f"not test_contract or ({contract})"]
    plain = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]
    return [*plain, *chosen, *(f"tests/{path}" for path in [*paths, "methods/test_contract.py"])]


def statuses(jobs: list[Job], slots: list[Path], limit: float) -> Iterator[tuple[int, int | None]]:
    """Number and exit status (None: out of time) of each job as they end, one at a time in each copy."""
    slots = list(slots)
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[int, Path, str, float]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                number, job = waiting.pop(0)
                slot = slots.pop()
                file = slot / "ssl_distill" / job.file
                original = file.read_text()
                file.write_text(job.source)
                running[start(slot, job.arguments)] = number, slot, original, time.monotonic()
            for process, (number, slot, original, started) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                late = not ended and time.monotonic() - started > limit
                if late:
                    os.killpg(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                if ended or late:
                    del running[process]
                    (slot / "ssl_distill" / jobs[number].file).write_text(original)
                    slots.append(slot)
                    yield number, None if late else os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
    finally:
        for process in running:
            os.killpg(process, signal.SIGKILL)


def check_unchanged(files: set[str], checkout: Path) -> None:
    """Run the tests without any mutant.

    Raises:
        RuntimeError: If they fail: every mutant would look dead.
    """
    file = min(files)
    job = Job(arguments(files), file, (checkout / "ssl_distill" / file).read_text())
    for _, status in statuses([job], [checkout], limit=3600.0):
        if status != 0:
            log = (checkout / "log").read_text()[-3000:]
            raise RuntimeError(f"the tests do not pass without a mutant (status {status}):\n{log}")


def main() -> None:
    """Draw mutants, run the tests on each, and say who lives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per mutant")
    parser.add_argument("--only", nargs="*", default=list(TESTS), choices=list(TESTS), help="files to mutate")
    parser.add_argument("--numbers", type=int, nargs="*", help="of the drawn ones only these")
    parser.add_argument("--list", action="store_true", help="do not run them")
    options = parser.parse_args()

    drawn = [mutant for file in TESTS for mutant in mutants_of(file, (ROOT / "ssl_distill" / file).read_text())]
    total = len(drawn)
    drawn = random.Random(options.seed).sample(drawn, min(options.count, total))
    chosen = [number for number, mutant in enumerate(drawn) if mutant.file in options.only]
    chosen = [number for number in chosen if options.numbers is None or number in options.numbers]
    print(f"{len(chosen)} of {total} possible mutants, seed {options.seed}", flush=True)
    if options.list:
        for number in chosen:
            print(f"{number:4} {drawn[number]}")
        return
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    lived, late, done = [], 0, 0
    mutants = [drawn[number] for number in chosen]
    jobs = [Job(arguments({mutant.file}), mutant.file, mutant.source) for mutant in mutants]
    with tempfile.TemporaryDirectory() as folder:
        slots = [copied(ROOT, Path(folder) / str(slot)) for slot in range(JOBS)]
        check_unchanged({mutant.file for mutant in mutants}, slots[0])
        for job, status in statuses(jobs, slots, options.limit):
            done, late = done + 1, late + (status is None)
            word = "late" if status is None else "dead" if status else "lives"
            print(f"{word:5} {done}/{len(jobs)} {chosen[job]:4} {drawn[chosen[job]]}", flush=True)
            if status == 0:
                lived.append(chosen[job])
    print(f"killed {done - len(lived)} of {done} ({100 * (done - len(lived)) / done:.1f} %), {late} of them by time")
    for number in sorted(lived):
        print(f"{number:4} {drawn[number]}")


if __name__ == "__main__":
    main()
