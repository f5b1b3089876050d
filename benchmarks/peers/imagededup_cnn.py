"""imagededup's CNN method on given features: `imagededup_cnn.py FEATURES.npy THRESHOLD WORKERS`.

WORKERS are the processes of its similarity computation (0: none). The network is not used: the
features are given.
"""

import json
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import numpy as np
import torch
from imagededup.methods import CNN
from imagededup.utils import CustomModel


def main(path, threshold, workers):
    features = np.load(path)
    method = CNN(verbose=False, model_config=CustomModel(model=torch.nn.Identity(), transform=lambda image: image, name="none"))
    names = {f"{i:06}.jpg": row for i, row in enumerate(features)}
    start = time.perf_counter()
    found = method.find_duplicates(
        encoding_map=names, min_similarity_threshold=float(threshold), num_sim_workers=int(workers)
    )
    seconds = time.perf_counter() - start
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "pairs": sum(map(len, found.values())) // 2, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
