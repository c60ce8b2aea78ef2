import logging

import numpy as np
import pytest
import torch

from ssl_distill.lidar.data import EvaluationSet, MixedLidarData, TrainingSet, chosen, origin, spread
from ssl_distill.lidar.frames import IGNORED
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.projection import pair_with_pixels
from ssl_distill.lidar.samples import LabelledSamples, PairedSamples
from ssl_distill.lidar.street import CLASS_NAMES, IMAGE_SIZE, SENSOR, render_scene
from ssl_distill.lidar.street_data import StreetFrames, SynthStreetData


def street(**kwargs):
    return SynthStreetData(**{"num_scenes": 6, "batch_size": 2, "bank_size": 3, "query_size": 2, "seed": 0, **kwargs})


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if first is None:
        return second is None
    return all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_pictures_and_points_agree():
    """The class of a point is that of its pixel, but for borders and what is hidden; mirrored pictures disagree."""
    agreement, mirrored = [], []
    for index in range(4):
        scene = render_scene(1, index)
        frame = scene.frame
        for camera, classes in zip(frame.cameras, scene.pixel_classes, strict=True):
            rows, pixels = pair_with_pixels(frame.points, camera, IMAGE_SIZE, SENSOR)
            row, column = pixels.T
            agreement.append(np.mean(classes[row, column] == frame.labels[rows]))
            mirrored.append(np.mean(classes[row, IMAGE_SIZE[1] - 1 - column] == frame.labels[rows]))
    assert min(agreement) >= 0.93
    assert np.mean(agreement) >= 0.96
    assert np.mean(mirrored) <= 0.75


def test_scenes_replay():
    first, again = render_scene(0, 3), render_scene(0, 3)
    np.testing.assert_array_equal(first.frame.points, again.frame.points)
    np.testing.assert_array_equal(first.frame.cameras[2].image, again.frame.cameras[2].image)
    without = render_scene(0, 3, ())
    np.testing.assert_array_equal(first.frame.points, without.frame.points)
    other = render_scene(0, 4)
    assert len(other.frame.points) != len(first.frame.points)


def test_scenes_hold_all_classes():
    scenes = [render_scene(0, index, ()).frame for index in range(12)]
    counts = np.sum([np.bincount(frame.labels, minlength=len(CLASS_NAMES)) for frame in scenes], axis=0)
    assert np.all(counts > 50)
    points = np.concatenate([frame.points for frame in scenes])
    assert 6500 * 12 < len(points) < 8600 * 12
    assert points[:, 3].min() >= 0
    assert points[:, 3].max() <= 1
    assert np.linalg.norm(points[:, :3], axis=1).max() < 60.2


def test_frames_come_from_the_cache(monkeypatch):
    first = StreetFrames(5, 0, 2)[1]
    monkeypatch.setattr("ssl_distill.lidar.street_data.render_scene", lambda *args: pytest.fail("rendered again"))
    again = StreetFrames(5, 0, 2)[1]
    np.testing.assert_array_equal(first.points, again.points)
    np.testing.assert_array_equal(first.cameras[3].image, again.cameras[3].image)


def test_a_damaged_cache_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path))
    first = StreetFrames(5, 0, 1)[0]
    (file,) = tmp_path.glob("street/*.npz")
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(StreetFrames(5, 0, 1)[0].points, first.points)
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "a_file"))  # no folder can be made there
    np.testing.assert_array_equal(StreetFrames(5, 0, 1)[0].points, first.points)


@pytest.mark.parametrize("samples", [PairedSamples(IMAGE_SIZE), LabelledSamples()])
def test_batches_do_not_depend_on_workers(samples):
    loaders = [street(samples=samples, num_workers=n).train_dataloader() for n in (0, 2)]
    epochs = []
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        epochs.append([list(loader) for loader in loaders])
        assert equal(*epochs[epoch])
    assert not equal(epochs[0][0], epochs[1][0])


def test_ranks_share_an_epoch():
    """Two ranks with batches of 1 see what one rank sees with batches of 2."""
    whole = list(street().train_dataloader())
    dataset = street().training_set()
    items = list(street().train_dataloader().sampler)
    for i, batch in enumerate(whole):
        pair = items[2 * i : 2 * i + 2]
        assert equal(dataset.samples.join([dataset[pair[0]], dataset[pair[1]]]), batch)


def test_parts():
    data = street()
    data.setup("fit")
    assert [len(part) for part in data.parts] == [6, 3, 2]
    assert data.num_classes == 11
    bank, queries = data.val_dataloader()
    batch = next(iter(queries))
    assert len(batch.points.num_points) == 2
    assert batch.labels.shape == batch.read_back.shape == (int(batch.num_read.sum()),)
    assert batch.read_back.max() < len(batch.points.features)
    assert len(list(bank)) == 1
    assert len(street(samples=LabelledSamples()).val_dataloader()) == 1
    train = {frame.frame_id for frame in (data.parts.train[i] for i in range(6))}
    assert train.isdisjoint(data.parts.queries[i].frame_id for i in range(2))


def test_predictions_are_read_back_from_the_nearest_point():
    data = street()
    scan = EvaluationSet(data.parts.queries, data.preparation)[0]
    kept = scan.points.features[:, 1:4]
    distance = torch.cdist(scan.xyz[:500], kept)
    torch.testing.assert_close(distance.gather(1, scan.read_back[:500, None])[:, 0], distance.amin(1))


def test_blind_frames_are_replaced_and_counted(caplog):
    frames = StreetFrames(0, 0, 3)
    blind = frames[1]._replace(cameras=())

    class WithBlind:
        def __len__(self):
            return 3

        def __getitem__(self, position):
            return blind if position == 1 else frames[position]

    dataset = TrainingSet(WithBlind(), PairedSamples(IMAGE_SIZE), street().preparation, 0)
    with caplog.at_level(logging.WARNING):
        batch = dataset.__getitems__([0, 1, 2])
    assert batch.picture.tolist()[1] == batch.picture.tolist()[2]
    assert dataset.replacement.num_useless == 1
    assert f"frame {blind.frame_id} has nothing to train on" in caplog.text
    nothing = TrainingSet(chosen(WithBlind(), [1, 1]), PairedSamples(IMAGE_SIZE), street().preparation, 0)
    with pytest.raises(OSError, match=r"none of 2 frames can be used, the last: frame .* has nothing to train on"):
        nothing[0]


def test_mix():
    data = MixedLidarData([street(), street(num_scenes=4, seed=9)], PairedSamples(IMAGE_SIZE), street().preparation)
    data.setup("validate")
    assert [len(part) for part in data.parts] == [10, 6, 2]
    frames = [data.parts.train[i].frame_id for i in range(10)]
    assert len(set(frames)) == 10
    assert data.parts.train[7].frame_id == "street_9_1"
    found = [origin(chosen(data.parts.train, [0, 5, 6, 9]), i) for i in range(4)]
    for (frames, place), position in zip(found, [0, 5, 6, 9], strict=True):
        assert frames[place].frame_id == data.parts.train[position].frame_id
        assert isinstance(frames, StreetFrames)
    with pytest.raises(IndexError):
        data.parts.train[10]
    with pytest.raises(ValueError, match="`members` must be one or more data sets"):
        MixedLidarData([])


def test_spread():
    frames = StreetFrames(0, 0, 10)
    assert spread(frames, 20) is frames
    assert list(spread(frames, 4).indices) == [0, 2, 5, 7]


def test_calibration_batches_are_no_training_batches():
    data = street()
    first, *rest = data.calibration_batches(4)
    assert len(rest) == 3
    assert len(first.points.num_points) == 2
    assert equal(first, next(data.calibration_batches(1)))
    images = data.sample_images(3)
    assert [image.shape for image in images] == [(1, 3, *IMAGE_SIZE)] * 3


def test_unlabelled_points_are_ignored():
    frame = render_scene(0, 0, ()).frame._replace(labels=None)
    batch = EvaluationSet([frame], street().preparation)[0]
    assert (batch.labels == IGNORED).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_scenes": 0}, "`num_scenes` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"query_size": 0}, "`query_size` must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        street(**arguments)


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="`batch_size` must be at most 6"):
        street(batch_size=7).setup("fit")


def test_no_point_in_view():
    preparation = Preparation(((8, 8),) * 3, (500, 500, 500), (510, 510, 510))
    with pytest.raises(OSError, match=r"none of 6 frames can be used, .* no point in the field of view"):
        next(iter(street(preparation=preparation).train_dataloader()))
