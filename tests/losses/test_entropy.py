import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.losses.entropy import (
    OutputEntropy,
    SphereEntropy,
    leave_one_out_entropy,
    mean_output_entropy,
    output_reconstruction,
    plug_in_entropy,
    resubstitution_entropy,
    sphere_reconstruction,
)
from ssl_distill.losses.matched import matched_entropy

EXPECT = {"rtol": 1e-6, "atol": 1e-9}
OFFICIAL = {"average": resubstitution_entropy, "expectation": plug_in_entropy}


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


@pytest.mark.parametrize("name", OFFICIAL)
def test_golden_sphere(golden, name):
    for stem in golden.cases("entropy_reconstruction/entropy_sphere_*"):
        case = golden(stem)
        kappa = case.params["kappa"]
        raw = case.tensors["z_raw"].requires_grad_()
        unit = F.normalize(raw, dim=1)
        entropy = OFFICIAL[name](unit, kappa)
        torch.testing.assert_close(entropy, case.tensors[f"entropy_{name}_exact"], **EXPECT)
        torch.testing.assert_close(gradient(entropy, unit), case.tensors[f"grad_z_{name}"], **EXPECT)
        part = SphereEntropy(weight=1.0, concentration=kappa, estimator=OFFICIAL[name])
        torch.testing.assert_close(gradient(-part(raw[None]), raw), case.tensors[f"grad_z_raw_{name}"], **EXPECT)


def test_golden_outputs(golden):
    case = golden("entropy_reconstruction/entropy_discrete")
    logits = case.tensors["logits"].requires_grad_()
    entropy = mean_output_entropy(logits, case.params["eps"])
    torch.testing.assert_close(entropy, case.tensors["entropy_expectation"], **EXPECT)
    torch.testing.assert_close(gradient(entropy, logits), case.tensors["grad_logits_expectation"], **EXPECT)


def test_golden_reconstruction(golden):
    case = golden("entropy_reconstruction/reconstruction_sphere")
    first, second = (case.tensors[name].requires_grad_() for name in ("z1", "z2"))
    value = sphere_reconstruction(first, second, case.params["kappa"])
    torch.testing.assert_close(value, case.tensors["reconstruction_exact"], **EXPECT)
    torch.testing.assert_close(gradient(value, first), case.tensors["grad_z1"], **EXPECT)
    torch.testing.assert_close(gradient(value, second), case.tensors["grad_z2"], **EXPECT)

    case = golden("entropy_reconstruction/reconstruction_discrete")
    first, second = (case.tensors[name].requires_grad_() for name in ("logits1", "logits2"))
    value = output_reconstruction(first, second, case.params["eps"])
    torch.testing.assert_close(value, case.tensors["reconstruction"], **EXPECT)
    torch.testing.assert_close(gradient(value, first), case.tensors["grad_logits1"], **EXPECT)
    torch.testing.assert_close(gradient(value, second), case.tensors["grad_logits2"], **EXPECT)
    torch.testing.assert_close(output_reconstruction(first, second), value, rtol=1e-4, atol=0)  # without the constant


def test_golden_objectives(golden):
    """Both terms together, as an objective of its own and with a teacher."""
    case = golden("entropy_reconstruction/er_loss_sphere")
    kappa = case.params["kappa"]
    raw = [case.tensors[name].requires_grad_() for name in ("z1_raw", "z2_raw")]
    first, second = (F.normalize(each, dim=1) for each in raw)
    entropies = resubstitution_entropy(first, kappa), resubstitution_entropy(second, kappa)
    loss = sphere_reconstruction(first, second, kappa) - sum(entropies) / 2
    torch.testing.assert_close(loss, case.tensors["er_sphere_symmetric"], **EXPECT)
    for each, name in zip(raw, ("grad_z1", "grad_z2"), strict=True):
        torch.testing.assert_close(gradient(loss, each), case.tensors[name], **EXPECT)
    loss = sphere_reconstruction(first, second.detach(), kappa) + SphereEntropy(1.0, kappa, resubstitution_entropy)(
        raw[0][None]
    )
    torch.testing.assert_close(loss, case.tensors["er_sphere_student"], **EXPECT)
    torch.testing.assert_close(gradient(loss, raw[0]), case.tensors["grad_student"], **EXPECT)

    case = golden("entropy_reconstruction/er_loss_discrete")
    first, second = (case.tensors[name].requires_grad_() for name in ("logits1", "logits2"))
    eps = case.params["eps"]
    entropies = mean_output_entropy(first, eps), mean_output_entropy(second, eps)
    loss = output_reconstruction(first, second, eps) - sum(entropies) / 2
    torch.testing.assert_close(loss, case.tensors["er_discrete_symmetric"], **EXPECT)
    torch.testing.assert_close(gradient(loss, first), case.tensors["grad_logits1"], **EXPECT)
    torch.testing.assert_close(gradient(loss, second), case.tensors["grad_logits2"], **EXPECT)


def test_golden_with_teacher(golden):
    """DINO's terms without centering; ours has no small constant, which moves the official numbers by up to 1e-5."""
    case = golden("entropy_reconstruction/er_loss_discrete")
    logits = case.tensors["logits1"].requires_grad_()
    targets = (case.tensors["logits2"] / case.params["teacher_temp"]).softmax(1)
    temperature = case.params["student_temp"]
    loss = matched_entropy(targets, logits, temperature)
    loss = loss + OutputEntropy(1.0)(logits[None] / temperature)
    torch.testing.assert_close(loss, case.tensors["dino_er_total"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(loss, logits), case.tensors["grad_student_logits"], rtol=1e-5, atol=1e-5)
    teacher = mean_output_entropy(case.tensors["logits2"] / case.params["teacher_temp"], case.params["eps"])
    torch.testing.assert_close(teacher, case.tensors["dino_er_entropy_teacher"], **EXPECT)


def test_leave_one_out_is_nearly_unbiased():
    """Uniform rows have the entropy of the sphere's surface; rows that see themselves seem denser."""
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(256, 128, dtype=torch.float64, generator=generator), dim=1)
    surface = math.log(2) + 64 * math.log(math.pi) - math.lgamma(64)
    assert leave_one_out_entropy(unit).item() == pytest.approx(surface, abs=0.02)
    assert resubstitution_entropy(unit).item() < surface - 3


@pytest.mark.parametrize("estimator", [leave_one_out_entropy, resubstitution_entropy, plug_in_entropy])
def test_maximising_it_spreads_a_batch(estimator):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 1, 8, generator=generator) + 0.3 * torch.randn(1, 12, 8, generator=generator)
    rows.requires_grad_()
    part = SphereEntropy(estimator=estimator)
    before = F.normalize(rows.detach(), dim=-1).mean(1).norm()
    assert before > 0.95
    for _ in range(100):
        rows.data -= 2 * gradient(part(rows), rows)
    assert F.normalize(rows.detach(), dim=-1).mean(1).norm() < 0.6


def test_maximising_it_uses_more_prototypes():
    logits = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0)) + 5 * F.one_hot(torch.tensor(0), 8)
    logits.requires_grad_()
    part = OutputEntropy()
    for _ in range(100):
        logits.data -= gradient(part(logits), logits)
    assert mean_output_entropy(logits[0].detach()) > 0.95 * math.log(8)


def test_gradient():
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for estimator in (leave_one_out_entropy, resubstitution_entropy, plug_in_entropy):
        assert torch.autograd.gradcheck(lambda x, f=estimator: f(F.normalize(x, dim=1), 4.0), rows)
    assert torch.autograd.gradcheck(mean_output_entropy, rows)
    assert torch.autograd.gradcheck(output_reconstruction, (rows, rows.detach().flip(0).requires_grad_()))


def test_outputs_that_are_certain_have_finite_gradients():
    logits = torch.tensor([[0.0, -400.0], [0.0, -400.0]], requires_grad=True)
    assert torch.isfinite(gradient(mean_output_entropy(logits), logits)).all()
    half = torch.zeros(2, 3, 4, dtype=torch.float16, requires_grad=True)
    assert OutputEntropy()(half).dtype == SphereEntropy()(half + 1).dtype == torch.float32


def on_a_rank(rank, port, queue, rows, split):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    own = rows.split(split)[rank].clone().requires_grad_()
    results = {}
    for name, function in {"sphere": unit_entropy, "outputs": mean_output_entropy}.items():
        value = function(own)
        results[name] = (value.item(), gradient(value, own).tolist())
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


def unit_entropy(rows):
    return leave_one_out_entropy(F.normalize(rows, dim=1), 4.0)


@pytest.mark.ddp
def test_ranks():
    """Values are those of the whole batch on every rank; gradients, averaged as DDP does, too."""
    rows = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=on_a_rank, args=(rank, port, queue, rows, [3, 3])) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=240) for _ in processes)
    for process in processes:
        process.join()
    whole = rows.clone().requires_grad_()
    for name, function in {"sphere": unit_entropy, "outputs": mean_output_entropy}.items():
        value = function(whole)
        expected = gradient(value, whole)
        assert [results[rank][name][0] for rank in range(2)] == pytest.approx([value.item()] * 2, rel=1e-12)
        ours = torch.cat([torch.tensor(results[rank][name][1], dtype=torch.float64) for rank in range(2)]) / 2
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_errors():
    table = [
        (lambda: leave_one_out_entropy(torch.ones(1, 2)), "`unit` must hold at least 2 rows"),
        (lambda: SphereEntropy(weight=-1), "`weight` must be at least 0 .a negative one rewards collapse., got -1"),
        (lambda: OutputEntropy(weight=-0.5), "`weight` must be at least 0"),
        (lambda: SphereEntropy(concentration=0), "`concentration` must be positive, got 0"),
        (lambda: SphereEntropy()(torch.ones(1, 2, 3)), "`features` must be the student's"),
        (lambda: OutputEntropy()(torch.ones(1, 2, 3)), "`logits` must be the student's"),
    ]
    for call, message in table:
        with pytest.raises(ValueError, match=message):
            call()


def test_golden_defaults(golden):
    kappa = golden("entropy_reconstruction/entropy_sphere_d8").params["kappa"]
    unit = F.normalize(torch.randn(2, 6, 4, requires_grad=True), dim=-1)
    for estimator in (leave_one_out_entropy, resubstitution_entropy, plug_in_entropy):
        torch.testing.assert_close(estimator(unit[0]), estimator(unit[0], kappa))
    expected = sphere_reconstruction(*unit, kappa)
    torch.testing.assert_close(sphere_reconstruction(*unit), expected)
    torch.testing.assert_close(SphereEntropy()(unit), SphereEntropy(1.0, kappa, leave_one_out_entropy)(unit))
    torch.testing.assert_close(OutputEntropy()(unit), OutputEntropy(1.0)(unit))


def test_terms_are_means_over_views():
    rows = torch.randn(3, 6, 4, requires_grad=True)
    outputs = torch.stack([mean_output_entropy(view) for view in rows])
    torch.testing.assert_close(OutputEntropy(1.0)(rows), -outputs.mean())
    spheres = torch.stack([leave_one_out_entropy(F.normalize(view, dim=1)) for view in rows])
    torch.testing.assert_close(SphereEntropy(1.0)(rows), -spheres.mean())


def test_half_precision_is_compared_in_float32():
    first, second = torch.randn(2, 6, 40).half()
    value = output_reconstruction(first, second)
    torch.testing.assert_close(value, output_reconstruction(first.float(), second.float()))
    value = sphere_reconstruction(first, second)
    torch.testing.assert_close(value, sphere_reconstruction(first.float(), second.float()))


def test_weights_scale_the_term():
    rows = torch.randn(2, 6, 4, requires_grad=True)
    for part in (SphereEntropy, OutputEntropy):
        torch.testing.assert_close(part(0.25)(rows), 0.25 * part(1.0)(rows))
    targets = torch.full((2, 6, 4), 0.25)
    assert cross_view_entropy(targets, rows) + OutputEntropy(0.0)(rows) == cross_view_entropy(targets, rows)
