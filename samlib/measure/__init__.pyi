from .hessian import quadratic_form, spectral_density, top_eigenvalues, trace
from .interference import cosine, cross_task_linearity, effective_rank, normalised_accuracy, sign_conflict, xi
from .intervals import bootstrap, estimate, paired
from .landscape import above_chord, linearity_bound, losses_on_line, losses_on_plane, plane, random_directions
from .taylor import gradient, taylor_terms

__all__ = [
    "above_chord",
    "bootstrap",
    "cosine",
    "cross_task_linearity",
    "effective_rank",
    "gradient",
    "estimate",
    "linearity_bound",
    "losses_on_line",
    "losses_on_plane",
    "normalised_accuracy",
    "paired",
    "plane",
    "quadratic_form",
    "random_directions",
    "sign_conflict",
    "spectral_density",
    "taylor_terms",
    "top_eigenvalues",
    "trace",
    "xi",
]
