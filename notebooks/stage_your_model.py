# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Stage your diffusers model
# A `UNet2DModel` that is trained already gets a decoder for each stage of noise levels, is trained on in your own
# loop, and goes back into its pipeline. Digits and a small network here; put your model and your images in their
# place.

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import multistage_diffusion as msd

STEPS = 300

# %% [markdown]
# ## Your model
# Yours comes from `UNet2DModel.from_pretrained(...)`. This one is trained for a minute, by the plain loop.

# %%
torch.manual_seed(0)
data = msd.load_data("digits")
images = data.floats()  # (n, 1, 8, 8) in [-1, 1]
scheduler = DDPMScheduler()
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def train(network, optimizer, steps):
    """The loop of diffusers' example: nothing in it knows of stages."""
    for step in range(steps):
        batch = images[torch.randint(len(images), (64,))]
        noise, timesteps = torch.randn_like(batch), torch.randint(1000, (len(batch),))
        loss = (network(scheduler.add_noise(batch, noise, timesteps), timesteps).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")


train(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3), STEPS)

# %% [markdown]
# ## Where do stages lie?
# The images decide, by the best denoiser that they allow; the network is not asked.

# %%
clustering = msd.cluster(data, msd.LDM(), stages=3)
print(clustering.stages)
clustering.stages.plot(msd.LDM())

# %% [markdown]
# ## A decoder for each stage
# `own` names what is copied. The staged network is a `UNet2DModel` and at first gives the outputs that it gave
# before.

# %%
decoder = ["up_blocks", "conv_norm_out", "conv_out"]
staged = msd.stage_module(unet, own=decoder, stages=clustering.stages, process=scheduler)
x, t = torch.randn(4, 1, 8, 8), torch.tensor([5, 300, 600, 990])
print(isinstance(staged, UNet2DModel), "stages of these timesteps:", staged.stage_of(t).tolist())
with torch.no_grad():
    print("largest change of an output:", (staged(x, t).sample - unet(x, t).sample).abs().max().item())

# %% [markdown]
# ## Train both on, equally long
# Learning rates by part: the encoder slowly, each decoder at its own pace.

# %%
groups = staged.parameter_groups(shared=2e-4, stages=[1e-3, 1e-3, 1e-3])
train(staged, torch.optim.AdamW(groups), STEPS)
train(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3), STEPS)

# %% [markdown]
# ## Which is better, where?
# The same held-out images, noise and timesteps for both: so their difference is known better than either loss. At
# this length it may go either way; what this shows is where.

# %%
test = msd.load_data("digits", split="test").floats()
noise, steps = torch.randn_like(test), torch.arange(25, 1000, 50)
change, error = [], []
with torch.no_grad():
    for step in steps:
        timesteps = step.expand(len(test))
        noisy = scheduler.add_noise(test, noise, timesteps)
        before, after = ((net(noisy, timesteps).sample - noise).square().mean((1, 2, 3)) for net in (unet, staged))
        change.append((after.mean() / before.mean() - 1).item() * 100)
        error.append((after - before).std().item() / len(test) ** 0.5 / before.mean().item() * 100)
figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
axes.axhline(0, color="grey", lw=0.8)
axes.errorbar(steps, change, error, marker="o", ms=3, lw=1, capsize=2)
for edge in msd.LDM().t(torch.tensor(clustering.stages.edges)).tolist():
    axes.axvline(edge, color="grey", ls=":")
axes.set(xlabel="timestep", ylabel="loss, staged against not (%)")

# %% [markdown]
# ## Back into the pipeline

# %%
pipeline = DDPMPipeline(staged.eval(), scheduler)
pipeline.set_progress_bar_config(disable=True)
pictures = pipeline(batch_size=8, num_inference_steps=50, output_type="np").images
figure, grid = plt.subplots(1, 8, figsize=(8, 1.2))
for axes, picture in zip(grid, pictures, strict=True):
    axes.imshow(picture[..., 0], cmap="gray", interpolation="nearest")
    axes.axis("off")
pipeline.save_pretrained("pipeline")
again = msd.load_staged("pipeline/unet", unet)  # the class comes from you; nothing that a file names is imported
print(sum(p.numel() for p in again.parameters()), "parameters")
print("MFLOPs of an image, by stage:", [round(flops / 1e6, 1) for flops in staged.flops(x[:1], 5)])
