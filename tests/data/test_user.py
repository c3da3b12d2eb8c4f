"""A user's own data: read right, or refused in one line; never written into."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import multistage_diffusion as msd
import tiny
from multistage_diffusion.data import Images
from multistage_diffusion.data.user import _numbers
from multistage_diffusion.errors import DataError

FIELDS = torch.randn(6, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 7


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


PICTURES = (FIELDS[:, :1] * 10).clamp(0, 255).to(torch.uint8)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


@pytest.mark.parametrize(
    "given",
    [
        PICTURES,
        PICTURES.numpy(),
        PICTURES[:, 0],
        TensorDataset(PICTURES, LABELS),
        Items([{"image": image, "label": int(label)} for image, label in zip(PICTURES, LABELS, strict=True)]),
        Items([(image.numpy(), label.item()) for image, label in zip(PICTURES, LABELS, strict=True)]),
    ],
)
def test_pictures_are_the_same_whoever_holds_them(given):
    data = msd.as_data(given)
    assert torch.equal(data.images, PICTURES) and data.shape == (1, 8, 8)
    if isinstance(given, Dataset):
        assert torch.equal(data.labels, LABELS) and data.classes == ("0", "1", "2")


def test_fields_are_scaled_and_scaled_back_and_the_callers_stay_as_they_are():
    before = FIELDS.clone()
    data = msd.as_data(FIELDS, LABELS[:, None], classes=("a", "b", "c"), scale="standardise")
    seen = data.floats()
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.codec.decode(seen), FIELDS, atol=1e-4, rtol=1e-4)
    assert torch.equal(FIELDS, before) and data.classes == ("a", "b", "c")
    assert torch.equal(msd.as_data(FIELDS).floats(), before)
    assert msd.as_data(data) is data


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (DataLoader(TensorDataset(PICTURES)), {}, "pass its dataset"),
        (torch.zeros(32, 32, 3), {}, "may be one picture in colours or 32 in grey"),
        (torch.zeros(9, 32, 32, 3), {}, "looks like"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.int64), {}, "give uint8 pictures or floats"),
        (torch.full((4, 1, 8, 8), torch.nan), {}, "finite"),
        (PICTURES, {"labels": [0, 1]}, "6 whole numbers"),
        (PICTURES, {"labels": [0.5] * 6}, "fractions"),
        (PICTURES, {"labels": [-1] * 6}, "0 or more"),
        (Items(["words"]), {}, "item 0 holds str"),
        (Items([]), {}, "empty"),
        (Items([PICTURES[0], PICTURES[0, :, :4]]), {}, "different shapes"),
        (Items([(PICTURES[0], 1), (PICTURES[1],)]), {}, "1 of 2 items have a label"),
        (Items([PICTURES[0], PICTURES[0].float()]), {}, "different types"),
        (PICTURES, {"labels": [float("inf")] * 6}, "infinity"),
        (PICTURES, {"labels": [10**9] * 6}, "below 1,000,000"),
        (PICTURES, {"classes": ("a",)}, "names of classes were given, and no labels"),
        (np.ma.masked_array(np.zeros((4, 8, 8)), mask=True), {}, "masked"),
        (PICTURES.to_sparse(), {}, "no plain values"),
        (PICTURES.to("meta"), {}, "no plain values"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(given, options, message):
    with pytest.raises(DataError, match=message) as caught:
        msd.as_data(given, name="mine", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ("digits", r"load_data\('folder:PATH'\)"),
        ([PICTURES[0]], r"torch\.stack"),
        ([PICTURES[0].numpy()], r"numpy\.stack"),
        ((PICTURES, LABELS), r"as_data\(images, labels\)"),
        ({"images": PICTURES}, r'x\["images"\]'),
        (np.array(["a"]), "an array of <U1"),
    ],
)
def test_what_makes_data_of_other_things(given, mend):
    with pytest.raises(DataError, match=mend):
        _numbers(given, "mine")


class Named(Dataset):
    """As torchvision's datasets: items of a picture and a number, and the names of the classes."""

    classes: ClassVar = ["cat", "dog"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return PICTURES[index], index % 2


def test_a_dataset_that_names_its_classes():
    for dataset in (Named(), Subset(Named(), range(4)), Subset(Subset(Named(), range(5)), [0, 1])):
        data = msd.as_data(dataset)
        assert data.classes == ("cat", "dog") and data.labels.tolist() == [i % 2 for i in range(len(data))]
    assert msd.as_data(Named(), classes=("a", "b")).classes == ("a", "b")


FLOATS = np.linspace(-1, 1, 384, dtype=np.float32).reshape(6, 1, 8, 8)


@pytest.mark.parametrize(
    "given",
    [
        FLOATS.astype(">f4"),
        FLOATS.astype(np.longdouble),
        FLOATS[::-1][::-1],
        torch.from_numpy(FLOATS).requires_grad_(),
        torch.from_numpy(FLOATS).double(),
    ],
)
def test_floats_of_every_kind_are_the_same(given):
    assert torch.equal(msd.as_data(given).floats(), torch.from_numpy(FLOATS))


def test_floats_are_the_callers_own():
    x = torch.from_numpy(FLOATS.copy())
    msd.as_data(x).floats().zero_()
    assert torch.equal(x, torch.from_numpy(FLOATS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": PICTURES[0]}, r"rows must be \(N, C, H, W\), got \(1, 8, 8\)"),
        ({"images": PICTURES.numpy()}, "rows must be a tensor, got ndarray; `as_data` takes"),
        ({"images": PICTURES.permute(0, 2, 3, 1)}, "these 8; move the last axis to the second place"),
        ({"images": PICTURES.float()}, "pictures must be uint8"),
        ({"labels": torch.zeros(6)}, r"labels must be a tensor of int64, got torch\.float32"),
        ({"labels": [0] * 6}, "labels must be a tensor of int64, got list"),
        ({"labels": torch.zeros(6, 1, dtype=torch.int64)}, r"one number for each row, got the shape \(6, 1\)"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "has labels, and no names of classes"),
        ({"classes": ("a", "a")}, "no two alike"),
        ({"classes": "abc"}, "classes must be names"),
        ({"classes": (1, 2)}, "classes must be names"),
    ],
)
def test_the_constructor_checks(arguments, message):
    with pytest.raises(DataError, match=message):
        images = object.__new__(Images)  # past the tests' own check of types
        for name, value in {"name": "mine", "images": PICTURES, "labels": None, "classes": (), **arguments}.items():
            object.__setattr__(images, name, value)
        images.__post_init__()


def test_training_on_given_data_says_what_looks_odd(tmp_path):
    config = tiny.run_config(tiny.SMALLEST, steps=1, save_every=1)
    with pytest.warns(UserWarning, match=r"pixels use 0\.\.1 of 0\.\.255"):
        msd.train(config, tmp_path / "run", data=(PICTURES > 50).to(torch.uint8), device="cpu")
    with pytest.raises(DataError, match="every pixel is 3"):
        msd.train(config, tmp_path / "other", data=torch.full((5, 1, 8, 8), 3, dtype=torch.uint8), device="cpu")
