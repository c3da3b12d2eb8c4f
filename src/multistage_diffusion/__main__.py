"""`python -m multistage_diffusion` is `msd`."""

from multistage_diffusion.cli import main

main()
