"""The public names are an inventory: whoever changes them changes this list, and the changelog."""

from __future__ import annotations

import subprocess
import sys

import pytest

import patchreg

INVENTORY = {
    "patchreg": ["Grid", "Registration", "Volume", "__version__", "apply_transform", "load_model", "losses", "ops", "register", "transforms"],
    "patchreg.ops": ["compose", "integrate", "lncc", "mutual_information", "warp"],
    "patchreg.transforms": ["Affine", "Composite", "DisplacementField", "Transform", "VelocityField"],
    "patchreg.losses": [
        "LNCC", "MSE", "BendingEnergy", "Diffusion", "LabelSet", "MutualInformation", "SoftDice", "centroid_distance_mm", "dice",
        "label_centroids", "target_error_mm",
    ],
    "patchreg.networks": [
        "ESPCN", "Elongated", "KeypointAffine", "ReversibleBlock", "ReversibleConvBlock", "ReversibleSequence", "SwinSize", "TransMorph",
        "TransMorphAffine", "UNet", "VoxelMorph", "elongate",
    ],
    "patchreg.cascade": ["Normalization", "PatchCascade", "Prepared", "PreparedPair", "Result", "Stage", "StageOutput", "shared_grid"],
    "patchreg.datasets": [
        "BRAIN_LABELS", "ManifestDataModule", "Pair", "PairDataModule", "SuperResolutionDataModule", "Synthesis", "SynthesisDataModule", "WorldAugmentation", "phantom",
    ],
    "patchreg.training": ["Objective", "Optimization", "PeakMemory", "Pictures", "RegistrationModule", "SaveRun", "SuperResolutionModule", "TransformWriter"],
    "patchreg.inference": [
        "Refinement", "Registration", "apply_transform", "evaluate_files", "load_model", "model_cards", "register",
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", INVENTORY)
def test_inventory(module):
    import importlib

    found = patchreg.transforms if module == "patchreg.transforms" else importlib.import_module(module)
    assert sorted(found.__all__) == sorted(INVENTORY[module])
    for name in found.__all__:
        thing = getattr(found, name)
        documented = callable(thing) and not name.isupper()
        assert not documented or (thing.__doc__ or "").strip(), f"{module}.{name} has no docstring"


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'registre'"):
        _ = patchreg.registre


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    loaded = run(
        "import sys, patchreg; print([m for m in ('torch', 'lightning', 'torchio', 'SimpleITK') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom patchreg.cli.main import main\n"
        "try:\n    main(['register', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'lightning', 'torchio', 'SimpleITK') if m in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "[]"


def test_registering_does_not_load_lightning_or_torchio():
    code = (
        "import sys, patchreg; patchreg.register; print([m for m in ('torchio', 'wandb', 'timm') if m in sys.modules])"
    )
    assert run(code) == "[]"
