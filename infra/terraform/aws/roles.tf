# A role a kind of machine. The head starts and ends machines and uses the bucket; workers use the
# bucket. Both may pull the image.

locals {
  account        = data.aws_caller_identity.current.account_id
  subnet         = aws_subnet.machines.id
  security_group = aws_security_group.machines.id

  role_policies = { head = ["head", "worker"], worker = ["worker"] }
}

data "aws_iam_policy_document" "assumed_by" {
  for_each = toset(["ec2", "ecs-tasks", "vpc-flow-logs", "monitoring.rds"])

  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["${each.value}.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "machine" {
  for_each           = local.role_policies
  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.assumed_by["ec2"].json
}

resource "aws_iam_instance_profile" "machine" {
  for_each = aws_iam_role.machine
  name     = each.value.name
  role     = each.value.name
}

resource "aws_iam_role_policy" "machine" {
  for_each = merge([
    for role, files in local.role_policies : { for file in files : "${role}-${file}" => [role, file] }
  ]...)
  name   = each.value[1]
  role   = aws_iam_role.machine[each.value[0]].id
  policy = local.policies[each.value[1]]
}

data "aws_iam_policy_document" "pull" {
  # checkov:skip=CKV_AWS_356:ecr:GetAuthorizationToken knows no resource; the images are named
  statement {
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }

  statement {
    actions = [
      "ecr:BatchCheckLayerAvailability",
      "ecr:BatchGetImage",
      "ecr:GetDownloadUrlForLayer",
    ]
    resources = [aws_ecr_repository.piflow.arn]
  }
}

resource "aws_iam_role_policy" "pull" {
  for_each = merge(
    { for key, role in aws_iam_role.machine : key => role.id },
    { mlflow = aws_iam_role.mlflow_start.id },
  )
  name   = "pull"
  role   = each.value
  policy = data.aws_iam_policy_document.pull.json
}

resource "aws_iam_role" "flow_log" {
  name               = "${var.name}-flow-log"
  assume_role_policy = data.aws_iam_policy_document.assumed_by["vpc-flow-logs"].json
}

data "aws_iam_policy_document" "write_log" {
  for_each = aws_cloudwatch_log_group.this

  statement {
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
    resources = ["${each.value.arn}:*"]
  }
}

resource "aws_iam_role_policy" "flow_log" {
  name   = "write-log"
  role   = aws_iam_role.flow_log.id
  policy = data.aws_iam_policy_document.write_log["network"].json
}

resource "aws_cloudwatch_log_group" "this" {
  # checkov:skip=CKV_AWS_158:CloudWatch encrypts with AWS's key; the logs hold addresses and requests
  for_each          = toset(["network", "mlflow"])
  name              = "/${var.name}/${each.value}"
  retention_in_days = 365
}
