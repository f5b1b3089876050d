"""Regraft: a new head on a pretrained image backbone, judged beside its SVM baseline.

import finetune
run = finetune.fit("photos/")
finetune.load(run.path).predict(["img.jpg"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.classifier import Classifier, Predictions
    from finetune.estimators import RegraftClassifier, RegraftFeatures
    from finetune.job import advise, fit, load
    from finetune.training.preflight import preflight

__all__ = [
    "Classifier",
    "Predictions",
    "RegraftClassifier",
    "RegraftFeatures",
    "UserError",
    "advise",
    "fit",
    "load",
    "preflight",
]


def __getattr__(name: str) -> Any:
    # Imported at first use, so that `import finetune` and `finetune --help` load no heavy library.
    import importlib

    homes = {
        **dict.fromkeys(("fit", "load", "advise"), "job"),
        **dict.fromkeys(("Classifier", "Predictions"), "classifier"),
        **dict.fromkeys(("RegraftClassifier", "RegraftFeatures"), "estimators"),
        "preflight": "training.preflight",
    }
    if name in homes:
        return getattr(importlib.import_module(f"finetune.{homes[name]}"), name)
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")
