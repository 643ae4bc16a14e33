output "values" {
  description = "Keys of `aws` in the values file of `piflow render`."
  value = {
    region            = var.region
    availability_zone = var.zones[0]
    subnet            = aws_subnet.machines.id
    security_group    = aws_security_group.machines.id
    head_profile      = aws_iam_instance_profile.machine["head"].arn
    worker_profile    = aws_iam_instance_profile.machine["worker"].arn
    placement_group   = aws_placement_group.gpu.name
  }
}

output "tracking_uri" {
  description = "The recipe's tracking.uri."
  value       = "http://mlflow.${var.name}.internal:5000"
}

output "registry" {
  description = "Where the image is pushed."
  value       = aws_ecr_repository.piflow.repository_url
}
