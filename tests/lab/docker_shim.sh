#!/bin/bash
# Stands for docker on a host of the lab, which has no images: `docker run … IMAGE COMMAND` runs the command on the host
# itself, with the environment that was asked for. The one faked part of a host.
case ${1:-} in
version | info | pull | login | image | inspect | rm | stop | kill) exit 0 ;;
run) shift ;;
*)
    echo "docker: the lab's shim does not know: $*" >&2
    exit 125
    ;;
esac
variables=() folder="" entrypoint=()
while [ $# -gt 0 ]; do
    case $1 in
    -e | --env) variables+=("$2") && shift 2 ;;
    --env=*) variables+=("${1#*=}") && shift ;;
    -w | --workdir) folder=$2 && shift 2 ;;
    --workdir=*) folder=${1#*=} && shift ;;
    --entrypoint) entrypoint=("$2") && shift 2 ;;
    --rm | -d | -i | -t | -it | --detach | --init | --privileged | --*=*) shift ;;
    -v | -u | --*) shift 2 ;; # --volume X, --network X, --name X, …
    *) break ;;
    esac
done
shift # the image
for at in "${!variables[@]}"; do
    name=${variables[at]%%=*}
    [[ ${variables[at]} == *=* ]] || variables[at]="$name=${!name:-}"
done
[ -z "$folder" ] || cd "$folder" || exit 125
exec env "${variables[@]}" "${entrypoint[@]}" "$@"
