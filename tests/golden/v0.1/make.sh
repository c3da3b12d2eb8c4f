#!/usr/bin/env bash
# Writes the files of this folder; ran once, with version 0.1.0 of multistage-diffusion. Run in an empty folder.
set -euo pipefail
export OMP_NUM_THREADS=1
tiny=(--threads 1 --model.width 4 --model.multipliers 1 --model.attention --model.blocks 1 --training.batch-size 8
    --training.learning-rate 2e-3 --training.warmup-images 40 --training.ema-half-life 40 --training.log-every 1)

msd cluster digits --process vp --out stages.json
msd train digits --stages stages.json --out multistage "${tiny[@]}" --model.decoder-widths 4 8 4 --training.steps 20 \
    --training.save-every 10 --training.ema-lengths 0.05 0.1 --training.ema-snapshot-every 10
msd train digits-edm --out edm "${tiny[@]}" --model.architecture unified --training.steps 10 --training.save-every 10
msd train digits-flow --out classes "${tiny[@]}" --stages.edges 2.0 --model.decoder-widths 4 4 --model.classes 10 \
    --training.steps 10 --training.save-every 10

# A run that dies after step 12: what an uninterrupted one wrote, without what it would have written later.
half=("${tiny[@]}" --stages.edges 2.0 --model.decoder-widths 4 4 --model.dropout 0.2 --data.flip
    --training.steps 20 --training.save-every 10)
msd train digits --out half-done "${half[@]}"
cp half-done/metrics.jsonl half-done.jsonl
sed -i '13,$d' half-done/metrics.jsonl
rm -r half-done/checkpoints/step-00000020 half-done/model

msd train digits-ldm --out separate "${tiny[@]}" --model.architecture separate --model.decoder-widths 4 4 --stages.edges 2.0 \
    --training.steps 10 --training.save-every 10
python -c "import multistage_diffusion as msd; msd.load_run('separate').denoiser.save_pretrained('saved')"
rm -r separate

msd export edm --out edm.safetensors
msd data digits --convert shards
msd convert edm diffusers-edm
msd train digits-ldm --out standard "${tiny[@]}" --model.architecture unified --model.resampling conv --model.skip-scale 1.0 \
    --model.groups 1 --model.multipliers 1 1 --model.attention 4 --model.decoder-attention all --model.head-channels 4 \
    --training.steps 10 --training.save-every 10
msd convert standard diffusers-standard
rm -r standard

msd autoencoder digits --resolution 8 --widths 8 8 --latent-channels 2 --steps 20 --batch-size 32 --out autoencoder
msd train digits-ldm --out latent "${tiny[@]}" --data.resolution 8 --data.autoencoder autoencoder \
    --model.architecture unified --training.steps 10 --training.save-every 10
