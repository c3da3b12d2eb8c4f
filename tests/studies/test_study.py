"""A study from the command line on real digits, with a budget of a few steps; its files and its page."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import Sampler
from multistage_diffusion.noise import VP
from multistage_diffusion.studies import budgets, designs, interference
from multistage_diffusion.studies.answers import answer
from multistage_diffusion.studies.budgets import Budget
from multistage_diffusion.studies.drawing import round_numbers, styles, svg
from multistage_diffusion.studies.figures import draw
from multistage_diffusion.studies.pages import redraw, write_page
from multistage_diffusion.studies.sheets import sheets
from multistage_diffusion.studies.study import STUDIES


def smallest():
    """A budget of about two steps a model."""
    base = replace(
        tiny.run_config(tiny.SMALLEST, batch_size=8, warmup_images=16, ema_half_life=50.0),
        process=VP(prediction="v"), sampling=Sampler(solver="ddim", steps=2),
    )  # fmt: skip
    return Budget(
        base=base, tflops=1e-5, points=2, seeds=2, samples=16, samples_on_the_way=8, proxy_steps=4,
        evaluations=(2, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of results, the small budget shrunk, the study of widths cut to one row beside the unified model."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSD_CACHE", str(folder / "cache"))
        patch.setitem(budgets.BUDGETS, "small", smallest)
        patch.setattr(designs, "DECODERS", {"equal": (1.0, 1.0, 1.0)})
        patch.setattr(interference, "_IMAGES", 16)
        yield folder


def msd(capsys, *words):
    capsys.readouterr()
    code = dispatch(["study", *map(str, words), "--data", "digits", "--device", "cpu", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def test_a_dry_run_says_what_it_costs_and_trains_nothing(home, capsys):
    code, document, said = msd(capsys, "decoders", "--dry-run", "--out", home / "dry")
    assert code == 0 and not (home / "dry").exists() and document["rows"] == []
    assert [(own["label"], own["seed"]) for own in document["models"]] == [
        ("unified", 0), ("unified", 1), ("equal", 0), ("equal", 1)
    ]  # fmt: skip
    for own in document["models"]:
        assert own["tflops"] > 0 and own["steps"] == 2 and own["parameters"] > 10_000 and not own["done"]
    assert "4 models" in said and "trained" in said
    _, longer, _ = msd(capsys, "decoders", "--dry-run", "--out", home / "dry", "--tflops", "1")
    assert all(own["steps"] > 4 for own in longer["models"])
    _, other, said = msd(capsys, "decoders", "--dry-run", "--out", home / "dry", "--process", "edm")
    assert {own["cell"] for own in other["models"]}.isdisjoint(own["cell"] for own in document["models"])


@pytest.fixture(scope="module")
def made(home):
    """What the command wrote."""
    words = ["decoders", "--data", "digits", "--seeds", "2", "--out", str(home / "out"), "--device", "cpu"]
    assert dispatch(["study", *words]) == 0
    return home / "out"


def test_a_study_writes_rows_figure_and_page(made):
    document = json.loads((made / "decoders.json").read_text())
    assert document["figures"] == ["decoders.svg"] and (made / "decoders.svg").read_text().startswith("<?xml")
    labels = [own["label"] for own in document["rows"]]
    assert labels == ["unified", "equal"] and len(document["findings"]) == 1
    for own in document["rows"]:
        for metric in ("fd", "kid", "loss"):
            assert len(own[metric]["values"]) == 2 and own[metric]["interval"][0] <= own[metric]["mean"]
    assert document["rows"][0]["difference"]["loss"]["values"] == [0.0, 0.0]
    assert document["made"]["command"].startswith("msd study decoders --data digits --budget small --seeds 2 --out")
    assert re.fullmatch(r"\d\S*(, commit [0-9a-f]{12}\+?)?", document["made"]["versions"]["multistage-diffusion"])
    assert document["settings"]["cells"] == 4
    page = (made / "report.html").read_text()
    assert STUDIES["decoders"].title in page and document["findings"][0] in page
    assert page.count("<svg") == 1 and not re.search(r'(src|href)="(?!#)', page) and "<script" not in page
    assert "is not FID" in re.sub(r"\s+", " ", page) and "2 a multiply-accumulate" in page


def test_the_same_command_again_trains_and_measures_nothing(made, capsys):
    files = {path: path.stat().st_mtime_ns for path in (made / "cells").rglob("*.json")}
    before = json.loads((made / "decoders.json").read_text())["rows"]
    code, document, said = msd(capsys, "decoders", "--seeds", "2", "--out", made)
    assert code == 0 and "0 of them, 0 TFLOPs, to train" in said and "report:" in said
    assert [{key: own[key] for key in own if key != "study"} for own in document["rows"]] == before
    assert document["figures"] == {"decoders": str(made / "decoders.svg")}
    assert {path: path.stat().st_mtime_ns for path in (made / "cells").rglob("*.json")} == files


def test_wrong_words_are_told_at_once(home, capsys):
    code, _, said = msd(capsys, "decoder", "--out", home / "no")
    assert code == 2 and 'did you mean "decoders"' in said
    assert msd(capsys, "decoders", "--seeds", "0", "--out", home / "no")[0] == 2
    code, _, said = msd(capsys, "decoders", "--tflops", "0", "--out", home / "no")
    assert code == 2 and "tflops" in said
    assert msd(capsys, "decoders", "--budget", "huge", "--out", home / "no")[0] == 2
    assert not (home / "no").exists()


def test_what_is_drawn_and_tabled_follows_the_document(made):
    document = json.loads((made / "decoders.json").read_text())
    assert svg(draw(document)) == svg(draw(document))
    result, models = sheets(document)
    assert [line[0].text for line in result.lines] == [line[0].text for line in models.lines] == ["unified", "equal"]
    assert all(len(line) == len(sheet.head) for sheet in (result, models) for line in sheet.lines)
    assert all(item.significant is None for item in result.lines[0])
    assert result.lines[1][3].significant in (True, False)


def test_a_page_leaves_out_documents_of_another_version(made, tmp_path):
    document = json.loads((made / "decoders.json").read_text())
    (tmp_path / "decoders.json").write_text(json.dumps(document))
    (tmp_path / "stages.json").write_text(json.dumps({"study": "stages", "rows": [{"of": "another version"}]}))
    page = write_page(tmp_path).read_text()
    assert STUDIES["decoders"].title in page and STUDIES["stages"].title not in page


@pytest.mark.parametrize("low", [0.0123, 0.9, 3.0])
@pytest.mark.parametrize("times", [1.05, 1.5, 3, 10, 1_000, 1e6])
def test_ticks_are_round_and_few(low, times):
    ticks = round_numbers(low, low * times)
    assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks)) and low <= ticks[0] <= ticks[-1] <= low * times


@pytest.mark.slow
def test_all_studies_share_one_page(home, capsys):
    out = home / "all"
    code, planned, _ = msd(capsys, "all", "--dry-run", "--out", out)
    assert code == 0 and not out.exists()
    assert len({own["cell"] for own in planned["models"]}) == len(planned["models"])
    code, document, said = msd(capsys, "all", "--out", out)
    assert code == 0, said
    assert set(document["figures"]) == set(STUDIES) == {own["study"] for own in document["rows"]}
    page = (out / "report.html").read_text()
    for name, study in STUDIES.items():
        assert f'id="{name}"' in page and study.title in page and (out / f"{name}.svg").is_file()
        own = json.loads((out / f"{name}.json").read_text())
        assert all(len(line) == len(sheet.head) for sheet in sheets(own) for line in sheet.lines)
    assert page.count("<svg") == len(STUDIES)
    (out / "intervals.json").unlink()
    write_page(out)
    assert (out / "report.html").read_text().count("<svg") == len(STUDIES) - 1


RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_no_two_models_look_alike():
    labels = ["unified", "multistage", "multistage, allocated", "multistage, narrowing", "unified, width 12",
              "unified, width 8", "multistage, allocated, width 8"]  # fmt: skip
    looks = styles(labels)
    assert len({look.colour for look in looks.values()}) == len({look.marker for look in looks.values()}) == len(labels)
    assert all((look.line == "-") == (not label.startswith("unified")) for label, look in looks.items())


def test_a_figure_in_a_page_says_its_values_and_takes_the_pages_colours():
    document = json.loads((RESULTS / "fashion-mnist-small" / "stages.json").read_text())
    alone, inside = svg(draw(document)), svg(draw(document), page=True)
    for text in (alone, inside):
        ElementTree.fromstring(text)
        titles = re.findall(r'<g class="tip"><title>([^<]*)</title>', text)
        assert len(titles) == 2 * len(document["rows"]) and "6 stages: Fréchet distance 12.11" in " ".join(titles)
    assert "var(--" not in alone and "var(--ink)" in inside and "#ffffff" not in inside and "#000000" not in inside


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_answer_comes_from_the_rows(path):
    document = json.loads(path.read_text())
    found = answer(document)
    assert found.sentence.endswith(".") and found.cards
    if document["study"] in ("architectures", "clusterings", "stages", "decoders"):
        least = min(document["rows"], key=lambda row: row["loss"]["mean"])
        assert f"held-out loss: “{least['label']}”" in found.sentence
        change = least["difference"]["loss"]["mean"] / document["rows"][0]["loss"]["mean"]
        assert f"{abs(change):.1%}" in found.cards[1].value
        assert found.cards[1].significant is True and "95% interval" in found.cards[1].uncertainty
    if document["study"] == "efficiency":
        assert "“multistage, allocated, width 8”, against" in found.sentence


def test_what_was_published_is_drawn_again_without_its_models(made, tmp_path):
    for name in ("decoders.json", "report.html"):
        shutil.copy(made / name, tmp_path)
    (tmp_path / "report.html").write_text("old")
    assert [path.name for path in redraw(tmp_path)] == ["decoders.svg", "report.html"]
    assert (tmp_path / "decoders.svg").read_bytes() == (made / "decoders.svg").read_bytes()
    assert (tmp_path / "report.html").read_bytes() == (made / "report.html").read_bytes()
    assert (tmp_path / "decoders.json").read_bytes() == (made / "decoders.json").read_bytes()
