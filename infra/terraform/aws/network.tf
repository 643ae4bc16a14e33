# One zone for machines (EFA and placement groups need it), a second one for the database alone.
# Machines have no addresses of the internet: packages and hubs are reached through one NAT gateway,
# S3 through a gateway of its own that costs nothing.

resource "aws_vpc" "this" {
  cidr_block           = var.network
  enable_dns_support   = true
  enable_dns_hostnames = true
  tags                 = { Name = var.name }
}

resource "aws_default_security_group" "closed" {
  vpc_id = aws_vpc.this.id
}

resource "aws_subnet" "public" {
  vpc_id            = aws_vpc.this.id
  availability_zone = var.zones[0]
  cidr_block        = cidrsubnet(var.network, 8, 0)
  tags              = { Name = "${var.name}-public" }
}

resource "aws_subnet" "machines" {
  vpc_id            = aws_vpc.this.id
  availability_zone = var.zones[0]
  cidr_block        = cidrsubnet(var.network, 4, 1) # 4,091 addresses; a p5.48xlarge takes 32
  tags              = { Name = "${var.name}-machines" }
}

resource "aws_subnet" "database" {
  count             = 2
  vpc_id            = aws_vpc.this.id
  availability_zone = var.zones[count.index]
  cidr_block        = cidrsubnet(var.network, 8, 2 + count.index)
  tags              = { Name = "${var.name}-database-${count.index}" }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id
}

resource "aws_eip" "nat" {
  domain = "vpc"
}

resource "aws_nat_gateway" "this" {
  allocation_id = aws_eip.nat.id
  subnet_id     = aws_subnet.public.id
  depends_on    = [aws_internet_gateway.this]
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.this.id

  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.this.id
  }
}

resource "aws_route_table_association" "public" {
  subnet_id      = aws_subnet.public.id
  route_table_id = aws_route_table.public.id
}

resource "aws_route_table" "machines" {
  vpc_id = aws_vpc.this.id

  route {
    cidr_block     = "0.0.0.0/0"
    nat_gateway_id = aws_nat_gateway.this.id
  }
}

resource "aws_route_table_association" "machines" {
  subnet_id      = aws_subnet.machines.id
  route_table_id = aws_route_table.machines.id
}

resource "aws_vpc_endpoint" "s3" {
  vpc_id          = aws_vpc.this.id
  service_name    = "com.amazonaws.${var.region}.s3"
  route_table_ids = [aws_route_table.machines.id]
}

resource "aws_flow_log" "this" {
  vpc_id          = aws_vpc.this.id
  traffic_type    = "REJECT"
  iam_role_arn    = aws_iam_role.flow_log.arn
  log_destination = aws_cloudwatch_log_group.this["network"].arn
}

# EFA needs a group that is open within itself in both directions, and nothing less.
resource "aws_security_group" "machines" {
  # checkov:skip=CKV2_AWS_5:`ray up` gives it to the machines that it starts
  name        = "${var.name}-machines"
  description = "Ray's head and workers"
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-machines" }
}

resource "aws_vpc_security_group_ingress_rule" "one_another" {
  security_group_id            = aws_security_group.machines.id
  referenced_security_group_id = aws_security_group.machines.id
  ip_protocol                  = "-1"
  description                  = "Machines of the cluster, one another"
}

resource "aws_vpc_security_group_egress_rule" "one_another" {
  security_group_id            = aws_security_group.machines.id
  referenced_security_group_id = aws_security_group.machines.id
  ip_protocol                  = "-1"
  description                  = "Machines of the cluster, one another (EFA)"
}

resource "aws_vpc_security_group_ingress_rule" "ssh" {
  for_each          = toset(var.ssh_from)
  security_group_id = aws_security_group.machines.id
  cidr_ipv4         = each.value
  ip_protocol       = "tcp"
  from_port         = 22
  to_port           = 22
  description       = "ray up"
}

resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.machines.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  description       = "AWS, registries and hubs"
}

resource "aws_vpc_security_group_egress_rule" "mlflow" {
  security_group_id            = aws_security_group.machines.id
  referenced_security_group_id = aws_security_group.mlflow.id
  ip_protocol                  = "tcp"
  from_port                    = 5000
  to_port                      = 5000
  description                  = "MLflow"
}

resource "aws_placement_group" "gpu" {
  name     = var.name
  strategy = "cluster"
}
