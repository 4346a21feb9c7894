"""How close a student's features are to its teacher's."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS
from prettytable import PrettyTable


@METRICS.register_module()
class DistillationMetric(BaseMetric):
    """Relative error and cosine similarity of every compared layer, on held-out images.

    The relative error of a layer is ``|student - teacher| / |teacher|``, norms over all channels,
    tokens and images; the cosine is the mean over tokens. Logs them as a table, and returns them by
    kind of tap and layer, ``mixer/error_00``, ``mixer/cosine_00`` and so on, with
    ``mixer/error_mean`` and ``mixer/error_max``; the smaller, the better.

    Takes what a distiller returns in "predict" mode, see
    :class:`cgspn_seg.models.distillation.Distiller`.
    """

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Keeps what was found in some images."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Sums over all images."""
        metrics: dict[str, float] = {}
        columns: dict[str, list[float]] = {}
        for tap in results[0]:
            layers = results[0][tap]["layers"].tolist()
            sums = {
                key: torch.stack([result[tap][key] for result in results]).double().sum(dim=0)
                for key in ("squared_error", "squared_norm", "cosine")
            }
            errors = (sums["squared_error"] / sums["squared_norm"].clamp_min(1e-30)).sqrt().tolist()
            cosines = (sums["cosine"] / len(results)).tolist()
            for name, values in (("error", errors), ("cosine", cosines)):
                columns[f"{tap} {name}"] = values
                metrics |= {
                    f"{tap}/{name}_{layer:02}": value
                    for layer, value in zip(layers, values, strict=True)
                }
            metrics[f"{tap}/error_mean"] = sum(errors) / len(errors)
            metrics[f"{tap}/error_max"] = max(errors)
        table = PrettyTable(["Layer", *columns])
        for layer, *row in zip(layers, *columns.values(), strict=True):
            table.add_row([layer, *(f"{value:.4f}" for value in row)])
        print_log(f"Student against teacher, {len(results)} images:\n{table}", logger="current")
        return metrics
