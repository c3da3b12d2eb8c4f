# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A first model in five minutes
# Digits of 8x8 pixels, on a CPU. While it trains, the loss of each stage is drawn, and images from the weights so far.

# %%
from dataclasses import replace

from IPython.display import Image, clear_output, display

import multistage_diffusion as msd
from multistage_diffusion.data.pictures import grid

STEPS = 700

# %% [markdown]
# ## The data decides where stages lie
# Over a finite training set the best possible denoiser is known. Where it behaves alike, noise levels belong together.

# %%
config = msd.recipe("digits")
clustering = msd.cluster(msd.load_data("digits"), config.process, stages=3)
stages = clustering.stages
display(stages, stages.plot(config.process))

# %% [markdown]
# ## Train, and look on
# A callback is any object with `on_log`. A record is a line of the run's `metrics.jsonl`, or a grid of samples.


# %%
class LookOn:
    """Each grid of samples, under the losses so far."""

    def on_log(self, record: msd.LogRecord) -> None:
        """Draw, where the record is a grid."""
        if record.picture is not None:
            clear_output(wait=True)
            display(msd.Run.open("runs/first").plot(), Image(str(record.picture)))


config = replace(
    config,
    stages=replace(config.stages, edges=stages.edges),
    training=replace(config.training, steps=STEPS),
    logging=msd.LoggingConfig(grid_every=STEPS // 4, grid_images=16),
)
run = msd.Run.open(msd.train(config, "runs/first", stages=stages, callbacks=[LookOn()]).run)
display(run, run.plot())

# %% [markdown]
# ## Draw, and measure by noise level

# %%
denoiser = run.load().denoiser
display(denoiser, grid(msd.sample(denoiser, 32).images, columns=8, scale=8, smooth=True))
result = msd.evaluate(denoiser, msd.load_data("digits", split="test"))
for part in result.sigma_loss:
    print(f"sigma {part['low']:.3g} to {part['high'] or float('inf'):.3g}: {part['loss']:.3f} ± {part['error']:.3f}")
