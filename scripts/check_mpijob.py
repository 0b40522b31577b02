"""Checks the MPIJob of examples/kubernetes by the schema that the Kubeflow MPI operator publishes.

    python scripts/check_mpijob.py deploy/v2beta1/mpi-operator.yaml

The argument is a file of https://github.com/kubeflow/mpi-operator. The script needs PyYAML and jsonschema. It
refuses fields that the schema does not name, as a cluster with strict validation does.
"""

import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

MANIFEST = Path(__file__).parents[1] / "examples" / "kubernetes" / "mpijob.yaml"


def published_schema(text: str, api_version: str) -> dict[str, Any]:
    """The schema of an MPIJob of this version, in the documents of the operator."""
    group, _, version = api_version.partition("/")
    for document in yaml.safe_load_all(text):
        if document and document["kind"] == "CustomResourceDefinition" and document["spec"]["group"] == group:
            for one in document["spec"]["versions"]:
                if one["name"] == version:
                    schema: dict[str, Any] = one["schema"]["openAPIV3Schema"]
                    return schema
    raise ValueError(f"no schema for {api_version}")


def strict(schema: Any) -> Any:
    """The same schema, which refuses fields that it does not name."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(one) for name, one in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        made["additionalProperties"] = False
    return made


def problems(manifest: dict[str, Any], text: str) -> list[str]:
    """The errors in a manifest, one line each."""
    schema = strict(published_schema(text, manifest["apiVersion"]))
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes has another schema for it
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def main() -> None:
    text, manifest = Path(sys.argv[1]).read_text(), yaml.safe_load(MANIFEST.read_text())
    # The check must find mistakes, or it is no check.
    container = manifest["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    for wrong in ({"imagee": "x"}, {"resources": {"limits": {"memory": [1]}}}, {"command": "sshd"}):
        kept = dict(container)
        container.update(wrong)
        assert problems(manifest, text), wrong
        container.clear()
        container.update(kept)
    for problem in (found := problems(manifest, text)):
        print(f"{MANIFEST.name}: {problem}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
