"""The report, table and JSON say what the run folders hold, inside one file."""

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowdopr.compare import compare
from flowdopr.compare.cards import read_run, wanted_cards
from flowdopr.compare.forecast import forecast
from flowdopr.compare.plan import expand, study_path
from flowdopr.compare.plots import draw_all
from flowdopr.compare.results import read_result
from flowdopr.compare.study import build_study
from flowdopr.config import ConfigError, apply_overrides
from flowdopr.data import DatasetInfo
from flowdopr.disk import sealed, write_json
from flowdopr.evaluate import Gallery
from flowdopr.evaluate.card import card_settings
from flowdopr.models import build_model
from flowdopr.runs import begin_run

DIGITS = DatasetInfo("digits", (1, 8, 8), 10, tuple("0123456789"), 1600, 197, "f" * 64)
MADE_BY = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "hardware": "abacus, 1 thread",
    "launched": "2026-03-14T15:09:26+00:00",
}
FD = {("AdamW", 0): 5.0, ("AdamW", 1): 6.0, ("DoPr-AdamW", 0): 3.0, ("DoPr-AdamW", 1): 3.5}


def card(plan, step, fd, config):
    return {
        "step": step,
        "weights": "ema",
        "checkpoint": {},
        "settings": json.loads(json.dumps(card_settings(config, DIGITS))),
        "metrics": {"one_step_loss": 0.5 + fd / 100, "fd": fd, "label_accuracy": 0.9},
        "sampling": {
            "solver": config.sample.solver.model_dump(mode="json"),
            "nfe": config.sample.solver.steps,
            "guidance": None,
            "num_images": 40,
            "labels": "balanced",
            "seed": 0,
        },
        "extractor": {"name": "own", "space": "own features", "held_out_accuracy": 0.98},
        "reference": {"name": "digits train"},
    }


def make_run(plan, fd):
    """A finished run folder, as training and evaluation leave it."""
    run = begin_run(plan.config, DIGITS, MADE_BY, resume=False)
    tensor = {"w": torch.zeros(1)}
    for step in (4, 8):
        run.save_checkpoint(step, model=tensor, averages={"ema-0.9": tensor}, state={}, note={})
    # The first window is slow, as first windows are; the median of the others is 0.020.
    for step, seconds in zip((2, 4, 6, 8), (9.0, 0.02, 0.01, 0.03), strict=True):
        run.append_metrics(
            {
                "step": step,
                "loss": 1.0,
                "seconds_per_step": seconds,
                "peak_memory_mib": 100.0 + step,
            }
        )
    run.append_metrics({"step": 8, "held_out_loss": 0.5})
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(run.path / "samples" / "step-00000008.png")
    for number, request in enumerate(wanted_cards(plan).all()):
        config = apply_overrides(plan.config, request.overrides)
        scale = (8 / request.step) * (2 / config.sample.solver.steps)
        text = json.dumps(card(plan, request.step, fd * scale, config))
        (run.path / "evaluation" / f"card-{number}.json").write_text(text)


def finish(study):
    for plan in expand(study):
        make_run(plan, FD[plan.arm, plan.seed])
    return study


@pytest.fixture
def finished(study):
    return finish(study)


@pytest.fixture(scope="module")
def report(shared_study):
    """The folder of a finished study with its report, for tests that only read it."""
    return compare(finish(shared_study), report_only=True)


def test_the_command_says_where_the_report_is_and_what_it_found(finished, capsys):
    folder = compare(finished, report_only=True)
    printed = capsys.readouterr().out
    assert str(folder / "report.html") in printed
    assert "DoPr-AdamW had the lowest mean FD" in printed


def test_numbers_of_the_table(report):
    plain, dopr = csv.DictReader(io.StringIO((report / "table.csv").read_text()))
    assert (plain["arm"], plain["optimizer"], plain["dopr"]) == ("AdamW", "adamw", "False")
    assert (dopr["arm"], dopr["optimizer"], dopr["dopr"]) == ("DoPr-AdamW", "adamw", "True")
    assert float(plain["fd_mean"]) == 5.5
    assert float(plain["fd_sd"]) == pytest.approx(0.5**0.5)
    assert float(dopr["one_step_loss_mean"]) == pytest.approx(0.5325)
    expected = {
        "lr": 0.001,
        "trials": 1,
        "seeds": 2,
        "fd_images": 40,
        "nfe": 2,
        "images_seen": 8 * 16,
        "seconds_per_step": 0.02,
        "peak_memory_bytes": 108 * 2**20,
        "global_batch_size": 16,
        "label_accuracy_mean": 0.9,
    }
    assert {key: float(plain[key]) for key in expected} == pytest.approx(expected)
    assert plain["commit"] == MADE_BY["commit"]
    assert plain["hardware"] == MADE_BY["hardware"]
    page = (report / "report.html").read_text()
    for shown in ("5.50 ± 0.71", "3.25 ± 0.35", "0.5550 ± 0.0071", "20 ms", "108 MiB", "abacus"):
        assert shown in page


def test_the_report_is_one_file(report):
    page = (report / "report.html").read_text()
    assert not re.search(r"https?:|<script [^>]|<link|@import|url\(", page)
    images = re.findall(r'<img[^>]* src="([^"]*)"', page)
    # Scatter, NFE, FD and loss over steps and seconds; a grid an arm.
    assert len(images) == 1 + 1 + 4 + 2
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert "DoPr-AdamW over AdamW" in page
    assert "too few for a claim" in page


def test_every_run_links_to_its_files(report, shared_study):
    page = (report / "report.html").read_text()
    for plan in expand(shared_study):
        for target in (f"{plan.name}/config.yaml", f"{plan.name}/evaluation/"):
            assert f'href="{target}"' in page
            assert (report / target).exists()
        assert f"<code>flowdopr train {plan.path}/config.yaml name=NEW</code>" in page


def test_what_was_trained_on_what_and_when_is_on_the_page(report, shared_study):
    page = (report / "report.html").read_text()
    model = build_model(shared_study, DIGITS.image_shape, DIGITS.num_classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for name, value in {
        "parameters": f"{parameters:,}",
        "data": "digits: 8 × 8 images of 1 channel, 1,600 to train on, 197 held out, 10 classes",
        "generated images": "40",
        "seeds": "0, 1",
        "runs launched": "2026-03-14 15:09 UTC",
    }.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    results = json.loads((report / "results.json").read_text())
    assert results["dataset"] == DIGITS.to_dict()
    assert {run["num_parameters"] for run in results["runs"]} == {parameters}
    assert all(run["launched"] == [MADE_BY["launched"]] for run in results["runs"])


def test_the_settings_in_which_arms_differ_are_listed(study):
    arms = "[{name: A, lrs: [1e-3]}, {name: B, lrs: [1e-3], set: {train.ema_decays: [0.8]}}, "
    arms += "{name: C, lrs: [2e-3]}]"
    config = apply_overrides(study, [f"compare.arms={arms}"])
    folder = compare(config, report_only=True)
    results = json.loads((folder / "results.json").read_text())
    assert results["differing_settings"] == {
        "optimizer.lr": {"A": "0.001", "B": "0.001", "C": "0.002"},
        "train.ema_decays": {"A": "[0.9]", "B": "[0.8]", "C": "[0.9]"},
    }
    note = "Not only the optimizer differs: train.ema_decays is not the same in B as in A and C."
    assert note in results["verdict"]["notes"]
    page = (folder / "report.html").read_text()
    assert re.search(r"<code>train.ema_decays</code></td>\s*<td>\[0.9\]</td><td>\[0.8\]</td>", page)


def test_time_is_that_of_training_and_bars_are_the_losses_that_both_reached(finished):
    study = build_study(finished, [read_result(read_run(plan)) for plan in expand(finished)])
    seeds_and_mean = draw_all(study)["fd-by-seconds"].axes[0].lines[:3]
    for line in seeds_and_mean:  # 4 and 8 steps of 0.02 s
        assert line.get_xdata() == pytest.approx([0.08, 0.16])
    assert seeds_and_mean[2].get_ydata() == pytest.approx([11.0, 5.5])
    bar = draw_all(study)["scatter"].axes[1].lines[0]
    # Losses are 0.5 + FD / 100: of seeds 0 and 1 up to that of DoPr at step 4, from AdamW's at 8.
    assert bar.get_xdata() == pytest.approx([0.5 + 5.5 / 100, 0.5 + 6.5 / 100])


def test_results_json_holds_every_run_and_difference(report):
    results = json.loads((report / "results.json").read_text())
    fd, *_, loss = results["claims"]
    assert (fd["first"], fd["second"]) == ("DoPr-AdamW", "AdamW")
    assert (fd["measure"], loss["measure"]) == ("FD at equal steps", "one-step loss")
    assert fd["by_seed"] == pytest.approx({"0": 3 / 5, "1": 3.5 / 6})
    assert fd["ratio"] == pytest.approx((3 / 5 * 3.5 / 6) ** 0.5)
    assert (fd["shown"], fd["p_permutation"]) == (False, 0.5)
    table = list(csv.DictReader(io.StringIO((report / "table.csv").read_text())))
    for row, arm in zip(table, results["arms"], strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in arm.items()}
    assert len(results["runs"]) == 4
    curve = results["runs"][0]["curve"]
    assert [(point["step"], point["fd"]) for point in curve] == [(4, 10.0), (8, 5.0)]
    by_nfe = results["runs"][0]["by_nfe"]
    assert [(point["nfe"], point["fd"]) for point in by_nfe] == [(1, 10.0), (2, 5.0)]


def test_the_report_is_a_pure_function_of_the_run_folders(finished):
    names = ("report.html", "table.csv", "results.json", "plots/scatter.png", "plots/nfe.png")
    folder = compare(finished, report_only=True)
    before = [(folder / name).read_bytes() for name in names]
    compare(finished, report_only=True)
    after = [(folder / name).read_bytes() for name in names]
    date = re.compile(rb"Report of [\d: -]+ UTC")
    assert date.search(before[0])
    assert [date.sub(b"", one) for one in before] == [date.sub(b"", one) for one in after]
    assert not list(study_path(finished).rglob("*.part"))


def test_steps_measured_beside_other_runs_are_said_to_be(finished):
    page = (compare(finished, report_only=True) / "report.html").read_text()
    assert "Up to 2 runs were made at a time" in page
    page = (compare(finished, report_only=True, workers=1) / "report.html").read_text()
    assert "made at a time" not in page


def test_the_hardware_and_commit_of_every_part_are_shown(study):
    first, *_ = plans = expand(study)
    for plan in plans:
        make_run(plan, 1.0)
    before = json.loads((first.path / "versions.json").read_text())
    made_by = before | {"from_step": 4, "hardware": "slide rule", "earlier": [before]}
    made_by |= {"commit": "fedcba9876543210fedcba9876543210fedcba98"}
    write_json(first.path / "versions.json", sealed(made_by))
    assert read_result(read_run(first)).hardware == "abacus, 1 thread | slide rule"
    page = (compare(study, report_only=True) / "report.html").read_text()
    assert page.count("<td>2026-03-14 15:09 UTC, in 2 launches</td>") == 1
    assert "0123456789ab | fedcba987654<" in page  # each of them once, whichever arms have it


def test_the_report_says_whose_features_fd_is_in(study):
    config = apply_overrides(study, ["evaluate.extractor=imagenet"])
    for plan in expand(config):
        make_run(plan, 1.0)
    page = (compare(config, report_only=True) / "report.html").read_text()
    assert "in the features of a network trained on photographs; it is not an FID." in page
    assert "classifier of this data set" not in page


def test_names_are_escaped(study):
    arms = "[{name: AdamW, lrs: [1e-3]}]"
    folder = ["data.name=folder", "data.root='<b>&'"]
    config = apply_overrides(study, [f"compare.arms={arms}", *folder])
    for plan in expand(config):
        make_run(plan, 1.0)
    page = (compare(config, report_only=True) / "report.html").read_text()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page


def test_unfinished_and_failed_runs_are_listed(study):
    first, second, third, _ = expand(study)
    make_run(first, 5.0)
    begin_run(second.config, DIGITS, MADE_BY, resume=False)
    third.failure.parent.mkdir()
    third.failure.write_text("RuntimeError: <boom>\n")
    assert [read_result(read_run(plan)).status for plan in expand(study)] == [
        "done",
        "unfinished",
        "failed",
        "not started",
    ]
    page = (compare(study, report_only=True) / "report.html").read_text()
    assert f"1 run not finished: {second.name}." in page
    assert "RuntimeError: &lt;boom&gt;" in page


def test_samples_without_a_finite_distance_are_a_failure(study):
    first, *_ = expand(study)
    make_run(first, float("inf"))
    for path in (first.path / "evaluation").iterdir():
        path.write_text(path.read_text().replace("Infinity", "null"))
    result = read_result(read_run(first))
    assert (result.status, result.done) == ("failed", False)
    assert "not finite" in result.reason


def test_samples_of_the_same_noise_and_their_neighbours_are_shown(finished):
    for plan in expand(finished):
        card = plan.path / "evaluation" / "card-0.json"
        images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
        distances = torch.tensor([1.0, 4.0, 2.0])
        gallery = Gallery(images, torch.arange(3), images.flip(3), distances, torch.tensor([4.0]))
        gallery.write(Gallery.beside(card))
        record = {"file": Gallery.beside(card).name, **gallery.to_dict()}
        card.write_text(json.dumps(json.loads(card.read_text()) | {"gallery": record}))
    folder = compare(finished, report_only=True)
    page = (folder / "report.html").read_text()
    for arm in ("AdamW", "DoPr-AdamW"):
        first = next(plan for plan in expand(finished) if plan.arm == arm).path / "evaluation"
        images = Gallery.read(first / "card-0.safetensors").images
        (row,) = re.findall(rf'alt="Samples of {arm}" src="data:image/png;base64,([^"]*)"', page)
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(row))))
        assert shown.shape == (48 + 4, 3 * 50 + 2, 3)  # each 48 pixels a side, 2 between them
        assert np.array_equal(shown[2:50:6, 52:100:6, 0], images[1, 0].numpy())
        pairs = re.findall(rf"A sample of {arm} and .*\n *<figcaption>([\d.]*)<", page)
        assert pairs == ["0.25", "0.50", "1.0"]
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert {run["nearest_ratio"] for run in runs} == {0.5}
    assert all(Path(run["gallery"]).is_file() for run in runs)
    for number, plan in enumerate(expand(finished)):  # without galleries, the grids of training
        card = plan.path / "evaluation" / "card-0.json"
        Gallery.beside(card).write_bytes(b"damaged")
        record = record | {"file": ["card-0.safetensors", "no\0path", "", "missing"][number]}
        card.write_text(json.dumps(json.loads(card.read_text()) | {"gallery": record}))
    page = (compare(finished, report_only=True) / "report.html").read_text()
    assert page.count('alt="Samples of') == 2
    assert "Nearest training images" not in page


def test_a_report_before_any_run(study):
    page = (compare(study, report_only=True) / "report.html").read_text()
    assert "nothing to compare" in page


def test_other_evaluation_settings_need_other_cards(finished):
    assert all(read_run(plan).finished for plan in expand(finished))
    changed = apply_overrides(finished, ["evaluate.fid_num_images=80"])
    plan = expand(changed)[0]
    assert read_run(plan).missing == wanted_cards(plan).all()
    more = apply_overrides(finished, ["compare.nfe_steps=[1, 2, 4]"])
    assert [request.overrides[-1] for request in read_run(expand(more)[0]).missing] == [
        "sample.solver.steps=4"
    ]
    solvers = apply_overrides(finished, ["compare.nfe_solvers=[heun2]"])
    assert [request.overrides[-1] for request in read_run(expand(solvers)[0]).missing] == [
        "sample.solver={name: heun2, steps: 1}",
        "sample.solver={name: heun2, steps: 2}",
    ]


EVERY_METRIC = ["evaluate.metrics=[fd, kid, isc, prc]", "evaluate.bpd={}", "evaluate.excess={}"]


@pytest.mark.parametrize(
    "change",
    [
        *("evaluate.bpd.num_images=65", "evaluate.bpd.trace=exact", "sample.batch_size=8"),
        *("evaluate.bpd.rtol=1e-3", "evaluate.excess.num_images=9", "evaluate.seed=1"),
        *("evaluate.weights=raw", "evaluate.labels=data", "evaluate.extractor=inception"),
        *("sample.solver.steps=3", "sample.solver.grid=edm", "sample.guidance.scale=2.0"),
    ],
)
def test_no_number_of_other_settings_is_taken_for_the_final_one(study, change):
    study = apply_overrides(study, EVERY_METRIC)
    make_run(expand(study)[0], 1.0)
    assert read_run(expand(study)[0]).finished
    plan = expand(apply_overrides(study, [change]))[0]
    assert wanted_cards(plan).final in read_run(plan).missing


def test_other_inception_weights_need_other_cards(study):
    study = apply_overrides(study, ["evaluate.extractor=inception"])
    make_run(expand(study)[0], 1.0)
    assert read_run(expand(study)[0]).finished
    plan = expand(apply_overrides(study, ["evaluate.extractor.weights=other.pth"]))[0]
    assert read_run(plan).missing == wanted_cards(plan).all()


@pytest.mark.parametrize("change", ["sample.batch_size=8", "sample.num_images=3"])
def test_settings_that_decide_no_number_here_need_no_new_card(finished, change):
    assert all(read_run(plan).finished for plan in expand(apply_overrides(finished, [change])))


def test_a_card_with_more_metrics_answers_too_and_one_without_settings_never(finished):
    plan = expand(finished)[0]
    cards = list((plan.path / "evaluation").iterdir())
    for path in cards:
        known = json.loads(path.read_text())
        known["settings"] |= {"metrics": ["fd", "kid"]}
        path.write_text(json.dumps(known))
    assert read_run(plan).finished
    for path in cards:
        known = json.loads(path.read_text())
        del known["settings"]
        path.write_text(json.dumps(known))
    assert read_run(plan).missing == wanted_cards(plan).all()


def test_a_run_folder_of_another_config_is_refused(finished):
    with pytest.raises(ConfigError, match="another config") as caught:
        compare(apply_overrides(finished, ["train.global_batch_size=32"]))
    assert "\n" not in str(caught.value)


def test_styles_tell_arms_apart_and_show_preconditioning(finished):
    results = [read_result(read_run(plan)) for plan in expand(finished)]
    styles = build_study(finished, results).styles
    assert styles["AdamW"].colour != styles["DoPr-AdamW"].colour
    assert (styles["AdamW"].line, styles["DoPr-AdamW"].line) == ("--", "-")


CHECK = """
<script>
  addEventListener("load", () => {
    const tables = [...document.querySelectorAll("table.sortable")].map((table) =>
      [...table.querySelectorAll("th")].map((title, column) => {
        const shown = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
        return [title.textContent, [1, 2].map(() => (title.click(), shown()))];
      }));
    const images = [...document.images].map((image) => image.naturalWidth);
    const tooWide = document.documentElement.scrollWidth - innerWidth;
    document.title = JSON.stringify({tables, images, tooWide});
  });
</script></body>"""


def in_chromium(page, path, width):
    """What the script CHECK found on the page, and the browser's console."""
    path.write_text(page.replace("</body>", CHECK))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--v=0", f"--window-size={width},900"]
    shown = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (found,) = re.findall(r"<title>(.*)</title>", shown.stdout)
    lines = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found)), lines


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no program chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_report_without_complaint_and_sorts_it(finished, tmp_path, width):
    page = (compare(finished, report_only=True) / "report.html").read_text()
    found, console = in_chromium(page, tmp_path / "page.html", width)
    assert console == []
    assert len(found["images"]) == page.count("<img")
    assert min(found["images"]) > 0
    assert found["tooWide"] <= 0
    results, every_run = (dict(table) for table in found["tables"])
    assert results["optimizer"] == [["AdamW", "DoPr-AdamW"], ["DoPr-AdamW", "AdamW"]]
    assert results["FD ↓"] == [["3.25 ± 0.35", "5.50 ± 0.71"], ["5.50 ± 0.71", "3.25 ± 0.35"]]
    distances = [f"{fd:.2f}" for fd in sorted(FD.values())]
    assert every_run["FD ↓"] == [distances, distances[::-1]]
    broken = page.replace("</body>", "<script>nothing()</script></body>")
    assert len(in_chromium(broken, tmp_path / "broken.html", width)[1]) == 1


def test_the_table_for_latex_has_the_rows_of_the_report(report):
    lines = (report / "table.tex").read_text().splitlines()
    assert lines[:2] == [r"\begin{tabular}{lrrrrrrr}", r"\toprule"]
    assert lines[2].startswith(r"optimizer & learning rate & FD $\downarrow$ & one-step loss")
    dopr = next(line for line in lines if line.startswith("DoPr-AdamW"))
    assert r"\textbf{3.25 $\pm$ 0.35}" in dopr
    assert r"90.0 $\pm$ 0.0 \%" in dopr
    assert all(line.count("&") == 7 for line in lines if "&" in line)


def test_a_dry_run_says_what_is_left_and_how_long_it_takes(finished):
    nothing = "1 trial, 2 runs of 8 steps; left: 0 runs, 0 steps"
    assert forecast(finished).splitlines() == [
        f"AdamW: {nothing}",
        f"DoPr-AdamW: {nothing}",
        "Training time left: 0:00:00, 2 runs at a time.",
    ]
    more = apply_overrides(finished, ["compare.seeds=[0, 1, 2, 3]"])
    # A step takes 0.025 s, the median of all windows, and 2 runs of 8 steps of each arm are left.
    left = forecast(more, workers=1).splitlines()
    assert left[0] == "AdamW: 1 trial, 4 runs of 8 steps; left: 2 runs, 16 steps"
    assert left[-1] == "Training time left: 0:00:01, 1 run at a time."


def test_a_dry_run_before_any_step_knows_no_time(study):
    lines = forecast(study).splitlines()
    assert lines[0] == "AdamW: 1 trial, 2 runs of 8 steps; left: 2 runs, 16 steps"
    assert lines[-1] == "Training time: not known before runs of the study have logged steps."
    assert not study_path(study).exists()
