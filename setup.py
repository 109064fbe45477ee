"""Packaging: a folder's path is its import path, so the repository's root is the package `oxfuse`.

pyproject.toml cannot say that, because the list of packages is found under each top-level folder and this file must stay
out of the wheel.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOTS = ("compiler", "passes", "runtime", "models", "artifacts")


class BuildWithoutSetup(build_py):  # type: ignore[misc]
    """Leaves setup.py out of the wheel: setuptools takes it for a module of the package, since both stand in the root."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [m for m in super().find_package_modules(package, package_dir) if m[1] not in ("setup", "conftest")]


setup(
    package_dir={"oxfuse": "."},
    packages=["oxfuse"]
    + [f"oxfuse.{root}" for root in ROOTS]
    + [f"oxfuse.{root}.{p}" for root in ROOTS for p in find_packages(root)],
    cmdclass={"build_py": BuildWithoutSetup},
)
