"""Train a multistage model on a folder of your own images, and draw from it.

python examples/own_images.py PATH_TO_IMAGES
"""

import sys
from dataclasses import replace

import multistage_diffusion as msd
from multistage_diffusion.training.trainer import StepResult


def main(folder: str, out: str = "runs/own-images", steps: int = 2_000) -> None:
    data = msd.load_data(f"folder:{folder}", resolution=32)
    print(f"{len(data)} images of {data.shape}; skipped: {len(data.skipped)}")

    base = msd.recipe("fashion-mnist")
    found = msd.cluster(data, base.process)
    print("stages at sigma", found.stages.edges)

    config = replace(
        base,
        data=replace(base.data, source=f"folder:{folder}", resolution=32, flip=True),
        stages=replace(base.stages, edges=found.stages.edges),
        model=replace(base.model, attention=(8,)),
        training=replace(base.training, steps=steps),
    )
    run = msd.train(config, out, data=data, stages=found.stages, on_step=report).run
    samples = msd.sample(msd.load_run(run).denoiser, 16, solver="dpmpp-2m", steps=20)
    print(f"drew {tuple(samples.images.shape)} with {samples.nfe} network calls each")


def report(result: StepResult, steps: int) -> None:
    if result.step % 50 == 0:
        print(f"step {result.step}/{steps}: loss {result.loss:.4f}, by stage {result.stage_loss}")


if __name__ == "__main__":
    main(sys.argv[1])
