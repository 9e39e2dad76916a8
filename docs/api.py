"""The pages of the API reference, written from the names that each room exports."""

import importlib
import inspect
import types
from pathlib import Path

PACKAGE = "pyro_flows_ext"

# Rooms in the order of the reference: title, introduction, and the groups of their names. Names in no group go to "Other".
ROOMS = {
    "guides": (
        "Guides",
        "Flow guides for Pyro models. :doc:`/which_guide` compares them.",
        {
            "Guides with an exact density": "AutoFlow AutoIAF AutoMAF AutoNSF AutoRealNVP AutoSylvester AutoPlanar "
            "AutoRadial AutoResidual",
            "Guides with a bound": "AutoCIF AutoHamiltonian",
            "Amortized guides": "AutoAmortizedFlow",
            "Reparametrisation": "CircularReparam",
        },
    ),
    "infer": (
        "Inference",
        "Training of guides and densities, bounds, and importance weights.",
        {
            "Guides": "fit FitResult TrainingState importance ImportanceResult refine RefineResult warm_start WarmStart",
            "Densities": "fit_density DensityFitResult DensityTrainingState",
            "Bounds": "ImportanceWeightedELBO AnnealedELBO linear cosine rezende",
            "Compiled steps": "CompiledSVI",
            "Logging callbacks": "CSVLogger TensorBoardLogger",
        },
    ),
    "flows": (
        "Flows by name",
        "Densities by the names of their papers. :doc:`/which_flow` compares them.",
        {
            "Vectors": "NSF MAF RealNVP NICE IAF CircularNSF Residual Planar Radial Sylvester",
            "Latent indices, order and noise": "CIF NestedDropout VAE",
            "Images": "Glow RealNVPImage NSFImage",
            "Registry": "FLOWS Flow Recipe make",
        },
    ),
    "distributions": (
        "Densities",
        "Densities are modules and Pyro distributions at once. :doc:`/which_flow` compares them.",
        {
            "Flows": "Density TransformedDensity FlowDistribution ContinuouslyIndexedFlow NestedDropoutFlow FlowVAE "
            "Dequantized UniformAngles check_guide_site",
            "Images": "MultiScaleFlow",
            "Test data and energies": "TOYS Toy ENERGIES Energy",
        },
    ),
    "transforms": (
        "Transforms",
        "Invertible maps with parameters. :doc:`/transforms` has their formulas and costs in one table.",
        {
            "Base classes": "FlowTransform InverseFlow ComposeFlow IndexedTransform",
            "Presets": "nsf maf iaf realnvp nice glow_vector circular_nsf residual sylvester",
            "Planar, radial and Sylvester": "Planar Radial Sylvester OrthogonalSylvester HouseholderSylvester "
            "TriangularSylvester",
            "Coupling and autoregressive": "Coupling Autoregressive Transformer Affine Additive RationalQuadratic "
            "CircularSpline",
            "Linear": "LULinear QRLinear HouseholderLinear Permute",
            "Elementwise and normalisation": "ElementwiseAffine Whitening SinhArcsinh ActNorm BatchNorm",
            "Residual and Hamiltonian": "ResidualFlow LogDetNoise Leapfrog",
            "Images": "Invertible1x1Conv Pixelwise Squeeze MultiScale LogitPreprocess Standardize Pad",
            "Helpers named as in Pyro": "planar radial permute batchnorm affine_coupling affine_autoregressive "
            "spline_coupling spline_autoregressive conditional_planar conditional_radial "
            "conditional_affine_coupling conditional_affine_autoregressive conditional_spline_autoregressive",
        },
    ),
    "diagnostics": (
        "Diagnostics",
        "Importance weights, evidence, gaps, calibration, summaries and export. Plots are in the modules below.",
        {
            "Summaries and export": "summary ParameterSummary flatten_samples to_inference_data save_netcdf",
            "Evidence and gaps": "log_evidence_ais annealed_importance_sampling AISResult gaps InferenceGaps",
            "Calibration and scores": "simulation_based_calibration CalibrationResult rank_histogram pit crps",
            "Importance weights": "importance ImportanceResult",
            "Numerics of a transform": "round_trip_error jacobian_condition_number lipschitz_estimate LipschitzEstimate",
        },
    ),
    "results": (
        "Results in files",
        "Guides and densities in files.",
        {"Saving and loading": "save load SavedDensity SavedGuide"},
    ),
    "datasets": ("Data sets", "Rows and named tensors from files and by name.", {}),
    "testing": (
        "Contract suite",
        "Checks for transforms and densities of your own; the package holds its own to them.",
        {
            "Whole contracts": "check_transform check_density_contract POINTS DENSITY_POINTS Point ContractError perturb"
        },
    ),
    "programs": (
        "Programs",
        "Pyro programs as functions. For developers of guides and bounds.",
        {},
    ),
    "nn": ("Networks", "Networks that emit parameters. For developers of transforms.", {}),
    "ops": ("Operations", "Stateless functions on tensors. For developers of transforms.", {}),
}


def public_names(room: str) -> list[str]:
    """The names that a room exports, without the modules in it."""
    module = importlib.import_module(f"{PACKAGE}.{room}")
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return [name for name in names if not isinstance(getattr(module, name), types.ModuleType)]


def address(room: str, name: str) -> str:
    """Where the reference documents a name: in its own room where another one exports it too."""
    home = (
        getattr(getattr(importlib.import_module(f"{PACKAGE}.{room}"), name), "__module__", None)
        or ""
    )
    own = home.removeprefix(f"{PACKAGE}.").split(".")[0]
    if own in ROOMS and own != room and name in public_names(own):
        room = own
    return f"{PACKAGE}.{room}.{name}"


def addresses() -> dict[str, str]:
    """Every public name and its address; of two objects of one name the one in the earlier room."""
    found: dict[str, str] = {}
    for room in ROOMS:
        for name in public_names(room):
            found.setdefault(name, address(room, name))
    return found


def groups(room: str) -> dict[str, list[str]]:
    """The names of a room by title, each once."""
    named = {title: names.split() for title, names in ROOMS[room][2].items()}
    listed = {name for names in named.values() for name in names}
    other = [name for name in public_names(room) if name not in listed]
    if other:
        named["Other" if named else ""] = other
    return named


def _heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""] if text else []


def _entry(room: str, name: str) -> list[str]:
    value = getattr(importlib.import_module(f"{PACKAGE}.{room}"), name)
    if address(room, name) != f"{PACKAGE}.{room}.{name}":
        return []
    if isinstance(value, type):
        return [f".. autoclass:: {name}", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}", ""]
    if isinstance(value, dict):
        keys = ", ".join(f"``{key}``" for key in value)
        return [f".. py:data:: {name}", "", f"   A dictionary with the keys {keys}.", ""]
    return [f".. py:data:: {name}", ""]


def room_page(room: str) -> str:
    """The page of one room: for each group a table of contents and the entries."""
    title, introduction, _ = ROOMS[room]
    lines = [*_heading(title, "="), introduction, "", f".. currentmodule:: {PACKAGE}.{room}", ""]
    for group, names in groups(room).items():
        lines += _heading(group, "-")
        lines += [".. autosummary::", "   :nosignatures:", ""]
        own = f"{PACKAGE}.{room}."
        lines += [f"   ~{address(room, name)}".replace(f"~{own}", "") for name in names] + [""]
        for name in names:
            lines += _entry(room, name)
    if room == "diagnostics":
        for module in ("plots", "plots_images"):
            lines += [
                *_heading(f"{room}.{module}", "-"),
                f".. automodule:: {PACKAGE}.{room}.{module}",
                "",
            ]
    return "\n".join(lines)


def front_door_page() -> str:
    """The names of the package itself, each a link to its entry."""
    package = importlib.import_module(PACKAGE)
    lines = _heading("Top-level names", "=")
    lines += [
        "``import pyro_flows_ext as pf``, and these names are imported when they are first used.",
        "",
    ]
    lines += [".. list-table::", "   :widths: 40 60", ""]
    for name in package.__all__:
        if isinstance(getattr(package, name), types.ModuleType):
            target = f":doc:`{name}`" if name in ROOMS else f"``{PACKAGE}.{name}``"
        else:
            home = next(room for room in ROOMS if name in public_names(room))
            target = f":py:obj:`{address(home, name)}`"
        lines += [f"   * - ``pf.{name}``", f"     - {target}"]
    return "\n".join([*lines, ""])


def write(folder: Path) -> None:
    """Writes all pages, the index first."""
    folder.mkdir(exist_ok=True)
    index = [
        *_heading("API reference", "="),
        "Every public name, by the package that it lives in.",
        "",
    ]
    index += [
        ".. toctree::",
        "   :maxdepth: 1",
        "",
        "   front_door",
        *(f"   {room}" for room in ROOMS),
        "",
    ]
    pages = {"index": "\n".join(index), "front_door": front_door_page()}
    pages.update({room: room_page(room) for room in ROOMS})
    for name, text in pages.items():
        (folder / f"{name}.rst").write_text(text)
