"""A student of a frozen random teacher becomes better than it, on images and not on noise."""

import pytest
from fit_runs import SEEDS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", SEEDS)
def test_fashion_mnist(fit, seed):
    """Standardised linear probes of teacher, student, and a student that saw noise, on the same queries."""
    run = fit("random_teacher", "random_teacher/fashion_mnist.yaml", seed)
    noise = fit(
        "random_teacher_noise", "random_teacher/fashion_mnist.yaml", seed, "-c", "configs/random_teacher/noise.yaml"
    )
    teacher, student, control = run.after("teacher"), run.after("student"), noise.after("student")
    print()
    for name, scores in {"teacher": teacher, "student": student, "noise": control}.items():
        print(f"{name}: linear {100 * scores['linear_top1']:.2f}, k-NN {100 * scores['knn_top1']:.2f}")
    assert run.before("student") == run.before("teacher") == teacher  # it began there, and the teacher never moved
    assert noise.after("teacher") == teacher
    assert student["linear_top1"] > teacher["linear_top1"]
    assert student["linear_top1"] > control["linear_top1"]
