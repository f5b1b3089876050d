"""scikit-learn's grid search over C: `sklearn_grid.py FOLDER`, with X, y, fold, test_X, test_y as
.npy and grid.json."""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.svm import LinearSVC

warnings.filterwarnings("ignore")  # ConvergenceWarning at large C


def main(folder, workers):
    X, y, fold, test_X, test_y = (np.load(Path(folder) / f"{name}.npy") for name in ("X", "y", "fold", "test_X", "test_y"))
    grid = json.loads((Path(folder) / "grid.json").read_text())
    start = time.perf_counter()
    search = GridSearchCV(LinearSVC(random_state=0), {"C": grid}, cv=PredefinedSplit(fold), n_jobs=int(workers)).fit(X, y)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "C": search.best_params_["C"], "cv": search.best_score_, "test": search.score(test_X, test_y)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
