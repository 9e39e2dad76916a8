"""Pyro programs as functions: traces, latents, particles, and the log joint."""

from .latents import (
    JacobianDelta,
    Latent,
    bijection,
    check_continuous,
    check_inside,
    constrain,
    read_latent,
    split,
    unconstrain,
)
from .log_joint import LogJoint, value_and_gradient
from .match import check_density, check_latents, check_shapes, traces_of
from .particles import Particles, draw_particles
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
    sample_sites,
)
from .vectorization import plate_nesting, vectorization_error

__all__ = [
    "PARTICLES",
    "JacobianDelta",
    "Latent",
    "LogJoint",
    "Particles",
    "Program",
    "Site",
    "bijection",
    "check_continuous",
    "check_density",
    "check_inside",
    "check_latents",
    "check_shapes",
    "constrain",
    "draw_particles",
    "evaluation_mode",
    "in_particles",
    "is_delta",
    "is_latent",
    "latent_sites",
    "log_prob_by_particle",
    "nesting_of",
    "nonfinite_ignored",
    "plate_nesting",
    "read_latent",
    "sample_sites",
    "split",
    "traces_of",
    "unconstrain",
    "value_and_gradient",
    "vectorization_error",
]
