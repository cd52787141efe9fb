"""What the server says of an uploaded image, as the program that asked gets it."""

import io

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.data.images import open_image
from xray_fastai.inference.gradcam import grad_cam, overlay
from xray_fastai.inference.model import Model
from xray_fastai.inference.stream import predict_batches
from xray_fastai.system.text import data_uri

PICTURE = 640
"""Pixels of the longer side, at most, of the pictures that an answer holds."""


class ModelFacts(BaseModel):
    """The model that answers, and where it decides."""

    name: str = Field(description="The export's folder.")
    architecture: str
    size: int = Field(description="Side of the square, in pixels, that the network sees of an image.")
    classes: list[str]
    positive: str | None = Field(description="The class to detect, where there is one.")
    threshold: float | None = Field(
        description="An image is called `positive` from this probability on; null: the most probable class is called."
    )
    calibrated: bool = Field(description="Whether the probabilities were calibrated on validation images.")
    calibration: str = Field(description="How threshold and temperature were settled.")
    temperature: float = Field(description="Probabilities are softmax(logits / temperature).")
    rehearsal: bool = Field(description="Trained on drawn X-rays: the model knows nothing of patients.")
    status: str = Field(description="complete, or what ended the fit before: interrupted, diverged.")

    @classmethod
    def of(cls, model: Model) -> "ModelFacts":
        settings = model.settings
        return cls(
            name=model.path.resolve().name,
            architecture=settings["architecture"],
            size=model.size,
            classes=model.classes,
            positive=model.positive,
            threshold=model.threshold_of(),
            calibrated=model.calibrated,
            calibration=settings["calibration"],
            temperature=model.temperature,
            rehearsal=settings["data"]["rehearsal"],
            status=settings["status"],
        )


class Prediction(BaseModel):
    """One file's prediction, or what is wrong with the file."""

    file: str = Field(description="The name that the file was sent under.")
    prediction: str | None = Field(None, description="The class called; null where the file can't be read.")
    probabilities: dict[str, float] | None = Field(None, description="By class.")
    threshold: float | None = Field(None, description="As the model's.")
    error: str | None = Field(None, description="What is wrong with the file.")
    image: str | None = Field(None, description=f"The X-ray as it was read, at most {PICTURE} px a side: a data URI.")
    heatmap: str | None = Field(
        None, description="The same under its Grad-CAM for the class called, red where most speaks for it: a data URI."
    )
    note: str | None = Field(None, description="Why there is no heat map, where there could be none.")


class Predictions(BaseModel):
    """What `POST /predict` answers: the files in the order that they were sent in."""

    predictions: list[Prediction]
    model: ModelFacts
    disclaimer: str = DISCLAIMER


class Health(BaseModel):
    """What `GET /health` answers."""

    status: str = "ok"
    version: str = Field(__version__, description="Of xray-fastai.")
    model: ModelFacts


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


def answer(model: Model, name: str, content: bytes, heatmap: bool = True) -> Prediction:
    """Predict one file.

    Args:
        model: from `open_model`.
        name: what the answer calls the file.
        content: the file.
        heatmap: with pictures of the image and of its heat map.

    Raises:
        UserError: the image does not fit into the device's memory.
    """
    if not content:
        return _refused(model, name, "the file is empty (0 bytes)")
    (batch,) = predict_batches(model, [content], 1)
    ((_, logits, error),) = batch.outputs()
    if error is not None:
        return _refused(model, name, error.removeprefix("image: "))
    if not np.isfinite(logits).all():
        return _refused(model, name, "the network's output is not a number")
    probabilities = model.probabilities(logits)  # (classes,)
    called = int(model.decide(probabilities[None])[0])
    found = Prediction(
        file=name,
        prediction=model.classes[called],
        probabilities={c: round(float(p), 7) for c, p in zip(model.classes, probabilities, strict=True)},
        threshold=model.threshold_of(),
    )
    if heatmap:
        picture = open_image(content)
        picture.thumbnail((PICTURE, PICTURE))
        found.image = _uri(picture)
        (cam,) = grad_cam(model, batch.images, [called])  # (h, w)
        if cam.size == 1:
            found.note = f"No heat map: {model.size} pixels leave one cell for the whole image"
        elif not cam.any():
            found.note = f"No heat map: no place speaks for {found.prediction} more than another"
        else:
            found.heatmap = _uri(overlay(picture, cam))
    return found


def _refused(model: Model, name: str, why: str) -> Prediction:
    return Prediction(file=name, threshold=model.threshold_of(), error=f"{name}: {why}")


def _uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return data_uri(stream.getvalue(), "image/jpeg")
