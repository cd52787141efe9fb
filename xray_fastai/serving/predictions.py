"""Predicts one uploaded file, and defines the answers of the API as pydantic models."""

import io

from PIL import Image
from pydantic import BaseModel, Field

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.inference.gradcam import grad_cam, overlay
from xray_fastai.inference.model import Model
from xray_fastai.inference.rows import DecisionRule, ImageResult, columns_of
from xray_fastai.inference.stream import predict_batches
from xray_fastai.serving.decoding import Decoder
from xray_fastai.system.errors import ImageError
from xray_fastai.system.text import data_uri

MAX_SIDE = 640
"""Pixels of the longer side of the pictures in an answer; larger images are scaled down to it."""


class ModelFacts(BaseModel):
    """The model that predicts, and its decision threshold."""

    name: str = Field(description="The name of the export's folder.", examples=["20260101-120000"])
    architecture: str = Field(description="The network's architecture.", examples=["resnet50"])
    size: int = Field(description="Images are resized to this side of a square, in pixels.", examples=[224])
    contrast: str = Field(description="equalize: histogram equalization; or none.", examples=["equalize"])
    classes: list[str] = Field(description="The classes that the model knows.", examples=[["NORMAL", "PNEUMONIA"]])
    positive: str | None = Field(description="The class to detect; null if there is none.", examples=["PNEUMONIA"])
    threshold: float | None = Field(
        description="The decision is `positive` if its probability is at least this; null: the most probable class.",
        examples=[0.5],
    )
    prevalence: float | None = Field(
        description="The share of `positive` that the probabilities were moved to; null: they are as the export's.",
        examples=[0.03],
    )
    calibrated: bool = Field(description="Whether validation images chose temperature or intercepts.")
    probabilities: str = Field(
        description="How the probabilities were calibrated.",
        examples=["cautious temperature 1.2 from validation images"],
    )
    calibration: str = Field(description="How temperature, intercepts and threshold were chosen.")
    temperature: float = Field(
        description="Probabilities are softmax(logits / temperature + intercepts).", examples=[1.2]
    )
    intercepts: list[float] | None = Field(description="One for each class; null: all are 0.", examples=[[-0.3, 0.3]])
    rehearsal: bool = Field(description="Trained on drawn X-rays: the model knows nothing of patients.")
    status: str = Field(description="complete, or why the training ended early: interrupted, diverged.")

    @classmethod
    def of(cls, model: Model) -> "ModelFacts":
        """Return the facts of an open export."""
        settings = model.settings
        return cls(
            name=model.path.resolve().name,
            architecture=settings["architecture"],
            size=model.size,
            contrast=model.contrast,
            classes=model.classes,
            positive=model.positive,
            threshold=model.threshold_of(),
            prevalence=model.prevalence,
            calibrated=model.scaling.kind != "none",
            probabilities=model.describe_probabilities(),
            calibration=settings["calibration"],
            temperature=model.scaling.temperature,
            intercepts=model.scaling.intercepts,
            rehearsal=settings["data"]["rehearsal"],
            status=settings["status"],
        )


class Prediction(BaseModel):
    """The prediction of one file, or the reason why the file cannot be read."""

    file: str = Field(description="The file's name, as in the request.", examples=["a.jpeg"])
    prediction: str | None = Field(
        None, description="The predicted class; null if the file cannot be read.", examples=["PNEUMONIA"]
    )
    probabilities: dict[str, float] | None = Field(
        None, description="The probability of each class.", examples=[{"NORMAL": 0.125, "PNEUMONIA": 0.875}]
    )
    threshold: float | None = Field(None, description="The model's decision threshold.", examples=[0.5])
    error: str | None = Field(
        None, description="Why the file cannot be read.", examples=["a.jpeg: the file is empty (0 bytes)"]
    )
    image: str | None = Field(
        None, description=f"The X-ray as it was read, scaled down to at most {MAX_SIDE} pixels a side, as a data URI."
    )
    heatmap: str | None = Field(
        None,
        description="The same picture under the Grad-CAM heat map of the predicted class (red: most important), "
        "as a data URI.",
    )
    note: str | None = Field(None, description="Why there is no heat map.")
    seen: str | None = Field(
        None,
        description="What the network sees, as a data URI: the whole image squeezed to a square, and equalized if the "
        "model has that contrast.",
    )
    row: dict[str, str | float | None] = Field(
        description="The file's row of the table that `xray-fastai predict` writes: the value of each column.",
        examples=[{"path": "a.jpeg", "prediction": "PNEUMONIA", "p_NORMAL": 0.125, "p_PNEUMONIA": 0.875}],
    )


class Predictions(BaseModel):
    """The answer of `POST /predict`: one prediction for each file, in the order of the request."""

    predictions: list[Prediction]
    model: ModelFacts
    disclaimer: str = DISCLAIMER


class Health(BaseModel):
    """The answer of `GET /health`."""

    status: str = "ok"
    version: str = Field(__version__, description="The version of xray-fastai.")
    model: ModelFacts


class Problem(BaseModel):
    """The reason why a request was refused."""

    error: str = Field(examples=["heatmap=maybe: give true or false"])


def predict_file(model: Model, decoder: Decoder, name: str, content: bytes, heatmap: bool = True) -> Prediction:
    """Predict one file.

    Args:
        model: an export from `open_model`.
        decoder: decodes the file.
        name: the file's name in the answer.
        content: the file's bytes.
        heatmap: whether to add the picture of the image and that of its heat map.

    Raises:
        UserError: the image does not fit into the device's memory.
    """
    if not content:
        return unreadable(model, name, "the file is empty (0 bytes)")
    try:
        pixels, picture = decoder.decode(content, model.size, MAX_SIDE if heatmap else None)
    except ImageError as error:
        return unreadable(model, name, error.message)
    (batch,) = predict_batches(model, [pixels], 1)
    if batch.errors[0] is not None:
        return unreadable(model, name, batch.errors[0].message)
    result = DecisionRule(model, model.threshold_of()).result(name, batch.logits[0])
    prediction = _prediction(model, result)
    if picture is not None and result.label is not None:
        prediction.image = _jpeg_uri(picture)
        prediction.seen = _jpeg_uri(Image.fromarray(model.seen(batch.images)[0, 0].numpy()))
        (cam,) = grad_cam(model, batch.images, [model.classes.index(result.label)])  # (h, w)
        if cam.size == 1:
            prediction.note = f"No heat map: at {model.size} pixels it has one cell for the whole image"
        elif not cam.any():
            prediction.note = f"No heat map: no region of the image supports {result.label}"
        else:
            prediction.heatmap = _jpeg_uri(overlay(picture, cam))
    return prediction


def unreadable(model: Model, name: str, reason: str) -> Prediction:
    """Return the answer for a file that cannot be read."""
    return _prediction(model, DecisionRule(model, model.threshold_of()).unreadable(name, reason))


def _prediction(model: Model, result: ImageResult) -> Prediction:
    return Prediction(
        file=result.path,
        prediction=result.prediction,
        probabilities=result.probabilities or None,
        threshold=result.threshold,
        error=result.error,
        row={column.name: column.value(result) for column in columns_of(model.classes, model.prevalence is not None)},
    )


def _jpeg_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return data_uri(stream.getvalue(), "image/jpeg")
