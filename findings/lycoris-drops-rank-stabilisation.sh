#!/usr/bin/env bash
# lycoris-lora 4.1.3 with torch 2.13.0.
#
# Rank-stabilised LoRA divides alpha by the square root of the rank instead of the rank. A layer of LyCORIS takes
# `rs_lora=True` and does so; `create_lycoris`, by which a network is wrapped, takes the same word and leaves it out on the
# way to the layers. At rank 16 the adapter is a quarter as strong as was asked for, and nothing in its file tells.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check torch==2.13.0 lycoris-lora==4.1.3 numpy
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

from lycoris import create_lycoris
from lycoris.modules.locon import LoConModule
from torch import nn

print("lycoris-lora", version("lycoris-lora"))
layer = LoConModule("layer", nn.Linear(32, 32), 1.0, 16, 16, rs_lora=True)
wrapped = create_lycoris(
    nn.Sequential(nn.Linear(32, 32)), 1.0, linear_dim=16, linear_alpha=16, algo="lora", rs_lora=True
)
print(f"rank 16, alpha 16, rs_lora: a layer made by itself has strength {layer.scale:g}")
print(f"rank 16, alpha 16, rs_lora: the layer that create_lycoris makes has strength {wrapped.loras[0].scale:g}")
assert layer.scale == 4
assert wrapped.loras[0].scale == 1
PY
