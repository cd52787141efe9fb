"""Predicts one uploaded file, and defines the answers of the API as pydantic models."""

import io
from dataclasses import asdict, dataclass, replace

from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.config.choices import members_of
from xray_fastai.inference.gradcam import grad_cam, mapped_classes, overlay
from xray_fastai.inference.model import Model
from xray_fastai.inference.rows import ImageResult, RowBuilder, Withheld
from xray_fastai.inference.stream import predict_batches
from xray_fastai.serving.decoding import Decoder, Wanted
from xray_fastai.system.errors import ImageError
from xray_fastai.system.text import data_uri

MAX_SIDE = 640
"""Pixels of the longer side of the pictures in an answer; larger images are scaled down to it."""


@dataclass(frozen=True)
class Options:
    """Holds what a request asks for, for each of its files."""

    heatmap: bool = True  # whether to add the pictures
    window: tuple[float, float] | None = None  # centre and width for DICOM files; None: as each file says


class ModelFacts(BaseModel):
    """The model that predicts, and its decision threshold."""

    name: str = Field(description="The name of the export's folder.", examples=["20260101-120000"])
    architecture: str = Field(description="The network's architecture.", examples=["resnet50"])
    members: int = Field(description="Networks of this architecture whose outputs are averaged.", examples=[1])
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
    has_gate: bool = Field(description="Whether the export knows what an image like the training images is.")
    limit: float | None = Field(
        description="An image with a greater `unlike` is `uncertain`; null: no image is, for that reason.",
        examples=[99.2],
    )
    abstain: float = Field(
        description="An image whose probability is within this distance of the threshold is `uncertain`; 0: none is.",
        examples=[0.05],
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
    def of(cls, builder: RowBuilder) -> "ModelFacts":
        """Return the facts of an open export, and of what is called."""
        model = builder.model
        settings = model.settings
        return cls(
            name=model.path.resolve().name,
            architecture=settings["architecture"],
            members=members_of(settings),
            size=model.size,
            contrast=model.contrast,
            classes=model.classes,
            positive=model.positive,
            threshold=model.threshold_of(),
            prevalence=model.prevalence,
            has_gate=model.gate is not None,
            limit=builder.rule.limit,
            abstain=builder.rule.abstain,
            calibrated=model.scaling.kind != "none",
            probabilities=model.describe_probabilities(),
            calibration=settings["calibration"],
            temperature=model.scaling.temperature,
            intercepts=model.scaling.intercepts,
            rehearsal=settings["data"]["rehearsal"],
            status=settings["status"],
        )


class GreyWindow(BaseModel):
    """The window that shows the values of a grey DICOM file, in the file's units: black to white."""

    centre: float | None = Field(
        description="The value in the middle; null, as the width: a VOI LUT of the file shows the values.",
        examples=[40],
    )
    width: float | None = Field(description="From black to white.", examples=[400])
    low: float = Field(description="The least centre that may be chosen.", examples=[-1024])
    high: float = Field(
        description="The greatest centre; the width may be up to its difference from `low`.", examples=[3071]
    )


class Prediction(BaseModel):
    """The prediction of one file, or the reason why the file cannot be read."""

    file: str = Field(description="The file's name, as in the request.", examples=["a.jpeg"])
    prediction: str | None = Field(
        None,
        description="The predicted class; `uncertain` if the image is not called; null if the file cannot be read.",
        examples=["PNEUMONIA"],
    )
    uncertain: str | None = Field(
        None,
        description="Why the image is not called, in words; null if it is called or cannot be read.",
        examples=["unlike the training images"],
    )
    probabilities: dict[str, float] | None = Field(
        None, description="The probability of each class.", examples=[{"NORMAL": 0.125, "PNEUMONIA": 0.875}]
    )
    threshold: float | None = Field(None, description="The model's decision threshold.", examples=[0.5])
    unlike: float | None = Field(
        None,
        description="The percentage of training images that are more like the others than this image is; null if the "
        "model has no gate, or the file cannot be read.",
        examples=[50.3],
    )
    error: str | None = Field(
        None, description="Why the file cannot be read.", examples=["a.jpeg: the file is empty (0 bytes)"]
    )
    image: str | None = Field(
        None, description=f"The X-ray as it was read, scaled down to at most {MAX_SIDE} pixels a side, as a data URI."
    )
    heatmap: str | None = Field(
        None,
        description="The same picture under the Grad-CAM heat map of the predicted class, or of `positive` where the "
        "probability is too close to the threshold, as a data URI. Red is 1; the strongest cell has the class's "
        "probability.",
    )
    positive_heatmap: str | None = Field(
        None, description="The same for `positive` where another class is predicted; null if no region supports it."
    )
    note: str | None = Field(None, description="Why there is no heat map.")
    seen: str | None = Field(
        None,
        description="What the network sees, as a data URI: the whole image squeezed to a square, and equalized if the "
        "model has that contrast.",
    )
    window: GreyWindow | None = Field(
        None, description="The window that was applied; null for colours and for files that are not DICOM."
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


def predict_file(
    builder: RowBuilder, decoder: Decoder, name: str, content: bytes, options: Options = Options()
) -> Prediction:
    """Predict one file.

    Args:
        builder: decides, with an export from `open_model`.
        decoder: decodes the file.
        name: the file's name in the answer.
        content: the file's bytes.
        options: of the request.

    Raises:
        UserError: the image does not fit into the device's memory.
    """
    if not content:
        return unreadable(builder, name, "the file is empty (0 bytes)")
    model = builder.model
    try:
        decoded = decoder.decode(content, Wanted(model.size, MAX_SIDE if options.heatmap else None, options.window))
    except ImageError as error:
        return unreadable(builder, name, error.message)
    (batch,) = predict_batches(model, [decoded.pixels], 1)
    (result,) = builder.results(replace(batch, sources=[name]))
    prediction = _prediction(builder, result)
    if decoded.window is not None:
        prediction.window = GreyWindow(**asdict(decoded.window))
    if decoded.picture is not None and result.label is not None:
        prediction.image = _jpeg_uri(decoded.picture)
        prediction.seen = _jpeg_uri(Image.fromarray(model.seen(batch.images)[0, 0].numpy()))
        _add_heat_maps(prediction, model, batch.images, decoded.picture, result)
    return prediction


def _add_heat_maps(
    prediction: Prediction, model: Model, images: Tensor, picture: Image.Image, result: ImageResult
) -> None:
    """Draw the heat maps of an image (1, 1, size, size), 8-bit, over its picture, or note why there is none.

    Too close to the threshold, the class to detect is explained, and no class of an image that is unlike the training
    images.
    """
    if result.withheld is Withheld.UNLIKE:
        prediction.note = f"No heat map: the image is {result.reason}"
        return
    explained = result.label if result.withheld is None else model.positive
    called, *others = mapped_classes(model, model.classes.index(explained))
    cam, *other_cams = grad_cam(model, images.expand(1 + len(others), -1, -1, -1), [called, *others])  # (h, w) each
    if cam.any():
        prediction.heatmap = _jpeg_uri(overlay(picture, cam))
    else:
        prediction.note = f"No heat map: no region of the image supports {model.classes[called]}"
    if other_cams and other_cams[0].any():
        prediction.positive_heatmap = _jpeg_uri(overlay(picture, other_cams[0]))


def unreadable(builder: RowBuilder, name: str, reason: str) -> Prediction:
    """Return the answer for a file that cannot be read."""
    return _prediction(builder, builder.rule.unreadable(name, reason))


def _prediction(builder: RowBuilder, result: ImageResult) -> Prediction:
    return Prediction(
        file=result.path,
        prediction=result.prediction,
        uncertain=result.reason,
        probabilities=result.probabilities or None,
        threshold=result.threshold,
        unlike=result.unlike,
        error=result.error,
        row=builder.row(result),
    )


def _jpeg_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return data_uri(stream.getvalue(), "image/jpeg")
