"""Datasets that begin in the middle of a pass: they give what is left, exactly, and decode nothing else."""

import numpy as np
import pytest

from keras_nonlocal.data import directory, video_dataset_from_directory
from keras_nonlocal.data.shards import write_shards
from tests.test_data_shards import make_videos

COUNT, BROKEN = 7, (2, 5)
OPTIONS = {"num_frames": 4, "frame_stride": 2, "image_size": (24, 28), "shorter_side": (32, 40), "seed": 5}
OPTIONS |= {"batch_size": None, "with_paths": True, "verbose": False}
VARIANTS = ({"shard": (2, 1)}, {"reshuffle_each_iteration": False}, {"shuffle": False})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "videos"
    make_videos(folder, COUNT, BROKEN)
    return folder


@pytest.fixture(scope="module")
def sources(videos, tmp_path_factory):
    """Two of them broken, as files; all good, as shards."""
    folder = tmp_path_factory.mktemp("data")
    whole = make_videos(folder / "videos", COUNT)
    write_shards(whole, folder / "shards", 36, videos_per_shard=4, verbose=False)
    return {"files": videos, "shards": folder / "shards"}


def passes(dataset, count):
    """For each pass its elements: clip, label, path, place."""
    return [
        [
            (clip, int(label), path, tuple(place[0].tolist()) if place else None)
            for clip, label, path, *place in dataset.as_numpy_iterator()
        ]
        for _ in range(count)
    ]


def equal(first, second, with_places=True):
    assert [element[1 : 4 if with_places else 3] for element in first] == [
        element[1 : 4 if with_places else 3] for element in second
    ]
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("source", ["files", "shards"])
@pytest.mark.parametrize("options", [{}, *[pytest.param(options, marks=pytest.mark.slow) for options in VARIANTS]])
def test_the_rest_is_the_same(sources, source, options):
    usual = passes(video_dataset_from_directory(sources[source], **OPTIONS, **options), 3)
    whole = passes(video_dataset_from_directory(sources[source], start=(0, 0), **OPTIONS, **options), 3)
    for number in range(3):
        equal(usual[number], whole[number], with_places=False)
        places = [element[3] for element in whole[number]]
        share = 3 if "shard" in options else COUNT
        assert set(places) <= {(number, position) for position in range(share)} and places == sorted(places)
        assert len(places) == share or source == "files"  # broken ones have a position, which is missing
    for position in (0, 2, share) if options == {} else (2,):
        dataset = video_dataset_from_directory(sources[source], start=(1, position), **OPTIONS, **options)
        rest, after = passes(dataset, 2)
        equal(rest, [element for element in whole[1] if element[3] >= (1, position)])
        equal(after, whole[2])


def test_nothing_before_is_decoded(videos, monkeypatch):
    decoded = []
    load_clip = directory.load_clip
    monkeypatch.setattr(directory, "load_clip", lambda path, *rest: decoded.append(path) or load_clip(path, *rest))
    dataset = video_dataset_from_directory(videos, start=(3, 4), **OPTIONS)
    ((clip, _, path, place), *_) = dataset.as_numpy_iterator()
    assert place.tolist() == [3, 4] and len(decoded) == COUNT - 4 and path.decode() in decoded
    assert dataset.report.num_good + len(dataset.report.broken) == COUNT - 4


def test_batches_and_both_subsets(videos):
    arguments = {**OPTIONS, "batch_size": 2, "validation_split": 0.3, "subset": "both", "on_error": "black"}
    training, validation = video_dataset_from_directory(videos, start=(0, 3), **arguments)
    first, second = ([place.tolist() for *_, place in training.as_numpy_iterator()] for _ in range(2))
    assert first == [[[0, 3], [0, 4]]]
    assert second == [[[1, 0], [1, 1]], [[1, 2], [1, 3]], [[1, 4]]]
    assert len(validation.element_spec) == 3 and validation.cardinality() == 1
    no_labels = video_dataset_from_directory(videos, labels=None, start=(0, 0), **{**OPTIONS, "with_paths": False})
    assert no_labels.element_spec[1].shape == (2,)


def test_only_broken_ones_are_left(videos):
    """No error, as what came before was good; a whole pass of broken ones is one."""
    dataset = video_dataset_from_directory(videos, start=(0, 0), **OPTIONS)
    last_ones = [elements[-1][3] for elements in passes(dataset, 9)]
    number, last_good = next(place for place in last_ones if place[1] < COUNT - 1)  # broken ones end that pass
    dataset = video_dataset_from_directory(videos, start=(number, last_good + 1), **OPTIONS)
    assert [len(elements) for elements in passes(dataset, 2)] == [0, COUNT - len(BROKEN)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 3}, r"pair \(pass, position\) of integers from 0 on. Received: start=3"),
        ({"start": (0, -1)}, r"pair \(pass, position\) of integers from 0 on. Received: start=\(0, -1\)"),
        ({"start": (0, 1.0)}, r"pair \(pass, position\)"),
        ({"start": (0, 8)}, r"a pass of 7 videos, at most its end. Received: start=\(0, 8\)"),
        ({"start": (0, 3), "shard": (3, 2)}, r"a pass of 2 videos, at most its end. Received: start=\(0, 3\)"),
        ({"start": (0, 3), "seed": None}, "`start` needs a `seed`.* Received: seed=None"),
        ({"start": (0, 3), "service": "grpc://localhost:1"}, r"with `service`.* Received: start=\(0, 3\), service="),
    ],
)
def test_wrong_starts(videos, arguments, message):
    with pytest.raises(ValueError, match=message):
        video_dataset_from_directory(videos, **{**OPTIONS, **arguments})
