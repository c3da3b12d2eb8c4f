"""The partition: every noise level lies in exactly one stage, and edges are the same number everywhere."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.noise import EDM, LDM, VE, VP, Cosine, Flow
from multistage_diffusion.stages import Stages, stage_at, stage_of
from multistage_diffusion.training.batches import Batches

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


PROCESSES = (VP(), Cosine(), LDM(), LDM(betas="linear", num_steps=200), EDM(), VE(), Flow(), Flow(time_scale=1.0))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.kind)
@given(data=st.data(), dtype=st.sampled_from((*SHORT, torch.float64)))
def test_the_time_of_an_edge_is_that_edge_in_every_type(process, data, dtype):
    """As converters see it: a scheduler hands a time, often in float32, whose stage is that of the noise level."""
    inside = st.floats(process.sigma_min * 1.01, min(process.sigma_max, 1e4) / 1.01)
    edges = tuple(sorted(data.draw(st.lists(inside, min_size=1, max_size=4, unique=True))))
    times = process.preconditioning(torch.tensor(edges, dtype=torch.float64)).c_noise
    rounded = times.to(dtype)
    found = stage_at(rounded, edges, process.level)
    if dtype == torch.float64:  # but for the last bit of a formula and its inverse
        edges = tuple(edge * (1 + 1e-9) for edge in edges)
        found = stage_at(rounded, edges, process.level)
    expected = [int((rounded < time).sum()) for time in rounded]  # an edge belongs to the stage below it
    assert found.tolist() == expected
    for index, time in enumerate(times.tolist()):  # of numbers
        assert stage_at(time, tuple(edge * (1 + 1e-9) for edge in edges), process.level) <= index


@given(edges=partitions.filter(bool), dtype=st.sampled_from(SHORT))
def test_a_time_that_runs_the_other_way_has_the_same_rule(edges, dtype):
    """Of a function of a user's, like the logarithm of the signal-to-noise ratio."""
    times = -2 * torch.tensor(edges, dtype=torch.float64).log()
    rounded = times.to(dtype)
    found = stage_at(rounded, edges, lambda time: (-time / 2).exp())
    assert found.tolist() == [int((rounded > time).sum()) for time in rounded]


def test_numbers_of_numpy_round_like_tensors():
    stages = Stages((0.6, 5.71))
    assert stage_of(np.float32(5.71), stages.edges) == 1 == stage_of(np.float64(5.71), stages.edges)
    assert stage_of(np.array([0.6, 5.71, 6], dtype=np.float32), stages.edges).tolist() == [0, 1, 2]


@given(edges=st.lists(st.floats(0.02, 50.0), min_size=1, max_size=3, unique_by=lambda edge: round(edge, 1)))
@settings(max_examples=15, deadline=None)
def test_training_draws_each_stages_levels_on_its_side_of_the_edges(edges):
    stages = Stages(tuple(sorted(edges)))
    for process in (VP(), EDM(), Flow()):
        batch = Batches(tiny.images(), process, stages, TrainingConfig(batch_size=64))(0)
        assert batch.sigma.dtype == torch.float64
        quotas = torch.arange(len(stages)).repeat_interleave(torch.tensor(batch.counts))
        assert torch.equal(stages.of(batch.sigma), quotas)
