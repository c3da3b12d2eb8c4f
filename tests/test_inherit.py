"""Starting from a trained network: equal decoders to the bit, others by rules that small cases show."""

from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.backbones import UNet
from multistage_diffusion.backbones.layers import Attention, ResidualBlock
from multistage_diffusion.backbones.resize import Channels, Plan, _attention, _block, choose
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.inherit import branch, inherit, inheritance
from multistage_diffusion.noise import EDM, VP
from multistage_diffusion.stages import Stages

TRUNK = tiny.architecture("unified")
SIGMA = torch.tensor([0.1, 1.5, 20.0])


def noisy(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, *tiny.SHAPE, generator=torch.Generator().manual_seed(seed))


def test_a_branched_network_is_its_trunk_to_the_bit():
    trunk = tiny.denoiser(TRUNK)
    staged = branch(trunk, Stages(tiny.EDGES))
    assert staged.network.stages == 3 and len(staged.network.encoders) == 1
    with torch.no_grad():
        for row, sigma in enumerate(SIGMA.tolist()):
            x = noisy()[row : row + 1]
            assert torch.equal(staged(x, sigma), trunk(x, sigma))
        # In a batch of several stages, convolutions may sum in another order.
        torch.testing.assert_close(staged(noisy(), SIGMA), trunk(noisy(), SIGMA), rtol=1e-4, atol=2e-5)
    decoders = [decoder.state_dict() for decoder in staged.network.decoders]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(decoders[0].values(), decoders[1].values(), strict=True))


def test_separate_networks_start_from_the_trunk_too():
    trunk = tiny.denoiser(TRUNK)
    model = replace(TRUNK, architecture="separate", decoder_widths=(8, 8, 8))
    staged = Denoiser.from_backbone(model, VP(), tiny.SHAPE, Stages(tiny.EDGES))
    inherit(staged, trunk)
    with torch.no_grad():
        torch.testing.assert_close(staged.eval()(noisy(), SIGMA), trunk(noisy(), SIGMA), rtol=1e-4, atol=2e-5)


def test_the_trained_stage_with_the_largest_share_is_taken():
    trained = tiny.denoiser(replace(tiny.MODEL, decoder_widths=(8, 8)), "vp")  # its edge is 0.6
    target = tiny.denoiser(replace(tiny.MODEL, decoder_widths=(8, 8, 8)), "vp")
    target.stages = Stages((0.5, 0.7))
    assert inheritance(target, trained).stages == (0, 0, 1) or inheritance(target, trained).stages == (0, 1, 1)
    target.stages = Stages((0.1, 0.5))
    assert inheritance(target, trained).stages == (0, 0, 1)


def test_the_strongest_groups_and_in_them_the_strongest_channels_are_kept():
    strength = torch.tensor([1.0, 2, 9, 9, 5, 6, 0, 0])  # groups of two: 3, 18, 11, 0
    assert choose(strength, 4, 4, 2).trained.tolist() == [2, 3, 4, 5]
    assert choose(strength, 4, 4, 4).trained.tolist() == [1, 2, 5, 6]
    assert choose(strength, 8, 4, 4).trained.tolist() == list(range(8))
    assert choose(strength, 16, 4, 8).trained.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7]
    assert choose(strength, 16, 4, 4).trained.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7]


def test_copies_share_the_weights_of_what_reads_them():
    channels = Channels(torch.tensor([0, 1, 0, 0]), 2)
    factors = channels.divided(5)
    torch.testing.assert_close(factors[:, [0, 2, 3]].sum(dim=1), torch.ones(5))
    torch.testing.assert_close(factors[:, 1], torch.ones(5))
    assert (factors > 0).all() and factors[:, 0].unique().numel() == 5  # copies get gradients of their own


def filled(plan: Plan, name: str, trained: torch.nn.Module, target: torch.nn.Module) -> None:
    state = {f"{name}.{key}": value for key, value in trained.state_dict().items()}
    target.load_state_dict({key.removeprefix(f"{name}."): entry.weight(state.get(key)) for key, entry in plan.items()})


@pytest.mark.parametrize("head_channels", [None, 4])
def test_widened_blocks_and_attention_keep_their_function(head_channels):
    options = {"attention": True, "head_channels": head_channels, "groups": 16, "eps": 1e-6}
    trained = tiny.randomise(ResidualBlock(8, 8, 6, **options))
    target = ResidualBlock(16, 16, 6, **options)
    inputs = choose(torch.ones(8), 16, 2, 4)  # two groups of four become four
    plan: Plan = {}
    outputs = _block(plan, "block", trained, target, inputs)
    filled(plan, "block", trained, target)
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    with torch.no_grad():
        expected, given = trained(x, embedding), target(x[:, inputs.trained], embedding)
    torch.testing.assert_close(given, expected[:, outputs.trained], rtol=1e-4, atol=1e-5)


def test_a_narrowed_attention_keeps_the_logits_of_what_is_left():
    trained, target = tiny.randomise(Attention(16, groups=4)), Attention(8, groups=2)
    channels, plan = Channels(torch.arange(8), 16), Plan()
    _attention(plan, "a", trained, target, channels)
    filled(plan, "a", trained, target)
    kept = plan["a.out.weight"].columns
    assert kept is not None
    q, k = (trained.qkv.weight[part * 16 + kept.trained][:, :8, 0, 0] for part in (0, 1))
    x = torch.randn(8)
    expected = (q @ x) @ (k @ x) / 16**0.5
    new_q, new_k = (target.qkv.weight[part * 8 : part * 8 + 8, :, 0, 0] for part in (0, 1))
    torch.testing.assert_close((new_q @ x) @ (new_k @ x) / 8**0.5, expected)


@pytest.mark.parametrize(
    "model",
    [
        UNet(width=16, decoder_widths=(16,), multipliers=(1, 2), blocks=1, attention=(4,), architecture="unified"),
        UNet(
            width=16, multipliers=(1, 2), blocks=1, attention=(4, 8), architecture="unified", middle="decoder",
            head_channels=8, resampling="conv", decoder_attention="all",
        ),
        UNet(width=16, multipliers=(1, 2), blocks=1, attention=(), architecture="unified", filter="fir", groups=4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("widths", [(8, 16), (16, 32), (24, 8)])
def test_decoders_of_every_kind_and_width_start_near_their_trunk(model, widths):
    trunk = tiny.denoiser(model)
    staged = branch(trunk, Stages((1.0,)), widths)
    kinds = inheritance(staged, trunk).kinds
    assert kinds == tuple("copied" if w == 16 else "narrowed" if w < 16 else "widened" for w in widths)
    with torch.no_grad():
        expected, given = trunk(noisy(), SIGMA), staged(noisy(), SIGMA)
        fresh = Denoiser.from_backbone(staged.backbone, VP(), tiny.SHAPE, Stages((1.0,))).eval()(noisy(), SIGMA)
    same = [row for row, sigma in enumerate(SIGMA) if widths[int(sigma >= 1.0)] == 16]
    torch.testing.assert_close(given[same], expected[same], rtol=1e-4, atol=1e-5)
    assert given.isfinite().all() and not torch.equal(given, fresh)


def test_what_does_not_fit_is_named_and_nothing_is_changed():
    trunk = tiny.denoiser(TRUNK)
    for changes, words in (
        ({"width": 12}, "width 8 there and 12 here"),
        ({"groups": 4, "skip_scale": 1.0}, "skip-scale .* there and 1.0 here, groups 16 there and 4 here"),
        ({"classes": 3}, "has 0 classes, and the network is to have 3; set --model.classes 0"),
    ):
        target = tiny.denoiser(replace(tiny.MODEL, **changes))
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(ConfigError, match=words) as caught:
            inherit(target, trunk, "runs/trunk")
        assert "\n" not in str(caught.value)
        assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    with pytest.raises(ConfigError, match="another process: VP there and EDM here"):
        inherit(tiny.denoiser(tiny.MODEL, "edm"), trunk)
    inherit(tiny.denoiser(tiny.MODEL, EDM(p_mean=0.0)), tiny.denoiser(TRUNK, "edm"))  # other noise levels are trained
    with pytest.raises(ConfigError, match="given as an object"):
        branch(Denoiser(torch.nn.Conv2d(1, 1, 1), "vp", shape=tiny.SHAPE), Stages((1.0,)))
