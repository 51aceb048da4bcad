"""Mistakes in the manifests that a cluster would report only after `kubectl apply`.

Names must match, pods must be restricted, and exit codes must have an effect.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.support.manifests import (
    COMPONENT,
    INSTANCE,
    MANIFESTS,
    Document,
    containers,
    jobs_of,
    render,
    render_another,
    workloads,
)

NEWEST = ".".join(kubernetes_validate.latest_version().split(".")[:2])
VERSIONS = ("1.31", NEWEST)  # docs/kubernetes.md promises the first


def kind(manifests: list[Document], *kinds: str) -> list[Document]:
    return [document for document in manifests if document["kind"] in kinds]


def named(manifests: list[Document], kind_and_name: str) -> Document:
    (document,) = (d for d in manifests if f"{d['kind']}/{d['metadata']['name']}" == kind_and_name)
    return document


def pods(manifests: list[Document]) -> list[Document]:
    return [workload["spec"]["template"]["spec"] for workload in workloads(manifests)]


def selected(manifests: list[Document], labels: dict[str, str]) -> list[str]:
    """Return the components of the workloads whose pods carry ``labels``."""
    return [
        w["metadata"]["labels"][COMPONENT]
        for w in workloads(manifests)
        if labels.items() <= w["spec"]["template"]["metadata"]["labels"].items()
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_of_the_oldest_and_newest_version_accepts_them(manifests: list[Document], version: str) -> None:
    for document in manifests:
        kubernetes_validate.validate(document, version, strict=True)


def test_every_name_is_there_once_and_names_no_namespace(manifests: list[Document]) -> None:
    names = Counter((document["kind"], document["metadata"]["name"]) for document in manifests)
    assert set(names.values()) == {1}
    assert not [document for document in manifests if "namespace" in document["metadata"]]
    assert not kind(manifests, "Secret")  # made by hand
    (settings,) = kind(manifests, "ConfigMap")
    assert settings["immutable"] is True
    assert settings["metadata"]["name"] == settings["data"]["run"]


def test_services_and_controllers_select_their_pods(manifests: list[Document]) -> None:
    for workload in kind(manifests, "Deployment", "StatefulSet"):
        assert selected(manifests, workload["spec"]["selector"]["matchLabels"]) == [workload["metadata"]["name"]]
    for service in kind(manifests, "Service"):
        assert selected(manifests, service["spec"]["selector"]) == [service["metadata"]["labels"][COMPONENT]]
        (pod,) = (
            w["spec"]["template"]["spec"]
            for w in workloads(manifests)
            if w["metadata"]["name"] == service["metadata"]["name"]
        )
        ports = {port["name"]: port["containerPort"] for container in pod["containers"] for port in container["ports"]}
        for port in service["spec"].get("ports", []):
            assert ports[port["targetPort"]] == port["port"]
    assert named(manifests, "StatefulSet/postgres")["spec"]["serviceName"] == "postgres"


def test_network_policies_let_through_what_is_needed_and_no_more(manifests: list[Document]) -> None:
    allowed: dict[str, set[tuple[str, str, str]]] = {"Ingress": set(), "Egress": set()}
    for policy in kind(manifests, "NetworkPolicy"):
        chosen = selected(manifests, policy["spec"]["podSelector"]["matchLabels"])
        assert chosen, f"{policy['metadata']['name']} selects no pod"
        for direction, rules, peers in (("Ingress", "ingress", "from"), ("Egress", "egress", "to")):
            assert (rules in policy["spec"]) <= (direction in policy["spec"]["policyTypes"])
            for rule in policy["spec"].get(rules, []):
                ports = " ".join(f"{port['protocol']}/{port['port']}" for port in rule.get("ports", [])) or "any"
                for peer in rule[peers]:
                    outside = (
                        peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
                    )
                    others = [outside] if outside else selected(manifests, peer["podSelector"]["matchLabels"])
                    assert others, f"{policy['metadata']['name']} names a peer that is not there"
                    allowed[direction] |= {(pod, other, ports) for pod in chosen for other in others}
    deny = named(manifests, "NetworkPolicy/ticketworks-default-deny")["spec"]
    assert set(deny) == {"podSelector", "policyTypes"} and deny["policyTypes"] == ["Ingress", "Egress"]
    everybody = [workload["metadata"]["labels"][COMPONENT] for workload in workloads(manifests)]
    assert selected(manifests, deny["podSelector"]["matchLabels"]) == everybody
    assert allowed["Ingress"] == {
        ("train", "train", "any"),
        ("mlflow", "train", "TCP/5000"),
        ("postgres", "mlflow", "TCP/5432"),
    }
    assert allowed["Egress"] == {(to, by, ports) for by, to, ports in allowed["Ingress"]} | {
        (pod, "kube-system", "UDP/53 TCP/53") for pod in everybody
    }


def test_every_volume_is_there_and_used(manifests: list[Document]) -> None:
    claims = {claim["metadata"]["name"] for claim in kind(manifests, "PersistentVolumeClaim")}
    claimed = set()
    for pod in pods(manifests):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert mounted == set(volumes)
        for volume in volumes.values():
            kinds = volume.keys() & {"emptyDir", "persistentVolumeClaim", "configMap"}
            assert len(kinds) == 1  # of what the restricted standard allows
            if "persistentVolumeClaim" in volume:
                claimed.add(volume["persistentVolumeClaim"]["claimName"])
            elif "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"]
    assert claimed == claims


def test_every_pod_meets_the_restricted_standard(manifests: list[Document]) -> None:
    for pod in pods(manifests):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"] == "ticketworks"
        assert pod["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()
            assert container.get("command", [""])[0] in ("python", "mlflow", "")  # no shell
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert named(manifests, "ServiceAccount/ticketworks")["automountServiceAccountToken"] is False


def test_passwords_are_references(manifests: list[Document]) -> None:
    found = [
        (variable["name"], variable.get("valueFrom"))
        for pod in pods(manifests)
        for container in containers(pod)
        for variable in container.get("env", [])
        if "PASSWORD" in variable["name"]
    ]
    reference = {"secretKeyRef": {"name": "mlflow-postgres", "key": "password"}}
    assert found == [("PGPASSWORD", reference), ("POSTGRES_PASSWORD", reference)]


@pytest.mark.parametrize(
    ("code", "action"),
    [
        *((code, "FailJob") for code in (64, 65, 73, 77, 78, 79)),
        (75, "Ignore"),
        *((code, "Count") for code in (69, 76)),
        *((code, None) for code in (1, 137)),  # no rule: counted
    ],
)
def test_exit_codes_of_training_end_or_restart_the_job(
    manifests: list[Document], code: int, action: str | None
) -> None:
    job = jobs_of(manifests)["train"]
    assert _first_action(job, code) == action
    for other in kind(manifests, "Job"):
        rules = other["spec"]["podFailurePolicy"]["rules"]
        assert {"type": "DisruptionTarget", "status": "True"} in [
            c for rule in rules for c in rule.get("onPodConditions", [])
        ]
        assert other["spec"]["podReplacementPolicy"] == "Failed"
        assert other["spec"]["template"]["spec"]["restartPolicy"] == "Never"
        for rule in rules:
            values = rule.get("onExitCodes", {}).get("values", [])
            assert values == sorted(set(values))  # the API server refuses another order


def _first_action(job: Document, code: int) -> str | None:
    for rule in job["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            assert rule["onExitCodes"].get("containerName", "train") in [
                c["name"] for c in containers(job["template"]["spec"])
            ]
            return str(rule["action"])
    return None


def test_the_pods_find_each_other(manifests: list[Document]) -> None:
    job = jobs_of(manifests)["train"]
    subdomain = job["template"]["spec"]["subdomain"]
    service = named(manifests, f"Service/{subdomain}")["spec"]  # pod K of the Job RUN is RUN-K.RUN
    assert named(manifests, f"Job/{subdomain}")["spec"] == job
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert job["completionMode"] == "Indexed"


def test_two_runs_share_a_namespace_data_and_mlflow(manifests: list[Document], overlay: str, tmp_path: Path) -> None:
    another = render_another(tmp_path, overlay, run="another-seed")
    together = [*manifests, *another]
    names = Counter((document["kind"], document["metadata"]["name"]) for document in together)
    assert set(names.values()) == {1}

    (first,) = (d for d in workloads(manifests) if d["metadata"]["labels"][COMPONENT] == "train")
    (second,) = workloads(another)
    for job, other in ((first, second), (second, first)):
        name = job["metadata"]["name"]
        labels = job["spec"]["template"]["metadata"]["labels"]
        assert labels[INSTANCE] == name
        selector = named(together, f"Service/{name}")["spec"]["selector"]
        assert selector.items() <= labels.items()
        assert not selector.items() <= other["spec"]["template"]["metadata"]["labels"].items()
    pods_of_both = [job["spec"]["template"]["spec"] for job in (first, second)]
    shared = [
        {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        for pod in pods_of_both
    ]
    assert shared[0] == shared[1]
    text = str(second).replace("another-seed", first["metadata"]["name"])
    assert text == str(first)  # nothing else has the name of a run


def test_what_a_deletion_removes(overlay: str) -> None:
    kinds = {
        stage: Counter(document["kind"] for document in render(MANIFESTS / "overlays" / overlay / stage))
        for stage in ("data", "run")
    }
    assert kinds == {"data": {"Job": 1}, "run": {"ConfigMap": 1, "Service": 1, "Job": 1}}  # no claim


def test_shared_memory_is_larger_than_a_containers_own(manifests: list[Document]) -> None:
    for job in kind(manifests, "Job"):
        pod = job["spec"]["template"]["spec"]
        (volume,) = (v for v in pod["volumes"] if v["name"] == "shared-memory")
        assert volume["emptyDir"]["medium"] == "Memory"
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_a_node_that_does_not_respond_is_given_up_in_half_a_minute(manifests: list[Document]) -> None:
    tolerations = jobs_of(manifests)["train"]["template"]["spec"]["tolerations"]
    seconds = {each["key"]: each.get("tolerationSeconds") for each in tolerations}
    assert seconds.pop("nvidia.com/gpu", None) is None
    assert seconds == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}


def test_the_scheduler_knows_the_disk_that_a_pod_fills(manifests: list[Document]) -> None:
    pod = jobs_of(manifests)["train"]["template"]["spec"]
    (train,) = pod["containers"]
    limits = {v["name"]: v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if "emptyDir" in v}
    assert all(limits[name].endswith("Gi") for name in ("data", "tmp"))
    requested = train["resources"]["requests"]["ephemeral-storage"]
    assert int(requested.removesuffix("Gi")) >= int(limits["data"].removesuffix("Gi"))


def test_only_a_volume_that_exists_becomes_images() -> None:
    claims = kind(render(MANIFESTS / "overlays/multi-node-gpu/shared"), "PersistentVolumeClaim")
    (images,) = (claim for claim in claims if claim["metadata"]["name"] == "images")
    assert images["spec"]["storageClassName"] == ""
    for example in sorted((MANIFESTS / "volumes").iterdir()):
        volumes = list(yaml.safe_load_all(example.read_text()))
        for volume in volumes:
            for version in VERSIONS:
                kubernetes_validate.validate(volume, version, strict=True)
            assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
            (claim,) = (c for c in claims if c["metadata"]["name"] == volume["spec"]["claimRef"]["name"])
            assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"]
            assert volume["spec"]["storageClassName"] == ""
        assert "images" in [volume["spec"]["claimRef"]["name"] for volume in volumes]


def test_the_node_cache_keeps_the_copy_outside_the_pod(tmp_path: Path) -> None:
    shutil.copytree(MANIFESTS, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "overlays/multi-node-gpu/run"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    kustomization["components"].append("../../../components/node-cache")
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    documents = render(folder)
    for document in documents:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    pod = jobs_of(documents)["train"]["template"]["spec"]
    (data,) = (volume for volume in pod["volumes"] if volume["name"] == "data")
    assert data == {"name": "data", "hostPath": {"path": "/var/lib/ticketworks/imagenet", "type": "Directory"}}


def test_autoscalers_leave_a_run_alone(manifests: list[Document]) -> None:
    annotations = jobs_of(manifests)["train"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
