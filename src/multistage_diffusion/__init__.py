"""Multi-stage diffusion models: noise levels in stages, one shared encoder, one decoder per stage."""
