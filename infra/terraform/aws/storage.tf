# models/ and prompts/ are read, stores/ and runs/ written by workers, mlflow/ by MLflow alone.

resource "aws_s3_bucket" "this" {
  # checkov:skip=CKV_AWS_144:checkpoints can be made again; a copy in another region costs as much again
  # checkov:skip=CKV2_AWS_62:nothing waits for objects
  # checkov:skip=CKV_AWS_145:SSE-S3 needs no KMS rights and calls of thousands of readers; say kms if you must
  # checkov:skip=CKV_AWS_18:access logs are CloudTrail's data events, which an organisation turns on for all
  bucket = var.bucket
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_versioning" "this" {
  bucket = aws_s3_bucket.this.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

# A run deletes checkpoints that it no longer needs: without this their versions would stay for good.
resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket     = aws_s3_bucket.this.id
  depends_on = [aws_s3_bucket_versioning.this]

  rule {
    id     = "old-versions"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.keep_old_versions_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }

  rule {
    id     = "unfinished-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
}

data "aws_iam_policy_document" "encrypted_ways_only" {
  statement {
    sid       = "EncryptedWaysOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  bucket     = aws_s3_bucket.this.id
  policy     = data.aws_iam_policy_document.encrypted_ways_only.json
  depends_on = [aws_s3_bucket_public_access_block.this]
}

resource "aws_ecr_repository" "piflow" {
  # checkov:skip=CKV_AWS_136:images hold no secret; AES256 is AWS's own key
  name                 = var.name
  image_tag_mutability = "IMMUTABLE"

  image_scanning_configuration {
    scan_on_push = true
  }
}

resource "aws_ecr_lifecycle_policy" "piflow" {
  repository = aws_ecr_repository.piflow.name
  policy = jsonencode({
    rules = [{
      rulePriority = 1
      description  = "Images without a tag that no recipe can name any more"
      selection = {
        tagStatus   = "untagged"
        countType   = "sinceImagePushed"
        countUnit   = "days"
        countNumber = 30
      }
      action = { type = "expire" }
    }]
  })
}
