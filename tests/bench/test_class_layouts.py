"""Each classification layout on a tiny generated folder: what is read, and how damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.datasets import CLASS_LAYOUTS, ImageBytes, read_classes
from bench.datasets.class_sets import ClassificationSet, ClassNames, Prompts
from bench.datasets.language_maps import LanguageMap, babel_language
from runtime.errors import DatasetError, LanguageError

WNIDS = ("n01440764", "n01443537", "n01484850")  # tench, goldfish, great white shark: classes 0, 1, 2
BABEL = {
    "DE": [[0, 2], ["Schleie", "Weißer Hai"]],
    "EN": [[1], ["this label is not asked"]],
    "ZH": [[1], ["金鱼"]],
    "AIN": [[1, 2], ["sakana", "sakana"]],
}
PROMPTS = {"DE": ["ein  {} .", "das {}"], "ZH": ["{}的照片"], "EN": ["not this {}"]}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_babel_imagenet(folder: Path) -> None:
    write(folder / "babel_imagenet-298.json", json.dumps(BABEL))
    write(folder / "nllb_dist13b_prompts.json", json.dumps(PROMPTS))
    for index, wnid in enumerate(WNIDS):
        for number in range(index + 1):
            write(folder / "val" / wnid / f"ILSVRC2012_val_{number}.JPEG", wnid)


def make_flat(folder: Path) -> Path:
    """The same images, flat: one of class 2, one of class 0, one of class 1."""
    make_babel_imagenet(folder)
    for wnid in WNIDS:
        for path in (folder / "val" / wnid).iterdir():
            path.unlink()
        (folder / "val" / wnid).rmdir()
    for number in (1, 2, 3):
        write(folder / "val" / f"ILSVRC2012_val_0000000{number}.JPEG", str(number))
    return folder


def make_image_folder(folder: Path) -> None:
    for name in ("cat", "dog"):
        write(folder / "images" / name / "1.png", name)
    write(folder / "images" / "dog" / "2.JPG", "dog")
    write(folder / "images" / "dog" / "notes.txt", "no image")
    write(
        folder / "labels" / "pt.json",
        json.dumps({"labels": {"cat": "gato", "dog": "cão"}, "templates": ["um {}"]}),
    )
    write(folder / "labels" / "sw.csv", "class,label\ndog,mbwa\n")
    write(folder / "labels" / "ibo_Latn.csv", 'class,label\ncat,"nwamba, pusi"\n')
    write(folder / "labels" / "ibo_Latn.templates.txt", "foto {}\n{} na foto\n")


MAKERS = {"babel-imagenet": make_babel_imagenet, "image-folder": make_image_folder}


def test_every_layout_is_covered() -> None:
    assert set(CLASS_LAYOUTS) == {*MAKERS, "emoji"}


def test_babel_imagenet_is_asked_as_its_evaluation_asks(tmp_path: Path) -> None:
    make_babel_imagenet(tmp_path)
    found = read_classes("babel-imagenet", tmp_path)
    assert found.class_of == (0, 1, 1, 2, 2, 2)
    assert found.images[1].read() == WNIDS[1].encode()
    german, english, chinese, ainu = found.languages
    assert german == ClassNames("DE", "deu_Latn", (0, 2), ("Schleie", "Weißer Hai"), ("ein  {} .", "das {}"))
    assert (chinese.language, ainu.language, ainu.templates) == ("zho_Hans", None, ())
    assert (english.labels[:2], len(english.labels)) == (("tench", "goldfish"), 1000)
    assert (english.templates[0], len(english.templates)) == ("a bad photo of a {}.", 80)
    assert found.rows(german).tolist() == [0, 3, 4, 5]
    assert found.relevance(german).items.tolist() == [0, 1, 1, 1]
    assert any("6 of ImageNet's 50,000" in note for note in found.notes)


def test_prompts_are_chosen(tmp_path: Path) -> None:
    make_babel_imagenet(tmp_path)
    found = read_classes("babel-imagenet", tmp_path)
    assert found.prompts is Prompts.TEMPLATES
    asked = found.asked_by(found.prompts)
    assert asked.codes == ("DE", "EN", "ZH")
    assert any("AIN" in note for note in asked.notes)
    bare = found.asked_by(Prompts.LABELS)
    assert {names.templates for names in bare.languages} == {("{}",)}
    assert bare.codes == found.codes


def test_without_prompts_the_labels_are_asked(tmp_path: Path) -> None:
    make_babel_imagenet(tmp_path)
    (tmp_path / "nllb_dist13b_prompts.json").unlink()
    (tmp_path / "babel_imagenet-298.json").rename(tmp_path / "babel_imagenet.json")
    found = read_classes("babel-imagenet", tmp_path)
    assert found.prompts is Prompts.LABELS
    with pytest.raises(DatasetError, match=r"no templates in any.*--prompts labels"):
        found.asked_by(Prompts.TEMPLATES)


@pytest.mark.parametrize(
    ("code", "paper", "right"),
    [
        ("DE", "deu_Latn", "deu_Latn"),
        ("ZH", "zho_Hant", "zho_Hans"),
        ("NO", "nno_Latn", "nob_Latn"),
        ("KU", "ckb_Arab", "kmr_Latn"),
        ("ZH_YUE", "eng_Latn", "yue_Hant"),
        ("BR", "eng_Latn", "bre_Latn"),
        ("JBO", "eng_Latn", None),
    ],
)
def test_babel_languages(code: str, paper: str, right: str | None) -> None:
    assert babel_language(code, LanguageMap.PAPER) == paper
    assert babel_language(code, LanguageMap.RIGHT) == right


def write_kaggle(folder: Path) -> None:
    rows = [f"ILSVRC2012_val_0000000{n},{WNIDS[c]} 1 2 3 4" for n, c in ((2, 0), (1, 2), (3, 1))]
    write(folder / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]) + "\n")


def write_caffe(folder: Path) -> None:
    rows = [f"ILSVRC2012_val_0000000{n}.JPEG {c}" for n, c in ((1, 2), (2, 0), (3, 1))]
    write(folder / "val.txt", "\n".join(rows) + "\n")


def write_devkit(folder: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    write(data / "ILSVRC2012_validation_ground_truth.txt", "201\n7\n30\n")
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    rows = [(201, WNIDS[2], 0), (7, WNIDS[0], 0), (30, WNIDS[1], 0), (1001, "n00001740", 12)]
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})


@pytest.mark.parametrize("write_truth", [write_kaggle, write_caffe, write_devkit])
def test_flat_images_take_their_classes_from_a_ground_truth(write_truth, tmp_path: Path) -> None:
    write_truth(make_flat(tmp_path))
    found = read_classes("babel-imagenet", tmp_path)
    assert [image.key for image in found.images] == [f"ILSVRC2012_val_0000000{n}.JPEG" for n in (1, 2, 3)]
    assert found.class_of == (2, 0, 1)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("babel_imagenet-298.json", "[1]", "not a JSON object"),
        ("babel_imagenet-298.json", '{"DE": [[0, 1]]}', "DE is not .*cut short"),
        ("babel_imagenet-298.json", '{"DE": [[0], ["a", "b"]]}', "1 classes and 2 labels"),
        ("babel_imagenet-298.json", '{"DE": [[1000], ["a"]]}', r"classes \[1000\]; ImageNet has 1000"),
        ("babel_imagenet-298.json", '{"DE": [[1, 1], ["a", "b"]]}', r"classes \[1\] more than once"),
        ("babel_imagenet-298.json", '{"DE": [[0], [" "]]}', "empty label"),
        ("babel_imagenet-298.json", '{"DE": [[5], ["a"]]}', r"no image of any class that \['DE'\]"),
        ("babel_imagenet-298.json", '{"DE": [[0', "not JSON"),
        ("nllb_dist13b_prompts.json", '{"DE": ["a photo"]}', "lack one {}"),
        ("nllb_dist13b_prompts.json", '{"DE": "a photo {}"}', "DE is not a list"),
        ("val/cats/1.JPEG", "", "not classes of ImageNet-1k.*cats"),
    ],
)
def test_a_damaged_babel_imagenet_is_refused(file: str, text: str, message: str, tmp_path: Path) -> None:
    make_babel_imagenet(tmp_path)
    write(tmp_path / file, text)
    with pytest.raises(DatasetError, match=message):
        read_classes("babel-imagenet", tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("other.txt", "", "holds no ground truth"),
        ("LOC_val_solution.csv", "ILSVRC2012_val_00000001,n999 1\n", r"line 1 is .*expected IMAGE,WNID"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 1000\n", "index below 1000"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 3\n", "lists no class of 2 images; the first is .*2.JPEG"),
        ("ILSVRC2012_validation_ground_truth.txt", "1\n2\n", "2 lines.*3 images"),
        ("ILSVRC2012_validation_ground_truth.txt", "1\n2\n3\n", "meta.mat"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_refused(
    file: str, text: str, message: str, tmp_path: Path
) -> None:
    write(make_flat(tmp_path) / file, text)
    with pytest.raises(DatasetError, match=message):
        read_classes("babel-imagenet", tmp_path)


def test_an_image_folder_is_read(tmp_path: Path) -> None:
    make_image_folder(tmp_path)
    found = read_classes("image-folder", tmp_path)
    assert [image.key for image in found.images] == ["cat/1.png", "dog/1.png", "dog/2.JPG"]
    assert found.class_of == (0, 1, 1)
    igbo, portuguese, swahili = found.languages
    assert igbo == ClassNames("ibo_Latn", "ibo_Latn", (0,), ("nwamba, pusi",), ("foto {}", "{} na foto"))
    assert portuguese == ClassNames("pt", "por_Latn", (0, 1), ("gato", "cão"), ("um {}",))
    assert swahili.templates == ("picha ya {}",)  # the runtime's own
    assert found.prompts is Prompts.TEMPLATES


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("labels/pt.json", "{}", DatasetError, "not of the form"),
        ("labels/pt.json", '{"labels": {"cat": 1}}', DatasetError, "not of the form"),
        ("labels/pt.json", '{"labels": {"bird": "ave"}}', DatasetError, r"labels \['bird'\], which have no"),
        ("labels/sw.csv", "dog,mbwa\n", DatasetError, "header class,label"),
        ("labels/sw.csv", "class,label\ndog\n", DatasetError, "line 2"),
        ("labels/sw.csv", "class,label\ndog,mbwa\ndog,umbwa\n", DatasetError, "line 3.*each class once"),
        ("labels/klingon.csv", "class,label\ndog,a\n", LanguageError, "klingon"),
    ],
)
def test_a_damaged_image_folder_is_refused(
    file: str, text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    make_image_folder(tmp_path)
    write(tmp_path / file, text)
    with pytest.raises(error, match=message):
        read_classes("image-folder", tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_folder_names_the_expected_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Expected layout:\n    FOLDER"):
        read_classes(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "message"), [("imagenet", None, "choose one of"), ("image-folder", None, "--data")]
)
def test_options_that_cannot_be_read(name: str, folder: Path | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_classes(name, folder)


def test_the_emoji_samples_are_read() -> None:
    found = read_classes("emoji")
    assert (len(found.images), len(found.languages)) == (1911, 106)
    assert found.prompts is Prompts.LABELS
    (french,) = found.select(["fra_Latn"]).languages
    cat = french.classes[french.labels.index("chat")]
    assert found.images[cat].key == "🐈"
    assert "une photo de {}" in french.templates


def test_languages_are_selected_or_refused() -> None:
    images = (ImageBytes("a", b"a"),)
    names = (ClassNames("DE", "deu_Latn", (0,), ("a",)), ClassNames("JBO", None, (0,), ("b",)))
    small = ClassificationSet("small", images, (0,), names)
    assert small.select(["deu_Latn"]).codes == ("DE",)
    assert small.select(["JBO"]).codes == ("JBO",)
    with pytest.raises(DatasetError, match=r"no class names in \['fr'\]"):
        small.select(["DE", "fr"])
    with pytest.raises(DatasetError, match="1 images and 2 class indices"):
        ClassificationSet("small", images, (0, 1), names)
    with pytest.raises(DatasetError, match="without duplicates"):
        ClassificationSet("small", images, (0,), (names[0], names[0]))
