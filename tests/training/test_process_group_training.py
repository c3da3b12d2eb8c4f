"""Several processes compute what one does: weights, averages, figures, whatever the way and the number of parts."""

from dataclasses import replace

import pytest
import torch

import ranks
import tiny
from multistage_diffusion.config import EngineConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.process_group import ProcessGroup, join
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import Batches
from multistage_diffusion.training.distributed import gather
from multistage_diffusion.training.run import build_trainer
from runs import tensors

CASES = [("ddp", "mixed", 1), ("ddp", "single-uniform", 2), ("fsdp", "mixed", 2), ("fsdp", "single-uniform", 1)]
MORE = [
    (kind, batches, accumulation)
    for kind in ("ddp", "fsdp")
    for batches in ("mixed", "single-uniform")
    for accumulation in (1, 2, 3)
]


def configuration(batches="mixed", *, dropout=0.3, batch_size=7, **engine):
    """AdamW, dropout, and batches of 7 in which the middle stage has one image, and each process not as many."""
    model = replace(tiny.SMALLEST, dropout=dropout)
    config = tiny.run_config(
        model,
        batches=batches,
        batch_size=batch_size,
        weight_decay=0.1,
        steps=6,
        learning_rate=1e-4,
        warmup_images=0,
        log_every=2,
    )
    return replace(config, engine=EngineConfig(**engine))


def trained(config, processes=None, steps=6):
    """Six steps from weights random everywhere: fresh ones end in zeros, whose gradients are rounding noise."""
    trainer = (
        build_trainer(config, tiny.images())
        if processes is None
        else build_trainer(config, tiny.images(), processes=processes)
    )
    start = tiny.randomise(build_trainer(config, tiny.images()).denoiser.network).state_dict()
    put_all(trainer.denoiser.network.state_dict(), start)
    results = list(trainer.run(steps))
    return {
        "weights": gather(trainer.denoiser.network.state_dict()),
        "average": gather(trainer.ema.average),
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "stages": [[-1.0 if loss is None else loss for loss in result.stage_loss] for result in results],
        "clipped": [result.clipped for result in results],
        "start": start,
    }


def put_all(targets, values):
    from multistage_diffusion.training.distributed import put

    for name, target in targets.items():
        put(target, values[name])


def compare(rank, cases):
    with join(torch.device("cpu"), 1.0) as processes:
        found = [
            trained(configuration(b, parallel=kind, gradient_accumulation=parts), processes) for kind, b, parts in cases
        ]
    return found if rank == 0 else None


def same(found, alone):
    for part in ("weights", "average"):
        torch.testing.assert_close(determined(found[part]), determined(alone[part]), atol=1e-5, rtol=0)
    for part in ("losses", "norms", "stages"):
        torch.testing.assert_close(torch.tensor(found[part]), torch.tensor(alone[part]), atol=1e-6, rtol=1e-5)


def determined(weights):
    """All but the biases of attention's keys: a softmax does not see them, so Adam makes steps of their rounding."""
    found = dict(weights)
    for name in found:
        if name.endswith("qkv.bias"):
            query, _, value = found[name].chunk(3)
            found[name] = torch.cat((query, value))
    return found


@pytest.fixture(scope="module")
def alone():
    return {batches: trained(configuration(batches)) for batches in ("mixed", "single-uniform")}


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone, tmp_path):
    found, _ = ranks.run(compare, tmp_path, CASES)
    for (_, batches, _), result in zip(CASES, found, strict=True):
        same(result, alone[batches])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_and_parts_trains_as_one_does(size, alone, tmp_path):
    cases = [case for case in MORE if size * case[2] <= 7]
    found = ranks.run(compare, tmp_path, cases, size=size, seconds=600)[0]
    for (_, batches, _), result in zip(cases, found, strict=True):
        same(result, alone[batches])


@pytest.mark.parametrize("batches", ["mixed", "single-uniform"])
def test_parts_one_after_the_other_train_as_the_whole_does(batches, alone):
    for parts in (2, 7):
        same(trained(configuration(batches, gradient_accumulation=parts)), alone[batches])


def one_stage_only(rank, kind, steps):
    """A run of single-stage batches, in as many steps as leave a decoder unused."""
    with join(torch.device("cpu"), 1.0) as processes:
        return trained(configuration("single-uniform", parallel=kind), processes, steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_decoder_that_no_process_used_does_not_move(kind, tmp_path):
    config = configuration("single-uniform")
    batches = build_trainer(config, tiny.images()).batches
    used = {max(range(3), key=lambda stage: batches(step).counts[stage]) for step in range(2)}
    unused = set(range(3)) - used
    assert unused
    found = ranks.run(one_stage_only, tmp_path, kind, 2)
    for result in found:
        for name, tensor in result["weights"].items():
            still = any(name.startswith(f"decoders.{stage}.") for stage in unused)
            assert torch.equal(tensor, result["start"][name]) == still, name
    assert tiny.bits_equal(found[0]["weights"], found[1]["weights"])


# Parts of a batch


def batches_of(batch_size=9, data=None, **training):
    config = tiny.run_config(batch_size=batch_size, **training).training
    return Batches(
        data or tiny.images(labels=True), tiny.run_config().process, Stages(tiny.EDGES), config,
        flip=True, augment_probability=0.3, classes=3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mixed", "single-p"])
@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_the_parts_of_a_batch_are_its_rows(kind, parts):
    batches = batches_of(batches=kind)
    for step in range(3):
        whole = batches(step)
        rows = {index: row for row, index in enumerate(whole.index.tolist())}
        seen = []
        for part in range(parts):
            own = batches(step, part, parts)
            assert own.batch_counts == whole.counts and sum(own.counts) == len(own.images)
            assert [count > 0 for count in own.counts] == [count > 0 for count in whole.counts]  # the same decoders
            places = [rows[index] for index in own.index.tolist()]
            for name in ("noise", "sigma", "labels"):
                assert torch.equal(getattr(own, name), getattr(whole, name)[places])
            torch.testing.assert_close(own.images, whole.images[places], atol=1e-6, rtol=0)  # turned ones round
            real = torch.tensor(own.counted).repeat_interleave(torch.tensor(own.counts))
            assert torch.equal(own.weight, whole.weight[places] * real)
            seen += [place for place, counts in zip(places, real.tolist(), strict=True) if counts]
            assert 0 <= len(own.images) - 9 // parts <= 3  # one row more at most, and what fills up three stages
        assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_image_is_seen_once_in_an_epoch_by_whichever_process(parts):
    data = tiny.images(10, labels=True)
    batches = batches_of(4, data, quotas=(1.0, 1.0, 1.0))
    picked = [int(i) for step in range(5) for i in batches._pick(step, 0, 1)]
    seen = []
    for step in range(5):  # two epochs of two and a half batches
        for part in range(parts):
            own = batches(step, part, parts)
            real = torch.tensor(own.counted).repeat_interleave(torch.tensor(own.counts))
            seen += [picked[index] for index in own.index[real].tolist()]
    assert sorted(seen) == sorted(list(range(10)) * 2)
    assert sorted(picked[:10]) == sorted(picked[10:]) == list(range(10))


def test_a_batch_with_fewer_images_than_parts_is_refused():
    with pytest.raises(ConfigError, match=r"batch-size 7 is less than 8, one image for each of 4 processes") as caught:
        build_trainer(configuration(gradient_accumulation=2), tiny.images(), processes=ProcessGroup(0, 4))
    assert "\n" not in str(caught.value)


# Resuming with another number of processes


def continued(rank, out, **engine):
    import warnings

    from multistage_diffusion.training.run import train

    config = replace(tiny.run_config(tiny.SMALLEST, sigma_rel=(0.1,)), engine=EngineConfig(**engine))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        summary = train(config, out, data=tiny.images())
    return summary.resumed, summary.loss, [str(warning.message) for warning in said if warning.category is UserWarning]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(kind, tmp_path):
    from runs import train_until

    config = tiny.run_config(tiny.SMALLEST, sigma_rel=(0.1,))
    continued(0, tmp_path / "whole")
    train_until(5, tmp_path / "run", config)
    found = ranks.run(continued_in_two_lives, tmp_path / "ranks", tmp_path / "run", kind)
    assert [result[0] for result in found] == [3, 3]
    assert found[0][1] == found[1][1]
    assert any("engine.processes 1 and is continued with 2: equal up to rounding" in text for text in found[0][2])
    assert found[1][2] == []
    resumed, _, said = continued(0, tmp_path / "run")
    assert resumed == 6 and any("engine.processes 2 and is continued with 1" in text for text in said)
    assert any("engine.parallel fsdp" in text for text in said) == (kind == "fsdp")
    torch.testing.assert_close(tensors(tmp_path / "run"), tensors(tmp_path / "whole"), atol=1e-5, rtol=1e-4)


def continued_in_two_lives(rank, out, kind):
    """To step 8 and its last checkpoint gone, so that there is something left to do for one process."""
    import shutil

    found = continued(rank, out, parallel=kind)
    if rank == 0:
        shutil.rmtree(out / "checkpoints" / "step-00000008")
    return list(found)
