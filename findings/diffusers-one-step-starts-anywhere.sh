#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0.
#
# Scheduler classes of diffusers are made from one another's configuration, and a pipeline's is often swapped. With a
# single step, which one-step generators take, the same configuration of Stable Diffusion starts at another timestep in
# each class: near the clean end in DDIM, DDPM and Euler, in the middle in DPM-Solver++ and UniPC, at the noisy end in LCM.
# A generator that was trained at the noisy end is called where the image is nearly clean, and draws noise, without a word.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers numpy
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'PY'
import diffusers

print("diffusers", diffusers.__version__)
config = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon",
}
seen = {}
for name in (
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "LCMScheduler",
):
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(1)
    seen[name] = int(scheduler.timesteps[0])
    print(f"{name}: one step starts at timestep {seen[name]}")
assert seen["DDIMScheduler"] == seen["DDPMScheduler"] == seen["EulerDiscreteScheduler"] == 1
assert seen["DPMSolverMultistepScheduler"] == seen["UniPCMultistepScheduler"] == 501
assert seen["LCMScheduler"] == 999
PY
