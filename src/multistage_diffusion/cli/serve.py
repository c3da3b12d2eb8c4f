"""`msd serve`: a local page that draws from a run."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.config import check
from multistage_diffusion.sampling.sampler import Sampler, SamplerOptions


@dataclass(frozen=True, kw_only=True)
class Options(SamplerOptions, Compute):
    """Serve a local page: draw images from a run, watch the stages and the estimates along the steps; Ctrl-C ends it.

    Only this machine can reach it, unless --host says otherwise; then the address printed holds a token.

    example: msd serve runs/digits
    """

    run: tyro.conf.Positional[str]
    """Run directory."""
    host: str = "127.0.0.1"
    """Address to listen on; with 0.0.0.0 other machines can reach the page, with the token."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or the trained ones."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Serve until a signal comes; never returns."""
    check(0 <= options.port <= 65_535, "port", "in 0..65535", options.port)
    device = prepare(options)

    from multistage_diffusion.data.latents import load_codec
    from multistage_diffusion.runs import load_run
    from multistage_diffusion.serving import LOCAL, Server

    loaded = load_run(options.run, weights=options.weights, device=device)
    token = None if options.host in LOCAL else secrets.token_urlsafe(16)
    server = Server(
        loaded.denoiser,
        codec=load_codec(options.run, device),
        name=Path(options.run).absolute().name,
        sampler=options.apply(loaded.denoiser.sampler or Sampler()),
        token=token,
        address=(options.host, options.port),
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{server.server_port}/" + (f"?token={token}" if token else "")
    if token is not None:
        console.print(f"warning: other machines can reach port {server.server_port}; every request needs the token")
    console.print(f"serving {options.run} at {url}; Ctrl-C ends it")
    if options.json:
        print(json.dumps({"url": url, "port": server.server_port}), flush=True)
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
    raise AssertionError("only a signal ends it")
