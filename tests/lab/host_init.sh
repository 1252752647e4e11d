#!/bin/bash
# First process of a host of the lab: makes its disk and mounts, waits for its network ("go" on stdin), then runs its
# user-data, and takes in orphans. SIGTERM is its power button, SIGKILL a power cut.
# Arguments: folder of the host in the lab, host name, bytes of disk and of /dev/shm, its memory cgroup,
# folders that must be there.
set -eu
folder=$1 name=$2 disk=$3 shm=$4 cgroup=$5
shift 5
mount -t tmpfs -o "size=$disk,mode=755" disk "$folder/disk"
mkdir "$folder/disk/upper" "$folder/disk/work" "$folder/disk/root"
mount -t overlay root -o "lowerdir=/,upperdir=$folder/disk/upper,workdir=$folder/disk/work" "$folder/disk/root"
cd "$folder/disk/root"
mount --rbind /dev dev
mount --rbind /sys sys
mount -t proc proc proc
mount -t tmpfs -o mode=1777 tmp tmp
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o "size=$shm,mode=1777" shm dev/shm
if [ -n "$cgroup" ]; then
    case $cgroup in
        /sys/fs/cgroup/memory/*) mount --bind "$cgroup" sys/fs/cgroup/memory ;;
        *) mount --bind "$cgroup" sys/fs/cgroup ;;
    esac
fi
for path in "$@"; do
    if [ ! -e "./$path/bin" ]; then # below /tmp, or on another disk
        mkdir -p "./$path"
        mount --bind "$path" "./$path"
    fi
done
hostname "$name"
mount --bind /etc/hosts etc/hosts
mount --bind /dev/null etc/resolv.conf
mkdir -p usr/local/sbin usr/local/bin var/lib/cloud
cp "$folder/user-data" var/lib/cloud/user-data
chmod 700 var/lib/cloud/user-data
printf '#!/bin/sh\nkill -TERM 1\n' >usr/local/sbin/shutdown
cp "$folder/docker" usr/local/bin/docker
chmod 755 usr/local/sbin/shutdown usr/local/bin/docker
pivot_root . .
umount -l .
cd /
set +e
trap 'exit 0' TERM
echo ready >&3
exec 3>&-
read -r _
exec </dev/null
/var/lib/cloud/user-data &
while :; do wait -n || sleep 0.5; done
