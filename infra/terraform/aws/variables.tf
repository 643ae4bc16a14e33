variable "region" {
  description = "Such as us-east-1."
  type        = string
}

variable "zones" {
  description = "Two availability zones; machines are in the first, the database may move to the second."
  type        = list(string)

  validation {
    condition     = length(var.zones) == 2 && var.zones[0] != var.zones[1]
    error_message = "Expected two different zones; GPU machines are in the first."
  }
}

variable "bucket" {
  description = "Name of the bucket for models, prompts, stores, runs and MLflow's artifacts."
  type        = string
}

variable "name" {
  description = "What names begin with."
  type        = string
  default     = "piflow"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,20}$", var.name))
    error_message = "Expected 2 to 21 small letters, digits and -, a letter first."
  }
}

variable "network" {
  description = "Addresses of the network, a /16 of private ones."
  type        = string
  default     = "10.0.0.0/16"

  validation {
    condition     = can(cidrsubnet(var.network, 4, 0)) && endswith(var.network, "/16")
    error_message = "Expected a /16, such as 10.0.0.0/16."
  }
}

variable "ssh_from" {
  description = "Addresses that `ray up` and `ray submit` come from: a VPN or an office, never 0.0.0.0/0."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for range in var.ssh_from : can(cidrhost(range, 0)) && !endswith(range, "/0")])
    error_message = "Expected ranges of addresses such as 203.0.113.0/28, not all addresses."
  }
}

variable "mlflow_image" {
  description = "MLflow with psycopg and boto3, by digest: registry/name@sha256:..."
  type        = string

  validation {
    condition     = can(regex("@sha256:[0-9a-f]{64}$", var.mlflow_image))
    error_message = "Expected an image with its digest: registry/name@sha256:<64 hex digits>."
  }
}

variable "database_class" {
  description = "Of MLflow's database."
  type        = string
  default     = "db.t4g.small"
}

variable "keep_old_versions_days" {
  description = "For which a replaced or deleted object of the bucket can be brought back."
  type        = number
  default     = 30
}
