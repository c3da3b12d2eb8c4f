"""The partition: every noise level lies in exactly one stage, and edges are the same number everywhere."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.noise import EDM
from multistage_diffusion.stages import Stages

SHORT = (torch.float32, torch.bfloat16, torch.float16)
levels = st.floats(1e-6, 1e6)
partitions = st.lists(levels, max_size=6, unique=True).map(lambda edges: tuple(sorted(edges)))


@given(edges=partitions, sigma=levels)
def test_each_level_lies_in_exactly_its_stage(edges, sigma):
    stages = Stages(edges)
    stage = stages.of(sigma)
    inside = [low < sigma <= high for low, high in (stages.bounds(k) for k in range(len(stages)))]
    assert inside == [k == stage for k in range(len(stages))]


@given(edges=partitions, sigmas=st.lists(levels, min_size=1, max_size=8))
def test_a_tensor_and_its_numbers_agree(edges, sigmas):
    stages = Stages(edges)
    sigmas += list(stages.edges)
    indices = stages.of(torch.tensor(sigmas, dtype=torch.float64))
    assert indices.dtype == torch.int64
    assert indices.tolist() == [stages.of(sigma) for sigma in sigmas]


@given(edges=partitions, sigmas=st.lists(levels, max_size=8), dtype=st.sampled_from(SHORT))
def test_a_short_tensor_and_its_numbers_agree_wherever_the_type_tells_them_from_an_edge(edges, sigmas, dtype):
    """Only a number that the type rounds to an edge that it is not may change its stage, and then to that edge's."""
    stages, rounded = Stages(edges), torch.tensor(edges, dtype=dtype).tolist()
    for sigma in (*sigmas, *stages.edges):
        single = torch.tensor(sigma, dtype=dtype)
        if single.item() not in rounded:
            assert stages.of(single).item() == stages.of(sigma)
        else:
            assert stages.of(single).item() == rounded.index(single.item())


@given(
    edges=st.lists(levels, min_size=1, max_size=6, unique_by=lambda edge: float(torch.tensor(edge))), up=st.booleans()
)
def test_a_float32_tensor_made_from_an_edge_is_that_edge(edges, up):
    """Also beside it, as far as float32 tells the two apart: the next number up is in the stage above."""
    stages = Stages(tuple(sorted(edges)))
    for index, edge in enumerate(stages.edges):
        single = torch.tensor(edge)
        assert single.dtype == torch.float32
        assert stages.of(single).item() == stages.of(edge) == index
        assert stages.of(single[None, None]).tolist() == [[index]]
        beside = torch.nextafter(single, torch.tensor(math.inf if up else 0.0))
        assert stages.of(beside).item() == index + up or beside.item() in torch.tensor(stages.edges).tolist()


def test_whole_numbers_are_not_rounded_edges():
    assert Stages((0.6, 5.71)).of(torch.tensor([0, 1, 5, 6])).tolist() == [0, 1, 1, 2]


@given(edges=partitions)
def test_an_edge_belongs_to_the_stage_below(edges):
    stages = Stages(edges)
    for index, edge in enumerate(stages.edges):
        assert stages.of(edge) == index
        assert stages.of(math.nextafter(edge, math.inf)) == index + 1


def test_shapes_are_kept_and_the_ends_are_open():
    stages = Stages((0.5, 3.0))
    assert stages.of(torch.tensor([[0.0, math.inf], [0.5, 0.6]], dtype=torch.float64)).tolist() == [[0, 2], [0, 1]]
    assert stages.of(torch.tensor(3.0)).shape == ()
    assert (stages.bounds(0), stages.bounds(2)) == ((0.0, 0.5), (3.0, math.inf))
    assert len(Stages()) == 1 and Stages().of(7.0) == 0


@given(edges=partitions)
def test_saved_edges_come_back_to_the_bit(edges, tmp_path_factory):
    stages = Stages(edges)
    file = tmp_path_factory.mktemp("stages") / "stages.json"
    Stages(stages.edges, {"method": "by hand", "alpha": 0.9}).save(file)
    assert Stages.load(file) == stages
    assert Stages.load(file).provenance == {"method": "by hand", "alpha": 0.9}


def test_a_figure_has_a_band_a_stage_that_holds_its_share():
    stages, process = Stages((0.6, 3.0)), EDM()
    axes = stages.plot(process).axes[0]
    bands = [(band.get_x(), band.get_x() + band.get_width()) for band in axes.patches]
    assert bands == [pytest.approx(ends) for ends in ((process.sigma_min, 0.6), (0.6, 3.0), (3.0, process.sigma_max))]
    assert [text.get_text() for text in axes.texts] == [
        f"stage {stage}\n{share:.1%}" for stage, share in enumerate(stages.shares(process))
    ]


def test_how_edges_were_found_is_no_part_of_equality():
    assert Stages((1.0,), {"method": "a"}) == Stages((1.0,), {"method": "b"}) != Stages((2.0,))
    assert repr(Stages((1.0, 2.5), {"method": "a"})) == "Stages(edges=(1.0, 2.5))"


@pytest.mark.parametrize(
    "edges", [(7.0, 2.0), (2.0, 2.0), (0.0, 1.0), (-1.0,), (math.inf,), (math.nan,), (1.0, math.nan)]
)
def test_wrong_edges_are_refused(edges):
    with pytest.raises(ConfigError, match="must be finite, positive and increasing in sigma, got"):
        Stages(edges)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "null", "{}", '{"edges": 7}', '{"edges": ["0.5"]}', '{"edges": [true]}', '{"edges": [[1]]}',
     '{"edges": [2, 1]}', '{"edges": [NaN]}', '{"edges": [1e999]}', '{"edges": [1' + "0" * 400 + "]}", '{"edge": [1]}'],
)  # fmt: skip
def test_malformed_files_are_named(text, tmp_path):
    file = tmp_path / "stages.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"stages\.json") as caught:
        Stages.load(file)
    assert "\n" not in str(caught.value)


def test_a_file_by_hand_needs_only_edges(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"edges": [1, 2.5]}))
    assert Stages.load(file).edges == (1.0, 2.5)
    with pytest.raises(ConfigError, match="no such file"):
        Stages.load(tmp_path / "other.json")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        Stages((1.0,)).save(tmp_path / "file" / "stages.json")
