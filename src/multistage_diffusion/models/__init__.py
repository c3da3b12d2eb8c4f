"""The multi-decoder U-Net and the denoiser around it."""
