"""Dashboard, alerts and what serves them on one machine, by the tools that they are made for.

Each check is also shown a file with a mistake in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from piflow.runtime.metrics import RANK_0_METRICS, RUN_METRICS, WORKER_METRICS
from tests.monitoring import DASHBOARD, INFRA, is_of_gpus, queries

REPOSITORY = Path(__file__).parents[2]
ALERTS = INFRA / "prometheus" / "alerts.yaml"
COMPOSE = INFRA / "compose.yaml"
EXAMPLE = INFRA / "compose.env.example"
PAGE = REPOSITORY / "docs" / "monitoring.md"
BIN = Path(sys.executable).parent
SECRET = re.compile(r"PASSWORD|SECRET|KEY")

RAYS_LABELS = {"NodeAddress", "WorkerId", "SessionName"}
# Ray's own, and Prometheus': names, and their labels as far as they are used
FOREIGN = {
    "up": {"job", "instance"},
    "ray_node_mem_used": {"ip"},
    "ray_node_mem_total": {"ip"},
    "ray_node_cpu_utilization": {"ip"},
    "ray_node_gpus_utilization": {"ip", "GpuIndex"},
    "ray_node_network_receive_speed": {"ip"},
    "ray_node_network_send_speed": {"ip"},
}


def known_metrics() -> dict[str, set[str]]:
    """Names with their labels."""
    known = dict(FOREIGN)
    for group, labels in (
        (RUN_METRICS, {"run"}), (WORKER_METRICS, {"run", "rank"}), (RANK_0_METRICS, {"run", "rank"})
    ):  # fmt: skip
        for name, metric in group.items():
            known[f"ray_{name}"] = labels | RAYS_LABELS | set((metric.by or ())[:1])
    return known


KNOWN = known_metrics()


def promtool(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def problems(query: str) -> list[str]:
    """Metrics that nobody exports, and labels that these don't have.

    Raises:
        ValueError: it isn't a query.
    """
    found, names, grouped = [], set(), set()

    def visit(node: Any) -> None:
        node = getattr(node, "vector_selector", node)
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
            asked = {matcher.name for matcher in node.matchers.matchers}
            found.extend(
                f"{node.name} has no {label}" for label in asked - KNOWN.get(node.name, asked)
            )
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    found += [f"no metric {name}" for name in names - KNOWN.keys()]
    labels = set().union(*(KNOWN.get(name, ()) for name in names))
    return found + [f"no label {label}" for label in grouped - labels]


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


# ---------------------------------------------------------------------------------------- dashboard


@pytest.mark.parametrize(("title", "query"), queries())
def test_a_panels_query_is_one_and_asks_for_what_is_exported(title: str, query: str) -> None:
    assert problems(query) == []


def test_planted_mistakes_in_a_query_are_found() -> None:
    assert problems("rate(ray_piflow_images_totals[1m])") == ["no metric ray_piflow_images_totals"]
    assert problems('ray_piflow_loss{part="data"}') == ["ray_piflow_loss has no part"]
    assert problems("sum by (worker) (ray_piflow_loss)") == ["no label worker"]
    with pytest.raises(ValueError, match="parenthesis"):
        problems("sum by (run (ray_piflow_loss)")


def test_every_metric_is_on_the_dashboard() -> None:
    asked = " ".join(query for _, query in queries())
    shown = {name for name in KNOWN if re.search(rf"\b{name}\b", asked)}
    assert KNOWN.keys() - shown == {"up", "ray_piflow_checkpoint_step"}


def test_panels_have_numbers_of_their_own_and_dont_lie_on_one_another() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_queries_of_gpus_are_answered_by_promtools_engine(tmp_path: Path) -> None:
    """No GPU here: on made-up series, of whose quotients the answers are known."""
    labels = 'run="r", rank="0"'
    series = {
        f"ray_piflow_gpu_memory_peak_bytes{{{labels}}}": 20,
        f"ray_piflow_gpu_memory_reserved_bytes{{{labels}}}": 30,
        f"ray_piflow_gpu_memory_total_bytes{{{labels}}}": 40,
        'ray_node_gpus_utilization{ip="10.0.0.1", GpuIndex="0"}': 50,
    }
    answers = {"peak": 0.5, "reserved": 0.75, "utilization": 0.5}
    asked = [query for _, query in queries() if is_of_gpus(query)]
    assert len(asked) == len(answers)

    def test_file(more: float) -> Path:
        tests = []
        for query in asked:
            (value,) = (value for name, value in answers.items() if name in query)
            given = 'ip="10.0.0.1", GpuIndex="0"' if "utilization" in query else labels
            samples = [{"labels": f"{{{given}}}", "value": value + more}]
            tests.append({"expr": query, "eval_time": "1m", "exp_samples": samples})
        inputs = [{"series": name, "values": f"{value}x5"} for name, value in series.items()]
        tree = {"tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": tests}]}
        file = tmp_path / "gpus.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    done = promtool("test", "rules", test_file(0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert promtool("test", "rules", test_file(0.1)).returncode == 1, "a wrong answer is noticed"


# ------------------------------------------------------------------------------------------- alerts


def test_prometheus_configuration_and_rules_are_valid() -> None:
    for kind, file in (("config", "prometheus.yaml"), ("rules", "alerts.yaml")):
        done = promtool("check", kind, INFRA / "prometheus" / file)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "file", "right", "wrong"),
    [
        ("config", "prometheus.yaml", "scrape_interval", "scrape_intervall"),
        ("config", "prometheus.yaml", "alerts.yaml", "alarms.yaml"),
        ("rules", "alerts.yaml", "expr: ray_piflow_workers == 0", "expr: ray_piflow_workers = 0"),
        ("rules", "alerts.yaml", "$labels.run", "$label.run"),
    ],
)
def test_a_planted_mistake_is_found_by_promtool(
    tmp_path: Path, kind: str, file: str, right: str, wrong: str
) -> None:
    folder = shutil.copytree(INFRA / "prometheus", tmp_path / "prometheus")
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong, 1))
    assert promtool("check", kind, folder / file).returncode != 0


def test_alerts_fire_and_stay_silent() -> None:
    done = promtool("test", "rules", INFRA / "prometheus" / "alerts.test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("> 15 * 60", "> 30 * 60"),
        ("for: 10m", "for: 1m"),
        ("> 0.2", "> 0.02"),
        ("> 60 * 60", "> 10 * 60"),
        ("and ray_piflow_workers > 0", "and ray_piflow_workers >= 0"),
        ('kind="non-finite"', 'kind=~".+"'),
        ("unless on (run) ray_piflow_steps_planned", ""),
        ("> 0.8", "> 0.95"),
        ('up{job="ray"}', "up"),
    ],
)
def test_a_changed_alert_fails_its_tests(tmp_path: Path, right: str, wrong: str) -> None:
    folder = shutil.copytree(INFRA / "prometheus", tmp_path / "prometheus")
    text = (folder / "alerts.yaml").read_text()
    assert right in text
    (folder / "alerts.yaml").write_text(text.replace(right, wrong))
    done = promtool("test", "rules", folder / "alerts.test.yaml")
    assert done.returncode == 1 and "FAILED" in done.stderr


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_doesnt() -> None:
    tree = yaml.safe_load((INFRA / "prometheus" / "alerts.test.yaml").read_text())
    tested = [test for group in tree["tests"] for test in group["alert_rule_test"]]
    fires = {test["alertname"] for test in tested if test["exp_alerts"]}
    silent = {test["alertname"] for test in tested if not test["exp_alerts"]}
    assert fires == silent == {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_exported_and_is_on_the_page(rule: dict[str, Any]) -> None:
    assert problems(rule["expr"]) == []
    assert f"`{rule['alert']}`" in PAGE.read_text()
    assert rule["labels"]["severity"] in ("warning", "critical")


# -------------------------------------------------------------------------------------- one machine


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    return service.get("environment", {})


def check_schema(file: Path) -> subprocess.CompletedProcess[str]:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_compose_file_follows_its_schema() -> None:
    done = check_schema(COMPOSE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("healthcheck:", "health_check:"), ("restart: unless-stopped", "restart: [always]")],
)
def test_a_planted_mistake_is_found_by_the_schema(tmp_path: Path, right: str, wrong: str) -> None:
    planted = tmp_path / "compose.yaml"
    planted.write_text(COMPOSE.read_text().replace(right, wrong, 1))
    assert check_schema(planted).returncode == 1


@pytest.fixture
def read_compose(tmp_path: Path) -> Any:
    """podman-compose's reading of the file with given variables; there is no engine."""
    engine = tmp_path / "podman"
    engine.write_text("#!/bin/sh\necho 5.0.0\n")
    engine.chmod(0o755)

    def read(variables: Path) -> subprocess.CompletedProcess[str]:
        reader = [BIN / "podman-compose", "--podman-path", engine]
        files = ["--env-file", variables, "--file", COMPOSE]
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        return subprocess.run(
            [*reader, *files, "config"], capture_output=True, text=True, timeout=60, env=clean
        )

    return read


def secrets() -> list[str]:
    return re.findall(r"^([A-Z0-9_]+)=", EXAMPLE.read_text(), re.M)


def test_the_pages_command_makes_every_secret_and_they_are_used(
    read_compose: Any, tmp_path: Path
) -> None:
    (script,) = re.findall(r"^```bash\n(\(umask 077;.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "infra").mkdir()
    shutil.copy(EXAMPLE, tmp_path / "infra")
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True)
    variables = tmp_path / "compose.env"
    assert variables.stat().st_mode & 0o077 == 0
    made = dict(line.split("=") for line in variables.read_text().split())
    assert list(made) == secrets() and len(set(made.values())) == len(made)
    done = read_compose(variables)
    assert done.returncode == 0, done.stderr
    assert all(value in done.stdout for value in made.values())


@pytest.mark.parametrize("lacking", secrets())
def test_nothing_starts_without_a_secret(read_compose: Any, tmp_path: Path, lacking: str) -> None:
    variables = tmp_path / "env"
    lines = [f"{name}={'' if name == lacking else 'x' * 12}" for name in secrets()]
    variables.write_text("\n".join(lines) + "\n")
    done = read_compose(variables)
    assert done.returncode != 0
    assert f"{lacking} is missing a value: set it in compose.env" in done.stderr


def test_no_secret_stands_in_a_file() -> None:
    assert not re.findall(r"=.+", re.sub(r"^#.*", "", EXAMPLE.read_text(), flags=re.M))
    for service in compose()["services"].values():
        for name, value in environment_of(service).items():
            if SECRET.search(name):
                assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?set it in compose\.env\}", value), name
    ignored = subprocess.run(
        ["git", "check-ignore", "--quiet", "compose.env"], cwd=REPOSITORY, timeout=30
    )
    assert ignored.returncode == 0


def test_images_are_pinned_services_are_checked_and_only_this_machine_reaches_them() -> None:
    services = compose()["services"]
    for name, service in services.items():
        if "image" in service:
            assert re.fullmatch(r"docker\.io/[\w/-]+:v?\d+(\.\d+)+", service["image"]), name
        else:
            dockerfile = (INFRA / service["build"] / "Dockerfile").read_text()
            assert re.search(r"^FROM ghcr\.io/[\w/]+:v\d+\.\d+\.\d+$", dockerfile, re.M)
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    awaited = {other for service in services.values() for other in service.get("depends_on", ())}
    assert awaited == {"postgres", "seaweedfs", "prometheus"}


def test_what_is_mounted_is_there_and_volumes_have_names() -> None:
    tree = compose()
    named = set()
    for service in tree["services"].values():
        for mount in service.get("volumes", ()):
            if isinstance(mount, dict):  # Ray's folder, which Ray makes
                assert mount["read_only"] and not mount["bind"]["create_host_path"]
                continue
            source, _, options = mount.partition(":")
            if source.startswith("."):
                assert (INFRA / source).exists() and options.endswith(":ro"), mount
            else:
                named.add(source)
    assert named == set(tree["volumes"])


def test_services_find_one_another() -> None:
    """What configuration says of hosts, ports and folders is what compose makes of them."""
    services = compose()["services"]
    mounts = {
        mount.split(":")[0]: mount.split(":")[1]
        for service in services.values()
        for mount in service.get("volumes", ())
        if isinstance(mount, str)
    }
    grafana = INFRA / "grafana" / "provisioning"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    (provider,) = yaml.safe_load((grafana / "dashboards" / "piflow.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert DASHBOARD.parent == INFRA / "grafana" / "dashboards"
    (option,) = (o for o in services["prometheus"]["command"] if o.startswith("--config.file="))
    inside = Path(option.partition("=")[2])
    assert str(inside.parent) == mounts["./prometheus"]
    assert (INFRA / "prometheus" / inside.name).exists()
    prometheus = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
    (job,) = prometheus["scrape_configs"]
    (ray,) = (mount for mount in services["prometheus"]["volumes"] if isinstance(mount, dict))
    (listed,) = job["file_sd_configs"][0]["files"]
    assert str(Path(listed).parent) == ray["target"] and job["job_name"] == "ray"
    database = "postgresql+psycopg://mlflow@postgres:5432/mlflow"
    assert f"--backend-store-uri={database}" in services["mlflow"]["command"]
    assert f"database_uri = {database}" in (INFRA / "mlflow" / "basic_auth.ini").read_text()
    assert services["postgres"]["environment"]["POSTGRES_USER"] == "mlflow"


def test_mlflows_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "info", INFRA / "mlflow" / "Dockerfile"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
