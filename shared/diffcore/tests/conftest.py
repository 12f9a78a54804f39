import pytest

from diffcore import Runtime
from diffcore.models import load
from diffcore.testing import tiny


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """Pipelines of the library, saved, and our models of the same folders; each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            pipeline = tiny.pipeline(name)
            pipeline.set_progress_bar_config(disable=True)
            folder = tmp_path_factory.mktemp("models") / name
            pipeline.save_pretrained(folder)
            made[name] = pipeline, load(folder, Runtime(device="cpu"))
        return made[name]

    return get
