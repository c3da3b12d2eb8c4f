"""Classes go by name: from the data into a run, and from the run to evaluation, sampling, resuming and serving."""

import json
from dataclasses import replace

import pytest
import torch

import multistage_diffusion as msd
import tiny
from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.data import Images
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.evaluation import generated, held_out_loss
from multistage_diffusion.training.run import train

ANIMALS = TrainedClasses(("cat", "dog", "owl"), (4, 3, 0))
NUMBERS = TrainedClasses(("1", "2", "10"), (1, 1, 1))
CONDITIONAL = replace(tiny.SMALLEST, classes=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes") / "run"
    train(tiny.run_config(CONDITIONAL, steps=4), folder, data=tiny.images(labels=True))
    return folder


@pytest.fixture(scope="module")
def denoiser(run):
    return tiny.randomise(msd.load_run(run).denoiser)


@pytest.mark.parametrize(
    ("record", "word", "expected"),
    [
        (ANIMALS, "cat", 0),
        (ANIMALS, "1", 1),
        (ANIMALS, "3", "no class 3; the model was trained on cat, dog, owl"),
        (ANIMALS, "dgo", 'did you mean "dog"'),
        (ANIMALS, "-1", "no class -1"),
        (NUMBERS, "1", 0),
        (NUMBERS, "10", 2),
        (NUMBERS, "0", "no class 0; the model was trained on 1, 2, 10"),
    ],
)
def test_a_word_is_a_name_and_digits_are_a_number_only_where_no_name_is(record, word, expected):
    if isinstance(expected, int):
        assert record.number(word) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            record.number(word)


def test_labels_are_matched_by_name_in_any_order_and_number():
    labels = torch.tensor([1, 1, 0])
    assert ANIMALS.match("x", ("dog", "cat"), labels).tolist() == [0, 0, 1]
    assert ANIMALS.match("x", ("ant", "cat", "dog"), labels + 1).tolist() == [1, 1, 0]  # no image of an ant
    with pytest.raises(ConfigError, match="x has images of ant, and the model was trained on cat, dog, owl"):
        ANIMALS.match("x", ("ant", "cat"), labels)
    with pytest.raises(ConfigError, match=r"class owl \(number 2\) has no training image.*trained on cat, dog$"):
        ANIMALS.match("x", ("owl",), torch.tensor([0]))


def test_a_run_and_its_folders_keep_the_names(run, tmp_path):
    expected = TrainedClasses(("a", "b", "c"), (4, 3, 3))
    assert json.loads((run / "classes.json").read_text()) == expected.document()
    assert msd.load_run(run).denoiser.trained_classes == expected
    assert Denoiser.from_pretrained(run / "model").trained_classes == expected
    (tmp_path / "classes.json").write_text('{"names": ["a", 3], "images": [1, 2]}')
    with pytest.raises(CheckpointError, match="holds no names of classes"):
        TrainedClasses.load(tmp_path)


def test_the_loss_does_not_depend_on_the_numbers_of_classes(denoiser):
    data = tiny.images(labels=True)
    loss = held_out_loss(denoiser, data).loss
    other = replace(data, labels=2 - data.labels, classes=("c", "b", "a"))
    more = replace(data, labels=data.labels + 1, classes=("0", "a", "b", "c"))
    assert held_out_loss(denoiser, other).loss == held_out_loss(denoiser, more).loss == loss
    thin = (data.labels > 0).nonzero()[:, 0]
    expected = held_out_loss(denoiser, data.take(thin)).loss
    renumbered = Images("thin", data.images[thin], data.labels[thin] - 1, ("b", "c"))
    assert held_out_loss(denoiser, renumbered).loss == expected
    with pytest.raises(ConfigError, match="has images of cat"):
        held_out_loss(denoiser, replace(data, classes=("cat", "b", "c")))
    with pytest.raises(ConfigError, match="conditional, and tiny has no labels"):
        held_out_loss(denoiser, tiny.images())


def test_without_names_numbers_must_fit():
    data = replace(tiny.images(labels=True), classes=("x", "y", "z"))
    assert held_out_loss(tiny.denoiser(CONDITIONAL), data).loss > 0
    with pytest.raises(ConfigError, match="class of number 2, and the model has 2 classes"):
        held_out_loss(tiny.denoiser(replace(CONDITIONAL, classes=2)), data)


def test_images_are_drawn_by_name(denoiser):
    named = msd.sample(denoiser, 2, steps=2, labels=["c", "a"]).images
    assert torch.equal(named, msd.sample(denoiser, 2, steps=2, labels=[2, 0]).images)
    assert not torch.equal(named, msd.sample(denoiser, 2, steps=2).images)
    for labels, message in (("d", "no class d"), (3, "between 0 and 2")):
        with pytest.raises(ConfigError, match=message):
            msd.sample(denoiser, 2, labels=labels)


def test_classes_that_no_image_has_are_said_and_never_drawn(tmp_path):
    data = tiny.images(labels=True)
    data = replace(data.take((data.labels != 1).nonzero()[:, 0]), classes=("a", "b", "c"))
    config = tiny.run_config(replace(CONDITIONAL, classes=5), steps=2, save_every=2)
    with pytest.warns(UserWarning, match=r"model.classes is 5, .* 2 classes \(none of b\): 3 are never trained"):
        train(config, tmp_path / "run", data=data)
    denoiser = msd.load_run(tmp_path / "run").denoiser
    for label, message in (("b", "class b"), (4, r"class \(number 4\)")):
        with pytest.raises(ConfigError, match=message):
            msd.sample(denoiser, 1, labels=label)
    labels = []
    denoiser.register_forward_pre_hook(lambda _, given: labels.extend(given[2].labels.tolist()))
    list(generated(denoiser, 20, msd.Sampler(solver="euler", steps=1)))
    assert set(labels) == {0, 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny.images(), "model.classes is 3, and tiny has no labels"),
        (
            replace(tiny.images(labels=True), classes=("a", "b", "d")),
            "trained on the classes a, b, c, and tiny has a, b, d",
        ),
        (tiny.images(shape=(1, 16, 16), labels=True), "trained on images of"),
        (tiny.images(seed=1, labels=True), "were changed, added or removed"),
    ],
)
def test_a_run_is_not_resumed_with_other_classes(run, data, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny.run_config(CONDITIONAL, steps=6), run, data=data)


def test_a_trained_model_keeps_its_numbers_when_it_is_trained_on(denoiser):
    data = tiny.images(labels=True)
    shuffled = replace(data, labels=2 - data.labels, classes=("c", "b", "a"))
    trainer = msd.Trainer(denoiser, shuffled, tiny.run_config(CONDITIONAL).training)
    assert torch.equal(trainer.data.labels, data.labels) and trainer.data.classes == ("a", "b", "c")
    with pytest.raises(ConfigError, match="has images of x"):
        msd.Trainer(denoiser, replace(data, classes=("x", "b", "c")), tiny.run_config(CONDITIONAL).training)


def test_what_would_not_be_trained_is_refused_before_training(tmp_path):
    data = tiny.images(labels=True)
    with pytest.raises(ConfigError, match=r"training\.label-dropout must be below 1 with classes"):
        train(tiny.run_config(CONDITIONAL, label_dropout=1.0), tmp_path / "a", data=data)
    config = replace(tiny.run_config(CONDITIONAL, label_dropout=0.0), sampling=msd.Sampler(guidance=2.0))
    with pytest.raises(ConfigError, match=r"training\.label-dropout must be above 0 with sampling\.guidance"):
        train(config, tmp_path / "b", data=data)
