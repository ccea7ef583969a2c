"""Merging fine-tuned weights: `METHODS` lists the methods; each is a function of the same name.

Data-free methods are called as `method(theta_0, thetas, ...)`, those that look at images as
`method(encoder, theta_0, thetas, images, heads, ...)`. `python -m samlib.merge` merges files.
"""

from __future__ import annotations

from samlib.merge.lam import accuracy_curve, choose_lambda
from samlib.merge.linear import average, consensus, dare, model_stock, task_arithmetic
from samlib.merge.method import METHODS, Method
from samlib.merge.spectral import iso_c, iso_cts, tsv_m, wudi
from samlib.merge.ties import ties
from samlib.merge.with_images import adamerging, fisher, regmean
from samlib.model.theta import task_vector

__all__ = [
    "METHODS",
    "Method",
    "accuracy_curve",
    "adamerging",
    "average",
    "choose_lambda",
    "consensus",
    "dare",
    "fisher",
    "iso_c",
    "iso_cts",
    "model_stock",
    "regmean",
    "task_arithmetic",
    "task_vector",
    "ties",
    "tsv_m",
    "wudi",
]
