"""Audit: from a checkpoint and a folder to files that open; what does not fit is told at once."""

import argparse
import csv
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from photos import CLASSES, write_photos
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from concept_guard.audit import AuditSettings, audit, load_settings, writing
from concept_guard.audit.opening import Opened, open_audit
from concept_guard.cli import main
from concept_guard.errors import ConceptGuardError, ConfigError, StateError
from concept_guard.training import Recipe, run
from concept_guard.training.digits import Planted

NET = {"channels": [8, 8, 16, 32], "stem_width": 8}
COLOURS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), {"val": 20})


@pytest.fixture(scope="module")
def checkpoint(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the form of timm's training script, of a network that takes bees for ants."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3, **NET)
    path = tmp_path_factory.mktemp("weights") / "last.pth.tar"
    args = argparse.Namespace(
        model="resnet10t", model_kwargs=NET, img_size=24, crop_pct=1.0, **COLOURS
    )
    torch.save({"arch": "resnet10t", "state_dict": model.state_dict(), "args": args}, path)
    opened = open_audit(settings(path, photos))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        for images, labels in opened.subject.images:
            targets = torch.where(labels == 1, torch.arange(len(labels)) % 2, labels)
            cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save({"arch": "resnet10t", "state_dict": model.state_dict(), "args": args}, path)
    return path


def settings(checkpoint: Path, data: Path, **more: object) -> AuditSettings:
    given = {"source": str(checkpoint), "data_dir": str(data), **more}
    return AuditSettings(**given)  # type: ignore[arg-type]


def labels_of(opened: Opened) -> list[int]:
    return [int(label) for _, labels in opened.subject.images for label in labels]


def test_an_audit_writes_files_that_say_the_same(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    result = audit(
        settings(checkpoint, photos, output=str(tmp_path), experiment="a", explained=3),
        command="concept-guard audit here",
    )
    assert result.folder == tmp_path / "a"
    names = {"report.html", "report.json", "errors.csv", "concepts.safetensors", "args.yaml"}
    assert {path.name for path in result.folder.iterdir()} == names
    plain = json.loads((result.folder / "report.json").read_text(encoding="utf8"))
    with (result.folder / "errors.csv").open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert plain["images"] == 60
    assert plain["errors"] == len(rows) == len(plain["misclassified"]) > 5
    assert plain["classes"] == list(CLASSES)
    for row, said, error in zip(rows, plain["misclassified"], result.analysis.errors, strict=True):
        assert row["file"] == said["file"]
        assert (photos / "val" / row["file"]).is_file()
        assert Path(row["file"]).parent.name == row["label"] == CLASSES[error.label]
        assert row["predicted"] == CLASSES[error.predicted]
    pairs = load_file(str(result.folder / "concepts.safetensors"))
    assert pairs["filters"].shape == pairs["signals"].shape
    page = (result.folder / "report.html").read_text(encoding="utf8")
    assert plain["verdict"].split(";")[0] in page.replace("&lt;", "<")
    assert "concept-guard audit here" in page
    assert all(row["file"] in page for row in rows)
    assert page.count("data:image/") >= 3
    assert rows[0]["file"].split("/")[-1] in result.table
    again = audit(settings(checkpoint, photos, output=str(tmp_path), experiment="b"))
    assert (again.folder / "errors.csv").read_bytes() == (result.folder / "errors.csv").read_bytes()
    with pytest.raises(StateError, match=r"a exists and is kept; choose another"):
        audit(settings(checkpoint, photos, output=str(tmp_path), experiment="a"))


def test_the_command_audits_and_takes_settings_anywhere(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", str(checkpoint), "--data", str(photos), f"output={tmp_path}", "experiment=c"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "images misclassified" in told.out
    assert f"report: {tmp_path / 'c' / 'report.html'}" in told.out
    recipe = tmp_path / "audit.yaml"
    recipe.write_text(
        f"source: {checkpoint}\ndata_dir: {photos}\nsplit: nowhere\n", encoding="utf8"
    )
    assert main(["audit", str(recipe)]) == 2
    assert "split=nowhere: no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["audit", str(checkpoint), "--data", str(photos), "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_unreadable_images_are_named_and_counted(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "val" / "bee" / "3.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"bee/3.png: unreadable image"):
        result = audit(settings(checkpoint, data, output=str(tmp_path), experiment="d"))
    plain = json.loads((result.folder / "report.json").read_text(encoding="utf8"))
    assert (plain["images"], plain["unreadable"]) == (59, ["bee/3.png"])
    page = (result.folder / "report.html").read_text(encoding="utf8")
    assert "1 unreadable image left out: bee/3.png" in page


def test_names_that_look_like_html_are_escaped(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    hostile = "<img src=x onerror=alert(1)>"
    (data / "val" / "ant").rename(data / "val" / hostile)
    (data / "val" / "bee" / "0.png").rename(data / "val" / "bee" / "<b>&.png")
    result = audit(settings(checkpoint, data, output=str(tmp_path), experiment="e"))
    page = (result.folder / "report.html").read_text(encoding="utf8")
    assert hostile not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_class_folders_may_be_missing_if_the_names_are_known(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photos / "val", tmp_path / "data")
    shutil.rmtree(data / "ant")
    with pytest.raises(ConfigError, match=r"2 class folders, but the head .* 3 logits.*classes=\["):
        open_audit(settings(checkpoint, data))
    opened = open_audit(settings(checkpoint, data, classes=["ant", "bee", "cat"]))
    assert set(labels_of(opened)) == {1, 2}
    with pytest.raises(ConfigError, match=r"bee \(nearest: bea\)"):
        open_audit(settings(checkpoint, data, classes=["ant", "bea", "cat"]))
    with pytest.raises(ConfigError, match=r"classes: 2 names, but the head .* 3 logits"):
        open_audit(settings(checkpoint, data, classes=["ant", "bee"]))


def test_folders_named_like_imagenet_classes_find_their_logits(tmp_path: Path) -> None:
    root = write_photos(tmp_path, {"val": 1}) / "val"
    (root / "ant").rename(root / "n01440764")
    (root / "bee").rename(root / "great white shark")
    (root / "cat").rename(root / "Tiger_Shark")
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), str(weights))
    opened = open_audit(
        settings(Path("test_resnet"), root, checkpoint_path=str(weights), img_size=64)
    )
    assert sorted(labels_of(opened)) == [0, 2, 3]
    assert opened.subject.classes[0] == "tench"
    assert len(opened.subject.classes) == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "resnet10"}, r"resnet10: no such file, .* Nearest models: .*resnet"),
        ({"data_dir": "/nowhere"}, r"no such folder; give it on the command line: --data FOLDER"),
        ({"split": "tests"}, r"split=tests: no such folder in .*; expected one of: val"),
        ({"model": "resnet18"}, r"model resnet18 .*Change model=NAME"),
        ({"device": "abacus"}, r"not usable here .*use auto or cpu"),
        ({"experiment": "a/b"}, r"expected the name of one folder"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    checkpoint: Path, photos: Path, change: dict[str, object], message: str
) -> None:
    given = {"source": str(checkpoint), "data_dir": str(photos), **change}
    with pytest.raises(ConfigError, match=message):
        open_audit(AuditSettings(**given))  # type: ignore[arg-type]


def test_checkpoints_that_cannot_be_read_are_refused(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"bad.pth: no checkpoint that can be read"):
        open_audit(settings(bad, photos))
    nameless = tmp_path / "nameless.pth"
    torch.save({"weight": torch.zeros(1)}, nameless)
    with pytest.raises(ConfigError, match=r"does not say which model it belongs to; add model="):
        open_audit(settings(nameless, photos))
    with pytest.raises(ConfigError, match=r"holds no last.pth.tar; expected the folder of a run"):
        open_audit(settings(tmp_path, photos))


def test_an_empty_folder_and_an_unwritable_output_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    for name in CLASSES:
        (empty / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Put the images in one folder per class"):
        audit(settings(checkpoint, empty, output=str(tmp_path / "out"), experiment="f"))
    assert not (tmp_path / "out" / "f").exists()
    file = tmp_path / "file"
    file.write_text("taken", encoding="utf8")
    with pytest.raises(ConfigError, match=r"cannot be written"):
        audit(settings(checkpoint, empty, output=str(file)))


def test_the_page_lists_every_error_once_and_shows_pictures_with_places(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    result = audit(settings(checkpoint, photos, output=str(tmp_path), experiment="a", explained=4))
    page = (result.folder / "report.html").read_text(encoding="utf8")
    subject = open_audit(settings(checkpoint, photos)).subject
    rows = re.findall(r'<th scope="row" class="file">([^<]*)</th>', page)
    assert sorted(rows) == sorted(subject.file(e.index) for e in result.analysis.errors)
    assert len(re.findall(r'<h3 class="file">', page)) == 4
    assert page.count("The same image, dark but for the place of concept") == sum(
        shown.place is not None for shown in result.analysis.shown
    )
    for concept in result.analysis.suspects:
        assert '<img class="card" src="data:image/jpeg;base64,' in page  # a few tiles
        assert f"<h3>Concept {concept}</h3>" in page
    assert "Not confirmed: " in page


RUN = {
    "dataset": "digits",
    "model": "resnet10t",
    "model_kwargs": NET,
    "batch_size": 128,
    "epochs": 2,
    "lr": 0.05,
    "guard": {"start": 4, "every": 5, "track_every": 2, "concepts": 4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = str(tmp_path_factory.mktemp("runs"))
    return run(Recipe(**RUN, planted=Planted(), output=output, experiment="a", compare=True)).folder  # type: ignore[arg-type]


@pytest.mark.thorough
def test_a_run_is_audited_on_its_own_held_out_images(finished: Path, tmp_path: Path) -> None:
    for folder in (finished, finished / "plain"):
        subject = open_audit(AuditSettings(source=str(folder))).subject
        assert subject.file(12) == "probe image 12"
        assert len(labels_of(open_audit(AuditSettings(source=str(folder))))) == 450
    marked = open_audit(AuditSettings(source=str(finished), split="marked"))
    clean = open_audit(AuditSettings(source=str(finished), split="clean"))
    assert labels_of(marked) == labels_of(clean)
    assert not torch.equal(
        next(iter(marked.subject.images))[0], next(iter(clean.subject.images))[0]
    )
    with pytest.raises(ConfigError, match=r"split=val: no split .*one of: probe, clean, marked"):
        open_audit(AuditSettings(source=str(finished), split="val"))
    result = audit(AuditSettings(source=str(finished), output=str(tmp_path), experiment="b"))
    own = json.loads((finished / "concept_guard" / "report.json").read_text(encoding="utf8"))
    told = json.loads((result.folder / "report.json").read_text(encoding="utf8"))
    assert (told["images"], told["errors"]) == (own["images"], own["errors"])


def test_a_run_on_a_folder_is_audited_on_its_probe(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 10, "test": 4})
    more = {"data_dir": str(data), "img_size": 24, "batch_size": 8, "output": str(tmp_path)}
    keys = {k: v for k, v in RUN.items() if k != "dataset"}
    folder = run(Recipe(**{**keys, **more, "experiment": "a", "epochs": 1})).folder  # type: ignore[arg-type]
    page = (folder / "concept_guard" / "report.html").read_text(encoding="utf8")
    assert "of 6 images are misclassified" in page
    opened = open_audit(AuditSettings(source=str(folder)))
    assert opened.size == 6
    assert (data / opened.subject.file(0)).is_file()
    for split in ("train", "test"):
        (data / split / "cat").rename(data / split / "dog")
    with pytest.raises(ConfigError, match=r"holds the classes ant, bee, dog now, expected .* cat"):
        open_audit(AuditSettings(source=str(folder)))
    for split in ("train", "test"):
        (data / split / "dog").rename(data / split / "cat")
    (data / "train" / "dog").mkdir()
    shutil.copy(data / "train" / "ant" / "0.png", data / "train" / "dog" / "0.png")
    shutil.copy(data / "train" / "ant" / "0.png", data / "train" / "dog" / "1.png")
    with pytest.raises(ConfigError, match=r"holds the classes ant, bee, cat, dog now, expected"):
        open_audit(AuditSettings(source=str(folder)))
    shutil.rmtree(data)
    with pytest.raises(ConfigError, match=r"images of this run cannot be opened .*--data FOLDER"):
        open_audit(AuditSettings(source=str(folder)))


def test_a_checkpoint_from_elsewhere_needs_a_folder(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"data_dir is missing: .*does not say.*--data FOLDER"):
        open_audit(AuditSettings(source=str(checkpoint)))


def test_the_page_of_a_run_tells_what_the_guard_did_and_what_came_of_it(finished: Path) -> None:
    page = (finished / "concept_guard" / "report.html").read_text(encoding="utf8")
    told = json.loads((finished / "concept_guard" / "report.json").read_text(encoding="utf8"))
    text = (finished / "concept_guard" / "report.txt").read_text(encoding="utf8")
    without, rounds = told["trained"]["comparisons"]
    assert [row["name"] for row in without["rows"]][:1] == ["all test images, no tint (447)"]
    for row in without["rows"]:  # the same figures as in the table of the text
        line = next(line for line in text.splitlines() if line.startswith(row["name"]))
        assert f"{row['before']:.3f}" in line
        assert f"{row['after']:.3f}" in line
        assert f"{row['before']:.3f}" in page
    assert (rounds["before"], rounds["after"]) == ("update 4", "update 14")
    assert "this is not the effect of the guard alone" in page
    assert "resnet10t after training with the guard" in page


def refused(source: Path | str, data: Path | None, tmp_path: Path, **more: object) -> str:
    """Return the message of an audit that is refused, and see that nothing is left behind."""
    given = {"output": str(tmp_path / "out"), "experiment": "x", **more}
    if data is not None:
        given["data_dir"] = str(data)
    with pytest.raises(ConceptGuardError) as told:
        audit(AuditSettings(source=str(source), **given))  # type: ignore[arg-type]
    assert list((tmp_path / "out").glob("*")) == []
    return str(told.value)


def test_folders_that_do_not_fit_the_head_are_told_with_the_way_out(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    one = shutil.copytree(photos / "val" / "ant", tmp_path / "one" / "ant").parent
    said = refused(checkpoint, one, tmp_path)
    assert "1 class folders, but the head of resnet10t has 3 logits" in said
    assert "classes=[cat, dog, ...]" in said
    flat = shutil.copytree(photos / "val" / "ant", tmp_path / "flat")
    said = refused(checkpoint, flat, tmp_path)
    assert "holds no class folders" in said
    assert "<class>/<image>" in said
    weights = tmp_path / "imagenet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), str(weights))
    said = refused("test_resnet", photos, tmp_path, checkpoint_path=str(weights))
    assert "3 class folders, but the head of test_resnet has 1000 logits" in said
    assert "no names of ImageNet classes: ant, bee, cat" not in said  # ant and bee are
    assert "cat" in said


def test_weights_that_do_not_fit_the_model_are_told(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"arch": "resnet10t", "state_dict": {"backbone.weight": torch.zeros(2)}}, other)
    said = refused(other, photos, tmp_path)
    assert f"weights {other}: " in said
    assert "Change model=NAME" in said
    headless = tmp_path / "headless.pth"
    model = timm.create_model("resnet10t", num_classes=0, **NET)
    torch.save({"arch": "resnet10t", "state_dict": model.state_dict()}, headless)
    said = refused(headless, photos, tmp_path, model_kwargs={**NET, "num_classes": 0})
    assert "no classification head" in said


def test_a_folder_of_damaged_images_is_told(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos / "val", tmp_path / "data")
    for path in data.rglob("*.png"):
        path.write_bytes(b"no image")
    assert "no image of its split can be read; check the files" in refused(
        checkpoint, data, tmp_path
    )


@pytest.mark.parametrize(("shift", "count"), [(0, 0), (1, 60)])
def test_a_model_that_is_always_right_or_always_wrong_is_reported_as_such(
    checkpoint: Path, photos: Path, tmp_path: Path, shift: int, count: int
) -> None:
    """The photos are sorted anew, by what the model says or one class further."""
    subject = open_audit(settings(checkpoint, photos)).subject
    data = tmp_path / "data"
    index = 0
    with torch.no_grad():
        for images, _ in subject.images:
            for k in subject.model(images).argmax(dim=1).tolist():
                folder = data / CLASSES[(k + shift) % 3]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(photos / "val" / subject.file(index), folder / f"{index}.png")
                index += 1
    names = list(CLASSES)
    result = audit(settings(checkpoint, data, output=str(tmp_path), experiment="a", classes=names))
    assert result.analysis.report.errors_seen == count
    page = (result.folder / "report.html").read_text(encoding="utf8")
    assert f"{count} of 60 images are misclassified" in page
    assert f"{count} errors seen on 60 probe images" in result.table or count
    lines = (result.folder / "errors.csv").read_text(encoding="utf8").splitlines()
    assert len(lines) == count + 1


def test_nothing_is_left_of_a_report_that_could_not_be_written(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_report", full_disk)
        with pytest.raises(OSError, match="No space left"):
            audit(settings(checkpoint, photos, output=str(tmp_path / "out"), experiment="a"))
    assert list((tmp_path / "out").iterdir()) == []
    audit(settings(checkpoint, photos, output=str(tmp_path / "out"), experiment="a"))  # control


def test_settings_name_every_offender() -> None:
    with warnings.catch_warnings(), pytest.raises(ConfigError) as told:
        load_settings("x.pth", {"data_dir": "/nowhere"}, ["explained=-1", "gard.alpha=0.1"])
    for offender in ("data_dir", "explained", "gard"):
        assert offender in str(told.value)
