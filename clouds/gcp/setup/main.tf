# What Heliostat needs of the Google Cloud project @PROJECT@ for the cloud "@NAME@" in @REGION@. Read it, then, in a
# folder of its own:
#
#   terraform init && terraform apply
#   terraform output -raw cloud_yaml > cloud.yaml
#   heliostat cloud register -f cloud.yaml && heliostat cloud verify @NAME@
#
# It holds no secret and makes no key: Google trusts tokens that this Heliostat signs, of one organization alone. What
# Heliostat may do is in local.permissions. IAM can't tie those to labels, so they hold for the whole project: a project
# of its own is the better boundary. What machines may do: objects of one bucket, and pulling images. Nothing lets
# anybody in: no SSH, no rule but between machines and from load balancers.
#
# It costs, apart from machines: Cloud NAT by the machine, hour and GiB (external_ip = true has none), and the bucket.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 5.27"
    }
  }
}

variable "project" {
  type    = string
  default = "@PROJECT@"
}

variable "region" {
  type    = string
  default = "@REGION@"
}

variable "zones" {
  description = "Tried in this order; empty: all of the region."
  type        = list(string)
  default     = []
}

variable "name" {
  description = "In the names of all that is made."
  type        = string
  default     = "@SLUG@"
  validation {
    condition     = can(regex("^[a-z][-a-z0-9]{0,12}[a-z0-9]$", var.name))
    error_message = "2 to 14 small letters, digits and dashes."
  }
}

variable "issuer" {
  description = "Heliostat's public URL. Google reads its keys there, over https."
  type        = string
  default     = "@ISSUER@"
}

variable "jwks_json" {
  description = "The issuer's keys (GET <issuer>/.well-known/jwks.json), where Google can't reach it. Upload them anew when the key changes."
  type        = string
  default     = null
}

variable "subject" {
  description = "Of the tokens that are trusted: this organization of this Heliostat."
  type        = string
  default     = "@SUBJECT@"
}

variable "external_ip" {
  description = "Machines get public addresses, which no firewall rule lets anybody call, and there is no Cloud NAT."
  type        = bool
  default     = false
}

variable "services" {
  description = "Whether services (endpoints on load balancers) will run here. false leaves those rights out."
  type        = bool
  default     = true
}

variable "certificates" {
  description = "Regional SSL certificates (projects/.../regions/.../sslCertificates/...): endpoints are https. gRPC wants one."
  type        = list(string)
  default     = []
}

variable "machines_cidr" {
  type    = string
  default = "10.64.0.0/18"
}

variable "proxies_cidr" {
  description = "Of Google's proxies, which load balancers are made of."
  type        = string
  default     = "10.64.64.0/23"
}

provider "google" {
  project = var.project
  region  = var.region
}

locals {
  full_name = "heliostat-${var.name}"
  role      = "heliostat_${replace(var.name, "-", "_")}"
  zones     = length(var.zones) > 0 ? var.zones : data.google_compute_zones.region.names

  # Launching, describing and deleting machines, and their disks.
  machines = [
@MACHINES@
  ]
  # Services' load balancers.
  balancers = [
@BALANCERS@
  ]
  # What `heliostat cloud verify` looks at.
  looks = [
@LOOKS@
  ]
  permissions = concat(
    local.machines,
    local.looks,
    var.services ? local.balancers : [],
    var.external_ip ? ["compute.subnetworks.useExternalIp"] : [],
  )
}

data "google_compute_zones" "region" {
  region     = var.region
  depends_on = [google_project_service.apis]
}

resource "google_project_service" "apis" {
  for_each = toset([
    "cloudresourcemanager.googleapis.com", # verify asks which permissions there are
    "compute.googleapis.com",
    "iam.googleapis.com",
    "iamcredentials.googleapis.com", # acting as the service account, signing URLs
    "storage.googleapis.com",
    "sts.googleapis.com", # taking our token
  ])
  service            = each.key
  disable_on_destroy = false
}

# ---- trust

resource "google_iam_workload_identity_pool" "heliostat" {
  workload_identity_pool_id = local.full_name
  display_name              = "Heliostat"
  depends_on                = [google_project_service.apis]
}

resource "google_iam_workload_identity_pool_provider" "control_plane" {
  workload_identity_pool_id          = google_iam_workload_identity_pool.heliostat.workload_identity_pool_id
  workload_identity_pool_provider_id = "control-plane"
  attribute_mapping                  = { "google.subject" = "assertion.sub" }
  # Another organization of the same Heliostat signs with the same key: it must not pass.
  attribute_condition = "assertion.sub == \"${var.subject}\""
  oidc {
    issuer_uri = var.issuer
    jwks_json  = var.jwks_json
    # No allowed_audiences: the provider's own name, which is what we ask for.
  }
}

# ---- Heliostat's control plane

resource "google_service_account" "control_plane" {
  account_id   = local.full_name
  display_name = "Heliostat's control plane, for cloud @NAME@"
  depends_on   = [google_project_service.apis]
}

resource "google_service_account_iam_member" "acts_as_it" {
  service_account_id = google_service_account.control_plane.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "principal://iam.googleapis.com/${google_iam_workload_identity_pool.heliostat.name}/subject/${var.subject}"
}

resource "google_project_iam_custom_role" "control_plane" {
  role_id     = local.role
  title       = "Heliostat, cloud @NAME@"
  permissions = local.permissions
}

resource "google_project_iam_member" "control_plane" {
  project = var.project
  role    = google_project_iam_custom_role.control_plane.name
  member  = google_service_account.control_plane.member
}

# Presigned URLs are signed by Google, for the account itself.
resource "google_project_iam_custom_role" "signer" {
  role_id     = "${local.role}_signer"
  title       = "Heliostat, cloud @NAME@: signing URLs"
  permissions = ["@SIGN@"]
}

resource "google_service_account_iam_member" "signs_for_itself" {
  service_account_id = google_service_account.control_plane.name
  role               = google_project_iam_custom_role.signer.name
  member             = google_service_account.control_plane.member
}

# ---- machines

resource "google_service_account" "machines" {
  account_id   = "${local.full_name}-node"
  display_name = "Heliostat's machines, of cloud @NAME@"
  depends_on   = [google_project_service.apis]
}

resource "google_project_iam_custom_role" "gives_machines_their_account" {
  role_id     = "${local.role}_act_as"
  title       = "Heliostat, cloud @NAME@: launching machines with their account"
  permissions = ["@ACT_AS@"]
}

resource "google_service_account_iam_member" "gives_machines_their_account" {
  service_account_id = google_service_account.machines.name
  role               = google_project_iam_custom_role.gives_machines_their_account.name
  member             = google_service_account.control_plane.member
}

resource "google_project_iam_member" "machines_pull_images" {
  project = var.project
  role    = "roles/artifactregistry.reader"
  member  = google_service_account.machines.member
}

# ---- code and logs

resource "google_storage_bucket" "heliostat" {
  name                        = "${replace(var.project, "/[^a-z0-9-]/", "-")}-${local.full_name}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  # Logs are written over as they grow: each older text would be kept, and paid for, for a week.
  soft_delete_policy {
    retention_duration_seconds = 0
  }
  lifecycle_rule {
    condition {
      age = 2
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }
  depends_on = [google_project_service.apis]
}

resource "google_project_iam_custom_role" "objects" {
  role_id     = "${local.role}_objects"
  title       = "Heliostat, cloud @NAME@: objects"
  permissions = [@OBJECTS@]
}

resource "google_storage_bucket_iam_member" "control_plane" {
  bucket = google_storage_bucket.heliostat.name
  role   = google_project_iam_custom_role.objects.name
  member = google_service_account.control_plane.member
}

resource "google_project_iam_custom_role" "machines_objects" {
  role_id     = "${local.role}_node_objects"
  title       = "Heliostat, cloud @NAME@: machines' objects"
  permissions = [@NODE_OBJECTS@]
}

resource "google_storage_bucket_iam_member" "machines" {
  bucket = google_storage_bucket.heliostat.name
  role   = google_project_iam_custom_role.machines_objects.name
  member = google_service_account.machines.member
}

# ---- network

resource "google_compute_network" "heliostat" {
  name                    = local.full_name
  auto_create_subnetworks = false
  depends_on              = [google_project_service.apis]
}

resource "google_compute_subnetwork" "machines" {
  name                     = "${local.full_name}-machines"
  region                   = var.region
  network                  = google_compute_network.heliostat.id
  ip_cidr_range            = var.machines_cidr
  private_ip_google_access = true # the bucket is reached without Cloud NAT
}

resource "google_compute_router" "heliostat" {
  count   = var.external_ip ? 0 : 1
  name    = local.full_name
  region  = var.region
  network = google_compute_network.heliostat.id
}

resource "google_compute_router_nat" "heliostat" {
  count                              = var.external_ip ? 0 : 1
  name                               = local.full_name
  region                             = var.region
  router                             = google_compute_router.heliostat[0].name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"
}

resource "google_compute_firewall" "among_themselves" {
  name          = "${local.full_name}-machines"
  network       = google_compute_network.heliostat.id
  direction     = "INGRESS"
  source_ranges = [var.machines_cidr]
  target_tags   = [local.full_name]
  allow {
    protocol = "all"
  }
}

resource "google_compute_subnetwork" "proxies" {
  count         = var.services ? 1 : 0
  name          = "${local.full_name}-proxies"
  region        = var.region
  network       = google_compute_network.heliostat.id
  ip_cidr_range = var.proxies_cidr
  purpose       = "REGIONAL_MANAGED_PROXY"
  role          = "ACTIVE"
}

# Google's health checks, and the proxies of load balancers, to Ray Serve on heads.
resource "google_compute_firewall" "serve" {
  count         = var.services ? 1 : 0
  name          = "${local.full_name}-serve"
  network       = google_compute_network.heliostat.id
  direction     = "INGRESS"
  source_ranges = [@PROBES@, var.proxies_cidr]
  target_tags   = [local.full_name]
  allow {
    protocol = "tcp"
    ports    = [@SERVE_PORTS@]
  }
}

output "cloud_yaml" {
  description = "For `heliostat cloud register -f`"
  value = yamlencode({
    name     = "@NAME@"
    provider = "gcp"
    config = {
      project                    = var.project
      region                     = var.region
      zones                      = local.zones
      workload_identity_provider = google_iam_workload_identity_pool_provider.control_plane.name
      service_account            = google_service_account.control_plane.email
      node_service_account       = google_service_account.machines.email
      network                    = google_compute_network.heliostat.name
      subnetwork                 = google_compute_subnetwork.machines.name
      network_tags               = [local.full_name]
      external_ip                = var.external_ip
      bucket                     = google_storage_bucket.heliostat.name
      balancer_certificates      = var.certificates
    }
  })
}
