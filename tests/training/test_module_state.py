"""What networks and optimisers of users keep beside weights: buffers, tied weights, counts in groups."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import multistage_diffusion as msd
import ranks
import tiny
from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.process_group import join
from multistage_diffusion.training.checkpoint import restore_checkpoint, save_checkpoint
from multistage_diffusion.training.run import fit
from multistage_diffusion.training.trainer import Trainer
from runs import PowerError, tensors

TRAINING = TrainingConfig(
    steps=8, batch_size=4, learning_rate=3e-3, save_every=3, log_every=2, sigma_rel=(0.1,), ema_snapshot_every=4
)


class Network(nn.Module):
    """A unified network with batch norm, whose two middle layers have one weight."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
            self.middle, self.again = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.again.weight = nn.BatchNorm2d(4), self.middle.weight

    def forward(self, x, c_noise):
        return self.last(self.again(torch.relu(self.middle(self.norm(self.first(x))))))


class Counting(torch.optim.SGD):
    """Its step shrinks with a count in its groups, and with one that is a number in each parameter's state."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["taken"], group["span"] = 0, (0.5, 2.0)

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            assert group["span"] == (0.5, 2.0)
            group["taken"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                assert state["calls"] == group["taken"]
                parameter.data.sub_(parameter.grad, alpha=group["lr"] / (group["taken"] * state["calls"]))


def trainer(steps=8, optimizer=None, **options):
    denoiser = Denoiser(Network(), "vp", shape=tiny.SHAPE)
    return Trainer(denoiser, tiny.images(), replace(TRAINING, steps=steps), optimizer=optimizer, **options)


def stopped(out, step, **options):
    def fail(result, _):
        if result.step == step:
            raise PowerError

    with pytest.raises(PowerError):
        fit(trainer(**options), out, on_step=fail)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    whole = trainer()
    fit(whole, folder / "whole")
    return folder / "whole", whole


def test_averages_come_with_the_buffers_of_the_trained_network(run):
    folder, whole = run
    trained = whole.denoiser.network.state_dict()
    buffers = [name for name in trained if "running" in name or "tracked" in name]
    assert len(buffers) == 3 and int(trained["decoders.0.module.norm.num_batches_tracked"]) == 8
    for options in ({}, {"weights": "raw"}, {"sigma_rel": 0.1}):
        loaded = msd.load_run(folder, network=Network(), **options).denoiser.network.state_dict()
        assert all(torch.equal(loaded[name], trained[name]) for name in buffers)
    averaged = whole.averaged().network.state_dict()
    assert all(torch.equal(averaged[name], trained[name]) for name in buffers)
    model = msd.Denoiser.from_pretrained(folder / "model", network=Network()).network.state_dict()
    assert tiny.bits_equal(model, msd.load_run(folder, network=Network()).denoiser.network.state_dict())


def test_tied_weights_stay_tied_and_are_written_under_both_names(run):
    folder, _ = run
    network = Network()
    denoiser = msd.load_run(folder, network=network).denoiser
    assert network.again.weight is network.middle.weight
    names = [name for name in tensors(folder) if name.endswith(("middle.weight", "again.weight"))]
    assert len(names) == 4  # in the weights and in the average
    denoiser.save_pretrained(folder / "saved")
    again = msd.Denoiser.from_pretrained(folder / "saved", network=Network())
    assert tiny.bits_equal(again.network.state_dict(), denoiser.network.state_dict())


def test_a_run_with_buffers_and_tied_weights_goes_on_to_the_bit(run, tmp_path):
    stopped(tmp_path / "run", 5)
    assert fit(trainer(), tmp_path / "run").resumed == 3
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(run[0]))


def test_what_an_optimizer_counts_goes_on(tmp_path):
    fit(trainer(optimizer=Counting), tmp_path / "whole")
    stopped(tmp_path / "run", 5, optimizer=Counting)
    assert fit(trainer(optimizer=Counting), tmp_path / "run").resumed == 3
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


def test_what_no_checkpoint_can_hold_is_refused_before_training():
    def with_function(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.param_groups[0]["rule"] = len
        return optimizer

    with pytest.raises(ConfigError, match="the optimiser SGD keeps what no checkpoint can hold"):
        trainer(optimizer=with_function)


def shared(rank, folder):
    """Three steps, a checkpoint, and its continuation by other processes; what all of them have of the buffers."""
    with join(torch.device("cpu"), 1.0) as processes:
        first = trainer(processes=processes)
        assert len(list(first.run(3))) == 3
        checkpoint = save_checkpoint(folder, first, {"shape": tiny.SHAPE}, {})
        second = trainer(processes=processes)
        restore_checkpoint(checkpoint if processes.is_main else None, second)
        restored = {name: value.clone() for name, value in second.denoiser.network.state_dict().items()}
        whole = {name: value.clone() for name, value in first.denoiser.network.state_dict().items()}
        results = [[result.loss for result in each.run(6)] for each in (first, second)]
    return {"restored": restored, "whole": whole, "losses": results}


@pytest.mark.slow
def test_processes_share_buffers_and_resume(tmp_path):
    first, second = ranks.run(shared, tmp_path / "ranks", tmp_path / "checkpoints")
    assert tiny.bits_equal(first["restored"], first["whole"])
    assert tiny.bits_equal(first["restored"], second["restored"])
    assert first["losses"][0] == first["losses"][1]


def learned(rank, folder):
    """A resumed run that learns weights of noise levels and shares of batches."""
    config = tiny.run_config(weighting="uncertainty", quotas="auto", batch_size=12)
    with join(torch.device("cpu"), 1.0) as processes:
        first = msd.build_trainer(config, tiny.images(), processes=processes)
        assert len(list(first.run(3))) == 3
        checkpoint = save_checkpoint(folder, first, {"shape": tiny.SHAPE}, {})
        second = msd.build_trainer(config, tiny.images(), processes=processes)
        restore_checkpoint(checkpoint if processes.is_main else None, second)
        return [[result.loss for result in each.run(6)] for each in (first, second)]


@pytest.mark.slow
def test_processes_resume_what_was_learned_of_levels_and_stages(tmp_path):
    first, second = ranks.run(learned, tmp_path / "ranks", tmp_path / "checkpoints")
    assert first[0] == first[1] == second[0] == second[1]


def test_steps_that_a_directory_does_not_hold_are_refused(run, tmp_path):
    started = trainer()
    assert len(list(started.run(2))) == 2
    with pytest.raises(ConfigError, match=r"the trainer has taken 2 steps, of which .*/b holds no checkpoint"):
        fit(started, tmp_path / "b")
    assert not (tmp_path / "b" / "config.json").exists()
    assert fit(run[1], run[0]).resumed == 8  # its own directory


def in_shards(rank, folder):
    """A log line of a run in shards, whose FLOPs are counted on a copy of the network."""
    from multistage_diffusion.config import EngineConfig

    torch.set_num_threads(1)
    with join(torch.device("cpu"), 1.0) as processes:
        denoiser = Denoiser(Plain(), "vp", shape=tiny.SHAPE)
        sharded = Trainer(denoiser, tiny.images(), TRAINING, EngineConfig(parallel="fsdp"), processes=processes)
        return fit(sharded, folder).training_flops


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise):
        return self.only(x)


@pytest.mark.slow
def test_a_users_network_trains_in_shards_and_its_flops_are_counted(tmp_path):
    first, second = ranks.run(in_shards, tmp_path / "ranks", tmp_path / "run")
    assert first == second > 0
