"""Validates files of cluster/ with the schemas of those who read them; runs in .venv-launchers: schemas.py FILE ...

A JobSet, a TrainingRuntime and a TrainJob by the models of Kubeflow Trainer's API, which include JobSet's; the Jobs in
them also by Kubernetes' own schemas; a file of SkyPilot by SkyPilot.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

# The oldest and the newest one that the validator knows and that the fields need.
KUBERNETES_VERSIONS = ("1.31", "1.37")
MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


def unknown(given: Any, understood: Any, where: str) -> Iterator[str]:
    """Fields that a model has dropped because it does not know them."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(understood, dict) or key not in understood:
                yield f"{where}.{key}: no such field"
            else:
                yield from unknown(value, understood[key], f"{where}.{key}")
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from unknown(value, understood[index], f"{where}[{index}]")


def kubernetes_faults(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one document of a file for Kubernetes."""
    kind = document["kind"]
    try:
        model = MODELS[kind].from_dict(document)
    except ValueError as error:
        yield f"{kind}: {error}"
        return
    yield from unknown(document, model.to_dict(), kind)
    spec = document["spec"]
    jobs = spec.get("replicatedJobs", spec.get("template", {}).get("spec", {}).get("replicatedJobs", []))
    for entry in jobs:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": entry["name"]}} | entry["template"]
        job["metadata"] = {"name": entry["name"]} | entry["template"].get("metadata", {})
        for version in KUBERNETES_VERSIONS:
            try:
                kubernetes_validate.validate(job, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"Job {entry['name']}, Kubernetes {version}: {error.message} at {list(error.path)}"


def skypilot_faults(path: Path) -> Iterator[str]:
    """What is wrong with a file of SkyPilot."""
    import sky  # takes seconds

    try:
        task = sky.Task.from_yaml(str(path))
    except ValueError as error:
        yield str(error)
        return
    for resources in task.resources:
        if not resources.job_recovery or not resources.job_recovery.get("recover_on_exit_codes"):
            yield "resources.job_recovery.recover_on_exit_codes: not understood"


def main() -> int:
    """Prints what is wrong; returns 1 if anything is."""
    faults = []
    for name in sys.argv[1:]:
        documents = list(yaml.safe_load_all(Path(name).read_text(encoding="utf-8")))
        if "apiVersion" in documents[0]:
            faults += [f"{name}: {fault}" for document in documents for fault in kubernetes_faults(document)]
        else:
            faults += [f"{name}: {fault}" for fault in skypilot_faults(Path(name))]
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
