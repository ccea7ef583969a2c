"""What pyproject.toml cannot say: packages are found by themselves, and one lies elsewhere."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["samlib", "samlib.*"]), "samlib.published"])
