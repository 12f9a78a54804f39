"""torchcfm's flow matchers with the exact assignment as their plan sampler, against torchcfm's own exact plan.

Every image of a batch stays, with its label; the transport cost is that of torchcfm's plan and no higher. What both
matchers call is checked by calling them, and the two signatures that this version of torchcfm has are compared.

Needs `torchcfm`, which stays out of the workspace: `make integrations` runs this in an environment of its own.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torchcfm.conditional_flow_matching import (  # pyright: ignore[reportMissingImports]
    ExactOptimalTransportConditionalFlowMatcher,
)
from torchcfm.optimal_transport import OTPlanSampler  # pyright: ignore[reportMissingImports]

from immiscible_noise import ExactAssignmentPlanSampler

METHODS = ("sample_plan", "sample_plan_with_labels", "sample_plan_with_scipy")
BATCH = 128


def matcher(sampler: Any = None) -> Any:
    """Returns torchcfm's matcher, with its own sampler or another one."""
    found = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    if sampler is not None:
        found.ot_sampler = sampler
    return found


def ends(t: Tensor, xt: Tensor, ut: Tensor) -> tuple[Tensor, Tensor]:
    """Returns noise and images of straight paths, from a point on each and its velocity."""
    share = t.reshape(-1, *[1] * (xt.ndim - 1))
    return xt - share * ut, xt + (1 - share) * ut


def kept(images: Tensor, data: Tensor) -> int:
    """Returns how many of the images of a data set are among those given."""
    return len(set(torch.cdist(images.flatten(1), data.flatten(1)).argmin(1).tolist()))


def squared(x0: Tensor, x1: Tensor) -> float:
    """Returns the mean squared distance of the pairs."""
    return float((x0.double() - x1.double()).flatten(1).square().sum(1).mean())


def main() -> None:
    """Compares signatures, images that stay, and costs; ends with an error where they are not as promised."""
    for method in METHODS:
        theirs = getattr(OTPlanSampler, method, None)
        names = None if theirs is None else list(inspect.signature(theirs).parameters)
        ours = list(inspect.signature(getattr(ExactAssignmentPlanSampler, method)).parameters)
        print(f"{method}: {'not in this version of torchcfm' if names is None else names}")
        assert names is None or names == ours, (method, names, ours)

    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(BATCH, 3, 8, 8, generator=g), torch.randn(BATCH, 3, 8, 8, generator=g)
    y0, y1 = torch.arange(BATCH), torch.arange(BATCH) % 4
    plan = OTPlanSampler(method="exact").get_map(x0, x1)
    distances = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().numpy()
    theirs = float((plan * distances).sum())

    for name, sampler in (("torchcfm", None), ("exact assignment", ExactAssignmentPlanSampler())):
        noise, images = ends(*matcher(sampler).sample_location_and_conditional_flow(x0, x1))
        cost, stay = squared(noise, images), kept(images, x1)
        print(f"{name}: {stay} of {BATCH} images stay, mean squared distance {cost:.4f} (torchcfm's plan {theirs:.4f})")
        if sampler is not None:
            torch.testing.assert_close(images, x1, rtol=1e-4, atol=1e-4)
            assert cost <= theirs * (1 + 1e-5), (cost, theirs)

    for respected in (True, False):
        guided = matcher(ExactAssignmentPlanSampler(respect_labels=respected))
        t, xt, ut, numbers, labels = guided.guided_sample_location_and_conditional_flow(x0, x1, y0, y1)
        noise, images = ends(t, xt, ut)
        torch.testing.assert_close(images, x1, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(noise, x0[numbers], rtol=1e-4, atol=1e-4)
        assert torch.equal(labels, y1)
        assert torch.equal(y1[numbers], y1) == respected
        rule = "respected" if respected else "ignored"
        print(f"labels {rule}: mean squared distance {squared(noise, images):.4f}")


if __name__ == "__main__":
    main()
