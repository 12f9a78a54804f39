"""Malformed models and adapters, made from valid ones by a seeded generator, so that no binary is stored.

Every input is harmless: it breaks a rule of diffcore, and would make other software raise an error at most. Inputs that
would crash other software, never end, or pass its checks are described in words, and the rule against them is tested
with an input that breaks it otherwise.

Each case is a change to a valid model. Loading it must raise an error that the user can act on, with
nothing executed and nothing written. A fault that a user finds becomes a case here, in the commit that repairs it.
"""

from diffcore.testing.malformed.adapters import AdapterCase, adapter_cases
from diffcore.testing.malformed.case import Bases, Case, make_bases
from diffcore.testing.malformed.configs import config_cases
from diffcore.testing.malformed.disguises import disguise_cases
from diffcore.testing.malformed.headers import header_cases
from diffcore.testing.malformed.places import place_cases


def cases(seed: int = 0) -> list[Case]:
    """Returns every case, each with a name of its own."""
    return [*header_cases(seed), *config_cases(), *disguise_cases(), *place_cases()]


__all__ = ["AdapterCase", "Bases", "Case", "adapter_cases", "cases", "make_bases"]
