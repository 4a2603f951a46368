"""Class names of the MedMNIST sets, whose files hold only numbers (source: medmnist 3.0.2, info.py)."""

# pixels; volumes have 28 or 64. The file name has the side if it is not 28: pneumoniamnist_64.npz
SIDES = (28, 64, 128, 224)

_ORGANS = (
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; pancreas; spleen"
)
_NAMES = {  # in the order of the labels, separated by "; "
    "pathmnist": (
        "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; cancer-associated "
        "stroma; colorectal adenocarcinoma epithelium"
    ),
    "chestmnist": (
        "atelectasis; cardiomegaly; effusion; infiltration; mass; nodule; pneumonia; pneumothorax; consolidation; "
        "edema; emphysema; fibrosis; pleural; hernia"
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; benign keratosis-like lesions; "
        "dermatofibroma; melanoma; melanocytic nevi; vascular lesions"
    ),
    "octmnist": "choroidal neovascularization; diabetic macular edema; drusen; normal",
    "pneumoniamnist": "normal; pneumonia",
    "retinamnist": "0; 1; 2; 3; 4",
    "breastmnist": "malignant; normal, benign",
    "bloodmnist": (
        "basophil; eosinophil; erythroblast; immature granulocytes(myelocytes, metamyelocytes and promyelocytes); "
        "lymphocyte; monocyte; neutrophil; platelet"
    ),
    "tissuemnist": (
        "Collecting Duct, Connecting Tubule; Distal Convoluted Tubule; Glomerular endothelial cells; Interstitial "
        "endothelial cells; Leukocytes; Podocytes; Proximal Tubule Segments; Thick Ascending Limb"
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
    "organmnist3d": (  # in another order than the flat sets
        "liver; kidney-right; kidney-left; femur-right; femur-left; bladder; heart; lung-right; lung-left; spleen; "
        "pancreas"
    ),
    "nodulemnist3d": "benign; malignant",
    "adrenalmnist3d": "normal; hyperplasia",
    "fracturemnist3d": "buckle rib fracture; nondisplaced rib fracture; displaced rib fracture",
    "vesselmnist3d": "vessel; aneurysm",
    "synapsemnist3d": "inhibitory synapse; excitatory synapse",
}
CLASSES = {name: tuple(names.split("; ")) for name, names in _NAMES.items()}


def class_names(stem: str) -> tuple[str, ...] | None:
    """Class names of a MedMNIST file by its name without suffix, in the order of the labels; None for other files."""
    name, _, side = stem.lower().partition("_")
    return CLASSES.get(name) if side in ("", *map(str, SIDES[1:])) else None
