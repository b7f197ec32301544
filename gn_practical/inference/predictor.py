"""``Predictor(weights)(picture)``: what a trained model sees in a picture."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from torch import nn

from gn_practical.inference.classes import Chosen, Classes
from gn_practical.inference.models import load_into, load_model
from gn_practical.inference.prediction import Prediction, make_prediction
from gn_practical.inference.reading import read_pixels, to_rgb


class Loaded(NamedTuple):
    """A picture that is ready for the model.

    Attributes:
        tensor: resized, ``(C, H, W)`` uint8 in the model's order of channels.
        pixels: as it was, ``(H, W, 3)`` RGB.
        file_name: where it comes from.
    """

    tensor: torch.Tensor
    pixels: np.ndarray
    file_name: str | None = None


class Predictor:
    """A trained model that takes pictures and returns what it sees in them.

    Pictures are read, rotated as EXIF says, and resized as an evaluation of the model does it, and
    the weights must fill all of the model: its predictions are those that its AP and PQ are of.

    Args:
        weights: a checkpoint of this package, which knows its config and classes; any other that
            :func:`gn_practical.weights.read_weights` reads, with ``config_file``; or an exported
            model, ``.onnx``.
        config_file: a YAML file, or a name in Detectron2's model zoo.
        device: "cpu", "cuda", "cuda:1"; by default CUDA where there is a GPU.
        min_size: shortest side that pictures are resized to, in pixels; by default
            ``INPUT.MIN_SIZE_TEST``, as trained.
        threshold: least score of a detection; by default that of the config, 0.05 as a rule, as AP
            is computed of.
        classes: names of the classes to keep; by default all.
        opts: keys of the config and values in turn.
        model: one that was built by code, as of a LazyConfig, to take the weights; its config,
            device and threshold are then its own.

    Raises:
        ValueError: if the weights are no model, or hold no config; says what to give.

    Example:
        >>> predict = Predictor("output/quickstart/model_final.pth")  # doctest: +SKIP
        >>> prediction = predict("photo.jpg")  # doctest: +SKIP
        >>> prediction.names, prediction.instances.scores  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        config_file: str | None = None,
        *,
        device: str | None = None,
        min_size: int | None = None,
        threshold: float | None = None,
        classes: Sequence[str] | None = None,
        opts: Sequence[str] = (),
        model: nn.Module | None = None,
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(
                f"the threshold must be from 0 to 1, got threshold={threshold}. Give a score."
            )
        if min_size is not None and min_size < 1:
            raise ValueError(f"min_size must be at least 1, got min_size={min_size}. Give pixels.")
        path = os.fspath(weights)
        self._model = (
            load_model(path, config_file, device=device, threshold=threshold, opts=opts)
            if model is None
            else load_into(model, path)
        )
        shortest, self._longest = self._model.sizes
        self._shortest = min_size or shortest
        if self._shortest > shortest > 0:
            self._longest = self._longest * self._shortest // shortest
        self._threshold = threshold
        self.classes: Classes = self._model.classes
        self._chosen: Chosen | None = None
        if classes is not None:
            self.keep_classes(classes)

    def keep_classes(self, names: Iterable[str]) -> None:
        """Leave all other classes out of the predictions from now on.

        Args:
            names: of classes; one text may name several with commas between.

        Raises:
            ValueError: if one is unknown.
        """
        self._chosen = self.classes.chosen(names)

    @property
    def device(self) -> str:
        """Where the model runs."""
        return self._model.device

    def __call__(self, images: Any) -> Prediction | list[Prediction]:
        """Predict one picture, or each of a list.

        Args:
            images: path, PIL image or RGB array ``(H, W[, C])`` of uint8 or uint16; or a list.

        Raises:
            ValueError: if one cannot be read.
        """
        if isinstance(images, list | tuple):
            return [self.predict([self.load(image)])[0] for image in images]
        return self.predict([self.load(images)])[0]

    def load(self, image: Any) -> Loaded:
        """Read a picture and resize it; may run in another thread than the model.

        Args:
            image: as :meth:`__call__` takes one.

        Raises:
            ValueError: if it cannot be read.
        """
        pixels = read_pixels(image, self._model.channels)
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        resized = self._resized(pixels, name or "one")
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return Loaded(tensor, to_rgb(pixels, self._model.channels), name)

    def predict(self, pictures: Iterable[Loaded]) -> list[Prediction]:
        """Predict pictures; those in a row that are of one size go through the model together.

        Others are not put into one batch: the model would pad them, and its norms would see it.

        Args:
            pictures: by :meth:`load`.
        """
        predictions: list[Prediction] = []
        for _, group in groupby(pictures, key=lambda each: each.tensor.shape):
            predictions += self._predict_equal(list(group))
        return predictions

    def _predict_equal(self, pictures: list[Loaded]) -> list[Prediction]:
        inputs = [
            {"image": each.tensor, "height": each.pixels.shape[0], "width": each.pixels.shape[1]}
            for each in pictures
        ]
        with torch.no_grad():
            if self._model.batches:
                outputs = self._model.run(inputs)
            else:
                outputs = [self._model.run([each])[0] for each in inputs]
            return [
                make_prediction(
                    output,
                    picture.pixels,
                    self.classes,
                    threshold=self._threshold,
                    chosen=self._chosen,
                    file_name=picture.file_name,
                )
                for output, picture in zip(outputs, pictures, strict=True)
            ]

    def _resized(self, pixels: np.ndarray, name: str) -> np.ndarray:
        height, width = pixels.shape[:2]
        if not self._shortest:
            return pixels
        sizes = (self._shortest, self._longest or 10**9)
        new_height, new_width = ResizeShortestEdge.get_output_shape(height, width, *sizes)
        if not (new_height and new_width):
            raise ValueError(
                f"a picture must keep a pixel of each side at a longest of {sizes[1]}, got {name} "
                f"of {width}x{height}. Cut it."
            )
        return ResizeTransform(height, width, new_height, new_width).apply_image(pixels)
