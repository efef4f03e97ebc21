"""What pyproject.toml cannot say: the gin files of the top folder are installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["flm_jax", "flm_jax.*"]), "flm_jax.gin_configs"],
    package_dir={"flm_jax.gin_configs": "gin_configs"},
    package_data={"flm_jax": ["py.typed"], "flm_jax.gin_configs": ["*/*.gin"]},
)
