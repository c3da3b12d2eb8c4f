"""A user's own data: read right, or refused in one line; never written into."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import multistage_diffusion as msd
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
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(given, options, message):
    with pytest.raises(DataError, match=message) as caught:
        msd.as_data(given, name="mine", **options)
    assert "\n" not in str(caught.value)
