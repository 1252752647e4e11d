#!/bin/sh
# The namespace and its search attributes; safe to run again. In the image temporalio/admin-tools.
set -eu
tries=0
until temporal operator cluster health >/dev/null 2>&1; do
  tries=$((tries + 1))
  if [ "$tries" -ge 60 ]; then
    echo "Temporal at ${TEMPORAL_ADDRESS:?} is not healthy after two minutes" >&2
    exit 1
  fi
  sleep 2
done
if ! temporal operator namespace describe --namespace "${TEMPORAL_NAMESPACE:?}" >/dev/null 2>&1; then
  temporal operator namespace create --namespace "$TEMPORAL_NAMESPACE" --retention "${RETENTION:-168h}"
fi
for name in HeliostatKind HeliostatState HeliostatProject HeliostatName; do
  temporal operator search-attribute create --namespace "$TEMPORAL_NAMESPACE" --name "$name" --type Keyword \
    || temporal operator search-attribute list --namespace "$TEMPORAL_NAMESPACE" | grep -q "$name"
done
