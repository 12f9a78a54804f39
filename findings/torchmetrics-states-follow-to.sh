#!/usr/bin/env bash
# torchmetrics 1.9.0 with torch 2.13.0.
#
# A metric keeps its states in the precision they were made in when the module that holds it is cast by `.half()` or
# `.bfloat16()`: the documentation says that casts reach states through `set_dtype` alone. A cast spelled
# `.to(torch.bfloat16)`, as trainers spell it, reaches them all the same. A sum in bfloat16 stops growing when what is
# added is less than half of its last place: six hundred ones add up to 256.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy
"$folder/env/bin/python" - <<'PY'
import torch
import torchmetrics
from torch import nn
from torchmetrics.aggregation import SumMetric

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)


def total(cast):
    holder = nn.ModuleDict({"network": nn.Linear(2, 2), "sum": SumMetric()})
    cast(holder)
    for _ in range(600):
        holder["sum"].update(torch.ones(()))
    return holder["sum"].sum_value.dtype, float(holder["sum"].compute())


by_name = total(lambda module: module.bfloat16())
by_type = total(lambda module: module.to(torch.bfloat16))
print("600 ones after module.bfloat16():        ", *by_name)
print("600 ones after module.to(torch.bfloat16):", *by_type)
assert by_name == (torch.float32, 600.0), "the method .bfloat16() used to leave states alone"
assert by_type == (torch.bfloat16, 256.0), "the cast by .to() used to reach the states"
PY
