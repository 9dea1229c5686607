"""The one table of tolerances. They are never widened to make a run green."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerances:
    """Largest errors that tests allow."""

    value_float32: float = 1e-5
    """Relative L2 error of an operation's value in float32 against float64."""
    value_float64: float = 1e-10
    """Relative error against a closed form in float64."""
    kernel_value: float = 1e-6
    """Relative L2 error of a native kernel's value in float32 against the reference in float64."""
    kernel_gradient: float = 1e-5
    """The same of its gradients."""
    kernel_gradient_at_steps: float = 1e-4
    """The same where two images share a step much higher than their texture: the gradient is a small difference there."""
    half: float = 1e-2
    """Relative L2 error of values from half-precision inputs."""
    points_mm: float = 1e-3
    """Error of mapped points, fields in float32."""
    inverse_mm: float = 2e-2
    """Distance of T(T^-1(y)) from y."""
    flow_inverse_voxels: float = 0.02
    """Distance of exp(-v)(exp(v)(x)) from x, in voxels of the velocity's lattice: it is interpolated linearly."""
    itk_intensity: float = 1e-3
    """Difference from SimpleITK's resampling, as a fraction of the intensity range."""
