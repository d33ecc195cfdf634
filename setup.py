"""Maps the folder kernels/ to the package tuned_lens_fast.kernels; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "tuned_lens_fast",
        "tuned_lens_fast.engines",
        "tuned_lens_fast.kernels",
        "tuned_lens_fast.nn",
        "tuned_lens_fast.plotting",
    ],
    package_dir={"tuned_lens_fast": "tuned_lens_fast", "tuned_lens_fast.kernels": "kernels"},
    package_data={"tuned_lens_fast": ["py.typed"]},
)
