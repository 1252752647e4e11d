#!/bin/sh
# Makes or upgrades Temporal's two databases; safe to run again. In the image temporalio/admin-tools.
set -eu
export SQL_PASSWORD="${POSTGRES_PWD:?}"
tool() {
  database=$1
  shift
  temporal-sql-tool --plugin postgres12 --ep "${POSTGRES_SEEDS:?}" -p 5432 -u "${POSTGRES_USER:?}" --db "$database" "$@"
}
for database in temporal temporal_visibility; do
  case $database in
    temporal) versioned=/etc/temporal/schema/postgresql/v12/temporal/versioned ;;
    *) versioned=/etc/temporal/schema/postgresql/v12/visibility/versioned ;;
  esac
  # "create" and "setup-schema" fail on a database that is there already; "update-schema" tells whether all is well.
  tool "$database" create || echo "$database exists"
  tool "$database" setup-schema -v 0.0 || echo "$database has a schema"
  tool "$database" update-schema -d "$versioned"
done
