"""Every metric goes through `check_metric`: two processes with unequal shares, batches, order, precision, pickling."""

import re
from pathlib import Path

import torch
from torchmetrics import Metric

import diffcore.metrics
from diffcore.metrics import RealAndFake
from diffcore.stats import RunningCovariance, RunningMoments
from diffcore.testing.metrics import check_metric


def test_every_metric_is_checked_in_all_ways():
    exported = [getattr(diffcore.metrics, name) for name in diffcore.metrics.__all__]
    kinds = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Metric)} - {RealAndFake}
    assert len(kinds) >= 8
    sources = [path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    checked = [source for source in sources if "check_metric(" in source]
    missing = [k.__name__ for k in kinds if not any(re.search(rf"\b{k.__name__}\(?", source) for source in checked)]
    assert missing == []


def test_moments_however_the_rows_arrive():
    x = (30 + torch.randn(40, 3, generator=torch.Generator().manual_seed(0))).half().float()  # exact in float16
    double = x.double()
    for metric, spread in ((RunningMoments, double.var(0)), (RunningCovariance, double.T.cov())):
        reference = (40, double.mean(0), spread)
        check_metric(lambda metric=metric: metric(3), [(x[:7],), (x[7:],)], reference, atol=1e-10, half_atol=1e-10)
