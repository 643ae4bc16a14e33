# What `piflow render --target gcp` needs: a network without addresses of the internet, a bucket, a
# registry, and an account each for the head and for workers.

terraform {
  required_version = ">= 1.6"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 7.0"
    }
  }

  backend "gcs" {}
}

provider "google" {
  project = var.project
  region  = var.region
}

variable "project" {
  description = "Project id."
  type        = string
}

variable "region" {
  description = "Such as us-central1."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket for models, prompts, stores and runs."
  type        = string
}

variable "name" {
  description = "What names begin with."
  type        = string
  default     = "piflow"
}

variable "ssh_from" {
  description = "Addresses that `ray up` comes from; 35.235.240.0/20 is Google's own tunnel."
  type        = list(string)
  default     = ["35.235.240.0/20"]
}

resource "google_compute_network" "this" {
  name                    = var.name
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "machines" {
  name                     = var.name
  network                  = google_compute_network.this.id
  region                   = var.region
  ip_cidr_range            = "10.0.16.0/20"
  private_ip_google_access = true # storage and registry without addresses of the internet

  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "EXCLUDE_ALL_METADATA"
  }
}

resource "google_compute_router" "this" {
  name    = var.name
  network = google_compute_network.this.id
  region  = var.region
}

resource "google_compute_router_nat" "this" {
  name                               = var.name
  router                             = google_compute_router.this.name
  region                             = var.region
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"
}

resource "google_compute_firewall" "one_another" {
  name                    = "${var.name}-one-another"
  network                 = google_compute_network.this.id
  source_service_accounts = [for account in google_service_account.machine : account.email]
  target_service_accounts = [for account in google_service_account.machine : account.email]

  allow {
    protocol = "all"
  }
}

resource "google_compute_firewall" "ssh" {
  name                    = "${var.name}-ssh"
  network                 = google_compute_network.this.id
  source_ranges           = var.ssh_from
  target_service_accounts = [for account in google_service_account.machine : account.email]

  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}

resource "google_storage_bucket" "this" {
  # checkov:skip=CKV_GCP_62:access logs are Cloud Audit's data access logs, turned on for a whole project
  name                        = var.bucket
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }

  lifecycle_rule {
    condition {
      days_since_noncurrent_time = 30
    }

    action {
      type = "Delete"
    }
  }

  lifecycle_rule {
    condition {
      age = 7
    }

    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }
}

resource "google_artifact_registry_repository" "piflow" {
  # checkov:skip=CKV_GCP_84:images hold no secret; Google's own key encrypts them
  repository_id = var.name
  location      = var.region
  format        = "DOCKER"

  docker_config {
    immutable_tags = true
  }
}

resource "google_service_account" "machine" {
  for_each     = toset(["head", "worker"])
  account_id   = "${var.name}-${each.value}"
  display_name = "piflow's ${each.value}"
}

# Workers read the whole bucket and write below runs/ and stores/.
resource "google_storage_bucket_iam_member" "read" {
  for_each = google_service_account.machine
  bucket   = google_storage_bucket.this.name
  role     = "roles/storage.objectViewer"
  member   = each.value.member
}

resource "google_storage_bucket_iam_member" "write" {
  for_each = google_service_account.machine
  bucket   = google_storage_bucket.this.name
  role     = "roles/storage.objectUser"
  member   = each.value.member

  condition {
    title = "runs and stores"
    expression = join(" || ", [for folder in ["runs", "stores"] :
      "resource.name.startsWith('projects/_/buckets/${var.bucket}/objects/${folder}/')"
    ])
  }
}

resource "google_artifact_registry_repository_iam_member" "pull" {
  for_each   = google_service_account.machine
  repository = google_artifact_registry_repository.piflow.name
  location   = var.region
  role       = "roles/artifactregistry.reader"
  member     = each.value.member
}

# The head starts and ends machines, and gives workers their account.
resource "google_project_iam_custom_role" "head" {
  role_id = "${replace(var.name, "-", "_")}_head"
  title   = "Starts and ends piflow's machines"
  permissions = [
    "compute.disks.create",
    "compute.disks.setLabels",
    "compute.images.useReadOnly",
    "compute.instances.create",
    "compute.instances.delete",
    "compute.instances.get",
    "compute.instances.list",
    "compute.instances.setLabels",
    "compute.instances.setMetadata",
    "compute.instances.setServiceAccount",
    "compute.machineTypes.get",
    "compute.projects.get",
    "compute.subnetworks.use",
    "compute.zoneOperations.get",
    "resourcemanager.projects.get",
  ]
}

resource "google_project_iam_member" "head" {
  project = var.project
  role    = google_project_iam_custom_role.head.name
  member  = google_service_account.machine["head"].member
}

resource "google_service_account_iam_member" "head" {
  service_account_id = google_service_account.machine["worker"].name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.machine["head"].member
}

output "values" {
  description = "Keys of `gcp` in the values file of `piflow render`."
  value = {
    project              = var.project
    region               = var.region
    subnet               = "projects/${var.project}/regions/${var.region}/subnetworks/${google_compute_subnetwork.machines.name}"
    service_account      = google_service_account.machine["worker"].email
    head_service_account = google_service_account.machine["head"].email
  }
}
