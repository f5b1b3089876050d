"""The plain timm way to features: its eval transform, a DataLoader with 2 workers, inference_mode,
float32."""

import json
import sys
import time
from pathlib import Path

import timm
import torch
from PIL import Image


class Files(torch.utils.data.Dataset):
    def __init__(self, folder, transform):
        self.paths, self.transform = sorted(Path(folder).rglob("*.jpg")), transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def main(folder, name):
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    data = Files(folder, transform)
    start = time.perf_counter()
    with torch.inference_mode():
        features = [model(batch) for batch in torch.utils.data.DataLoader(data, batch_size=32, num_workers=2)]
    n = sum(len(f) for f in features)
    print(json.dumps({"n": n, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
