# The rights of machines are written once, in infra/aws/, where tests enforce them; here the names are
# put in.

locals {
  policy_names = {
    "BUCKET"         = var.bucket
    "REGION"         = var.region
    "ACCOUNT"        = local.account
    "SUBNET"         = local.subnet
    "SECURITY_GROUP" = local.security_group
  }

  policy_files = {
    for role in ["head", "worker"] : role => file("${path.module}/../../aws/${role}-policy.json")
  }

  policies = {
    for role, text in local.policy_files : role => replace(replace(replace(replace(replace(replace(
      text,
      "role/piflow-worker", "role/${var.name}-worker"),
      "/\\bSECURITY_GROUP\\b/", local.policy_names["SECURITY_GROUP"]),
      "/\\bSUBNET\\b/", local.policy_names["SUBNET"]),
      "/\\bACCOUNT\\b/", local.policy_names["ACCOUNT"]),
      "/\\bREGION\\b/", local.policy_names["REGION"]),
    "/\\bBUCKET\\b/", local.policy_names["BUCKET"])
  }
}
