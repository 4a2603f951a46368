"""Write an image as PNG, TIFF, NIfTI or DICOM, with the intensities of the train images where these have a unit.

write_file = writer("nifti", info, "a generated image")
write_file(Path("image.nii.gz"), image)

No file contains a date, a patient or the name of a source file: the same image gives the same bytes.

Shapes: C channels, H W height and width, D depth of volumes.
"""

import gzip
import hashlib
import io
import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medgen import __version__
from medgen.config import IntensityWindow, Preprocess, unknown_name
from medgen.data.images import maximum, to_stored
from medgen.errors import UserError
from medgen.ingest.formats.raw import Affine
from medgen.io import write_atomic
from medgen.models.bundle import BundleInfo
from medgen.reports.figures import encode_deep, write_image

SUFFIXES = {"png": ".png", "png16": ".png", "tiff": ".tif", "nifti": ".nii.gz", "dicom": ".dcm"}  # by format
_SLICE_AXES = {  # volume.axis -> axis of X Y Z across the slice, and the directions of X Y Z along rows and columns
    "sagittal": (0, (1.0, -1.0, -1.0)),
    "coronal": (1, (-1.0, 1.0, -1.0)),
    "axial": (2, (-1.0, -1.0, 1.0)),
}


class WriteImage(Protocol):
    """Function that writes an image (C, H, W) or volume (C, D, H, W), floats in [0, 1], to a path."""

    def __call__(self, path: Path, image: Tensor, affine: Affine | None = None) -> None:
        """`affine` is the place of a volume from indices of D, H and W; None: of a new volume."""


def default_format(info: BundleInfo) -> str:
    """The format that shows all of an image: png, or nifti of a volume."""
    return "nifti" if info.preprocess.has_volumes else "png"


def writer(kind: str, info: BundleInfo, description: str) -> WriteImage:
    """Function that writes images of a model in the format `kind`.

    - png, png16: grey values of 8 or 16 bits, black to white. Of a volume the three middle planes, side by side.
    - tiff: float32 intensities if the model's images have a scale, else grey values as the dataset stores them.
    - nifti: grey values as the dataset stores them, with the slope and intercept to intensities. The affine gives the
      directions in which the slices of the train volumes are shown; pixels are 1 x 1 x 1 and without a unit of length,
      because slices of different spacing are resized to one size. A volume has the directions and the voxel size of
      the train volumes (`preprocess.voxel_size`) in mm, or the place in the patient that it is given.
    - dicom: a Secondary Capture object as `nifti`, colours in 8 bits.

    Args:
        kind: a key of `SUFFIXES`.
        info: the model that the images are from.
        description: what an image is, for DICOM.

    Raises:
        UserError: there is no such format, or it has no colours or volumes and the model does.
    """
    if kind not in SUFFIXES:
        raise unknown_name("--format", kind, SUFFIXES)
    if info.preprocess.has_volumes and kind not in ("nifti", "png"):
        raise UserError(f"--format {kind}: this model generates volumes; expected nifti, or png for the middle planes")
    if kind == "nifti" and info.image_shape[0] == 3:
        raise UserError("--format nifti: this model generates colours; expected grey images. Use png, tiff or dicom")
    scale, bits = info.preprocess.scale, info.preprocess.bits

    def write(path: Path, image: Tensor, affine: Affine | None = None) -> None:
        match kind:
            case "png":
                write_image(path, image)
            case "png16":
                write_image(path, to_stored(image, 16))
            case "tiff":
                values = _intensities(image, scale) if scale else _pixels(to_stored(image, bits))
                write_atomic(path, encode_deep(".tif", values))
            case "nifti":
                stored = to_stored(image, bits)
                file = _nifti(_pixels(stored), info.preprocess, affine)
                file.header["descrip"] = f"synthetic image, medgen {__version__}"
                if scale is not None:
                    file.header.set_slope_inter(_slope(stored, scale), scale.low)
                    file.header["intent_name"] = scale.unit
                write_atomic(path, gzip.compress(file.to_bytes(), mtime=0))
            case "dicom":
                stored = to_stored(image, 8 if len(image) == 3 else bits)
                write_atomic(path, _dicom(stored, scale, info, description))

    return write


def map_suffix(info: BundleInfo) -> str:
    """End of the name of a file that `write_map` writes."""
    return SUFFIXES["nifti" if info.preprocess.has_volumes else "tiff"]


def write_map(path: Path, values: Tensor, info: BundleInfo, affine: Affine | None) -> None:
    """Write values (C, H, W) of pixels as a TIFF file of float32, or (1, D, H, W) of voxels as NIfTI, unscaled."""
    pixels = _pixels(values.float())
    if not info.preprocess.has_volumes:
        write_atomic(path, encode_deep(".tif", pixels))
        return
    file = _nifti(pixels, info.preprocess, affine)
    file.header["descrip"] = f"map of a model, medgen {__version__}"
    write_atomic(path, gzip.compress(file.to_bytes(), mtime=0))


def _pixels(image: Tensor) -> NDArray[Any]:
    """Image (C, H, W) as (H, W), or (H, W, 3) with colours; volume (1, D, H, W) as (D, H, W)."""
    pixels: NDArray[Any] = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)


def _intensities(image: Tensor, scale: IntensityWindow) -> NDArray[np.float32]:
    pixels = _pixels(image.double().clamp(0.0, 1.0))
    return (scale.low + pixels * (scale.high - scale.low)).astype(np.float32)


def _slope(stored: Tensor, scale: IntensityWindow) -> float:
    """Intensity per grey value."""
    return (scale.high - scale.low) / maximum(stored)


def _nifti(values: NDArray[Any], preprocess: Preprocess, affine: Affine | None) -> Any:
    """NIfTI image of a slice (H, W) or a volume (D, H, W), as a reader of the train files sees them upright."""
    import nibabel

    create: Any = nibabel.Nifti1Image  # without types
    across, directions = _SLICE_AXES[preprocess.volume.axis]
    if values.ndim == 2:
        voxels = np.expand_dims(values.T, across)  # the columns of an image are X or Y, its rows Y or Z
        return create(voxels, np.diag([*directions, 1.0]))
    order = [2, 1]  # of D H W along X Y Z
    order.insert(across, 0)
    if affine is None:  # all axes of a volume point down, to the back or to the right
        depth_height_width = preprocess.voxel_size or (1.0, 1.0, 1.0)
        in_patient = np.diag([*(-depth_height_width[axis] for axis in order), 1.0])
    else:
        in_patient = affine[:, [*order, 3]]
    image = create(values.transpose(order), in_patient)
    if affine is not None or preprocess.voxel_size is not None:
        image.header.set_xyzt_units("mm")
    return image


def _dicom(stored: Tensor, scale: IntensityWindow | None, info: BundleInfo, description: str) -> bytes:
    """A Secondary Capture object (PS3.3 A.8.1), marked as synthetic, of a patient of its own."""
    from pydicom import Dataset, dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    from pydicom.valuerep import DS

    pixels = _pixels(stored)
    content = hashlib.sha256(pixels.tobytes()).hexdigest()
    found: Any = Dataset()

    def uid(level: str) -> str:
        return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'medgen {info.run} {content} {level}').int}"  # PS3.5 B.2

    def number(value: float) -> Any:
        return DS(value, auto_format=True)

    found.SOPClassUID, found.SOPInstanceUID = SecondaryCaptureImageStorage, uid("instance")
    found.StudyInstanceUID, found.SeriesInstanceUID = uid("study"), uid("series")
    found.ImageType = ["DERIVED", "SECONDARY"]
    found.SyntheticData, found.ConversionType, found.ContentQualification = "YES", "SYN", "RESEARCH"
    found.DerivationDescription = found.ImageComments = (
        f"Synthetic: {description} of model {info.run} ({info.model.name}, medgen {__version__}). Not for diagnosis"
    )
    found.PatientName = found.PatientID = f"SYNTHETIC-{content[:12]}"  # images of one ID would count as one patient's
    found.PatientIdentityRemoved, found.DeidentificationMethod = "YES", "Image made by a model, without patient data"
    found.PatientBirthDate = found.PatientSex = found.StudyDate = found.StudyTime = found.StudyID = ""
    found.AccessionNumber = found.ReferringPhysicianName = found.PatientOrientation = ""
    found.Modality, found.SeriesNumber, found.InstanceNumber = "OT", 1, 1
    found.Manufacturer, found.SoftwareVersions = "medgen", __version__
    found.BurnedInAnnotation = "NO"
    found.SamplesPerPixel = len(stored)
    found.PhotometricInterpretation = "MONOCHROME2" if len(stored) == 1 else "RGB"
    if len(stored) == 3:
        found.PlanarConfiguration = 0
    found.Rows, found.Columns = pixels.shape[:2]
    found.BitsAllocated = found.BitsStored = 8 * pixels.itemsize
    found.HighBit, found.PixelRepresentation = found.BitsStored - 1, 0
    if scale is not None and len(stored) == 1:
        found.RescaleSlope, found.RescaleIntercept = number(_slope(stored, scale)), number(scale.low)
        found.RescaleType = scale.unit or "US"  # unspecified
        found.WindowCenter, found.WindowWidth = number((scale.low + scale.high) / 2), number(scale.high - scale.low)
        found.VOILUTFunction = "LINEAR_EXACT"
    data = pixels.tobytes()
    found.PixelData = data + b"\0" * (len(data) % 2)
    found["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    dcmwrite(buffer, found, enforce_file_format=True)
    return buffer.getvalue()
