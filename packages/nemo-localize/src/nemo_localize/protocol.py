"""How verification tests and judges: its measures, seeds and thresholds, fixed before its first run on a trained model.

A change of a number here changes what "closed" means: verdicts from before and after do not compare.

An image is a copy where its likeness to the training image is above `COPY_ABOVE`. A prompt is

* open: the edited model generates a copy in one of the checks: held-out seeds, paraphrases, dropped tokens, search;
* inconclusive: it is not open, but the unedited model generated no copy either, so that there was no leak to close; or
  its seeds still agree with one another after the edit, on something that need not be the training image;
* closed: it is neither open nor inconclusive.

Verification as a whole is inconclusive where the adversarial search opens a control, a prompt that was never memorised,
since a hit then means nothing; or where it does not find the known leaks of the unedited model from noise alone, since
a miss then means nothing. Otherwise it is open if any prompt is, closed if all are, and else inconclusive.

References:
    Kowalczuk et al., "Finding Dori: Memorization in Text-to-Image Diffusion Models Is Less Local Than Assumed", 2025:
    Adam at 0.1, 8 draws of noise and timestep per step, 50 steps, from the prompt's embedding or from N(0, I).
    Copies: Hintersdorf, Struppek et al. 2024, appendix C.1, for SSCD; structural similarity takes the same number.
"""

from typing import Any

COPY_ABOVE = 0.7

# Localization uses seeds from 1 on, evaluation seed 2: none of these.
HELD_OUT_SEEDS = range(100_001, 100_009)  # the prompt itself
VARIANT_SEEDS = range(100_101, 100_105)  # paraphrases and dropped tokens
AUDIT_SEEDS = range(100_201, 100_209)  # embeddings that the search found
TARGET_SEEDS = range(100_301, 100_309)  # the unedited model, where no training image is given

PARAPHRASES = ("a photo of {}", "an image of {}", "{}, high quality", "{}, on a plain background")
DROPPED_TOKENS = 8  # at most, spread evenly over the prompt

AUDIT_STEPS = 50
AUDIT_LEARNING_RATE = 0.1
AUDIT_DRAWS = 8  # of noise and timestep, in each step
AUDIT_NOISE_STARTS = 2  # besides the prompt's own embedding
AUDIT_SEED = 100_401

FEWEST_CONTROLS = 3
LEAST_REOPENED = 0.5  # share of the known leaks that the search must find on the unedited model, from noise


def described() -> dict[str, Any]:
    """Returns the protocol as plain values, for records."""
    plain = {range: lambda seeds: [seeds.start, seeds.stop], tuple: list}
    return {
        name.lower(): plain.get(type(value), type(value))(value) for name, value in globals().items() if name.isupper()
    }
