"""Sections `evaluate` and `utility`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medgen.config.base import Count, Positive, Section, Seed, Width, without_defaults


class LocalNetwork(Section):
    """A feature network from a local file: safetensors of a torchvision architecture, or TorchScript (docs/data.md)."""

    path: str  # relative to the project's folder
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    architecture: Literal["resnet18", "resnet34", "resnet50", "densenet121", "torchscript"]
    image_size: Width = 224  # images are resized to this side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of its training images, in [0, 1]
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class Utility(Section):
    """Test whether samples help to train a classifier, or a U-Net where masks are a condition (docs/measures.md)."""

    enabled: bool = False
    # shares of the train images of each class, or of those with a mask, that networks are trained on, besides all
    fractions: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (0.1, 0.3)
    repetitions: Annotated[int, Field(ge=2, le=100)] = 5  # trainings on each set of images, each with another seed
    steps: Count = 500  # number of steps of each training, whatever the number of images
    num_generated: Count = 2000  # samples to train on, equally many of each class, or for each mask of the train split
    seed: Seed = 0


class Evaluate(Section):
    """Evaluation on the test split."""

    num_generated: Count = 2000  # comparisons of models need many samples
    batch_size: Count = 64
    seed: Seed = 0
    grid_images: Count = 36
    # feature networks; inception adds IS, FID and KID (`medgen weights fetch inception`), local FID and KID
    extractors: tuple[Literal["domain", "inception", "local"], ...] = ("domain",)
    local: LocalNetwork | None = None
    # class whose test images are normal: metrics of how well all others are detected (docs/uses.md); None: no metrics
    normal_class: str | None = None
    save_images: bool = False  # write the compared images to artifacts/evaluation/images

    @model_serializer(mode="wrap")
    def _without_new_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, dump(self), "normal_class")

    @model_validator(mode="after")
    def _extractors_are_complete(self) -> Self:
        if "domain" not in self.extractors:
            raise ValueError(f"extractors must hold domain, found {list(self.extractors)}")
        if "local" in self.extractors and self.local is None:
            raise ValueError(
                "extractors hold local, but there is no section evaluate.local: {path, sha256, architecture}"
            )
        return self
