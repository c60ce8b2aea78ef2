"""Optuna in the terms of a sweep file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssl_distill.sweeps.file import Parameter, Sweep

try:
    import optuna
    from optuna import Study, TrialPruned
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise ValueError("`ssl-distill sweep` needs Optuna: pip install 'ssl-distill[sweep]'.") from error


__all__ = [
    "FrozenTrial",
    "Study",
    "Trial",
    "TrialPruned",
    "TrialState",
    "draw_again",
    "finished",
    "grid_of",
    "open_study",
    "suggest",
]


class DrawnByNumber(BaseSampler):
    """A sampler whose draws follow from a seed and the number of the trial, and from what earlier trials gave.

    Optuna's own begin their stream of draws again in every process: a search that is gone on with, and processes that
    share one, would repeat each other's trials.

    Args:
        make: The sampler, by a seed.
        seed: Of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self.make = make
        self.seed = seed
        self.sampler = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Begin the draws of this trial."""
        self.sampler = self.make(int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]))
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The sampler's own."""
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The sampler's own."""
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The sampler's own."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """The sampler's own."""
        self.sampler.after_trial(study, trial, state, values)


def open_study(sweep: Sweep, folder: Path, seed: int) -> Study:
    """The study in a folder, gone on with if it is there; several processes may work on it at once.

    Args:
        sweep: What is searched.
        folder: Holds `study.log`.
        seed: Of the sampler.

    Raises:
        ValueError: If the folder holds a search by another metric.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers: dict[str, Callable[[], BaseSampler]] = {
        "bayes": lambda: DrawnByNumber(lambda seed: optuna.samplers.TPESampler(seed=seed), seed),
        "random": lambda: DrawnByNumber(lambda seed: optuna.samplers.RandomSampler(seed=seed), seed),
        "grid": lambda: optuna.samplers.GridSampler(grid_of(sweep), seed=seed),  # goes by the number itself
    }
    pruner: Any = optuna.pruners.NopPruner()
    if sweep.min_iter is not None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=sweep.min_iter, reduction_factor=sweep.eta)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        sampler=samplers[sweep.method](),
        pruner=pruner,
        study_name="sweep",
        direction="maximize" if sweep.maximize else "minimize",
        load_if_exists=True,
    )
    if (known := study.user_attrs.get("metric", sweep.metric)) != sweep.metric:
        raise ValueError(f"`--output` {folder} holds a search by {known}, not {sweep.metric}; give another folder.")
    study.set_user_attr("metric", sweep.metric)
    return study


def grid_of(sweep: Sweep) -> dict[str, list[Any]]:
    """All choices of all parameters.

    Raises:
        ValueError: If one is a range of real numbers.
    """
    grid: dict[str, list[Any]] = {}
    for name, parameter in sweep.parameters.items():
        if parameter.values:
            grid[name] = [_plain(value) for value in parameter.values]
        elif parameter.is_whole:
            grid[name] = list(range(int(parameter.low), int(parameter.high) + 1))
        else:
            raise ValueError(f"`parameters.{name}` must have `values` for `method: grid`.")
    return grid


def suggest(trial: Trial, parameters: dict[str, Parameter]) -> dict[str, Any]:
    """Values for a trial, by dotted key."""
    return {name: _suggest_one(trial, name, parameter) for name, parameter in parameters.items()}


def _suggest_one(trial: Trial, name: str, parameter: Parameter) -> Any:
    if parameter.values:
        choices = {_plain(value): value for value in parameter.values}
        return choices[trial.suggest_categorical(name, list(choices))]
    if parameter.is_whole:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high))
    if parameter.is_log and parameter.step:  # Optuna's logarithms have no steps
        value = trial.suggest_float(name, parameter.low, parameter.high, log=True)
        return min(max(round(value / parameter.step) * parameter.step, parameter.low), parameter.high)
    return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.is_log, step=parameter.step)


def _plain(value: Any) -> Any:
    """Lists and mappings as text: Optuna stores numbers, texts, booleans and None."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def draw_again(study: Study, number: int) -> None:
    """Give up a trial that was cut short; the next one gets its values."""
    trial = study.tell(number, state=TrialState.FAIL)
    if trial.params:
        kept = {key: value for key, value in trial.system_attrs.items() if key in ("grid_id", "search_space")}
        again = {**kept, "fixed_params": trial.params}  # as `enqueue_trial` has it, which forgets the place in a grid
        study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=again))


def finished(study: Study) -> list[FrozenTrial]:
    """Trials that came to their end, the best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=study.direction.name == "MAXIMIZE")
