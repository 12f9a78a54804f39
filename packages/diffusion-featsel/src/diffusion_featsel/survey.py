"""The pass of a ranking: runs the network on batches of images, and adds what its hooks see to the sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.models import DiffusionModel
from diffcore.noise import row_generator, row_noise
from diffusion_featsel.activation import Activation
from diffusion_featsel.forward import Condition, activations_of
from diffusion_featsel.locality import LocalitySums
from diffusion_featsel.moments import Moments
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.ranking import Ranking, Scored
from diffusion_featsel.readout import ReadoutSums, Targets, places_of
from diffusion_featsel.self_match import SelfMatchSums
from diffusion_featsel.similarity import Samples, cka_matrix
from diffusion_featsel.spectrum import Granularity, SpectrumSums
from diffusion_featsel.sums import Sums
from diffusion_featsel.variance import VarianceSums
from diffusion_featsel.views import Batch, Views, projection_of
from diffusion_featsel.warp import MILD, Affine, random_affine, random_gain, warp_images, warp_points

Measurement = Literal["variance", "readout", "spectrum", "locality", "self", "samples"]
MEASUREMENTS: tuple[Measurement, ...] = get_args(Measurement)
POINTS, ANCHORS = 12, 32
_PLACE, _NOISE = slice(0, 2), slice(2, None)  # targets of the readout
_MOVED, _MOVEMENT, _CELLS = 2, 3, 4  # streams of an image's random numbers: its third noise, its movement, its cells


@dataclass
class ActivationSums(Sums):
    """All sums of one activation; None for what is not measured.

    Attributes:
        moments: Moments of the channels.
        variance: Sums of products of channels.
        readout: Sums that are needed to read the noise and the position out of the channels.
        spectrum: Sums of the power by frequency.
        locality: Cosines of neighboring and of distant cells.
        matches: Matches of points in moved images.
        samples: Values of the first images.
        other_samples: Values of the first images at the other timestep.
    """

    moments: Moments
    variance: VarianceSums | None
    readout: ReadoutSums | None
    spectrum: SpectrumSums | None
    locality: LocalitySums | None
    matches: SelfMatchSums | None
    samples: Samples | None
    other_samples: Samples | None

    def add(self, views: Views) -> None:
        """Adds one batch of images to everything that is measured.

        Args:
            views: Maps of the activation.
        """
        self.moments.add(views)
        for sums in (self.variance, self.spectrum, self.locality, self.matches, self.samples):
            if sums is not None:
                sums.add(views)
        if self.readout is not None:
            self.readout.add(views, views.batch.kept("targets", views.grid, lambda: _targets(views.batch, views.grid)))


@dataclass
class ImageSums(Sums):
    """Sums of the encoded images themselves on one grid, with which activations are compared.

    Attributes:
        variance: Sums of products of channels.
        position: Sums for reading the position out of the channels.
    """

    variance: VarianceSums
    position: ReadoutSums

    def add(self, batch: Batch, grid: tuple[int, int]) -> None:
        """Adds one batch of images.

        Args:
            batch: The images of one pass.
            grid: Rows and columns that they are averaged to.
        """
        views = Views(batch, torch.stack([batch.x0_at(grid)] * 2), None, None)
        self.variance.add(views)
        self.position.add(views, Targets.of(places_of(grid, len(batch), batch.x0.device), batch.first))


@dataclass
class SurveySums(Sums):
    """The sums of a whole pass.

    Attributes:
        activations: Sums of each activation, by name.
        images: Sums of the encoded images, by grid.
    """

    activations: dict[str, ActivationSums]
    images: dict[tuple[int, int], ImageSums]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass measures, and on what; see `diffusion_featsel.rank.score` for the meaning of each setting."""

    model: DiffusionModel
    images: Tensor
    activations: tuple[Activation, ...]
    t: float
    other_t: float | None
    condition: Condition
    seed: int
    measurements: tuple[Measurement, ...]
    encode: Callable[[Tensor], Tensor]

    @property
    def rows_per_image(self) -> int:
        """Rows of a forward pass for each image: two draws, and the moved image where points are searched in it."""
        return 3 if "self" in self.measurements else 2

    @property
    def identity(self) -> str:
        """Word for all that the sums depend on besides images and model."""
        names = " ".join(activation.name for activation in self.activations)
        return f"score {self.t} {self.other_t} {self.seed} {' '.join(self.measurements)} {names}"

    @cached_property
    def _projections(self) -> dict[str, Tensor | None]:
        if not set(self.measurements) & {"variance", "readout", "spectrum"}:
            return {}
        return {a.name: projection_of(a.name, a.channels, self.model.device) for a in self.activations}

    def empty(self) -> SurveySums:
        """Returns sums over no image."""
        by_name = {activation.name: self._empty(activation) for activation in self.activations}
        channels, device = self.model.shape[0], self.model.device
        grids = {activation.grid for activation in self.activations if activation.grid and self._wants("readout")}
        images = {
            grid: ImageSums(VarianceSums.empty(channels, grid, device), ReadoutSums.empty(channels, 2, device))
            for grid in sorted(grids)
        }
        return SurveySums(by_name, images)

    def measured(self, groups: Sequence[range], in_batches: InBatches) -> SurveySums:
        """Returns the sums over some groups of images.

        Args:
            groups: Ranges of images that follow one another.
            in_batches: Runs the network on as many groups at a time as memory holds.

        Raises:
            MachineError: Memory is too small for one group.
        """
        sums, done, whole = self.empty(), list[range](), True

        def add(some: list[range]) -> None:
            nonlocal sums, whole
            if not whole:
                # A batch that ran out of memory left its part in the sums of some activations. It is rare, so what was
                # added before is added anew, where a copy of all sums would take memory in every batch.
                sums = self.empty()
                for group in done:
                    self._add(sums, [group])
            whole = False
            self._add(sums, some)
            whole = True
            done.extend(some)

        for _ in in_batches(list(groups), add):
            pass
        return sums

    def _add(self, sums: SurveySums, groups: list[range]) -> None:
        """Adds some groups of images to the sums, in one forward pass for each timestep."""
        batch, moved_x0, keys = self._batch(groups)
        schedule = self.model.denoiser.schedule
        for t in (self.t,) if self.other_t is None else (self.t, self.other_t):
            main = t == self.t
            clean = [batch.x0, batch.x0, *([moved_x0] if moved_x0 is not None and main else [])]
            noise = [*batch.noise]
            if len(clean) > 2:
                noise.append(row_noise(self.seed, keys, batch.x0.shape[1:], stream=_MOVED, device=batch.x0.device))
            times = torch.full((sum(map(len, clean)),), float(t), device=batch.x0.device)
            x_t = schedule.add_noise(torch.cat(clean), torch.cat(noise), times)
            see = self._seeing(batch, sums, main=main, moved=len(clean) > 2)
            activations_of(self.model, x_t, t, self.condition, self.activations, reduce=see)
        for grid, image_sums in sums.images.items():
            image_sums.add(batch, grid)

    def _seeing(self, batch: Batch, sums: SurveySums, *, main: bool, moved: bool) -> Callable[[str, Tensor], None]:
        """Returns the hook that adds an activation's maps to its sums."""
        n = len(batch)

        def see(name: str, maps: Tensor) -> None:
            maps = maps.float()
            draws, rest = maps[: 2 * n].unflatten(0, (2, n)), maps[2 * n :] if moved else None
            views = Views(batch, draws, rest, self._projections.get(name))
            mine = sums.activations[name]
            if main:
                mine.add(views)
            elif mine.other_samples is not None:
                mine.other_samples.add(views)

        return see

    def _batch(self, groups: list[range]) -> tuple[Batch, Tensor | None, list[int]]:
        """Returns the images of some groups with their random numbers, their moved copies in x0, and their keys."""
        images = self.images[groups[0].start : groups[-1].stop]
        keys = image_keys(images)
        device = self.model.device
        x0 = self.encode(images).float()
        noise = torch.stack([row_noise(self.seed, keys, x0.shape[1:], stream=draw, device=device) for draw in range(2)])
        cells = torch.stack([torch.rand(ANCHORS, 2, generator=row_generator(self.seed, key, _CELLS)) for key in keys])
        points = moved_points = torch.empty(len(images), 0, 2)
        moved_x0 = None
        if self._wants("self"):
            moved, points, moved_points = self._moved(images, keys)
            moved_x0 = self.encode(moved).float()
        batch = Batch(tuple(groups), x0, noise, points.to(device), moved_points.to(device), cells.to(device))
        return batch, moved_x0, keys

    def _moved(self, images: Tensor, keys: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns moved images, random points in the images, and where these went, as shares of the sides."""
        sides = torch.tensor([images.shape[3], images.shape[2]])
        parts = []
        for image, key in zip(images, keys, strict=True):
            generator = row_generator(self.seed, key, _MOVEMENT)
            affine = random_affine(1, generator, MILD)
            points = torch.rand(1, POINTS, 2, generator=generator) * sides - 0.5
            moved = warp_points(points, affine, (images.shape[2], images.shape[3]))
            parts.append((affine, random_gain(image[None], generator), points, moved))
        affines, gained, points, moved = zip(*parts, strict=True)
        affine = Affine(torch.cat([one.linear for one in affines]), torch.cat([one.shift for one in affines]))
        pictures = warp_images(torch.cat(gained), affine)
        inside = ((torch.cat(moved) > -0.5) & (torch.cat(moved) < sides - 0.5)).all(2, keepdim=True)
        arrived = torch.where(inside, torch.cat(moved), torch.nan)
        return pictures, (torch.cat(points) + 0.5) / sides, (arrived + 0.5) / sides

    def _wants(self, measurement: Measurement) -> bool:
        return measurement in self.measurements

    def _empty(self, activation: Activation) -> ActivationSums:
        channels, grid, device = activation.channels, activation.grid or (1, 1), self.model.device
        readout, sampled = self._wants("readout"), self._wants("samples") or self.other_t is not None
        return ActivationSums(
            Moments.empty(channels, device),
            VarianceSums.empty(channels, grid, device) if self._wants("variance") or readout else None,
            ReadoutSums.empty(channels, 2 + self.model.shape[0], device) if readout else None,
            SpectrumSums.empty(grid, device) if self._wants("spectrum") else None,
            LocalitySums.empty(device) if self._wants("locality") else None,
            SelfMatchSums.empty(device) if self._wants("self") else None,
            Samples.empty(channels, device) if sampled else None,
            Samples.empty(channels, device) if self.other_t is not None else None,
        )

    def ranking(self, sums: SurveySums) -> Ranking:
        """Returns the measurements that sums over all images amount to.

        Args:
            sums: Sums over all images.
        """
        rows, broken = [], {}
        for activation in self.activations:
            mine = sums.activations[activation.name]
            if mine.moments.finite:
                rows.append(_scored(activation, mine, sums.images))
            else:
                broken[activation.name] = "it has values that are NaN or infinite; use bfloat16 or float32"
        samples = [sums.activations[row.name].samples for row in rows] if self._wants("samples") else []
        values = [one.values for one in samples if one is not None]
        similarity = cka_matrix(values).cpu() if values else None
        return Ranking(tuple(rows), float(self.t), len(self.images), similarity, broken)


def _targets(batch: Batch, grid: tuple[int, int]) -> Targets:
    """Returns the place of each cell, and the noise there, as targets."""
    noise = batch.noise_at(grid)
    return Targets.of(torch.cat([places_of(grid, len(batch), noise.device), noise], 2), batch.first)


def _scored(activation: Activation, sums: ActivationSums, images: dict[tuple[int, int], ImageSums]) -> Scored:
    """Returns the measurements of one activation."""
    moments, split = sums.moments, sums.variance and sums.variance.split()
    # What is found of a map that no image and no noise changes says nothing: a constant, or a mere template.
    varies = split is None or split.reliability is not None
    found = sums.spectrum.granularity() if sums.spectrum and varies else Granularity()
    leak = position = change = None
    if sums.variance and sums.readout and activation.grid:
        position = sums.readout.r2(sums.variance.second, _PLACE)
        leak = sums.readout.r2(sums.variance.second, _NOISE)
        image = images[activation.grid]
        plain = image.position.r2(image.variance.second)
        position = None if position is None else max(position - (plain or 0.0), 0.0)
    if sums.samples and sums.other_samples:
        alike = float(cka_matrix([sums.samples.values, sums.other_samples.values])[0, 1])
        change = None if alike != alike else 1 - alike
    return Scored(
        activation,
        rms=moments.rms,
        mean=moments.mean.float().cpu(),
        std=moments.std.float().cpu(),
        massive=moments.massive,
        reliability=split.reliability if split else None,
        snr_db=split.snr_db if split else None,
        position_share=split.position_share if split else None,
        noise_leak=leak,
        position_r2=position,
        granularity=found.frequency,
        over_refinement=found.over_refinement,
        high_frequency=found.high_frequency,
        locality=sums.locality.locality if sums.locality else None,
        t_dependence=change,
        fisher=split.fisher if split else None,
        information=split.information if split else None,
        effective_rank=split.effective_rank if split else None,
        self_match=sums.matches.share if sums.matches and varies else None,
    )
