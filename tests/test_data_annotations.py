"""Annotation files of every format, right and wrong, against what they are known to say."""

import logging
import os

import numpy as np
import pytest

from keras_nonlocal.data import annotations, read_annotations
from keras_nonlocal.data.annotations import FORMATS, Format, Row, WrongRow


@pytest.fixture
def disk(tmp_path):
    """Makes empty videos and writes files; nothing is decoded here."""

    class Disk:
        path = tmp_path

        def videos(self, *names):
            for name in names:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()

        def write(self, name, text):
            (tmp_path / name).write_text(text, encoding="utf-8")
            return tmp_path / name

        def read(self, name, text, **arguments):
            return read_annotations(tmp_path, self.write(name, text), **arguments)

        def names(self, result):
            return [os.path.relpath(path, tmp_path) for path in result.paths]

    return Disk()


KINETICS = """label,youtube_id,time_start,time_end,split
riding a bike,---0dWlqevI,19,29,train
"air, drumming",AbC_-123456,0,10,validate
riding a bike,flat0000000,5,15,train
"""


def test_kinetics(disk):
    disk.videos(
        "train/riding_a_bike/---0dWlqevI_000019_000029.mkv", "AbC_-123456_000000_000010.mp4", "flat0000000.WEBM"
    )
    result = disk.read("k.csv", KINETICS)
    assert disk.names(result) == [
        "train/riding_a_bike/---0dWlqevI_000019_000029.mkv",
        "AbC_-123456_000000_000010.mp4",
        "flat0000000.WEBM",
    ]
    assert result.class_names == ("air, drumming", "riding a bike")
    assert result.labels.tolist() == [1, 0, 1] and result.labels.dtype == np.int32
    assert result.skipped == []
    given = disk.read("k.csv", KINETICS, class_names=["riding a bike", "x", "air, drumming"])
    assert given.labels.tolist() == [0, 2, 0] and given.class_names == ("riding a bike", "x", "air, drumming")
    assert disk.read("k.csv", KINETICS, labels=None).labels is None


@pytest.mark.parametrize(
    "split, expected", [("train", ["a.mp4"]), ("val", ["b.mp4", "c.mp4"]), ("test", ["d.mp4"]), (None, list("abcd"))]
)
def test_kinetics_splits(disk, split, expected):
    disk.videos("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    rows = "x,a,0,1,train\ny,b,0,1,val\nx,c,0,1,Validate\nz,d,0,1,test\n"
    result = disk.read("k.csv", "label,youtube_id,time_start,time_end,split\n" + rows, split=split)
    assert [name[0] for name in disk.names(result)] == [name[0] for name in expected]
    assert result.class_names == ("x", "y", "z")  # of all splits: they share their numbers


def test_spaces_in_the_header(disk):
    disk.videos("a.mp4", "b.mp4")
    result = disk.read("k.csv", "label, youtube_id , split\nx,a,train\ny, b , val \n", split="val")
    assert disk.names(result) == ["b.mp4"] and result.skipped == []


def test_wrong_rows_of_other_splits_are_nobodys_business(disk, caplog):
    disk.videos("a.mp4", "b.mp4")
    rows = ["x,a,0,1,train", "x,gone,0,1,val", "x,b,zero,1,val", ",b,0,1,val", "x,a,0,1,val", "x,gone,0,1,train"]
    rows += ["x,b,one,1,Train", "x,b,0,1", "x,b,zero,1,"]
    text = "\n".join(["label,youtube_id,time_start,time_end,split", *rows])
    with caplog.at_level(logging.WARNING, logger="keras_nonlocal"):
        result = disk.read("k.csv", text, split="train")
    assert disk.names(result) == ["a.mp4"] and len(caplog.records) == 4
    assert [message.split("line ")[1].split(". Received")[0] for message in result.skipped] == [
        f"7: the video is not in {disk.path}",
        "8: the times must be whole seconds",
        "9: the row does not say its split",
        "10: the times must be whole seconds",
    ]
    good = "\n".join(["label,youtube_id,time_start,time_end,split", *rows[:5]])
    assert disk.names(disk.read("k.csv", good, split="train", on_error="raise")) == ["a.mp4"]
    with pytest.raises(
        ValueError, match=r"1 are wrong, the first: .*line 2: the row does not say its split.*splits \[\]"
    ):
        disk.read("k.csv", "label,youtube_id\nx,a\n", split="train")


def test_kinetics_takes_the_file_in_the_folder_of_the_label(disk):
    disk.videos(
        "other/id.mp4", "a b/id.mp4", "id.mp4", "other/id2.mp4", "id2.mp4", "z/id3.mp4", "y/id3_000001_000002.mp4"
    )
    rows = "a b,id,1,2\nc,id2,1,2\nc,id3,1,2\n"
    result = disk.read("k.csv", "label,youtube_id,time_start,time_end\n" + rows)
    assert disk.names(result) == ["a b/id.mp4", "id2.mp4", "y/id3_000001_000002.mp4"]


def test_wrong_kinetics_rows_are_skipped_counted_and_logged_once(disk, caplog):
    disk.videos("good.mp4", "times.mp4", "empty.mp4", "short.mp4", "unknown.mp4")
    text = """label,youtube_id,time_start,time_end,split
a,good,0,10,train
a,times,zero,10,train
,empty,0,10,train
a,short
a,,0,10,train
b,missing,0,10,train
a,good,0,10,train
c,unknown,0,10,train
"""
    with caplog.at_level(logging.WARNING, logger="keras_nonlocal"):
        result = disk.read("k.csv", text, class_names=["a", "b"])
    assert disk.names(result) == ["good.mp4"] and result.class_names == ("a", "b")
    expected = {
        3: "the times must be whole seconds. Received: time_start='zero', time_end='10'",
        4: "there is no label. Received: label=''",
        5: "the column 'time_start' is missing. Received: row={'label': 'a', 'youtube_id': 'short'}",
        6: "the column 'youtube_id' is empty.",
        7: "Received: video='missing_000000_000010'",
        8: "the video is in line 2 too. Received: video='good_000000_000010'",
        9: "the label must be one of the 2 classes. Received: label='c'",
    }
    for message, (line, reason) in zip(result.skipped, expected.items(), strict=True):
        assert message.startswith(f"{disk.path / 'k.csv'}, line {line}: ") and reason in message
    assert [r.getMessage() for r in caplog.records] == [f"Skipped a wrong row. {m}" for m in result.skipped]
    with pytest.raises(
        ValueError, match=r"Wrong row: .*k\.csv, line 3: the times must be .* Received: time_start='zero'"
    ):
        disk.read("k.csv", text, on_error="raise")
    missing = "label,youtube_id\na,good\nb,missing\n"
    with pytest.raises(ValueError, match=r"Wrong row: .*line 3: .* Received: video='missing'"):
        disk.read("k.csv", missing, on_error="raise")


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", "])
def test_lists(disk, separator):
    disk.videos("a.mp4", "my videos/the b.mp4", "c.avi")
    lines = [f"a.mp4{separator}0", "", f"my videos/the b.mp4{separator}12", f"{disk.path}/c.avi{separator}3"]
    result = disk.read("train.txt", "\r\n".join(lines))
    assert disk.names(result) == ["a.mp4", "my videos/the b.mp4", "c.avi"]
    assert result.labels.tolist() == [0, 12, 3]
    assert result.class_names == tuple(map(str, range(13)))
    assert disk.read("train.txt", "\n".join(lines), class_names=[f"class {i}" for i in range(20)]).labels.max() == 12


def test_wrong_lines_of_a_list(disk):
    disk.videos("good.mp4", *(f"{letter}.mp4" for letter in "abcde"))
    lines = ["path label", "good.mp4 1", "a.mp4 -1", "b.mp4 3", "c.mp4 2.5", "d.mp4", "gone.mp4 1", "./good.mp4 2"]
    result = disk.read("list.txt", "\n".join(lines), class_names=["x", "y", "z"])
    assert disk.names(result) == ["good.mp4"] and result.labels.tolist() == [1]
    reasons = {int(m.split(", line ")[1].split(":")[0]): m for m in result.skipped}
    assert sorted(reasons) == [1, 3, 4, 5, 6, 7, 8]
    for line, reason in {
        1: "the label must be an integer. Received: label='label'",
        3: "the label must be in [0, 100000). Received: label=-1",
        4: "the label must be in [0, 3). Received: label=3",
        5: "the label must be an integer. Received: label='2.5'",
        6: "expected a path and a label. Received: row='d.mp4'",
        7: "Received: video='gone.mp4'",
        8: "the video is in line 2 too. Received: video='./good.mp4'",
    }.items():
        assert reasons[line].endswith(reason)
    slip = disk.read("list.txt", "good.mp4 0\na.mp4 99999999")  # not a name for each class up to it
    assert slip.class_names == ("0",) and len(slip.skipped) == 1


def test_lists_of_image_folders_are_refused(disk):
    with pytest.raises(ValueError, match=r"`path total_frames label`, are not read\. Received: .*'some/video 120 3'"):
        disk.read("rawframes.txt", "some/video 120 3\nother 99 1\n")


def test_ucf101(disk):
    disk.videos("Archery/v_Archery_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi", "Biking/v_Biking_g01_c01.avi")
    disk.write("classInd.txt", "1 Archery\n2 Biking\n3 YoYo\n")
    result = disk.read("trainlist01.txt", "YoYo/v_YoYo_g01_c01.avi 3\nArchery/v_Archery_g01_c01.avi 1\n")
    assert disk.names(result) == ["YoYo/v_YoYo_g01_c01.avi", "Archery/v_Archery_g01_c01.avi"]
    assert result.labels.tolist() == [2, 0] and result.class_names == ("Archery", "Biking", "YoYo")
    tests = disk.read("testlist01.txt", "Biking/v_Biking_g01_c01.avi\nArchery/v_Archery_g01_c01.avi\n")
    assert tests.labels.tolist() == [1, 0] and tests.class_names == result.class_names
    wrong = "Archery/v_Archery_g01_c01.avi 1\nYoYo/v_YoYo_g01_c01.avi 0\nBiking/v_Biking_g01_c01.avi 4\n"
    wrong += "Climbing/v_x.avi\nBiking/v_Biking_g01_c01.avi two\nv_loose.avi\n"
    result = disk.read("trainlist01.txt", wrong)
    assert disk.names(result) == ["Archery/v_Archery_g01_c01.avi"]
    assert [message.split("line ")[1] for message in result.skipped] == [
        "2: the label must be in [1, 3]. Received: label=0",
        "3: the label must be in [1, 3]. Received: label=4",
        "4: the label must be one of the 3 classes. Received: label='Climbing'",
        "5: the label must be an integer. Received: label='two'",
        "6: expected `Class/video.avi`. Received: row='v_loose.avi'",
    ]
    disk.write("classInd.txt", "1 Archery\n3 YoYo\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*classInd\.txt must be `2 name`\. Received: line='3 YoYo'"):
        disk.read("trainlist01.txt", wrong)
    (disk.path / "classInd.txt").unlink()
    with pytest.raises(ValueError, match=r"names of the classes must be .* Received: no file '.*classInd\.txt'"):
        disk.read("trainlist01.txt", wrong, annotation_format="ucf101")


CHARADES = """id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length
46GP8,HR43,Kitchen,6,7,Yes,"A person, cooking
says ""hi"".",food;stove,A person.,c092 11.90 21.20;c147 0.00 12.60,24.83
N11GT,0KZ7,Stairs,5,7,Yes,Runs.,phone,Runs.,,18.33
XXN4E,S1,Hall,5,7,Yes,x,x,x,c156 0 3.5;c000 1.0 2.0;c156 5.0 6.0,9
"""


def test_charades(disk):
    disk.videos("46GP8.mp4", "N11GT.mp4", "deep/XXN4E.mp4")
    result = disk.read("Charades_v1_train.csv", CHARADES)
    assert disk.names(result) == ["46GP8.mp4", "N11GT.mp4", "deep/XXN4E.mp4"]
    assert result.labels.shape == (3, 157) and result.labels.dtype == np.float32
    assert [np.flatnonzero(row).tolist() for row in result.labels] == [[92, 147], [], [0, 156]]
    assert set(np.unique(result.labels)) == {0, 1}
    assert result.class_names[:2] == ("c000", "c001") and result.class_names[156] == "c156"
    disk.write("Charades_v1_classes.txt", "".join(f"c{i:03} Doing {i}\n" for i in range(157)))
    named = disk.read("Charades_v1_train.csv", CHARADES)
    assert named.class_names[92] == "Doing 92"
    np.testing.assert_array_equal(named.labels, result.labels)
    disk.write("Charades_v1_classes.txt", "c000 Doing nothing\n")
    with pytest.raises(ValueError, match=r"must name 157 classes\. Received: 1 names"):
        disk.read("Charades_v1_train.csv", CHARADES)


def test_wrong_charades_rows(disk):
    disk.videos(*(f"{letter}.mp4" for letter in "abcde"))
    text = "id,actions\na,c001 0 1\nb,c157 0 1\nc,c1 0 1\nd,c001 0\ne\n,c001 0 1\nf,c001 0 1\n"
    result = disk.read("c.csv", text)
    assert disk.names(result) == ["a.mp4"]
    assert [message.split("line ")[1] for message in result.skipped] == [
        "3: an action must be in c000 to c156. Received: action='c157 0 1'",
        "4: an action must be like 'c092 11.90 21.20'. Received: action='c1 0 1'",
        "5: an action must be like 'c092 11.90 21.20'. Received: action='c001 0'",
        "6: the column 'actions' is missing. Received: row={'id': 'e'}",
        "7: the column 'id' is empty. Received: row={'id': '', 'actions': 'c001 0 1'}",
        f"8: the video is not in {disk.path}. Received: video='f'",
    ]


def test_directory(disk):
    disk.videos("b/x.mp4", "a/deep/y.avi", "a/z.mp4", "loose.mp4", "a/notes.txt", "c/.hidden.mp4")
    result = read_annotations(disk.path)
    assert disk.names(result) == ["a/deep/y.avi", "a/z.mp4", "b/x.mp4"]
    assert result.labels.tolist() == [0, 0, 1] and result.class_names == ("a", "b", "c")
    assert disk.names(read_annotations(disk.path, labels=None))[-1] == "loose.mp4"


def test_a_new_format_is_one_entry(disk, monkeypatch):
    def parse(source, line):
        name, _, path = line.partition("|")
        if not path:
            raise WrongRow(f"expected `class|path`. Received: row={line!r}")
        return Row((path,), name)

    toy = Format(
        fits=lambda lines, path: lines[0] == "TOY",
        rows=lambda source: ((n, line) for n, line in enumerate(source.open().read().splitlines(), 1) if line != "TOY"),
        parse=parse,
        find=lambda source, row: os.path.join(source.directory, row.videos[0]),
    )
    monkeypatch.setitem(FORMATS, "toy", toy)
    result = disk.read("toy.txt", "TOY\nb|x.mp4\na|y.mp4\nz\n")
    assert disk.names(result) == ["x.mp4", "y.mp4"]
    assert result.labels.tolist() == [1, 0] and result.class_names == ("a", "b")
    assert result.skipped == [f"{disk.path / 'toy.txt'}, line 4: expected `class|path`. Received: row='z'"]


def test_bytes_that_are_no_text_and_a_byte_order_mark(disk):
    disk.videos("a.mp4")
    (disk.path / "l.txt").write_bytes(b"\xef\xbb\xbfa.mp4 0\n\xff\xfe.mp4 1\n")
    result = read_annotations(disk.path, disk.path / "l.txt")
    assert disk.names(result) == ["a.mp4"] and len(result.skipped) == 1


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("", {}, r"name any other format with `annotation_format`\. Received: .*which starts with ''"),
        ('{"a": 1}\n', {}, r"which starts with '\{\"a\": 1\}'"),
        ("x" * 200_000, {}, r"which starts with 'x{100}'"),
        ("a.mp4 0\n", {"annotation_format": "hmdb"}, r"must be None or one .* Received: annotation_format='hmdb'"),
        ("a.mp4 0\n", {"split": "train"}, r"'list' has none\. Received: split='train'"),
        (KINETICS, {"split": "trainval"}, r"`split` must be None or one of .* Received: split='trainval'"),
        (KINETICS, {}, r"can be used: 3 are wrong, the first: .*line 2: the video is not in .* Received: directory="),
        ("label,youtube_id,split\nx,a,train\n", {"split": "val"}, r"of the splits \['train'\], not split='val'\."),
        ("a.mp4 0\n", {"labels": [1]}, r'must be "inferred" or None with `annotations`'),
        ("a.mp4 0\n", {"class_names": ["x", "x"]}, r"must differ\. Received: class_names=\['x', 'x'\]"),
        ("a.mp4 0\n", {"class_names": ["x"], "labels": None}, r"Received: class_names=\['x'\]"),
        (f'label,youtube_id\n"{"x" * 140_000}', {}, r"must be a CSV file; line \d+: field larger .* Received: annot"),
    ],
)  # fmt: skip
def test_guards(disk, text, arguments, message):
    disk.videos("a.mp4")
    with pytest.raises(ValueError, match=message):
        disk.read("file", text, **arguments)


def test_guards_of_paths(disk):
    with pytest.raises(ValueError, match=r"`annotations` must be an existing file\. Received: annotations='nowhere'"):
        read_annotations(disk.path, "nowhere")
    with pytest.raises(ValueError, match=r"needs the file `annotations`\. Received: annotation_format='list'"):
        read_annotations(disk.path, annotation_format="list")
    with pytest.raises(ValueError, match=r"'directory' has none\. Received: split='val'"):
        read_annotations(disk.path, split="val")
    with pytest.raises(ValueError, match=r"`directory` must be an existing directory"):
        read_annotations(disk.path / "nowhere")


def test_every_format_is_documented():
    for name in FORMATS:
        assert f'`"{name}"`' in annotations.read_annotations.__doc__
