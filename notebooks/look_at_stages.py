# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Look at stages
# Where do your noise levels fall apart into stages, and what would each cost? Nothing is trained here.

# %%
import matplotlib.pyplot as plt

import multistage_diffusion as msd
from multistage_diffusion.clustering.plots import similarity_figure, strip_figure

data = msd.load_data("digits")  # or folder:PHOTOS, or an array of (n, channels, height, width)

# %% [markdown]
# ## The best denoiser that the images allow
# Above, images with more and more noise; below each, what the best possible denoiser makes of it. At low noise it
# names the one image that it was, at high noise it gives the mean of all, and in between it changes with every
# level.

# %%
clustering = msd.cluster(data, msd.VP(), stages=3)
strip_figure(data.floats(), clustering.stages, msd.VP(), rows=3)

# %% [markdown]
# ## Where it behaves alike
# Thin: how often the denoiser agrees with its limit at an end. Bold: the mean from that end. The edges are where the
# bold curves fall below alpha; grey are their 95 % intervals.

# %%
print(clustering.stages)
similarity_figure(clustering)

# %% [markdown]
# ## How often a stage is trained
# Edges are noise levels, so they can be compared between processes. How often a process draws a stage differs
# widely: EDM hardly visits the highest one.

# %%
for process in (msd.VP(), msd.EDM(), msd.Flow()):
    found = msd.cluster(data, process, stages=3).stages
    shares = ", ".join(f"{share:.1%}" for share in found.shares(process))
    print(f"{process.kind}: edges at sigma {', '.join(f'{edge:.3g}' for edge in found.edges)}; training draws {shares}")
found.plot(process)

# %% [markdown]
# ## How many?
# For other numbers than three one dynamic programme finds the exact optimum. The elbow shows what each added stage
# buys.

# %%
similarity_figure(msd.cluster(data, msd.VP(), stages=4))

# %% [markdown]
# ## What a stage costs
# Parameters and FLOPs are counted without computing anything. A narrow decoder pays where it is drawn often.

# %%
unified = msd.recipe("digits", "unified").model
figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
for widths in ((28, 20, 12), (32, 32, 32), (20, 20, 20)):
    model = msd.recipe("digits").model.with_capacities(widths)
    cost, shares = msd.network_cost(model, data.shape), clustering.stages.shares(msd.VP())
    mean = sum(part.flops * share for part, share in zip(cost.stages, shares, strict=True)) / 1e6
    label = f"{widths}: {mean:.1f} MFLOPs an image in training, {cost.parameters / 1e3:.0f} k parameters"
    axes.plot(range(3), [part.flops / 1e6 for part in cost.stages], "o-", label=label)
axes.axhline(msd.network_cost(unified, data.shape).stages[0].flops / 1e6, color="grey", ls="--", label="unified")
axes.set(xticks=range(3), xlabel="stage, low to high noise", ylabel="MFLOPs an image", ylim=(0, None))
axes.legend(fontsize="small")
