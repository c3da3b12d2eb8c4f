"""What to do after a command: the line with which each ends."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multistage_diffusion.recipes import RECIPES


def next_step(name: str, options: Any, document: Mapping[str, Any]) -> str | None:
    """The command that comes next, as a shell takes it.

    Args:
        name: The command that is done.
        options: Its options.
        document: Its document.

    Returns:
        The words; none where the command says it itself, or nothing comes next.
    """
    return _AFTER[name](options, document) if name in _AFTER else None


def _after_data(options: Any, document: Mapping[str, Any]) -> str:
    if options.convert is not None:
        return _train(f"shards:{options.convert}")
    return _words("msd", "cluster", options.source, "--out", "stages.json")


def _after_cluster(options: Any, document: Mapping[str, Any]) -> str:
    if options.out is None:
        return "the same with --out stages.json, then msd train ... --stages stages.json"
    of_the_process = f"{options.source}-{options.process}"
    return _train(options.source, str(options.out), of_the_process if of_the_process in RECIPES else None)


def _after_autoencoder(options: Any, document: Mapping[str, Any]) -> str:
    latents = ("--data.source", options.source, "--data.autoencoder", options.out)
    return _words("msd", "train", "fashion-mnist-latent", *latents, "--out", "runs/latent")


def _after_profile(options: Any, document: Mapping[str, Any]) -> str | None:
    return _train(options.target) if options.target in RECIPES else None


def _after_train(options: Any, document: Mapping[str, Any]) -> str | None:
    if "run" not in document:  # of --dry-run and --profile
        return None
    return f"{_sample(document['run'])}; then {_words('msd', 'evaluate', document['run'])}"


def _after_sample(options: Any, document: Mapping[str, Any]) -> str:
    return f"open {shlex.quote(document['grid'])}; {_words('msd', 'evaluate', options.run)}"


def _after_evaluate(options: Any, document: Mapping[str, Any]) -> str | None:
    target = Path(options.target)
    is_run = (target / "config.json").is_file()
    return _words("msd", "convert", options.target, f"models/{target.name}") if is_run else None


def _after_convert(options: Any, document: Mapping[str, Any]) -> str | None:
    if "pipeline" in document:  # which is loaded in Python, as the command says
        return None
    return f"{_sample(options.out)}, or msd train ... --init {shlex.quote(options.out)}"


def _after_demo(options: Any, document: Mapping[str, Any]) -> str:
    return f"open {shlex.quote(document['report'])}; {_words('msd', 'serve', f'{options.out}/multistage')}"


def _train(source: str, stages: str | None = None, recipe: str | None = None) -> str:
    """Training on a source: by a recipe of it, by that of its name, or by a recipe with another source."""
    kind, colon, path = source.partition(":")
    recipe = recipe or (source if source in RECIPES else None)
    words = [recipe] if recipe else ["fashion-mnist", "--data.source", source]
    words += [] if stages is None else ["--stages", stages]
    return _words("msd", "train", *words, "--out", f"runs/{(Path(path).stem if colon else kind) or 'mine'}")


def _sample(model: str) -> str:
    return _words("msd", "sample", model, "--out", "samples")


def _words(*words: str) -> str:
    return shlex.join(words)


_AFTER: dict[str, Callable[[Any, Mapping[str, Any]], str | None]] = {
    "data": _after_data,
    "cluster": _after_cluster,
    "autoencoder": _after_autoencoder,
    "profile": _after_profile,
    "train": _after_train,
    "sample": _after_sample,
    "evaluate": _after_evaluate,
    "verify": lambda options, document: _sample(options.run),
    "export": lambda options, document: _sample(options.out),
    "merge": lambda options, document: _sample(options.out),
    "convert": _after_convert,
    "study": lambda options, document: f"open {shlex.quote(document['report'])}" if "report" in document else None,
    "demo": _after_demo,
}
