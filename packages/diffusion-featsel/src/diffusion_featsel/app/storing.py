"""What the command `extract` does beside the method: a table and a picture of what was stored, for the report."""

from diffcore.run import Run
from diffusion_featsel.app.inputs import pixels_of_files
from diffusion_featsel.app.report import components_of, save_components
from diffusion_featsel.files.features import StoredFeatures
from diffusion_featsel.files.images import ImageList


def keep_stored(run: Run, stored: StoredFeatures, listed: ImageList) -> None:
    """Keeps what was stored for the report: shape and size of each activation, and one image's components.

    Args:
        run: Run that keeps the results.
        stored: Features of the images.
        listed: List of the images.
    """
    if not len(stored):
        return
    first = stored.images[0]
    maps = {name: stored.read(name, first)[None] for name in stored.names}
    rows = [
        {
            "activation": name,
            "channels": tensor.shape[1],
            "grid": "x".join(map(str, tensor.shape[2:])),
            "precision": str(tensor.dtype).removeprefix("torch."),
            "KiB per image": tensor.nbytes / 1024,
        }
        for name, tensor in maps.items()
    ]
    caption = (
        f"Shapes are those of {first}. StoredFeatures.open(folder).read(name, image) returns one map, and .maps(name) "
        "those of all images."
    )
    run.keep_table("stored", rows, caption)
    image = next(image for image in listed.images if image.name == first)
    pixels = pixels_of_files(listed, [image])[0]
    save_components(run, pixels.float() / 255, components_of(maps))
