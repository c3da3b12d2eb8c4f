"""`msd train`: train a model; the same command again resumes."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro
from rich.console import Console

from multistage_diffusion.cli import parse as parse_words
from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.cli.values import Values, combinations, read_values, start, with_command
from multistage_diffusion.config import Architecture, RunConfig, check, from_dict, to_dict
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.noise import process_by_kind
from multistage_diffusion.recipes import RECIPES, recipe

# Options that --help shows; --help-all shows the others.
COMMON = (
    "out", "config", "resume", "init", "stages", "training.steps", "training.batch_size", "training.learning_rate",
    "model.architecture", "model.classes", "logging.grid_every", "device", "dry_run",
)  # fmt: skip
# Options that change the defaults of others.
_FIRST = ("--config", "--init", "--resume", "--model.architecture", "--model.backbone", "--process.kind", "--stages")

if TYPE_CHECKING:
    from multistage_diffusion.stages import Stages
    from multistage_diffusion.training.callbacks import LogRecord
    from multistage_diffusion.training.initial import Initial
    from multistage_diffusion.training.trainer import StepResult


@dataclass(frozen=True, kw_only=True)
class Options(Compute):
    """Train a model in a run directory; the same command again resumes where it stopped.

    example: msd train digits --out runs/digits --training.steps 2000
    """

    recipe: tyro.conf.Positional[str]
    """Recipe to start from; it comes first, unless --config names one."""
    out: str | None = None
    """Run directory; needed for all but --dry-run and --profile."""
    config: str | None = None
    """JSON, TOML or YAML file with values that replace the recipe's, like the config.json of another run. It may hold
    the whole command (recipe, out, device) and lists to sweep."""
    stages: str | None = None
    """File from msd cluster; sets stages.edges, and model.decoder-widths where the file has them."""
    resume: str | None = None
    """Run directory to go on with, in place of a recipe and --out: msd train --resume RUN --training.steps 60."""
    init: str | None = None
    """Trained model to start from: a run, a saved model, a folder of diffusers (they set --model and --process), or a
    .safetensors file of the recipe's network."""
    init_names: str | None = None
    """JSON file that maps names of weights in --init's file, or their beginnings, to those of the network."""
    data_root: str | None = None
    """Folder that holds the source's files; sets data.root."""
    dry_run: bool = False
    """Print the whole resolved configuration and stop."""
    profile: bool = False
    """Train for a few steps, print where their time goes, and write no run."""
    profile_steps: int = 20
    """Steps that --profile measures."""
    profile_trace: str | None = None
    """File for --profile's trace, to be opened in chrome://tracing or ui.perfetto.dev."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    values: tyro.conf.Suppress[Values | None] = None


def parse(arguments: Sequence[str]) -> Options:
    """Parse the words after `msd train`: the recipe gives the defaults of all other options.

    Raises:
        ConfigError: No recipe, or a wrong option.
    """
    wants_help = any(word in ("-h", "--help", "--help-all") for word in arguments)
    words = dict(_values(arguments))
    if "--resume" in words and not wants_help:
        return _resume(words, arguments)
    file = read_values(words["--config"]) if "--config" in words else None
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None:
        name = "digits" if wants_help else file.command.get("recipe") if file is not None else None
        arguments = [name or "config", *arguments]
        if file is None and name is None:
            raise ConfigError(
                f"msd train needs a recipe as its first word: {', '.join(RECIPES)}; or --config FILE, or --resume RUN"
            )
    values = dict(_values(arguments))  # again: help shows the options of a recipe
    base = _base(name, values, file)
    default = Options(recipe=arguments[0], run=base)
    if file is not None:
        given = {word.partition("=")[0] for word in arguments}
        default = replace(with_command(default, file, given), values=file)
        for option in file.sweep:
            if (word := f"--{option.replace('_', '-')}") in given:
                raise ConfigError(f"{word} is swept by {file.file}; leave it out here or there")
    return parse_words(Options, "train", arguments, default, COMMON)


def _base(name: str | None, values: dict[str, str], file: Values | None) -> RunConfig:
    """The recipe with the file's values, and what those options say that change the defaults of others."""
    if name is None:
        assert file is not None
        base = start(file, "msd train")
    else:
        base = recipe(name, _architecture(values, file))
    if file is not None:
        base = file.merge(base)
    if "--process.kind" in values and not base.process.is_kind({"kind": values["--process.kind"]}):
        base = replace(base, process=process_by_kind(values["--process.kind"]))
    if "--model.backbone" in values:
        base = replace(base, model=base.model.of_kind(values["--model.backbone"], len(base.stages.edges) + 1))
    if "--stages" in values:
        base = _with_stages(base, values["--stages"])
    if "--init" in values and not values["--init"].endswith(".safetensors"):
        from multistage_diffusion.interop.initial import load_initial, start_from

        base = start_from(base, load_initial(values["--init"]))
    return base


def _resume(values: dict[str, str], arguments: Sequence[str]) -> Options:
    """The options of a run as it is, with those changed that the words change."""
    from multistage_diffusion.runs import Run

    folder = values["--resume"]
    for option in set(values) & {"--config", "--init", "--stages"} | {word for word in arguments if word == "--out"}:
        raise ConfigError(f"--resume takes everything from the run; leave {option} out")
    if not arguments[0].startswith("-"):
        raise ConfigError(f"--resume takes the recipe from the run; leave {arguments[0]} out")
    default = Options(recipe="resume", out=folder, run=Run.open(folder).config)
    return parse_words(Options, "train", ["resume", *arguments], default)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Train.

    Args:
        options: The command's options.
        console: Where people read.

    Returns:
        The command's document.
    """
    config = options.run
    if options.data_root is not None:
        config = replace(config, data=replace(config.data, root=options.data_root))
    if options.values is not None and options.values.sweep:
        return _sweep(config, options, console)
    stages = None
    if options.stages is not None:
        from multistage_diffusion.stages import Stages

        stages = Stages.load(Path(options.stages))
        process = stages.provenance.get("process")
        if isinstance(process, dict) and not config.process.is_kind(process):
            console.print(
                f"warning: {options.stages} was made for the process {process['kind']}; the run's is "
                f"{config.process.kind}"
            )
    if options.dry_run:
        document = to_dict(config)
        if not options.json:
            console.print_json(json.dumps(document))
        return document
    if options.profile:
        return _profile(config, options, console)
    if options.out is None:
        raise ConfigError(f"--out is needed: where to keep the run, like --out runs/{options.recipe}")
    return _train(config, options, options.out, stages, console)


def _train(config: RunConfig, options: Options, out: str, stages: Stages | None, console: Console) -> dict[str, Any]:
    """Train one run in a folder."""
    device = prepare(options)
    if config.model.architecture == "unified" and (reason := _why_not_standard(config)):
        console.print(f"msd convert will make a MultistagePipeline of it, not a standard one of diffusers: {reason}")

    from multistage_diffusion.cli.progress import encoding_progress, training_progress
    from multistage_diffusion.training.run import train
    from multistage_diffusion.training.schedule import usual_rates

    rate, usual = config.training.learning_rate, usual_rates(config.model, config.training)
    if usual is not None and options.init is None and not usual[0] <= rate <= usual[1]:
        console.print(
            f"warning: training.learning-rate {rate:g} is far from what serves U-Nets of width "
            f"{config.model.capacity}, {4 * usual[0]:.2g} to {usual[1] / 4:.2g} (docs/training.md)"
        )

    with training_progress(console, config.training, device=device) as progress:

        def on_step(result: StepResult, steps: int) -> None:
            progress(result, steps)

        summary = train(
            config,
            out,
            stages=stages,
            initial=_initial(options),
            device=device,
            callbacks=(_InitialLoss(console),),
            on_step=on_step,
            on_encode=encoding_progress(console),
        )
    if summary.resumed == summary.step:
        console.print(f"{summary.run} has all {summary.step} steps already")
    else:
        resumed = f", resumed at step {summary.resumed}" if summary.resumed else ""
        console.print(
            f"trained {summary.run} to step {summary.step} ({summary.images} images, "
            f"{summary.training_flops / 1e15:.3g} PFLOPs) in {summary.seconds:.0f} s{resumed}"
        )
    return {
        "run": str(summary.run),
        "step": summary.step,
        "images": summary.images,
        "loss": summary.loss,
        "resumed": summary.resumed,
        "training_pflops": summary.training_flops / 1e15,
        "seconds": round(summary.seconds, 3),
    }


def _sweep(config: RunConfig, options: Options, console: Console) -> dict[str, Any]:
    """Train every combination of the file's lists, in folders below --out."""
    from multistage_diffusion.cli.sweep import planned, sweep

    assert options.values is not None
    if options.profile:
        raise ConfigError(f"--profile measures one run, and {options.values.file} sweeps; leave its sweep out")
    runs = combinations(config, options.values.sweep, options.values.file)
    if options.dry_run:
        return planned(runs, console)
    if options.out is None:
        raise ConfigError("--out is needed: the folder of the sweep's runs, like --out runs/sweep")
    check(options.stages is None, "--stages", "left out in a sweep; write the file's edges into stages.edges", "a file")
    return sweep(
        runs,
        Path(options.out),
        lambda config, out: _train(config, options, out, None, console),
        console,
        prepare(options),
    )


def _initial(options: Options) -> Initial | Callable[[tuple[int, int, int]], Initial] | None:
    """What to start from; a plain file of weights is read when the shape of the images is known."""
    check(options.init is not None or options.init_names is None, "init-names", "used with --init", options.init_names)
    if options.init is None:
        return None

    from multistage_diffusion.interop.initial import load_initial, load_state
    from multistage_diffusion.training.initial import Initial

    source, names = options.init, options.init_names
    if source.endswith(".safetensors"):
        return lambda shape: Initial(load_state(source, options.run, shape, names), source)
    check(names is None, "init-names", "used with a .safetensors file", names)
    return Initial(load_initial(source), source)


@dataclass(frozen=True)
class _InitialLoss:
    """Prints the loss right after the start beside that of the trained model."""

    console: Console

    def on_log(self, record: LogRecord) -> None:
        """Look for the two losses."""
        scalars = record.scalars
        if "initial/loss" in scalars:
            self.console.print(
                f"starts at the loss {scalars['initial/loss']:.4f}; the trained model has "
                f"{scalars['initial/trained_loss']:.4f} on the same training images"
            )


def _why_not_standard(config: RunConfig) -> str | None:
    """Why the run's model becomes no standard pipeline of diffusers, as far as it is known before the data are read."""
    from multistage_diffusion.interop.export import why_not_standard

    resolution = config.data.resolution or 64
    with contextlib.suppress(ConfigError):  # of images that the network cannot take, which the run itself refuses
        return why_not_standard(config.model, config.process, (3, resolution, resolution), latent=False)
    return None


def _profile(config: RunConfig, options: Options, console: Console) -> dict[str, Any]:
    """Print where a step's time goes."""
    check(options.profile_steps >= 1, "profile-steps", "at least 1", options.profile_steps)
    device = prepare(options)

    from rich.table import Table

    from multistage_diffusion.cli.progress import encoding_progress
    from multistage_diffusion.data.latents import load_examples
    from multistage_diffusion.process_group import join
    from multistage_diffusion.training.profile import profile
    from multistage_diffusion.training.run import build_trainer

    data = load_examples(config.data, device, encoding_progress(console))
    with join(device, config.engine.timeout) as processes:
        trainer = build_trainer(config, data, device=device, processes=processes)
        trace = Path(options.profile_trace) if options.profile_trace and processes.is_main else None
        step = profile(trainer, steps=options.profile_steps, trace=trace)
    on_gpu = step.gpu_memory_gib is not None
    table = Table("part of a step", box=None)
    for name in ("ms", "share", *(("GPU ms",) if on_gpu else ())):
        table.add_column(name, justify="right")
    for part in step.parts:
        gpu = () if part.gpu_seconds is None else (f"{part.gpu_seconds * 1e3:.2f}",)
        table.add_row(part.part, f"{part.seconds * 1e3:.2f}", f"{part.seconds / step.profiled_seconds:.1%}", *gpu)
    table.add_row("all", f"{step.profiled_seconds * 1e3:.2f}")
    console.print(table)
    memory = f", {step.gpu_memory_gib:.1f} GiB of GPU memory" if on_gpu else ""
    console.print(
        f"without the profiler, a step takes {step.seconds * 1e3:.2f} ms: {step.images_per_second:.1f} images/s, "
        f"{step.tflops:.3g} TFLOP/s{memory} (means of {step.steps} steps on {device})"
    )
    return {
        "device": str(device),
        "steps": step.steps,
        "step_ms": step.seconds * 1e3,
        "watched_step_ms": step.profiled_seconds * 1e3,
        "images_per_second": step.images_per_second,
        "tflops": step.tflops,
        "gpu_memory_gib": step.gpu_memory_gib,
        "parts": [
            {"part": part.part, "ms": part.seconds * 1e3}
            | ({} if part.gpu_seconds is None else {"gpu_ms": part.gpu_seconds * 1e3})
            for part in step.parts
        ],
    }


def _values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options that change the defaults of others, with their values."""
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, value = word.partition("=")
        if name in _FIRST and (equals or following is not None):
            yield name, value if equals else following


def _architecture(values: dict[str, str], file: Values | None) -> Architecture | None:
    """The architecture that options or their file ask for, as a recipe has the published network of each."""
    name: Any = values.get("--model.architecture")
    if name is None and file is not None:
        model = file.sections.get("model")
        name = model.get("architecture") if isinstance(model, dict) else None
    return name if name in get_args(Architecture) else None  # a wrong one is refused where options are read


def _with_stages(base: RunConfig, file: str) -> RunConfig:
    """The configuration with the edges and widths of a file; without widths for a new number of stages, equal ones."""
    document = read_json(Path(file))
    edges, widths = (document.get("edges"), document.get("decoder_widths")) if isinstance(document, dict) else (0, 0)
    if not isinstance(edges, list):
        raise ConfigError(f'{file}: "edges" must be a list of noise levels sigma, like {{"edges": [0.5, 3.0]}}')
    if widths is None:
        same = len(base.model.capacities) == len(edges) + 1
        widths = list(base.model.capacities) if same else [base.model.capacity] * (len(edges) + 1)
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise ConfigError(f'{file}: "decoder_widths" must be a list of positive whole numbers, got {widths}')
    model = replace(base.model.with_capacities(tuple(widths)), architecture=base.model.architecture)
    changed = to_dict(base)
    changed["stages"]["edges"], changed["model"] = edges, to_dict(model)
    return from_dict(RunConfig, changed, file)
