"""What the package reads and writes: data sets, latents, features, selections."""
