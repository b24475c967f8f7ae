"""Training of the sample towers: what was never shown, other styles, a faster tower, and resumption."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from open_clip.transformer import PatchDropout
from torch import nn

from samples import dataset, fast_vit, training
from samples.curves import PATH, RUNS, table_from_curves, write_curves
from samples.drawings import DESIGNS, OTHER_NAMES, PACKAGES, VENDORS
from samples.fast_vit import ComputingCopy, clip_embedded, siglip_embedded
from samples.image_stages import (
    CLIP_IMAGES,
    CLIP_IMAGES_AGAIN,
    SIGLIP_IMAGES,
    SIGLIP_IMAGES_AGAIN,
    TEACHER,
    ClipStudent,
    ConvolutionalStudent,
    _clip_tower,
    siglip_from_clip,
)
from samples.image_training import Data, ImageSchedule, Prototypes, resized, train_student
from samples.images import ClassBalancedSampler, ImageSettings, TrainingDrawings, recalls, unit
from samples.restyling import restyled
from samples.teacher import teacher
from samples.texts import TextRows, TextSchedule, train_text_tower
from samples.training import ResumableRun, cpu_hours
from samples.trials import NEW_DESIGNS

ROOT = Path(__file__).resolve().parent.parent
BODY = (
    '<defs><linearGradient id="a"><stop stop-color="#ff0000"/><stop stop-color="#0000ff"/></linearGradient>'
    '</defs><path fill="url(#a)" d="M1 1h8v8z"/><circle fill="#ffbe1f" cx="4" cy="4" r="3"/>'
    '<circle fill="#FFBE1F" cx="6" cy="4" r="1" opacity=".4"/>'
)
N_EMOJI = 24


@pytest.fixture
def drawings() -> TrainingDrawings:
    """Return random pixels of 24 emoji by three sets, with one other style of Noto's."""
    vendors = ("noto",) * 2 * N_EMOJI + ("emojione",) * N_EMOJI + ("emojione-lines",) * N_EMOJI
    return TrainingDrawings(
        pixels=torch.randint(0, 256, (4 * N_EMOJI, 3, 64, 64), dtype=torch.uint8),
        classes=torch.arange(N_EMOJI).repeat(4),
        vendors=vendors,
        restyled=torch.tensor([False] * N_EMOJI + [True] * N_EMOJI + [False] * 2 * N_EMOJI),
        n_classes=N_EMOJI,
    )


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Train on one thread from the same random numbers; other orders of sums would change the weights."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(n_threads)


def test_the_gallerys_vendor_is_in_no_training_set() -> None:
    assert {drawing.vendor for drawing in dataset.load_gallery()} == {"twemoji"}
    names = " ".join([*DESIGNS, *(vendor.package.name for vendor in VENDORS)])
    assert "twemoji" not in names
    assert "openmoji" not in names


def test_training_reads_no_drawing_of_the_gallery() -> None:
    for path in (ROOT / "samples").glob("*.py"):
        if path.stem not in {"dataset", "build", "evaluate", "sources"}:
            assert not re.search("load_gallery|TWEMOJI|gallery.parquet", path.read_text()), path.name


def test_the_notice_names_every_package_and_its_licence() -> None:
    notice = (ROOT / "samples" / "LICENSES" / "NOTICE.md").read_text()
    for package in PACKAGES:
        rows = [line for line in notice.splitlines() if f"`{package.name}`" in line]
        assert any(package.licence.split()[0] in row for row in rows), package


def test_the_tarball_of_every_package_is_recorded() -> None:
    recorded = json.loads((ROOT / "samples" / "provenance.json").read_text())["packages"]
    assert [(one["name"], one["version"], one["licence"]) for one in recorded] == [
        (package.name, package.version, package.licence) for package in PACKAGES
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", one["sha256"]) for one in recorded)


def test_every_weighted_set_has_a_design_and_trials_leave_out_existing_ones() -> None:
    assert set(NEW_DESIGNS) <= set(DESIGNS.values())
    keys = {drawing.emoji.replace("\ufe0f", "") for drawing in dataset.load_training_images()}
    assert set(OTHER_NAMES) <= keys


@pytest.mark.parametrize("seed", range(20))
def test_a_restyled_drawing_is_well_formed_and_keeps_its_parts(seed: int) -> None:
    body = restyled(BODY, 10, random.Random(seed))
    root = ElementTree.fromstring(f"<svg>{body}</svg>")
    assert [len(list(root.iter(tag))) for tag in ("path", "circle", "stop")] == [1, 2, 2]
    one, other = (circle.get("fill") for circle in root.iter("circle"))
    assert one == other  # equal colours stay equal
    assert body == restyled(BODY, 10, random.Random(seed))


def test_styles_differ_and_some_have_no_gradient() -> None:
    bodies = [restyled(BODY, 10, random.Random(seed)) for seed in range(20)]
    assert len(set(bodies)) == 20
    stops = [set(re.findall('stop-color="(#[0-9a-f]{6})"', body)) for body in bodies]
    assert {len(colours) for colours in stops} == {1, 2}


def test_the_sampler_draws_every_emoji_once_a_round_and_styles_by_their_share(
    drawings: TrainingDrawings,
) -> None:
    rows = ClassBalancedSampler(drawings, 0.75).draw(1000 * N_EMOJI)
    assert all(len(set(part.tolist())) == N_EMOJI for part in torch.split(drawings.classes[rows], N_EMOJI))
    of_noto = rows[rows < 2 * N_EMOJI]
    assert float((of_noto >= N_EMOJI).float().mean()) == pytest.approx(0.75, abs=0.02)


def test_a_held_out_design_is_held_out_whole(drawings: TrainingDrawings) -> None:
    learned, held_out = drawings.split("emojione")
    assert set(learned.vendors) == {"noto"}
    assert held_out.vendors == ("emojione",) * N_EMOJI
    assert torch.equal(held_out.pixels, drawings.pixels[2 * N_EMOJI : 3 * N_EMOJI])
    with pytest.raises(ValueError, match=r"No drawings of 'fxemoji'; there are \["):
        drawings.split("fxemoji")


def test_a_design_is_held_out_for_every_so_many_emoji(drawings: TrainingDrawings) -> None:
    learned, held_out = drawings.split("emojione", every=4)
    assert held_out.classes.tolist() == list(range(0, N_EMOJI, 4))
    assert set(held_out.vendors) == {"emojione"}
    assert sum(name == "noto" for name in learned.vendors) == sum(name == "noto" for name in drawings.vendors)
    assert all(
        one % 4
        for one, name in zip(learned.classes, learned.vendors, strict=True)
        if DESIGNS[name] == "emojione"
    )


def test_drawings_are_resized_as_they_are_changed(drawings: TrainingDrawings) -> None:
    data = Data(drawings, None, ImageSettings())
    small, large = data.augmented(torch.arange(3), 40), data.augmented(torch.arange(3))
    assert (small.shape, large.shape) == ((3, 3, 40, 40), (3, 3, 64, 64))
    torch.testing.assert_close(resized(large, 40).mean(), large.mean(), atol=0.05, rtol=0)


def test_recalls_by_hand() -> None:
    prototypes = unit(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    embeddings = unit(torch.tensor([[1.0, 0.1], [1.0, 0.2]]))  # the second is drawn as 1, and lies near 0
    found = recalls(embeddings, torch.tensor([0, 1]), prototypes)
    assert found == {"top_1": 0.5, "top_10": 1.0, "recall_at_1": 1.0, "recall_at_10": 1.0}


def test_the_fast_tower_computes_open_clips_embeddings() -> None:
    tower, pixels = _clip_tower().eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(clip_embedded(tower, pixels), tower(pixels), rtol=1e-4, atol=1e-5)


def test_the_fast_siglip_tower_computes_timms_embeddings() -> None:
    tower, pixels = siglip_from_clip(_clip_tower()).eval(), torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(siglip_embedded(tower, pixels), tower(pixels), rtol=1e-4, atol=1e-5)


def test_the_fast_tower_drops_patches_as_open_clip_does() -> None:
    tower, pixels = _clip_tower(), torch.randn(2, 3, 1, 1).expand(2, 3, 64, 64)
    nn.init.zeros_(tower.positional_embedding)  # now all patches are alike, so any half of them is the same
    tower.patch_dropout = PatchDropout(0.5)
    with torch.no_grad():
        torch.testing.assert_close(
            clip_embedded(tower, pixels, drop=0.5), tower.train()(pixels), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_the_copy_are_the_towers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_vit, "computing_dtype", lambda: dtype)
    tower, pixels = _clip_tower(), torch.randn(4, 3, 64, 64)
    quick = ComputingCopy(tower, clip_embedded)
    quick.refresh()
    quick.embed(pixels).square().sum().backward()
    quick.return_gradients()
    found = torch.cat([one.grad.flatten() for one in tower.parameters() if one.grad is not None])
    tower.zero_grad()
    tower(pixels).square().sum().backward()
    wanted = torch.cat([one.grad.flatten() for one in tower.parameters() if one.grad is not None])
    assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.999


@pytest.fixture
def saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a run's state after every step."""
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)


@pytest.mark.parametrize("kind", ["teacher", "clip"])
@pytest.mark.usefixtures("saved_at_every_step")
def test_training_that_was_stopped_continues_as_if_it_had_not(
    kind: str, drawings: TrainingDrawings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned, held_out = drawings.split("emojione")
    data = Data(learned, held_out, ImageSettings())
    rows = unit(torch.randn(N_EMOJI, 128))

    def trained(folder: Path, *, stop_before: int | None = None) -> nn.Module:
        torch.manual_seed(3)
        if kind == "teacher":
            student = ConvolutionalStudent(teacher(128, 8).train(), Prototypes(rows, learned=True))
        else:
            student = ClipStudent(_clip_tower().train(), Prototypes(rows, learned=False))
        drawn = 0

        def stop(pixels: torch.Tensor) -> torch.Tensor:
            nonlocal drawn
            drawn += 1
            if drawn == stop_before:
                raise KeyboardInterrupt
            return unit(torch.ones(len(pixels), 128))

        schedule = ImageSchedule(5, 16, 1e-3, n_warm=2, share_masked=0.5)
        folder.mkdir(exist_ok=True)
        return train_student(student, data, schedule, folder / kind, n_steps=5, teach=stop)[0]

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop_before=4)
    continued = trained(tmp_path / "stopped")
    assert f"{kind} continues at step 3 of 5" in capsys.readouterr().out
    for one, other in zip(whole.state_dict().values(), continued.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert cpu_hours(tmp_path / "stopped") > 0


@pytest.mark.usefixtures("saved_at_every_step")
def test_text_training_that_was_stopped_continues_as_if_it_had_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = TextRows(torch.randint(2, 50, (40, 6)), torch.arange(40) % 8, torch.ones(40), pad_id=1)
    prototypes, schedule = unit(torch.randn(8, 16)), TextSchedule(20, batch=40)
    start = nn.Sequential(nn.EmbeddingBag(50, 16), nn.Linear(16, 16))

    def trained(name: str, *, stop_before: int | None = None) -> nn.Module:
        torch.manual_seed(3)
        tower = copy.deepcopy(start)
        n_calls = 0

        def stop(*_: object) -> None:
            nonlocal n_calls
            n_calls += 1
            if n_calls == stop_before:
                raise KeyboardInterrupt

        tower.register_forward_pre_hook(stop)
        train_text_tower(tower, rows, prototypes, schedule, tmp_path / name)
        return tower

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", stop_before=18)
    continued = trained("stopped")
    assert "stopped continues at step 17 of 20" in capsys.readouterr().out
    for one, other in zip(whole.parameters(), continued.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("settings", "n_steps"), [({"rate": 1.0}, 3), ({"rate": 2.0}, 2)])
def test_a_run_with_other_settings_is_not_continued(
    settings: dict[str, object], n_steps: int, tmp_path: Path
) -> None:
    for _ in ResumableRun(tmp_path / "one", {}, {"rate": 1.0}, 2).steps():
        pass
    with pytest.raises(ValueError, match=r"a run with .*'n_steps': 2.*, not .*; remove it to start anew"):
        next(ResumableRun(tmp_path / "one", {}, settings, n_steps).steps())


def test_the_settings_were_chosen_on_a_training_vendor() -> None:
    report = json.loads((ROOT / "samples" / "trials.json").read_text())
    assert report["held_out"] in DESIGNS.values()
    names = {"recall_at_1", "recall_at_10", "top_1", "top_10", "step", "cpu_s", "loss"}
    assert all(set(point) == names for trial in report["trials"].values() for point in trial["curve"])


def test_settings_are_named_in_the_trials() -> None:
    from samples.trials import TRIALS

    assert TRIALS["chosen"] == ImageSettings()
    assert all(asdict(one) != asdict(TRIALS["chosen"]) for name, one in TRIALS.items() if name != "chosen")


def test_the_stored_curves_are_of_the_schedules_and_in_the_readme() -> None:
    curves = json.loads(PATH.read_text())
    schedules = {
        "teacher": TEACHER,
        "clip": CLIP_IMAGES,
        "clip-again": CLIP_IMAGES_AGAIN,
        "siglip": SIGLIP_IMAGES,
        "siglip-again": SIGLIP_IMAGES_AGAIN,
    }
    for name, schedule in schedules.items():
        assert curves[name][-1]["step"] == schedule.n_steps, name
        assert {"top_1", "top_10", "loss", "cpu_s"} <= set(curves[name][-1]), name
    assert table_from_curves(curves) in (ROOT / "samples" / "README.md").read_text()


def test_curves_are_collected_whole(tmp_path: Path) -> None:
    points = {
        name: [{"step": step, "cpu_s": 60.0 * step, "top_1": 0.5, "top_10": 1.0} for step in (1, 2, 3)]
        for name in RUNS
    }
    for name, curve in points.items():
        (tmp_path / f"{name}.curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    write_curves(tmp_path, tmp_path / "curves.json")
    assert json.loads((tmp_path / "curves.json").read_text()) == points
    assert table_from_curves(points).splitlines()[-1] == "| the same, on | 3 | 3.0 | 0.50 / 1.00 | – |"
    (tmp_path / "teacher.curve.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="teacher"):
        write_curves(tmp_path, tmp_path / "curves.json")
