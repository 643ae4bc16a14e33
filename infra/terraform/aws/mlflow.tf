# MLflow as one container on Fargate, with its own PostgreSQL and the bucket's mlflow/ for artifacts.
# Machines reach it as http://mlflow.<name>.internal:5000 and nothing else does; put a load balancer
# with your certificate before it for people outside of the network.

resource "aws_db_subnet_group" "mlflow" {
  name       = "${var.name}-mlflow"
  subnet_ids = aws_subnet.database[*].id
}

resource "aws_security_group" "database" {
  name        = "${var.name}-database"
  description = "MLflow's PostgreSQL"
  vpc_id      = aws_vpc.this.id
}

resource "aws_vpc_security_group_ingress_rule" "database" {
  security_group_id            = aws_security_group.database.id
  referenced_security_group_id = aws_security_group.mlflow.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
  description                  = "MLflow"
}

resource "aws_db_parameter_group" "mlflow" {
  name   = "${var.name}-mlflow"
  family = "postgres17"

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }

  parameter {
    name  = "log_statement"
    value = "ddl"
  }

  parameter {
    name  = "log_min_duration_statement"
    value = "5000"
  }
}

resource "aws_db_instance" "mlflow" {
  # checkov:skip=CKV_AWS_157:runs keep their metrics until MLflow is back; a standby doubles the price
  # checkov:skip=CKV_AWS_354:Performance Insights are kept under AWS's key
  identifier     = "${var.name}-mlflow"
  engine         = "postgres"
  engine_version = "17"
  instance_class = var.database_class
  db_name        = "mlflow"
  username       = "mlflow"

  manage_master_user_password         = true # in Secrets Manager, never in Terraform's state
  iam_database_authentication_enabled = true

  allocated_storage     = 20
  max_allocated_storage = 200
  storage_encrypted     = true

  db_subnet_group_name   = aws_db_subnet_group.mlflow.name
  vpc_security_group_ids = [aws_security_group.database.id]
  parameter_group_name   = aws_db_parameter_group.mlflow.name
  publicly_accessible    = false

  backup_retention_period         = 14
  copy_tags_to_snapshot           = true
  deletion_protection             = true
  skip_final_snapshot             = false
  final_snapshot_identifier       = "${var.name}-mlflow-last"
  auto_minor_version_upgrade      = true
  enabled_cloudwatch_logs_exports = ["postgresql", "upgrade"]
  performance_insights_enabled    = true
  monitoring_interval             = 60
  monitoring_role_arn             = aws_iam_role.database_monitoring.arn
}

resource "aws_iam_role" "database_monitoring" {
  name               = "${var.name}-database-monitoring"
  assume_role_policy = data.aws_iam_policy_document.assumed_by["monitoring.rds"].json
}

resource "aws_iam_role_policy_attachment" "database_monitoring" {
  role       = aws_iam_role.database_monitoring.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/service-role/AmazonRDSEnhancedMonitoringRole"
}

# Filled in by hand, so that it is in no file: a JSON object with admin_password and session_key.
resource "aws_secretsmanager_secret" "mlflow" {
  # checkov:skip=CKV_AWS_149:Secrets Manager's own key; rights to the secret are what protects it
  # checkov:skip=CKV2_AWS_57:users know the password; whoever changes it tells them
  name        = "${var.name}-mlflow"
  description = "MLflow's first user and the key of its sessions"
}

resource "aws_security_group" "mlflow" {
  name        = "${var.name}-mlflow"
  description = "MLflow's server"
  vpc_id      = aws_vpc.this.id
}

resource "aws_vpc_security_group_ingress_rule" "mlflow" {
  security_group_id            = aws_security_group.mlflow.id
  referenced_security_group_id = aws_security_group.machines.id
  ip_protocol                  = "tcp"
  from_port                    = 5000
  to_port                      = 5000
  description                  = "Machines of the cluster"
}

resource "aws_vpc_security_group_egress_rule" "mlflow" {
  for_each          = { https = 443, database = 5432 }
  security_group_id = aws_security_group.mlflow.id
  cidr_ipv4         = each.key == "database" ? var.network : "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
  description       = each.key
}

resource "aws_service_discovery_private_dns_namespace" "this" {
  name = "${var.name}.internal"
  vpc  = aws_vpc.this.id
}

resource "aws_service_discovery_service" "mlflow" {
  name = "mlflow"

  dns_config {
    namespace_id = aws_service_discovery_private_dns_namespace.this.id

    dns_records {
      type = "A"
      ttl  = 10
    }
  }
}

# What starts the container reads the secrets; what runs in it uses the bucket's mlflow/ alone.
resource "aws_iam_role" "mlflow_start" {
  name               = "${var.name}-mlflow-start"
  assume_role_policy = data.aws_iam_policy_document.assumed_by["ecs-tasks"].json
}

resource "aws_iam_role" "mlflow" {
  name               = "${var.name}-mlflow"
  assume_role_policy = data.aws_iam_policy_document.assumed_by["ecs-tasks"].json
}

data "aws_iam_policy_document" "mlflow_start" {
  source_policy_documents = [data.aws_iam_policy_document.write_log["mlflow"].json]

  statement {
    actions = ["secretsmanager:GetSecretValue"]
    resources = [
      aws_secretsmanager_secret.mlflow.arn,
      aws_db_instance.mlflow.master_user_secret[0].secret_arn,
    ]
  }
}

resource "aws_iam_role_policy" "mlflow_start" {
  name   = "start"
  role   = aws_iam_role.mlflow_start.id
  policy = data.aws_iam_policy_document.mlflow_start.json
}

data "aws_iam_policy_document" "mlflow" {
  statement {
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["mlflow/*"]
    }
  }

  statement {
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${aws_s3_bucket.this.arn}/mlflow/*"]
  }
}

resource "aws_iam_role_policy" "mlflow" {
  name   = "artifacts"
  role   = aws_iam_role.mlflow.id
  policy = data.aws_iam_policy_document.mlflow.json
}

resource "aws_ecs_cluster" "this" {
  name = var.name

  setting {
    name  = "containerInsights"
    value = "enabled"
  }
}

locals {
  mlflow_database = "postgresql://mlflow@${aws_db_instance.mlflow.endpoint}/mlflow?sslmode=require"

  # The password comes to libpq as PGPASSWORD, so that no command line shows it. Users are kept in the
  # same database, in tables of their own.
  mlflow_command = <<-EOT
    set -eu
    printf '[mlflow]\ndefault_permission = READ\ndatabase_uri = %s\nauthorization_function = %s\n' \
      '${local.mlflow_database}' mlflow.server.auth:authenticate_request_basic_auth > /tmp/auth.ini
    export MLFLOW_AUTH_CONFIG_PATH=/tmp/auth.ini
    exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 \
      --allowed-hosts 'mlflow.${var.name}.internal:5000' \
      --backend-store-uri '${local.mlflow_database}' \
      --artifacts-destination 's3://${var.bucket}/mlflow'
  EOT
}

resource "aws_ecs_task_definition" "mlflow" {
  family                   = "${var.name}-mlflow"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = 1024
  memory                   = 4096
  execution_role_arn       = aws_iam_role.mlflow_start.arn
  task_role_arn            = aws_iam_role.mlflow.arn

  volume {
    name = "tmp"
  }

  container_definitions = jsonencode([{
    name                   = "mlflow"
    image                  = var.mlflow_image
    essential              = true
    user                   = "1000:1000"
    readonlyRootFilesystem = true
    command                = ["sh", "-c", local.mlflow_command]
    portMappings           = [{ containerPort = 5000, protocol = "tcp" }]
    mountPoints            = [{ sourceVolume = "tmp", containerPath = "/tmp", readOnly = false }]
    environment = [
      { name = "HOME", value = "/tmp" },
      { name = "MLFLOW_AUTH_ADMIN_USERNAME", value = "admin" },
    ]
    secrets = [
      { name = "PGPASSWORD", valueFrom = "${aws_db_instance.mlflow.master_user_secret[0].secret_arn}:password::" },
      { name = "MLFLOW_AUTH_ADMIN_PASSWORD", valueFrom = "${aws_secretsmanager_secret.mlflow.arn}:admin_password::" },
      { name = "MLFLOW_FLASK_SERVER_SECRET_KEY", valueFrom = "${aws_secretsmanager_secret.mlflow.arn}:session_key::" },
    ]
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        awslogs-group         = aws_cloudwatch_log_group.this["mlflow"].name
        awslogs-region        = var.region
        awslogs-stream-prefix = "mlflow"
      }
    }
  }])
}

resource "aws_ecs_service" "mlflow" {
  name            = "mlflow"
  cluster         = aws_ecs_cluster.this.id
  task_definition = aws_ecs_task_definition.mlflow.arn
  desired_count   = 1
  launch_type     = "FARGATE"

  network_configuration {
    subnets          = [aws_subnet.machines.id]
    security_groups  = [aws_security_group.mlflow.id]
    assign_public_ip = false
  }

  service_registries {
    registry_arn = aws_service_discovery_service.mlflow.arn
  }
}
