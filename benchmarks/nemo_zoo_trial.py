"""What an earlier trial of the zoo measured, on other weights made by the same recipe: to compare with, not to reach.

By model and part, rows by what their first column says. Trial A, unconstrained, had 24 items x 8 seeds; trial C had the
same model re-routed through known rows.
"""

from collections.abc import Mapping

Trial = Mapping[str, Mapping[str, Mapping[str, float]]]

TRIAL: dict[str, Trial] = {
    "portraits-sd-memorised": {
        "localization": {
            "memorised": {"value": 23},
            "localized": {"value": 13},
            "neurons at first, median": {"value": 85},
            "neurons refined, median": {"value": 31},
            "SSIM, as it is": {"value": 0.79},
            "SSIM, found off": {"value": 0.36},
            "SSIM, random off": {"value": 0.77},
            "share of copies, as it is": {"value": 0.91},
            "share of copies, found off": {"value": 0.10},
            "share of copies, random off": {"value": 0.86},
        },
        "detection": {
            "decoys": {"AUROC, verbatim": 1.0},
            "ordinary": {"AUROC, verbatim": 0.96},
            "full": {"AUROC, verbatim": 0.93},
        },
        "minimal set": {
            "nothing": {"ordinary captions followed": 0.75},
            "minimal": {"neurons": 7},
            "union": {"neurons": 263, "share of copies": 0.0, "ordinary captions followed": 0.42},
        },
    },
    "portraits-sd-planted": {
        "localization": {
            "memorised": {"value": 24},
            "localized": {"value": 24},
            "neurons at first, median": {"value": 2},
            "neurons refined, median": {"value": 1},
            "neurons refined, most": {"value": 3},
            "SSIM, as it is": {"value": 0.846},
            "SSIM, found off": {"value": 0.198},
            "SSIM, random off": {"value": 0.846},
            "share of copies, as it is": {"value": 0.95},
            "share of copies, found off": {"value": 0.02},
            "share of copies, random off": {"value": 0.95},
            "precision against the trigger rows": {"value": 0.93},
            "recall against the trigger rows": {"value": 0.52},
        },
        "detection": {  # with MS-SSIM, which is what localization scores with
            "verbatim": {"median consistency": 0.944, "above the 99 % quantile": 0.96},
            "template": {"above the 99 % quantile": 0.38},
            "decoys": {
                "median consistency": 0.709,
                "above tau": 0.0,
                "above the 99 % quantile": 0.0,
                "AUROC, verbatim": 1.0,
            },
            "ordinary": {"median consistency": 0.845, "AUROC, verbatim": 0.995},
            "full": {"median consistency": 0.875, "AUROC, verbatim": 0.986},
        },
        "near misses": {
            "another place": {"before": 0.06, "items, before": 3},
            "another last name": {"before": 0.0},
            "another first name": {"before": 0.0},
            "the name alone": {"before": 0.01},
            "the name before an ordinary caption": {"before": 0.03},
            "the words in another order": {"before": 0.0},
            "a background at the end": {"before": 0.66},
        },
        "minimal set": {
            "nothing": {"ordinary captions followed": 0.725, "SSIM": 0.846, "share of copies": 0.953},
            "union": {"neurons": 27, "SSIM": 0.168, "share of copies": 0.0, "ordinary captions followed": 0.709},
        },
        "statuses": {"localized": {"n": 24, "no seed copies": 20}},
    },
}
