"""Pyro programs as functions: traces, latents, particles, and the log joint."""

from .arguments import check_finite_log_joint, describe_nonfinite, nonfinite_arguments
from .evaluation import completed_latents, value_and_gradient
from .following import Following, needs_run
from .latents import (
    JacobianDelta,
    Latent,
    check_inside,
    constrain,
    leading_shape,
    read_latent,
    split,
    to_support,
    unconstrain,
)
from .log_joint import LogJoint
from .masks import is_maskable, is_masked
from .match import check_density, check_latents, check_modules, check_shapes, traces_of
from .particles import Particles, draw_particles
from .raising import ERRORS
from .subsamples import SparseSubsample, draw_subsample
from .supports import (
    CIRCULAR,
    SPHERICAL,
    bijection,
    check_log_prob,
    support_of,
    tensors_of,
    true_support,
)
from .traces import (
    PARTICLES,
    Program,
    Site,
    evaluation_mode,
    in_particles,
    is_delta,
    is_latent,
    latent_sites,
    log_prob_by_particle,
    nesting_of,
    nonfinite_ignored,
    recorded_parameters,
    sample_sites,
)
from .vectorization import plate_nesting, vectorization_error

__all__ = [
    "CIRCULAR",
    "ERRORS",
    "PARTICLES",
    "SPHERICAL",
    "Following",
    "JacobianDelta",
    "Latent",
    "LogJoint",
    "Particles",
    "Program",
    "Site",
    "SparseSubsample",
    "bijection",
    "check_density",
    "check_finite_log_joint",
    "check_inside",
    "check_latents",
    "check_log_prob",
    "check_modules",
    "check_shapes",
    "completed_latents",
    "constrain",
    "describe_nonfinite",
    "draw_particles",
    "draw_subsample",
    "evaluation_mode",
    "in_particles",
    "is_delta",
    "is_latent",
    "is_maskable",
    "is_masked",
    "latent_sites",
    "leading_shape",
    "log_prob_by_particle",
    "needs_run",
    "nesting_of",
    "nonfinite_arguments",
    "nonfinite_ignored",
    "plate_nesting",
    "read_latent",
    "recorded_parameters",
    "sample_sites",
    "split",
    "support_of",
    "tensors_of",
    "to_support",
    "traces_of",
    "true_support",
    "unconstrain",
    "value_and_gradient",
    "vectorization_error",
]
