"""Packaging. Runtime dependencies live in requirements.txt, so that `pip install -r` and `pip install .` agree."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent


def _requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stripped = (line.split("#", 1)[0].strip() for line in lines)
    return [line for line in stripped if line]


def _version() -> str:
    source = (ROOT / "dmosnet_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "([^"]+)"', source)
    if match is None:
        raise RuntimeError("dmosnet_jax/__init__.py has no __version__")
    return match.group(1)


# The CPU build is a third of the size and all that conversion needs; it exists for Linux on x86-64.
_CPU_WHEEL = "platform_machine == 'x86_64' and sys_platform == 'linux'"
_NO_CPU_WHEEL = "platform_machine != 'x86_64' or sys_platform != 'linux'"
CONVERT = [
    f"tensorflow-cpu>=2.20; {_CPU_WHEEL}",
    f"tensorflow>=2.20; {_NO_CPU_WHEEL}",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources>=6.4",  # tensorflow-datasets needs it and does not declare it
    "apache-beam>=2.65",
    "h5py>=3.11",
    "scipy>=1.14",
]
# Data behind URLs; for other storages than Google's, their fsspec package (s3fs, adlfs, ...).
REMOTE = ["fsspec>=2024.6", "gcsfs>=2024.6"]
# The page of `python -m dmosnet_jax.demo`.
DEMO = ["starlette>=0.40", "uvicorn>=0.30", "python-multipart>=0.0.18"]
# The site of `docs/`; MkDocs 2 is another program.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
TEST = [
    "beartype>=0.21",  # checks array shapes while tests run: tests/conftest.py
    "pytest>=8.3",
    "pytest-xdist>=3.7",
    "packaging>=24",
    "pyyaml>=6",  # the nav of the site, the citation
    "setuptools>=70.1",  # builds the wheel under test; older ones need another package for that
    "ruff>=0.9",
    "mypy>=1.14",
    "scikit-learn>=1.6",
    # Exported files as their users read them.
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "opencv-python-headless>=4.10",
    # The page, as a program and in a browser (the system's Chromium).
    *DEMO,
    "httpx>=0.27",
    "playwright>=1.49",
    "distributed>=2024.4.2",  # a cluster for the conversion by Beam
    "lmdb>=1.5",  # writes the LMDB of the tests; reading one needs no library
]

setuptools.setup(
    name="dmosnet_jax",
    version=_version(),
    description="DM-OSNet person re-identification with SpCL self-supervised pre-training, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *setuptools.find_packages(include=["dmosnet_jax", "dmosnet_jax.*", "data_prep", "data_prep.*"]),
        "dmosnet_jax.configs",
    ],
    # Elsewhere than in a checkout, `--config=configs/<file>.py` is found inside the package.
    package_dir={"dmosnet_jax.configs": "configs"},
    package_data={"dmosnet_jax": ["py.typed", "evaluation/report.html", "export/model_card.md", "demo/page.html"]},
    entry_points={
        "console_scripts": [
            "dmosnet = dmosnet_jax.main:main",
            "dmosnet-convert = data_prep.convert:start",
            "dmosnet-lint = data_prep.lint:start",
        ]
    },
    python_requires=">=3.11",
    install_requires=_requirements(),
    extras_require={
        "convert": CONVERT,
        # The `tfds` command itself, whose sub-commands tensorflow-datasets imports all at once.
        "tfds": [*CONVERT, "mlcroissant>=1.0"],
        "remote": REMOTE,
        "demo": DEMO,
        "docs": DOCS,
        "test": [*TEST, *CONVERT, "fsspec>=2024.6"],
        # Only to compare with the PyTorch implementations; of torchreid, single modules are loaded by file path.
        "peers": ["torch>=2.6", "torchreid>=0.2.5"],
    },
)
