#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0.
#
# `fuse_qkv_projections` of an SD3 transformer joins three projections into one, which changes the order of sums and
# nothing else. The attention processor that it puts in place (`FusedJointAttnProcessor2_0`) leaves out the normalisation
# of queries and keys, though: a model with `qk_norm`, as Stable Diffusion 3.5 has it, computes something else once it is
# fused, without a word. Without `qk_norm` both outputs are equal up to rounding.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers numpy
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'PY'
import diffusers
import torch

print("diffusers", diffusers.__version__, "torch", torch.__version__)


def difference(qk_norm):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=8, qk_norm=qk_norm,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": 3 * torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        plain = model(**inputs).sample
        model.fuse_qkv_projections()
        fused = model(**inputs).sample
    processor = type(model.transformer_blocks[0].attn.processor).__name__
    apart = float((fused - plain).abs().max() / plain.abs().max())
    print(f"qk_norm={qk_norm}, {processor}: outputs differ by {apart:.1e} of the largest value")
    return apart


assert difference(None) < 1e-5, "without a norm, fusing used to change nothing"
assert difference("rms_norm") > 1e-3, "with a norm, fusing used to change the output"
PY
