"""Files of version 0.1 can be read: runs, half-done runs, models, shards, exported and converted ones."""

import json

import pinned
import pinned_files as files
import pytest

EXPECTED = json.loads((pinned.OLD / "expected.json").read_text())
STEP = 12  # after which the half-done run died; its checkpoint is of step 10

# What needs diffusers, which takes seconds to import, is slow.
MODELS = [pytest.param(model, marks=pytest.mark.slow) if model == "latent" else model for model in files.MODELS]

diffusers_warns = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return files.copy(tmp_path_factory.mktemp("golden") / "files")


@pytest.fixture(autouse=True)
def inside(copied, monkeypatch, tmp_path):
    monkeypatch.chdir(copied)
    monkeypatch.setenv("MSD_CACHE", str(copied.parent / "cache"))


@pytest.mark.parametrize("run", EXPECTED["verify"])
def test_every_file_is_whole(run):
    pinned.near(pinned.msd("verify", run), EXPECTED["verify"][run])


@pytest.mark.parametrize("model", MODELS)
def test_images_are_drawn(model, tmp_path):
    found, wanted = files.drawn(model, tmp_path / "samples"), EXPECTED["draw"][model]
    pinned.near_pictures(found.pop("pictures"), wanted["pictures"])
    assert found == {key: wanted[key] for key in found}


@pytest.mark.parametrize("model", MODELS)
def test_the_held_out_loss(model):
    pinned.near(files.loss(model), EXPECTED["loss"][model])


@pytest.mark.parametrize("length", files.LENGTHS)
def test_an_average_of_another_length(length):
    found = files.loss(files.LENGTH_RUN, "--ema-length", length)
    pinned.near(found, EXPECTED["loss_of_length"][str(length)])


def test_the_raw_weights():
    pinned.near(files.loss(files.LENGTH_RUN, "--weights", "raw"), EXPECTED["loss_raw"])


def test_a_half_done_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(files.copy(tmp_path / "files"))
    document = pinned.msd(*files.HALF)  # fails on a warning
    assert (document["resumed"], document["step"]) == (10, 20)
    pinned.near(pinned.steps_of(pinned.Path("half-done/metrics.jsonl")), EXPECTED["half_done"])
    pinned.msd("verify", "half-done")


def test_a_finished_run_of_two_checkpoints_trains_on(tmp_path, monkeypatch):
    """With the options of its own `config.json`, and its stages with how they were found."""
    monkeypatch.chdir(files.copy(tmp_path / "files"))
    document = pinned.msd(
        "train", "digits", "--config", "multistage/config.json", "--out", "multistage", "--threads", "1",
        "--training.steps", "21",
    )  # fmt: skip
    assert (document["resumed"], document["step"]) == (20, 21)
    theirs, ours = (json.loads((path / "multistage/stages.json").read_text()) for path in (pinned.OLD, pinned.Path()))
    assert theirs == ours and theirs["method"] == "optimal-denoiser"


@pytest.mark.slow
def test_a_run_goes_on_with_its_images_in_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(files.copy(tmp_path / "files"))
    document = pinned.msd(*files.HALF, "--data.source", "shards:shards")
    assert document["resumed"] == 10
    pinned.near(pinned.steps_of(pinned.Path("half-done/metrics.jsonl")), EXPECTED["half_done"])


def test_the_shards_are_the_digits():
    found = pinned.msd("data", "shards:shards")
    pinned.near(found, EXPECTED["shards"])
    assert found["digest"] == pinned.msd("data", "digits")["digest"] == EXPECTED["digits"]["digest"]


def test_an_export_is_what_it_was(tmp_path):
    pinned.msd("export", "edm", "--out", tmp_path / "edm.safetensors")
    (metadata, values), (old, wanted) = map(files.tensors, (tmp_path / "edm.safetensors", "edm.safetensors"))
    assert values == wanted
    pinned.near(*({key: json.loads(value) for key, value in about.items()} for about in (metadata, old)))


def test_the_stages_train_a_run(tmp_path):
    found = pinned.msd("train", "digits", "--stages", "stages.json", "--dry-run")
    assert found["stages"]["edges"] == json.loads(pinned.Path("stages.json").read_text())["edges"]


def test_a_profile_of_a_run():
    pinned.near(pinned.msd("profile", "multistage"), EXPECTED["profile"])


@pytest.mark.slow
@diffusers_warns
def test_a_standard_pipeline_comes_back(tmp_path):
    pinned.msd("convert", files.STANDARD, tmp_path / "back", "--resolution", 8)
    pinned.near(files.loss(str(tmp_path / "back")), EXPECTED["converted"])


@pytest.mark.slow
@diffusers_warns
def test_a_multistage_pipeline_draws():
    from multistage_diffusion.interop.pipeline import MultistagePipeline  # the import that the model card names

    pipeline = MultistagePipeline.from_pretrained("diffusers-edm")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("run", [*files.RUNS, "saved", "multistage/model"])
def test_the_library_loads_it(run):
    import multistage_diffusion as ours

    loaded = ours.load_run(run)
    steps = [checkpoint["step"] for checkpoint in EXPECTED["verify"].get(run, {}).get("checkpoints", [])]
    assert loaded.step == (steps[-1] if steps else None)
