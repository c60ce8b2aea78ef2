import pytest
import torch
import torch.nn.functional as F

from ssl_distill.augment.color import ColorRecipe
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.losses.pixel_contrast import pixel_contrast
from ssl_distill.losses.pixel_pairs import cross_view, cross_view_aligned, same_view
from ssl_distill.views import TwoViews


def rows(maps):
    return maps.movedim(1, -1).flatten(0, -2)


def test_golden(golden):
    for name in golden.cases("pcd/pixel_contrastive_loss*"):
        case = golden(name)
        student = case.tensors["student_map"].double().requires_grad_()
        teacher, negatives = case.tensors["teacher_map"].double(), case.tensors["queue"].double().T
        for chunk_size in (10, 512):
            student.grad = None
            temperature = case.params["temperature"]
            loss = pixel_contrast(rows(student), rows(teacher), negatives, temperature, chunk_size=chunk_size)
            loss.backward()
            torch.testing.assert_close(loss, case.tensors["loss"].double(), rtol=2e-6, atol=1e-7)
            expected = case.tensors["grad_student_map"].double()
            torch.testing.assert_close(student.grad, expected, rtol=2e-6, atol=1e-8)


def dense(students, teachers, negatives, temperature):
    """The formula, in one piece and by autograd."""
    student, teacher = F.normalize(students, dim=1), F.normalize(teachers, dim=1)
    logits = torch.cat([(student * teacher).sum(1, keepdim=True), student @ negatives.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.2, 0.005])
def test_gradient(temperature):
    torch.manual_seed(0)
    students = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    teachers = torch.randn(30, 6, dtype=torch.float64)
    negatives = F.normalize(torch.randn(20, 6, dtype=torch.float64), dim=1)
    ours = pixel_contrast(students, teachers, negatives, temperature, chunk_size=7)
    theirs = dense(students, teachers, negatives, temperature)
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(3 * ours, students)
    (expected,) = torch.autograd.grad(3 * theirs, students)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(lambda x: pixel_contrast(x, teachers, negatives, 0.2), students)


def test_length_does_not_matter_and_autocast_neither():
    torch.manual_seed(0)
    students, teachers = (F.normalize(torch.randn(9, 6, dtype=torch.float64), dim=1) for _ in range(2))
    negatives = F.normalize(torch.randn(20, 6, dtype=torch.float64), dim=1)
    expected = pixel_contrast(students, teachers, negatives)
    torch.testing.assert_close(pixel_contrast(1.1e-12 * students, 1.1e-12 * teachers, negatives), expected)

    students, teachers, negatives = students.float().requires_grad_(), teachers.float(), negatives.float()
    (gradient,) = torch.autograd.grad(pixel_contrast(students, teachers, negatives), students)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_contrast(students, teachers, negatives)
    torch.testing.assert_close(torch.autograd.grad(loss, students)[0], gradient)


def test_half_precision_and_no_pixels():
    students = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    negatives = F.normalize(torch.randn(10, 8), dim=1)
    loss = pixel_contrast(students, students.detach() * 3, negatives)
    loss.backward()
    assert loss.dtype == torch.float32
    assert students.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, dense(students.float(), students.float(), negatives, 0.2))
    nothing = torch.empty(0, 8, requires_grad=True)
    loss = pixel_contrast(nothing, torch.empty(0, 8), negatives)
    loss.backward()
    assert loss == 0


def test_pairings():
    maps = torch.randn(2, 3, 4, 5, 5)
    boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).expand(2, 3, 4)
    flip = torch.zeros(2, 3, dtype=torch.bool)
    views = TwoViews(torch.empty(2, 3, 3, 10, 10), boxes, flip, torch.zeros(3, 3).long())
    assert same_view(maps, views) == (maps, None)
    torch.testing.assert_close(cross_view(maps, views).targets, maps.flip(0))
    aligned = cross_view_aligned(maps, views)
    assert aligned.valid.all()
    torch.testing.assert_close(aligned.targets, maps.flip(0))

    flip = torch.tensor([[False] * 3, [True] * 3])
    aligned = cross_view_aligned(maps, views._replace(flip=flip))
    torch.testing.assert_close(aligned.targets, maps.flip(0).flip(-1))

    boxes = boxes.clone()
    boxes[1, 0] = torch.tensor([4.0, 0.0, 14.0, 10.0])  # the second view lies two cells further right
    aligned = cross_view_aligned(maps, views._replace(boxes_xyxy=boxes))
    assert aligned.valid[0, 0].all(0).tolist() == [False, False, True, True, True]
    torch.testing.assert_close(aligned.targets[0, 0, :, :, 2:], maps[1, 0, :, :, :3])
    torch.testing.assert_close(aligned.targets[1, 0, :, :, :3], maps[0, 0, :, :, 2:])
    assert aligned.valid[1, 0].all(0).tolist() == [True, True, True, False, False]


def test_pixels_whose_middle_lies_on_the_border_are_there():
    maps = torch.randn(2, 1, 4, 5, 5)
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]], [[1.0, 0.0, 9.0, 10.0]]])  # by half a pixel narrower on each side
    views = TwoViews(torch.empty(2, 1, 3, 10, 10), boxes, torch.zeros(2, 1).bool(), torch.zeros(1, 3).long())
    assert cross_view_aligned(maps, views).valid.all()


def test_aligned_pixels_show_the_same_place():
    """Real crops of an image whose colours are its coordinates."""
    size = 64
    ramp = torch.linspace(20, 235, size).round().byte()
    image = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size).byte()])
    batch = ImageBatch(image[None].repeat(6, 1, 1, 1), torch.tensor([[80.0, 120.0]]).repeat(6, 1), torch.arange(6))
    plain = ColorRecipe(jitter_probability=0, greyscale_probability=0, blur_probability=0)
    augment = TwoViewAugment(32, scale=(0.3, 0.6), recipe_1=plain, recipe_2=plain, mean=(0, 0, 0), std=(1, 1, 1))
    views = augment(batch, Draws(0, 0))
    aligned = cross_view_aligned(views.images, views)
    inner = aligned.valid
    inner[..., :2] = inner[..., -2:] = inner[..., :2, :] = inner[..., -2:, :] = False
    difference = (aligned.targets - views.images).abs().amax(2)[inner]
    assert inner.float().mean() > 0.2
    assert difference.quantile(0.99) < 0.02
    same = (cross_view(views.images, views).targets - views.images).abs().amax(2)[inner]
    assert same.mean() > 5 * difference.mean()
