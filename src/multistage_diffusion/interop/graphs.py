"""A denoiser as graphs that run without this package, one a stage, and a small JSON: which graph serves which sigma."""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.devices import evaluating
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import sha256, whole_directory, write_json
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.records import check, to_dict

Format = Literal["torch-export", "onnx"]
GRAPHS = "graphs.json"
_SUFFIX = {"torch-export": "pt2", "onnx": "onnx"}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-3  # of the largest output; float32 rounding leaves a hundredth of this
_WITHIN = (0.1, 0.5, 0.9)  # where in a stage, in ln sigma, a graph is compared
_OPSET = 18


@dataclass(frozen=True)
class Graph:
    """A graph that was written.

    Attributes:
        stage: The stage whose decoder it has.
        above: It serves the noise levels above this one.
        up_to: And up to this one; none if there is no highest.
        file: Its file in the folder.
        sha256: Of that file.
        max_error: Largest difference of its estimates from those of the denoiser, over the largest estimate.
    """

    stage: int
    above: float
    up_to: float | None
    file: str
    sha256: str
    max_error: float


@final
class _OneStage(nn.Module):
    """The estimate of one stage: what a graph computes, with the names of its inputs."""

    def __init__(self, denoiser: Denoiser, stage: int) -> None:
        super().__init__()
        network = MultiDecoder(denoiser.network.encoder(stage), denoiser.network.decoders[stage])
        self.denoiser = Denoiser(network, denoiser.process, shape=denoiser.shape, classes=denoiser.classes)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.denoiser(x, sigma, labels)


def save_graphs(
    denoiser: Denoiser,
    out: str | Path,
    *,
    format: Format = "torch-export",
    stages: Sequence[int] | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Graph]:
    """Write a graph for each stage, read it back, and compare it with the denoiser at noise levels of the stage.

    A graph maps noisy images `x`, their noise levels `sigma` and, of a conditional model, their `labels` (the number of
    classes means none) to estimates of the clean images, for any number of images. Whoever draws looks up the stage of
    each noise level in `graphs.json`.

    Args:
        denoiser: The model.
        out: The folder; replaced if an earlier call wrote it.
        format: torch.export's `.pt2`, or ONNX, which needs packages of its own.
        stages: Which stages; by default all.
        about: More for `graphs.json`.

    Raises:
        ConfigError: There is no such stage, a package is missing, the network cannot be traced, or a graph's estimates
            differ from the denoiser's; nothing is written then.
        CheckpointError: The folder cannot be written.
    """
    number = len(denoiser.stages)
    for stage in stages or ():
        check(0 <= stage < number, "stage", f"all or in 0..{number - 1}", stage)
    if format == "onnx":
        _require_onnx()
    with evaluating(denoiser), whole_directory(Path(out)) as folder:
        graphs = [_save(denoiser, stage, folder, format) for stage in (range(number) if stages is None else stages)]
        inputs: dict[str, Any] = {"x": ["float32", ["batch", *denoiser.shape]], "sigma": ["float32", ["batch"]]}
        if denoiser.classes:
            inputs["labels"] = ["int64", ["batch"]]
        document = {
            "format": "multistage-diffusion graphs 1",
            "graphs": format,
            "inputs": inputs,
            "output": ["float32", ["batch", *denoiser.shape]],
            "classes": denoiser.classes,
            "process": to_dict(denoiser.process),
            "edges": list(denoiser.stages.edges),
            "stages": [vars(graph) for graph in graphs],
            **(about or {}),
        }
        write_json(folder / GRAPHS, document)
    return graphs


@torch.no_grad()
def _save(denoiser: Denoiser, stage: int, folder: Path, format: Format) -> Graph:
    """Write the graph of a stage, and compare it."""
    module, (low, high) = _OneStage(denoiser, stage).eval(), denoiser.stages.bounds(stage)
    batches = [_inputs(denoiser, stage, count) for count in (3, 1, 5)]
    batch, name = torch.export.Dim("batch", min=1), f"stage-{stage}.{_SUFFIX[format]}"
    path = folder / name
    with _quiet():
        try:
            program = torch.export.export(module, batches[0], dynamic_shapes=tuple({0: batch} for _ in batches[0]))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise ConfigError(f"the network cannot be traced by torch.export: {reason}; nothing was written") from error
        run = (_save_onnx if format == "onnx" else _save_program)(program, batches[0], path)
    error = 0.0
    for inputs in batches:
        expected, output = denoiser(*inputs), run(inputs)
        error = max(error, float((output - expected).abs().max()) / float(expected.abs().max()))
    if not error < _TOLERANCE:
        raise ConfigError(f"the graph of stage {stage} differs from the network by {error}; nothing was written")
    return Graph(stage, low, None if stage + 1 == len(denoiser.stages) else high, name, sha256(path), error)


def _inputs(
    denoiser: Denoiser, stage: int, count: int
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"], *tuple[Int[Tensor, " batch"], ...]]:
    """Noisy images at noise levels of a stage, with labels if there are classes."""
    low, high = denoiser.stages.bounds(stage)
    high = min(high, max(denoiser.process.sigma_max, 2 * low))
    low = low if low > 0 else min(denoiser.process.sigma_min, high / 2)
    within = torch.tensor([_WITHIN[index % len(_WITHIN)] for index in range(count)], dtype=torch.float64)
    sigma = (low * (high / low) ** within).float()
    x = rng.normal(0, "graphs", torch.arange(count), denoiser.shape) * (1 + sigma)[:, None, None, None]
    labels = (torch.arange(count) % (denoiser.classes + 1),) if denoiser.classes else ()
    return x, sigma, *labels


def _save_program(program: Any, inputs: Sequence[Tensor], path: Path) -> Callable[[Sequence[Tensor]], Tensor]:
    """Write a program of torch.export; returns what was written, as a function."""
    content = io.BytesIO()  # torch warns of other suffixes and remembers names of files
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())
    module = torch.export.load(str(path)).module()
    return lambda given: module(*given)


def _save_onnx(program: Any, inputs: Sequence[Tensor], path: Path) -> Callable[[Sequence[Tensor]], Tensor]:
    """Write an ONNX graph from a program of torch.export; returns what was written, as a function."""
    names = ["x", "sigma", "labels"][: len(inputs)]
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]

        made: Any = torch.onnx.export(
            program.run_decompositions({torch.ops.aten.hypot.default: _hypot}),
            tuple(inputs),
            input_names=names,
            output_names=["denoised"],
            dynamo=True,
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )
        made.save(str(path), external_data=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError(f"the network cannot be written as ONNX: {reason}; try --format torch-export") from error
    given_names = [entry.name for entry in session.get_inputs()]

    def run(given: Sequence[Tensor]) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True) if name in given_names}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _hypot(one: Tensor, other: Tensor) -> Tensor:
    """ONNX has none; noise levels are at most 1e15, whose square float32 holds."""
    return (one * one + other * other).sqrt()


def _require_onnx() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"ONNX needs {', '.join(_NEEDED)} ({error}): pip install multistage-diffusion[onnx]"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own parts while it traces."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
