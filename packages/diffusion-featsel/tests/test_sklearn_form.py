"""The transformer of scikit-learn: its own estimator checks, as far as they apply to images, and pooling by hand.

The checks feed tables of any numbers, so they run on a subclass that paints each row of a table as an image. Left out
are `check_array_api_input`, which needs an environment variable before SciPy is imported, and
`check_estimators_overwrite_params`, which compares the model with a deep copy by a digest that differs between the two;
instead, the digest of the model is the same after fitting.
"""

from copy import deepcopy
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from jaxtyping import config
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import validate_data

from diffcore.errors import UserError
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from diffusion_featsel import extractor as extractor_module
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.inventory import inventory
from diffusion_featsel.sklearn_form import DiffusionFeatures

MODEL = from_pipeline(tiny.pipeline("sd15"))
NAMES = ["mid-vit-out", "up-level0-upsampler-out"]
PIXELS = tiny.model("unet2d")
FeatureExtractor(PIXELS, "unet-in")(torch.rand(1, 3, 8, 8))  # fills tables that pickles of the model contain


@pytest.fixture(scope="module", autouse=True)
def listed_once():
    """Lists the activations of a model once, not in each of some hundred fits."""
    known = {}

    def kept(model, *, size, num_text):
        key = (id(model.backbone), size, num_text)
        if key not in known:
            known[key] = inventory(model, size=size, num_text=num_text)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor_module, "inventory", kept)
        yield


class Painted(DiffusionFeatures):
    """Takes tables: paints each row as an 8x8 image."""

    def _images(self, X, *, reset):
        rows: Any = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
        columns = self.n_features_in_
        pixels = np.stack([np.resize(1 / (1 + np.exp(-row.clip(-30, 30))), (8, 8, 3)) for row in rows])
        images = super()._images(pixels, reset=reset)
        self.n_features_in_ = columns
        return images

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def checks():
    """Yields the checks with the estimator that each one gets.

    Rows of one image are expected to agree to 1e-7 in any batch, and kernels of float32 do to 5e-6: where this is
    checked, images are computed one at a time.
    """
    usual, alone = (Painted(PIXELS, ["unet-after-conv-in"], batch_size=size) for size in (64, 1))
    every: Any = zip(estimator_checks_generator(usual), estimator_checks_generator(alone), strict=True)
    for (_, check), (_, same) in every:
        name = check.func.__name__
        if name in ("check_array_api_input", "check_estimators_overwrite_params"):
            continue
        single = "invariance" in name and "params" not in name
        yield pytest.param(alone if single else usual, same if single else check, id=name)


@pytest.mark.parametrize(("estimator", "check"), list(checks()))
@pytest.mark.filterwarnings("ignore")
def test_estimator_checks(estimator, check):
    # Settings of wrong types are to be kept until `fit`, which type checks of tests would not let happen.
    config.update("jaxtyping_disable", "init_or_set_params" in check.func.__name__)
    try:
        check(estimator)
    finally:
        config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 20, 16, 3), dtype=np.uint8)


def test_rows_are_balanced_means_over_places(images):
    fitted = DiffusionFeatures(MODEL, NAMES).fit(images)
    rows = fitted.transform(images)
    found = FeatureExtractor(MODEL, NAMES)(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    expected = torch.cat([found[name].mean((2, 3)) / found[name].square().mean().sqrt() for name in NAMES], dim=1)
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-5)
    assert fitted.get_feature_names_out()[64] == "up-level0-upsampler-out:0"
    assert len(fitted.get_feature_names_out()) == fitted.n_features_out_ == rows.shape[1] == 128
    floats = DiffusionFeatures(MODEL, NAMES).fit_transform(images.transpose(0, 3, 1, 2) / 255)
    np.testing.assert_allclose(floats, rows, atol=1e-5)


def test_places_and_generalised_means(images):
    places = DiffusionFeatures(MODEL, NAMES, pooling="none", balance="none").fit_transform(images)
    maps = FeatureExtractor(MODEL, NAMES, balance="none").maps(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(places.reshape(5, 8, 8, 128), maps.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    gem = DiffusionFeatures(MODEL, NAMES[1:], pooling="gem", balance="none").fit_transform(images)
    np.testing.assert_allclose(gem, np.cbrt((maps[:, 64:].numpy() ** 3).mean((2, 3))), atol=1e-4)


def test_it_is_a_step_of_a_pipeline_and_its_networks_are_not_copied(images):
    steps = make_pipeline(DiffusionFeatures(MODEL, NAMES), LogisticRegression())
    search = GridSearchCV(steps, {"diffusionfeatures__t": [50, 400]}, cv=2)
    labels = [0, 1, 0, 1, 0]
    search.fit(images, labels)
    assert search.best_estimator_[0].model is MODEL
    assert search.predict(images).tolist() == labels


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), "images have 4 dimensions, and this array has 3"),
        (np.zeros((2, 8, 8, 4), np.uint8), "images have 3 channels, first or last"),
        (np.full((2, 8, 8, 3), 2.0), r"images of floats are in \[0, 1\]; these run from 2 to 2"),
        (np.full((2, 8, 8, 3), np.nan), "contains NaN"),
    ],
)
def test_what_is_no_image_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        DiffusionFeatures(MODEL, NAMES).fit(array)


def test_fitting_leaves_the_model_as_it_was():
    before = joblib.hash(PIXELS)
    assert joblib.hash(deepcopy(PIXELS)) != before  # why scikit-learn's own check says nothing here
    DiffusionFeatures(PIXELS, ["unet-after-conv-in"]).fit(np.zeros((2, 8, 8, 3), np.uint8))
    assert joblib.hash(PIXELS) == before


def test_settings_are_checked_when_fitting(images):
    with pytest.raises(UserError, match="`pooling` is 'max'; it may be"):
        DiffusionFeatures(MODEL, NAMES).set_params(pooling="max").fit(images)
    with pytest.raises(NotFittedError):
        DiffusionFeatures(MODEL, NAMES).transform(images)
