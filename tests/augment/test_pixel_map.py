import torch

from ssl_distill.augment.pixel_map import PixelMap, joined, unmoved

SIZE = 20


def turned(images=1):
    """The whole crop turned by a quarter, clockwise: what was on top is on the right."""
    middle = torch.arange(SIZE) + 0.5
    x, y = middle[:, None].expand(SIZE, SIZE), SIZE - middle.expand(SIZE, SIZE)
    return PixelMap(torch.stack([x, y])[None].repeat(images, 1, 1, 1), torch.ones(images, SIZE, SIZE).bool())


def halved():
    """The left half of the crop in the middle of the view at half its size, nothing around."""
    middle = torch.arange(SIZE) + 0.5
    line = (middle - SIZE / 4) * 2
    place = torch.stack([line.expand(SIZE, SIZE), line[:, None].expand(SIZE, SIZE)])[None]
    return PixelMap(place, ((place >= 0) & (place <= torch.tensor([10.0, 20]).view(2, 1, 1))).all(1))


def test_a_quarter_turn():
    points = torch.tensor([[[1.0, 0.5], [19.5, 0.5], [7.25, 12.0]]])
    there = turned().to_view(points)
    torch.testing.assert_close(there.points, torch.tensor([[[19.5, 1.0], [19.5, 19.5], [8.0, 7.25]]]))
    assert there.shown.all()
    back = turned().to_crop(there.points)
    torch.testing.assert_close(back.points[:, 2], points[:, 2])
    mask = torch.zeros(1, 2, SIZE, SIZE)
    mask[:, 0, :4], mask[:, 1, 5, 2] = 1, 1
    moved = turned().masks(mask)
    assert torch.equal(moved[0, 0].nonzero()[:, 1].unique(), torch.arange(16, 20))
    assert moved[0, 1].nonzero().tolist() == [[2, 14]]


def test_what_is_not_shown():
    pixel_map = halved()
    points = torch.tensor([[[4.0, 4.0], [9.0, 19.0], [15.0, 4.0], [-3.0, 4.0]]])
    there = pixel_map.to_view(points)
    assert there.shown.tolist() == [[True, True, False, False]]
    torch.testing.assert_close(there.points[:, :2], torch.tensor([[[7.0, 7.0], [9.5, 14.5]]]))
    back = pixel_map.to_crop(torch.tensor([[[7.0, 7.0], [1.0, 7.0], [13.0, 7.0], [25.0, 7.0]]]))
    assert back.shown.tolist() == [[True, False, False, False]]
    torch.testing.assert_close(back.points[0, 0], torch.tensor([4.0, 4.0]))
    assert pixel_map.masks(torch.ones(1, 1, SIZE, SIZE)).sum() == 5 * 10


def test_images_in_parts(monkeypatch):
    monkeypatch.setattr("ssl_distill.augment.pixel_map._DISTANCES_AT_ONCE", SIZE**2 * 10)
    points = torch.rand(5, 8, 2) * SIZE
    whole = turned(5).to_view(points)
    torch.testing.assert_close(whole.points, torch.stack([SIZE - points[..., 1], points[..., 0]], -1))


def test_views_that_follow_one_another():
    """Only the second view is turned."""
    maps = joined([unmoved((1, 3, SIZE, SIZE), torch.device("cpu")), turned()])
    points = torch.tensor([[[5.0, 12.5], [20.0, 0.0]]]).repeat(2, 1, 1)
    there = maps.to_view(points)
    torch.testing.assert_close(there.points, torch.stack([points[0], torch.tensor([[7.5, 5.0], [20.0, 20.0]])]))
    assert there.shown.all()
    for part, whole in zip(maps.views(2)[1], turned(), strict=True):
        assert torch.equal(part, whole)
