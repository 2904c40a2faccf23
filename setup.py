"""Packaging of kd_plugin.

fairseq is deliberately no hard dependency: two distributions provide it, and depending on one
would overwrite the other that a user already has. `pip install .[fairseq]` brings the one that
fits this Python.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="kd_plugin",
    version="0.1.0",
    description="Knowledge distillation of translation models as a fairseq --user-dir plugin",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author="kd_plugin authors",
    # 3.8: the oldest Python with a prebuilt fairseq 0.12.2; 3.13: no prebuilt fairseq at all.
    python_requires=">=3.8,<3.13",
    packages=find_packages(include=["kd_plugin", "kd_plugin.*"]),
    # Ranges are what the tests passed with. A lower bound is the oldest release tried, for the
    # reason that is given or for none; an upper one the next that may break what they showed.
    install_requires=[
        # 1.12 and 2.13 are tested. Later ones are newer than any fairseq was ever run with, and
        # without a bound pip brings several GB of the newest CUDA builds.
        "torch>=1.12,<2.14",
        # 1.21: numpy.typing as matplotlib's Pillow needs it. What goes with older Pythons was
        # compiled for numpy 1: with numpy 2, torch 1.12 says that numpy is not available.
        "numpy>=1.21,<2; python_version < '3.11'",
        "numpy>=1.23,<3; python_version >= '3.11'",
        # 2.0: its metric classes, with the signatures that the tables show.
        "sacrebleu>=2.0,<3",
        "sentencepiece>=0.1.96,<0.3",
        "tqdm>=4.60,<5",
        # 3.5: the first with constrained layouts that fairseq-kd-report's pictures need; 3.7 is the
        # last for Python 3.8.
        "matplotlib>=3.5,<4",
    ],
    extras_require={
        "fairseq": [
            # fairseq's main branch as a wheel. Imports as `fairseq`.
            "ve-fairseq==0.12.3; python_version >= '3.11'",
            # The last official release; it cannot be imported on Python 3.11 and later.
            "fairseq==0.12.2; python_version < '3.11'",
        ],
        # fairseq-kd-sequences --engine ctranslate2. 4.0: its converters for both ends of fairseq.
        "ctranslate2": ["ctranslate2>=4.0,<5"],
        # fairseq-kd-sequences --import of .zst files. 0.19: decompressors that know the end.
        "zstd": ["zstandard>=0.19,<1"],
        # Of fairseq-kd-sequences: chrF of all pairs of hypotheses, equal to sacreBLEU's; and which
        # language a text is in. The oldest are the last ones for Python 3.8.
        "mbr": ["fastchrf>=0.1,<0.3"],
        "languages": ["py3langid>=0.3,<0.5"],
        # fairseq-kd-report --metrics rouge and wer. 0.1.2: the first whose scorer takes a
        # tokenizer; 3.0: the first with process_words.
        "rouge": ["rouge-score>=0.1.2,<0.2"],
        "wer": ["jiwer>=3,<5"],
        # fairseq-kd-sequences with a tokenizer or a model of Hugging Face's, and
        # fairseq-kd-export --format transformers. 4.46: the last for
        # Python 3.8, with torch 1.12; 4.57: tried with torch 2.13. 5 imports torchaudio with every
        # model, and ve-fairseq brings one that need not fit torch. safetensors: what weights are
        # written in for the converter.
        "transformers": ["transformers>=4.46,<5", "safetensors>=0.4,<1", "ctranslate2>=4.0,<5"],
        # ONNX files of such a folder (docs/guides/export.md), for transformers 4. accelerate finds
        # weights that are there twice (1.15 was tried).
        "onnx": [
            "optimum-onnx[onnxruntime]>=0.1,<0.2; python_version >= '3.9'",
            "accelerate>=1.0,<2; python_version >= '3.9'",
        ],
        # What recipes/corpus.py phrases its sentences with. 2.12: format_compact_decimal for all
        # locales; 0.5.12: number words of all its languages on Python 3.8 and later.
        "recipes": ["Babel>=2.12,<3", "num2words>=0.5.12,<0.6", "ctranslate2>=4.0,<5"],
        "test": [
            "pytest>=7,<10",
            "hypothesis>=6.30,<7",
            "pytest-xdist>=3.3,<4",
            # Fixed minor version, so that a new rule never breaks an old commit.
            "ruff>=0.8,<0.9",
            # 1.14: the last mypy that runs on Python 3.8.
            "mypy>=1.11,<1.15",
            # 2.6: earlier ones break fairseq's import beside today's protobuf.
            "tensorboardX>=2.6,<3",
            "fastchrf>=0.1,<0.3",
            "py3langid>=0.3,<0.5",
            "rouge-score>=0.1.2,<0.2",
            "jiwer>=3,<5",
        ],
    },
    entry_points={
        "console_scripts": [
            "fairseq-kd-benchmark=kd_plugin.commands.benchmark:main",
            "fairseq-kd-cache=kd_plugin.commands.cache:main",
            "fairseq-kd-export=kd_plugin.commands.export:main",
            "fairseq-kd-init=kd_plugin.commands.init:main",
            "fairseq-kd-report=kd_plugin.commands.report:main",
            "fairseq-kd-sequences=kd_plugin.commands.sequences:main",
            "fairseq-kd-vocabulary=kd_plugin.commands.vocabulary:main",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.8",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
